import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipelines.compute.devices import ComputeConfig
from pipelines.config import load_config
from pipelines.run import Run
from pipelines.stages import encode
from pipelines.stages.encode import COMPILED_PIXELS, EncodeConfig, compiles
from pipelines.storage.shards import index_shard, read_member


@pytest.mark.parametrize(
    ("asked", "gpu", "pixels", "answer"),
    [
        ("auto", True, COMPILED_PIXELS, True),
        ("auto", True, COMPILED_PIXELS - 1, False),
        ("auto", False, COMPILED_PIXELS, False),
        (True, False, 1, True),
        (False, True, COMPILED_PIXELS, False),
    ],
)
def test_the_encoder_is_compiled_where_that_pays(
    asked: bool | str, gpu: bool, pixels: int, answer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "on_gpu", lambda compute: gpu)
    assert compiles(EncodeConfig(compile=asked), ComputeConfig(), pixels) is answer


def encoded(tiny_run: Path, folder: Path, write_config: Callable[..., Path], **changes: object) -> dict[str, bytes]:
    run = tiny_run.parent / "run"
    config = {"images": {"from": str(run / "images")}, "tokenizer": {"from": str(run / "tokenizer")}, "encode": changes}
    Run(load_config(write_config(folder, config))).stage("encode")
    return {path.name: path.read_bytes() for path in (folder / "run" / "codes").iterdir()}


def test_a_compiled_encoder_sees_one_size_of_batch_and_is_named_by_the_receipts(
    tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: set[int] = set()

    def recording(function: Callable, dynamic: bool) -> Callable:
        return lambda images: (sizes.add(len(images)), function(images))[1]

    monkeypatch.setattr(torch, "compile", recording)
    plain = encoded(tiny_run, tmp_path / "plain", write_config)
    assert not sizes
    compiled = encoded(tiny_run, tmp_path / "compiled", write_config, compile=True)
    assert sizes == {64}
    assert all(plain[name] == compiled[name] for name in plain if name.endswith(".tar"))
    assert plain["train-000000.json"] != compiled["train-000000.json"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
@pytest.mark.skipif(not os.environ.get("SMALTI_COMPILE"), reason="takes a minute; set SMALTI_COMPILE=1")
def test_a_compiled_encoder_finds_the_same_codes(
    tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    plain = encoded(tiny_run, tmp_path / "plain", write_config)
    compiled = encoded(tiny_run, tmp_path / "compiled", write_config, compile=True)
    assert all(plain[name] == compiled[name] for name in plain if name.endswith(".tar"))


def test_each_view_carries_what_lies_beside_its_image(
    tiny_run: Path, picture_folder: Path, tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    for path in (picture_folder / "cat").glob("*.png"):
        path.with_suffix(".txt").write_bytes(f"picture {path.stem}\r\n".encode())
    tokenizer = {"from": str(tiny_run.parent / "run" / "tokenizer")}
    source = {"source": f"folder:{picture_folder}"}
    changes = {"images": source, "tokenizer": tokenizer, "encode": {"views": ["image", "flip"]}}
    run = Run(load_config(write_config(tmp_path, changes)))
    run.stage("pack")
    run.stage("encode")
    for name, views in (("train-000000.tar", ["-0", "-1"]), ("val-000000.tar", [""])):
        images, codes = (index_shard(tmp_path / "run" / folder / name) for folder in ("images", "codes"))
        assert [sample.key for sample in codes] == [f"{sample.key}{view}" for sample in images for view in views]
        with (tmp_path / "run" / "codes" / name).open("rb") as file:
            for sample in codes:
                folder, _, stem = sample.key.removesuffix("-0").removesuffix("-1").partition("/")
                caption = f"picture {stem}\r\n" if folder == "cat" else ""
                assert read_member(file, sample.members["txt"]).decode() == caption
                assert set(sample.members) == {"level0.npy", "level1.npy", "cls", "txt"}


def test_an_impossible_setting_is_refused() -> None:
    with pytest.raises(ValueError, match=r"encode\.views must name one or more of image, flip"):
        EncodeConfig(views=["upside-down"])
