"""What training reads: samples of image shards by index, codes from memory-mapped arrays, and their loaders.

B batch, C channels, H W pixels, h w code grid, T = h*w.
"""

import io
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pipelines.errors import StageError
from pipelines.fingerprint import digest
from pipelines.order import TrainingBatches, ValidationBatches, drawn_sample
from pipelines.pictures import FORMATS, BadImageError, pixels_of
from pipelines.shards import (
    SampleIndex,
    code_dtype,
    index_shard,
    read_manifest,
    read_member,
    shard_names,
)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What training does to images at random.

    Attributes:
        flip: mirror every other image, left to right.
        shift: move the image by up to this many pixels each way, its edge repeated ("random crop").
    """

    flip: bool = True
    shift: int = 0

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise ValueError(f"augment.shift must not be negative, got {self.shift}")


class ImageShards:
    """One split of packed images, read by index; each shard is indexed when it is first touched.

    Args:
        folder: an `images` folder.
        split: "train" or "val".
    """

    def __init__(self, folder: Path, split: str) -> None:
        manifest = read_manifest(folder, "images", "pack")
        self.folder = folder
        self.size: int = manifest["image_size"]
        self.channels: int = manifest["channels"]
        self.class_names: list[str] = manifest["class_names"]
        self.shards = shard_names(manifest, split)
        self.ends = list(accumulate(samples for _, samples in self.shards))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def pixels(self, index: int) -> np.ndarray:
        """Return uint8 (C, H, W)."""
        number = bisect_right(self.ends, index)
        name = self.shards[number][0]
        before = self.ends[number - 1] if number else 0
        path = self.folder / name
        return sample_pixels(path, _shard_index(path)[index - before], self.size, self.channels)


def sample_pixels(path: Path, sample: SampleIndex, size: int, channels: int) -> np.ndarray:
    """Return the image of a sample as uint8 (C, H, W).

    Raises:
        StageError: there is none, or it cannot be decoded; names shard and key.
    """
    extension = next((extension for extension in sample.members if extension in FORMATS), None)
    try:
        if extension is None:
            raise BadImageError(f"has no image among {sorted(sample.members)}")
        with path.open("rb") as file:
            data = read_member(file, sample.members[extension])
        return pixels_of(data, size, channels)
    except BadImageError as error:
        raise StageError(f"sample {sample.key} of {path}: {error}; run `smalti pack` again") from error


@lru_cache(maxsize=256)
def _shard_index(path: Path) -> list[SampleIndex]:
    return index_shard(path)


def shift_pixels(pixels: np.ndarray, down: int, right: int) -> np.ndarray:
    """Move (C, H, W) pixels, repeating the edge."""
    _, height, width = pixels.shape
    rows = np.clip(np.arange(height) - down, 0, height - 1)
    columns = np.clip(np.arange(width) - right, 0, width - 1)
    return pixels[:, rows[:, None], columns[None]]


class TrainingImages:
    """Augmented images by draw: a function of (seed, draw)."""

    def __init__(self, shards: ImageShards, augment: AugmentConfig, seed: int) -> None:
        self.shards, self.augment, self.seed = shards, augment, seed

    def __getitem__(self, draw: int) -> Tensor:
        pixels = self.shards.pixels(drawn_sample(self.seed, draw, len(self.shards)))
        generator = np.random.default_rng((self.seed, 2, draw))
        flip = generator.random() < 0.5
        down, right = generator.integers(-self.augment.shift, self.augment.shift + 1, size=2)
        if self.augment.flip and flip:
            pixels = pixels[:, :, ::-1]
        if down or right:
            pixels = shift_pixels(pixels, int(down), int(right))
        return torch.from_numpy(np.array(pixels))


class ValidationImages:
    """(image, 1.0) by index; (zeros, 0.0) for the filling of the tail, index -1."""

    def __init__(self, shards: ImageShards) -> None:
        self.shards = shards

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        if index < 0:
            return torch.zeros(self.shards.channels, self.shards.size, self.shards.size, dtype=torch.uint8), 0.0
        return torch.from_numpy(np.array(self.shards.pixels(index))), 1.0


class Codes:
    """One split of a code data set, memory-mapped: unpacked from its shards once.

    Args:
        folder: a `codes` folder.
        split: "train" or "val".
        cache: folder for the unpacked arrays.
    """

    def __init__(self, folder: Path, split: str, cache: Path) -> None:
        manifest = read_manifest(folder, "codes", "encode")
        self.grids = [tuple(level["grid"]) for level in manifest["levels"]]
        self.codebook_sizes = [level["codebook_size"] for level in manifest["levels"]]
        self.class_names: list[str] = manifest["class_names"]
        paths = unpack_codes(folder, manifest, split, cache)
        self.levels = [np.load(path, mmap_mode="r") for path in paths[:-1]]  # (N, h, w) each
        self.labels = np.load(paths[-1], mmap_mode="r")  # (N,)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: list[int]) -> tuple[list[Tensor], Tensor]:
        """Return int64 codes (B, h, w) a level and classes (B,); zeros for the filling of the tail, index -1."""
        rows = np.maximum(indices, 0)
        codes = [torch.from_numpy(level[rows].astype(np.int64)) for level in self.levels]
        return codes, torch.from_numpy(self.labels[rows].astype(np.int64))


def unpack_codes(folder: Path, manifest: dict, split: str, cache: Path) -> list[Path]:
    """Write a split's codes and classes as plain arrays, unless they are there: their names hold the shards' hashes.

    Returns:
        The paths, one a level and the classes last.

    Raises:
        StageError: a shard is not what the manifest says.
    """
    cache.mkdir(parents=True, exist_ok=True)
    receipts = manifest["splits"].get(split, [])
    stamp = digest([receipt["sha256"] for receipt in receipts])[:16]
    num_levels = len(manifest["levels"])
    names = [f"level{level}" for level in range(num_levels)] + ["classes"]
    paths = [cache / f"{split}-{stamp}-{name}.npy" for name in names]
    if all(path.exists() for path in paths):
        return paths
    count = sum(receipt["samples"] for receipt in receipts)
    shapes = [(count, *level["grid"]) for level in manifest["levels"]] + [(count,)]
    dtypes = [code_dtype(level["codebook_size"]) for level in manifest["levels"]] + [np.dtype(np.int32)]
    # Levels train as jobs of their own that may unpack at the same time: each writes its own files, and renames them.
    written = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in paths]
    try:
        arrays = [
            np.lib.format.open_memmap(path, "w+", dtype, shape)
            for path, dtype, shape in zip(written, dtypes, shapes, strict=True)
        ]
        row = 0
        for name, samples in shard_names(manifest, split):
            found = _unpack_shard(folder / name, manifest["levels"], arrays, row)
            if found != samples:
                raise StageError(f"{folder / name} holds {found} samples, not {samples}; run `smalti encode` again")
            row += found
        for array in arrays:
            array.flush()
        for source, path in zip(written, paths, strict=True):
            source.replace(path)
    finally:
        for path in written:
            path.unlink(missing_ok=True)
    for stale in cache.glob(f"{split}-*.npy"):
        if stamp not in stale.name:
            stale.unlink(missing_ok=True)
    return paths


def _unpack_shard(path: Path, levels: list[dict], arrays: Sequence[np.ndarray], row: int) -> int:
    """Copy a code shard's grids and classes into the arrays from a row on; return how many samples it has."""
    samples = index_shard(path)
    if row + len(samples) > len(arrays[-1]):
        return len(samples)
    with path.open("rb") as file:
        for number, sample in enumerate(samples, row):
            for level, array in enumerate(arrays[:-1]):
                member = sample.members.get(f"level{level}.npy")
                if member is None:
                    raise StageError(f"sample {sample.key} of {path} lacks level{level}.npy; run `smalti encode` again")
                array[number] = _grid(read_member(file, member), levels[level], f"{sample.key} of {path}")
            if "cls" in sample.members:
                arrays[-1][number] = int(read_member(file, sample.members["cls"]))
    return len(samples)


def _grid(data: bytes, level: dict, name: str) -> np.ndarray:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise StageError(f"sample {name} holds no readable array ({error}); run `smalti encode` again") from error
    if list(array.shape) != list(level["grid"]) or array.dtype.kind != "u" or array.max() >= level["codebook_size"]:
        raise StageError(
            f"sample {name} must hold codes of {level['grid']} below {level['codebook_size']}, "
            f"has {array.dtype} {array.shape} up to {array.max()}; run `smalti encode` again"
        )
    return array


class TrainingCodes:
    """(codes, classes) of a batch of draws."""

    def __init__(self, codes: Codes, seed: int) -> None:
        self.codes, self.seed = codes, seed

    def __getitems__(self, draws: list[int]) -> Any:
        return self.codes.batch([drawn_sample(self.seed, draw, len(self.codes)) for draw in draws])


class ValidationCodes:
    """((codes, classes), mask) of a batch of indices, -1 filling the tail."""

    def __init__(self, codes: Codes) -> None:
        self.codes = codes

    def __getitems__(self, indices: list[int]) -> Any:
        return self.codes.batch(indices), torch.tensor([float(index >= 0) for index in indices])


def as_it_is(batch: Any) -> Any:
    """Collate nothing: the data set returns whole batches."""
    return batch


class StepData(pl.LightningDataModule):
    """Loaders for a training job that counts in steps.

    Args:
        train: data set by draw.
        val: data set by index, -1 for filling.
        num_val: samples in val.
        steps: optimizer steps of the whole job.
        batch_size: global.
        micro_batches: of one optimizer step.
        num_workers: processes that load.
        collate: how a list of samples becomes a batch; torch's default if None.
    """

    def __init__(
        self,
        train: Any,
        val: Any,
        num_val: int,
        steps: int,
        batch_size: int,
        micro_batches: int,
        num_workers: int,
        collate: Any = None,
    ) -> None:
        super().__init__()
        self.train, self.val, self.num_val = train, val, num_val
        self.steps, self.batch_size, self.micro_batches = steps, batch_size, micro_batches
        self.options = {"num_workers": num_workers, "collate_fn": collate, "pin_memory": torch.cuda.is_available()}

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        batches = TrainingBatches(
            self.trainer.global_step,
            self.steps,
            self.batch_size,
            self.micro_batches,
            self.trainer.global_rank,
            self.trainer.world_size,
        )
        return DataLoader(self.train, batch_sampler=batches, **self.options)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        batches = ValidationBatches(self.num_val, self.batch_size, self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(self.val, batch_sampler=batches, **self.options)  # type: ignore[arg-type]


def to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 (B, C, H, W) to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> np.ndarray:
    """Float (B, C, H, W) in [-1, 1] to uint8 of the same shape, on the CPU."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
