from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.compute.devices import ComputeConfig
from pipelines.data import images as data
from pipelines.data.images import (
    AugmentConfig,
    ImageShards,
    TrainingImages,
    ValidationImages,
    augmentations,
    checked_pixels,
    image_batch,
    sample_pixels,
    shift_pixels,
    to_uint8,
    to_unit_range,
)
from pipelines.errors import StageError
from pipelines.stages.pack import ImagesConfig, pack
from pipelines.storage.cache import Cache
from pipelines.storage.receipts import write_shard
from pipelines.storage.shards import index_shard


def test_images_are_found_by_index_across_shards(tiny_run: Path, cache: Cache) -> None:
    shards = ImageShards(tiny_run.parent / "run" / "images", "train", cache)
    assert len(shards.receipts) == 3
    position = 0
    for receipt in shards.receipts:
        path = shards.folder / receipt["shard"]
        first = sample_pixels(path, index_shard(path)[0], 16, 1)
        assert np.array_equal(shards.pixels(position), first)
        position += receipt["samples"]
    assert len(shards) == position


@pytest.mark.parametrize(("kept_bytes", "worker", "decoded"), [(2**29, None, 1), (0, None, 2), (2**29, "0", 2)])
def test_a_small_split_is_decoded_once_a_large_one_or_a_loaders_is_not_kept(
    tiny_run: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch, kept_bytes: int, worker: str | None, decoded: int
) -> None:
    monkeypatch.setattr(data, "KEPT_BYTES", kept_bytes)
    monkeypatch.setattr(data, "get_worker_info", lambda: worker)
    shards = ImageShards(tiny_run.parent / "run" / "images", "train", cache)
    calls: list[object] = []
    monkeypatch.setattr(data, "checked_pixels", lambda *given: calls.append(given) or checked_pixels(*given))
    first = shards.pixels(3)
    assert np.array_equal(shards.pixels(3), first)
    assert len(calls) == decoded


def test_random_changes_cover_their_range_evenly() -> None:
    changes = augmentations(0, 0, 2)
    assert 0.4 < changes[:, 0].mean() < 0.6
    for axis in (1, 2):
        counts = np.unique(changes[:, axis], return_counts=True)
        assert counts[0].tolist() == [-2, -1, 0, 1, 2] and min(counts[1]) > 150
    assert not np.array_equal(changes, augmentations(0, 1, 2))


def test_augmentation_is_a_function_of_the_draw(tiny_run: Path, cache: Cache) -> None:
    shards = ImageShards(tiny_run.parent / "run" / "images", "train", cache)
    one, two = (TrainingImages(shards, AugmentConfig(flip=True, shift=2), 0) for _ in range(2))
    assert all(np.array_equal(one[draw].pixels, two[draw].pixels) for draw in range(20))
    plain = TrainingImages(shards, AugmentConfig(flip=False, shift=0), 0)
    assert sum(np.array_equal(one[draw].pixels, plain[draw].pixels) for draw in range(20)) < 5
    other_epoch = [one[draw + len(shards)] for draw in range(20)]
    assert not all(np.array_equal(one[draw].pixels, other_epoch[draw].pixels) for draw in range(20))
    assert all(one[draw][1:] == plain[draw][1:] for draw in range(20))  # class, key and caption stay the image's


def test_shifting_repeats_the_edge() -> None:
    pixels = np.arange(9, dtype=np.uint8).reshape(1, 3, 3)
    assert shift_pixels(pixels, 1, 0)[0].tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5]]
    assert shift_pixels(pixels, 0, -1)[0].tolist() == [[1, 2, 2], [4, 5, 5], [7, 8, 8]]


def test_filling_is_masked_out(tiny_run: Path, cache: Cache) -> None:
    images = ValidationImages(ImageShards(tiny_run.parent / "run" / "images", "val", cache))
    batch = image_batch([images[0], images[-1]])
    assert batch.mask.tolist() == [1, 0] and not batch.pixels[1].any() and batch.keys[1] == batch.captions[1] == ""


def test_a_batch_carries_image_class_key_and_caption(tmp_path: Path, picture_folder: Path, cache: Cache) -> None:
    for path in picture_folder.rglob("*.png"):
        path.with_suffix(".txt").write_text(f"a {path.parent.name}, ä")
    config = ImagesConfig(source=f"folder:{picture_folder}", size=16, channels=1)
    (tmp_path / "images").mkdir()
    pack(config, 0, ComputeConfig(num_workers=0), tmp_path / "images")
    shards = ImageShards(tmp_path / "images", "train", cache)
    batch = image_batch([TrainingImages(shards, AugmentConfig(), 0)[draw] for draw in range(4)])
    assert batch.pixels.shape == (4, 1, 16, 16) and batch.mask.tolist() == [1] * 4 and len(set(batch.keys)) == 4
    named = [shards.class_names[label] for label in batch.classes]
    assert batch.captions == [f"a {name}, ä" for name in named] and set(named) == {"cat", "dog"}
    assert all(key.startswith(name) for key, name in zip(batch.keys, named, strict=True))


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
