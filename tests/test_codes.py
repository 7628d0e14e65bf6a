import io
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.compute.devices import ComputeConfig
from pipelines.config import Config
from pipelines.data.codes import Codes
from pipelines.errors import StageError
from pipelines.run import Run
from pipelines.storage.cache import Cache
from pipelines.storage.manifest import write_manifest
from pipelines.storage.receipts import write_shard
from pipelines.storage.shards import array_bytes

LEVELS = [{"grid": [2, 2], "codebook_size": 300}]


def code_folder(folder: Path, grids: list[np.ndarray], split: str = "train") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    samples = [
        (f"{n:03d}", {"level0.npy": array_bytes(grid), "cls": str(n % 3).encode()}) for n, grid in enumerate(grids)
    ]
    write_shard(folder / f"{split}-000000.tar", samples[:3], {})
    write_shard(folder / f"{split}-000001.tar", samples[3:], {})
    describe(folder, split)
    return folder


def describe(folder: Path, split: str = "train") -> None:
    """Write the manifest of what lies there now."""
    described = {
        "kind": "codes",
        "levels": LEVELS,
        "class_names": ["a", "b", "c"],
        "image_size": 8,
        "channels": 1,
        "tokenizer": "0" * 64,
        "made_from": "0" * 64,
    }
    write_manifest(folder, {split: [f"{split}-00000{n}.tar" for n in (0, 1)]}, described)


def grids(count: int = 5) -> list[np.ndarray]:
    return [np.full((2, 2), 50 * n, dtype=np.uint16) for n in range(count)]


def test_codes_are_unpacked_once_into_memory_mapped_arrays(tmp_path: Path, cache: Cache) -> None:
    folder = code_folder(tmp_path / "codes", grids())
    codes = Codes(folder, "train", tmp_path / "unpacked", cache)
    assert isinstance(codes.levels[0], np.memmap)
    assert codes.levels[0].dtype == np.uint16
    (level0,), classes = codes.batch([4, 0, -1])
    assert level0.dtype == torch.int64
    assert level0[:, 0, 0].tolist() == [200, 0, 0]
    assert classes.tolist() == [1, 0, 0]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "unpacked").iterdir()}
    Codes(folder, "train", tmp_path / "unpacked", cache)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "unpacked").iterdir()} == before


def test_other_codes_take_the_place_of_the_unpacked_ones(tmp_path: Path, cache: Cache) -> None:
    Codes(code_folder(tmp_path / "codes", grids()), "train", tmp_path / "unpacked", cache)
    changed = Codes(code_folder(tmp_path / "codes", grids()[::-1]), "train", tmp_path / "unpacked", cache)
    assert changed.levels[0][:, 0, 0].tolist() == [200, 150, 100, 50, 0]
    assert len(list((tmp_path / "unpacked").iterdir())) == 2


def test_unpacking_leaves_what_it_did_not_unpack(tmp_path: Path, cache: Cache) -> None:
    (tmp_path / "unpacked").mkdir()
    for name in ("train-notes.npy", "train-0123456789abcdef-level0.npy"):
        (tmp_path / "unpacked" / name).write_text("")
    Codes(code_folder(tmp_path / "codes", grids()), "train", tmp_path / "unpacked", cache)
    assert (tmp_path / "unpacked" / "train-notes.npy").exists()
    assert len(list((tmp_path / "unpacked").iterdir())) == 3


def test_remote_runs_that_share_a_cache_unpack_codes_apart(tmp_path: Path) -> None:
    cache = {"cache_dir": str(tmp_path / "cache")}
    own, other = (
        Run(Config(run_dir=f"s3://bucket/{name}", compute=ComputeConfig(**cache))).finished.unpacked
        for name in ("a", "b")
    )
    kept = []
    for unpacked, name, found in ((own, "a", grids()), (other, "b", grids()[::-1]), (own, "a", grids())):
        codes = Codes(code_folder(tmp_path / name, found), "train", unpacked, Cache(tmp_path / "cache", 2**30))
        assert codes.levels[0][:, 0, 0].tolist() == [grid[0, 0] for grid in found]
        kept.append({path: path.stat().st_mtime_ns for path in own.iterdir()})
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize(
    "bad",
    [np.full((2, 2), 300, np.uint16), np.zeros((2, 3), np.uint16), np.zeros((2, 2), np.float32), np.zeros((2, 2), "O")],
    ids=["out of range", "other grid", "floats", "objects"],
)
def test_codes_that_are_none_are_refused_by_name(bad: np.ndarray, tmp_path: Path, cache: Cache) -> None:
    folder = code_folder(tmp_path / "codes", grids())
    buffer = io.BytesIO()
    np.save(buffer, bad, allow_pickle=True)
    write_shard(folder / "train-000000.tar", [(f"x{n}", {"level0.npy": buffer.getvalue()}) for n in range(3)], {})
    describe(folder)
    with pytest.raises(StageError, match=r"sample x0 of .*train-000000\.tar"):
        Codes(folder, "train", tmp_path / "unpacked", cache)
    assert not list((tmp_path / "unpacked").iterdir())


def test_a_shard_with_fewer_samples_than_promised_is_named(tmp_path: Path, cache: Cache) -> None:
    folder = code_folder(tmp_path / "codes", grids())
    sample = {"level0.npy": array_bytes(grids()[0]), "cls": b"0"}
    write_shard(folder / "train-000001.tar", [("y", sample)], {"samples": 2})
    describe(folder)
    with pytest.raises(StageError, match=r"train-000001\.tar holds 1 samples but its manifest tells of 2"):
        Codes(folder, "train", tmp_path / "unpacked", cache)


@pytest.mark.parametrize("label", [b"3", b"-1", b"one", b"", b"9" * 40])
def test_a_class_that_does_not_exist_is_refused_by_name(label: bytes, tmp_path: Path, cache: Cache) -> None:
    folder = code_folder(tmp_path / "codes", grids())
    samples = [(f"x{n}", {"level0.npy": array_bytes(grids()[0]), "cls": label}) for n in range(3)]
    write_shard(folder / "train-000000.tar", samples, {})
    describe(folder)
    with pytest.raises(StageError, match=r"sample x0 of .*train-000000\.tar must have a class below 3"):
        Codes(folder, "train", tmp_path / "unpacked", cache)


@pytest.mark.parametrize("change", ["flip", "cut", "swap", "lose"])
def test_a_shard_that_is_not_what_was_listed_is_found_before_it_is_used(
    change: str, tmp_path: Path, cache: Cache
) -> None:
    folder = code_folder(tmp_path / "codes", grids())
    shard = folder / "train-000001.tar"
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    if change == "lose":
        shard.unlink()
    elif change == "swap":
        shard.write_bytes((folder / "train-000000.tar").read_bytes())
    else:
        shard.write_bytes(data if change == "flip" else data[:-1000])
    with pytest.raises(StageError, match=r"train-000001\.tar is (missing|not the file that its receipt tells of)"):
        Codes(folder, "train", tmp_path / "unpacked", cache)
    assert not list((tmp_path / "unpacked").iterdir())


@pytest.mark.parametrize(
    "bad",
    [
        array_bytes(np.zeros(4, np.uint16)),
        array_bytes(np.zeros((2, 2), np.int16)),
        array_bytes(np.asfortranarray(grids()[0])).replace(b"'fortran_order': False", b"'fortran_order': True "),
        array_bytes(grids()[0]) + b"\0",
        array_bytes(grids()[0])[:-1],
        array_bytes(grids()[0])[:100],
        array_bytes(grids()[0])[:-2] + b"\xff\xff",
    ],
    ids=["shape", "dtype", "order", "longer", "shorter", "no values", "out of range"],
)
def test_a_grid_among_good_ones_is_checked_like_the_first(bad: bytes, tmp_path: Path, cache: Cache) -> None:
    folder = code_folder(tmp_path / "codes", grids())
    samples = [(f"x{n}", {"level0.npy": array_bytes(grids()[0]), "cls": b"0"}) for n in range(3)]
    samples[2][1]["level0.npy"] = bad
    write_shard(folder / "train-000000.tar", samples, {})
    describe(folder)
    with pytest.raises(StageError, match=r"sample x2 of .*train-000000\.tar"):
        Codes(folder, "train", tmp_path / "unpacked", cache)
