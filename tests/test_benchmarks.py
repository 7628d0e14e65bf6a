"""What times a GPU or makes up codes, at sizes that a CPU does in a second; only the figures mean nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import export, gpu, temperatures
from pipelines.errors import StageError
from pipelines.tokens.dataset import TokenDataset
from prior import PixelSNAILConfig, TransformerConfig

TINY = gpu.Sizes(
    lookups=((70, 33, 5),),
    images=(16, 2, 8),
    prior=(TransformerConfig(width=16, depth=1, heads=2), 3, 2),
    sampled=(3, 17, (1, 2)),
    networks=(
        TransformerConfig(width=16, depth=1, heads=2),
        PixelSNAILConfig(width=8, blocks=1, residual_blocks=1, heads=2, attention_width=8),
    ),
    product=64,
    copy=2**12,
    ways=("plain float32", "… and bfloat16"),
    repeats=1,
)


def test_every_work_is_timed_beside_the_limits(capsys: pytest.CaptureFixture[str]) -> None:
    figures = gpu.measure(TINY)
    assert set(figures["limits"]) == {"bytes", "float32", "bfloat16"}
    assert list(figures["works"]) == [
        "lookup, K 33, D 5",
        *(f"stage {stage}, {way}" for stage in ("one", "two") for way in ("plain float32", "bfloat16")),
        *("encode, float32", "encode, bfloat16"),
        *(f"{name}, batch {batch}" for name in ("Transformer", "PixelSNAIL") for batch in (1, 2)),
    ]
    for work in figures["works"].values():
        assert all(work[name] > 0 for name in ("seconds", "bytes", "operations", "share_of_bandwidth", "share_of_peak"))
    shown = capsys.readouterr().out
    assert all(name in shown for name in figures["works"])


def test_bytes_are_counted_where_they_are_read_and_written() -> None:
    values = torch.zeros(10, 10)
    assert gpu.counted(lambda: values + values)[0] == 3 * 400
    assert gpu.counted(lambda: values.t()[:5])[0] == 0
    assert gpu.counted(lambda: values @ values) == (3 * 400, 2000)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.run() == 0
    assert "make gpu is skipped, for there is no GPU that torch can use: torch 2." in capsys.readouterr().out


def test_samples_of_several_temperatures_stand_in_one_table_if_they_were_made_alike() -> None:
    def figures(temperature: float, count: int = 50) -> dict:
        drawn = {"count": count, "settings": {"temperature": temperature}}
        made = {"splits": {"samples": drawn}, "features": {"features": "pixels"}}
        own = {"images": count, "real_images": 90, "kid": temperature / 100, "kid_error": 0.001, "precision": 0.5}
        return {"samples": own | {"made": made, "frechet": {"fid": 7.0, "made": made}}}

    found = temperatures.table({"a": figures(0.8), "b": figures(1.0)}).splitlines()
    assert found[0] == "| 50 samples beside 90 real images, in pixels | temperature 0.8 | temperature 1.0 |"
    assert found[2:] == [
        "| KID x 1000 | 8.000 ± 1.000 | 10.000 ± 1.000 |",
        "| FID | 7 | 7 |",
        "| precision | 0.5 | 0.5 |",
    ]
    with pytest.raises(StageError, match=r"samples of a and of b were not made alike .*count: 50 -> 60"):
        temperatures.table({"a": figures(0.8), "b": figures(1.0, 60)})


def test_made_up_codes_are_what_stages_read(tmp_path: Path) -> None:
    sizes = {"grids": [(2, 2), (4, 4)], "codebook_size": 300, "shards": 2, "records": 3}
    export.made_up(tmp_path / "codes", **sizes)  # type: ignore[arg-type]
    for step in ("receipts", "verify", "memory map"):
        export.take_step(step, tmp_path)
    assert export.write_flat(tmp_path / "codes", tmp_path) == 2 * 3 * 20
    flat = np.concatenate([np.fromfile(path, np.uint16).reshape(3, 20) for path in sorted(tmp_path.glob("*.bin"))])
    levels = [np.load(next((tmp_path / "unpacked").glob(f"*level{n}.npy"))).reshape(6, -1) for n in (0, 1)]
    assert np.array_equal(flat, np.concatenate(levels, axis=1))
    export.take_step("export, resumed", tmp_path)
    assert len(TokenDataset(tmp_path / "tokens", "train")) == 6
