from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.data import (
    AugmentConfig,
    Codes,
    ImageShards,
    TrainingImages,
    ValidationImages,
    sample_pixels,
    shift_pixels,
    to_uint8,
    to_unit_range,
)
from pipelines.errors import StageError
from pipelines.shards import array_bytes, index_shard, write_manifest, write_shard

LEVELS = [{"grid": [2, 2], "codebook_size": 300}]


def code_folder(folder: Path, grids: list[np.ndarray], split: str = "train") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    samples = [
        (f"{n:03d}", {"level0.npy": array_bytes(grid), "cls": str(n % 3).encode()}) for n, grid in enumerate(grids)
    ]
    write_shard(folder / f"{split}-000000.tar", samples[:3], {})
    write_shard(folder / f"{split}-000001.tar", samples[3:], {})
    described = {"kind": "codes", "levels": LEVELS, "class_names": ["a", "b", "c"]}
    write_manifest(folder, {split: [f"{split}-00000{n}.tar" for n in (0, 1)]}, described)
    return folder


def grids(count: int = 5) -> list[np.ndarray]:
    return [np.full((2, 2), 50 * n, dtype=np.uint16) for n in range(count)]


def test_codes_are_unpacked_once_into_memory_mapped_arrays(tmp_path: Path) -> None:
    folder = code_folder(tmp_path / "codes", grids())
    codes = Codes(folder, "train", tmp_path / "cache")
    assert isinstance(codes.levels[0], np.memmap)
    assert codes.levels[0].dtype == np.uint16
    (level0,), classes = codes.batch([4, 0, -1])
    assert level0.dtype == torch.int64
    assert level0[:, 0, 0].tolist() == [200, 0, 0]
    assert classes.tolist() == [1, 0, 0]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    Codes(folder, "train", tmp_path / "cache")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == before


def test_other_codes_take_the_place_of_the_unpacked_ones(tmp_path: Path) -> None:
    Codes(code_folder(tmp_path / "codes", grids()), "train", tmp_path / "cache")
    changed = Codes(code_folder(tmp_path / "codes", grids()[::-1]), "train", tmp_path / "cache")
    assert changed.levels[0][:, 0, 0].tolist() == [200, 150, 100, 50, 0]
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(
    "bad",
    [np.full((2, 2), 300, np.uint16), np.zeros((2, 3), np.uint16), np.zeros((2, 2), np.float32), np.zeros((2, 2), "O")],
    ids=["out of range", "other grid", "floats", "objects"],
)
def test_codes_that_are_none_are_refused_by_name(bad: np.ndarray, tmp_path: Path) -> None:
    folder = code_folder(tmp_path / "codes", grids())
    import io

    buffer = io.BytesIO()
    np.save(buffer, bad, allow_pickle=True)
    write_shard(folder / "train-000000.tar", [(f"x{n}", {"level0.npy": buffer.getvalue()}) for n in range(3)], {})
    with pytest.raises(StageError, match=r"sample x0 of .*train-000000\.tar"):
        Codes(folder, "train", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_shard_with_fewer_samples_than_promised_is_named(tmp_path: Path) -> None:
    folder = code_folder(tmp_path / "codes", grids())
    write_shard(folder / "train-000001.tar", [("y", {"level0.npy": array_bytes(grids()[0])})], {})
    with pytest.raises(StageError, match=r"train-000001\.tar holds 1 samples, not 2"):
        Codes(folder, "train", tmp_path / "cache")


def test_images_are_found_by_index_across_shards(tiny_run: Path) -> None:
    shards = ImageShards(tiny_run.parent / "run" / "images", "train")
    assert len(shards.shards) == 3
    position = 0
    for name, samples in shards.shards:
        path = shards.folder / name
        first = sample_pixels(path, index_shard(path)[0], 16, 1)
        assert np.array_equal(shards.pixels(position), first)
        position += samples
    assert len(shards) == position


def test_augmentation_is_a_function_of_the_draw(tiny_run: Path) -> None:
    shards = ImageShards(tiny_run.parent / "run" / "images", "train")
    one, two = (TrainingImages(shards, AugmentConfig(flip=True, shift=2), 0) for _ in range(2))
    assert all(torch.equal(one[draw], two[draw]) for draw in range(20))
    plain = TrainingImages(shards, AugmentConfig(flip=False, shift=0), 0)
    assert sum(torch.equal(one[draw], plain[draw]) for draw in range(20)) < 5
    other_epoch = [one[draw + len(shards)] for draw in range(20)]
    assert not all(torch.equal(one[draw], other_epoch[draw]) for draw in range(20))


def test_shifting_repeats_the_edge() -> None:
    pixels = np.arange(9, dtype=np.uint8).reshape(1, 3, 3)
    assert shift_pixels(pixels, 1, 0)[0].tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5]]
    assert shift_pixels(pixels, 0, -1)[0].tolist() == [[1, 2, 2], [4, 5, 5], [7, 8, 8]]


def test_filling_is_masked_out(tiny_run: Path) -> None:
    images = ValidationImages(ImageShards(tiny_run.parent / "run" / "images", "val"))
    assert images[-1][1] == 0
    assert images[0][1] == 1


def test_every_byte_survives_the_way_to_floats_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(torch.from_numpy(to_uint8(to_unit_range(pixels))), pixels)


def test_a_damaged_image_in_a_shard_is_named(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    write_shard(tmp_path / "a.tar", [("k", {"png": b"no image"}), ("m", {"cls": b"1"})], {})
    samples = index_shard(tmp_path / "a.tar")
    with pytest.raises(StageError, match=r"sample k of .*a\.tar: not an image"):
        sample_pixels(tmp_path / "a.tar", samples[0], 16, 1)
    with pytest.raises(StageError, match=r"sample m of .*has no image among \['cls'\]"):
        sample_pixels(tmp_path / "a.tar", samples[1], 16, 1)
