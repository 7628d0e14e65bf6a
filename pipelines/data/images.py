"""What training reads of images: samples of image shards by index.

B batch, C channels, H W pixels.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from pipelines.data.batches import drawn_sample
from pipelines.data.pictures import FORMATS, BadImageError, pixels_of
from pipelines.errors import StageError
from pipelines.storage.cache import Cache
from pipelines.storage.manifest import Kind, read_manifest, receipts_of
from pipelines.storage.shards import SampleIndex, check_count, index_shard, read_class, read_member

# A split whose pixels take no more is decoded once by a process that trains and loads: decoding CIFAR takes a tenth of
# the time of its training steps. Loaders of their own decode while others train, and would each keep it all.
KEPT_BYTES = 2**29
# Draws whose random changes are drawn at once: a generator for each would take as long as decoding a small image.
AUGMENTED_DRAWS = 1024


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What training does to images at random.

    Attributes:
        flip: mirror every other image, left to right.
        shift: move the image by up to this many pixels each way, its edge repeated ("random crop").
        corrupt: what the encoder sees in place of the image, which stays what is to be reconstructed: "noise" (added,
            Gaussian), "mask" (patches of grey), "salt" (pixels of white and black) or "none".
        corrupt_strength: standard deviation of the noise, of values in [-1, 1]; share of patches or pixels.
        corrupt_patch: side of a patch in pixels.
    """

    flip: bool = True
    shift: int = 0
    corrupt: Literal["none", "noise", "mask", "salt"] = field(default="none", metadata={"introduced": "none"})
    corrupt_strength: float = field(default=0.3, metadata={"introduced": 0.3})
    corrupt_patch: int = field(default=4, metadata={"introduced": 4})

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise ValueError(f"augment.shift must not be negative, got {self.shift}")
        most = 1.0 if self.corrupt in ("mask", "salt") else math.inf
        if not 0 <= self.corrupt_strength <= most:
            raise ValueError(f"augment.corrupt_strength must lie in [0, {most}], got {self.corrupt_strength}")
        if self.corrupt_patch < 1:
            raise ValueError(f"augment.corrupt_patch must be at least 1, got {self.corrupt_patch}")


class ImageSample(NamedTuple):
    """What an image has.

    Attributes:
        pixels: uint8 (C, H, W), not to be written to.
        label: index of its class, 0 where there are none.
        key: of it in its split.
        caption: empty where there is none.
        counts: 0 for what is no image but filling.
    """

    pixels: np.ndarray
    label: int
    key: str
    caption: str
    counts: float = 1.0


class ImageBatch(NamedTuple):
    """A batch of what images have, as training reads it.

    Attributes:
        pixels: uint8 (B, C, H, W).
        classes: int64 (B,).
        keys: of each.
        captions: of each.
        mask: (B,), 1 for images that count, 0 for filling.
    """

    pixels: Tensor
    classes: Tensor
    keys: list[str]
    captions: list[str]
    mask: Tensor


def image_batch(samples: Sequence[ImageSample]) -> ImageBatch:
    """Return samples as a batch."""
    pixels, labels, keys, captions, counts = zip(*samples, strict=True)
    mask = torch.tensor(counts, dtype=torch.float32)
    return ImageBatch(torch.from_numpy(np.stack(pixels)), torch.tensor(labels), list(keys), list(captions), mask)


class ImageShards:
    """One split of packed images, read by index; each shard is fetched, checked and indexed when it is first touched.

    Samples of a small split stay in memory once they are decoded, but in a loader's process.

    Args:
        folder: an `images` folder, local or remote.
        split: "train" or "val".
        cache: for its shards.

    Raises:
        StageError: the split is empty.
    """

    # What its manifest is one of, and the stage that makes it.
    kind: Kind = "images"
    stage = "pack"

    def __init__(self, folder: Path, split: str, cache: Cache) -> None:
        manifest = read_manifest(folder, self.kind, self.stage)
        self.folder, self.cache = folder, cache
        self.size: int = manifest["image_size"]
        self.channels: int = manifest["channels"]
        self.class_names: list[str] = manifest["class_names"]
        self.receipts = receipts_of(manifest, split)
        self.sizes = tuple(receipt["samples"] for receipt in self.receipts)
        self.ends = list(accumulate(self.sizes))
        self.checked: dict[int, Path] = {}  # local files of shards that have been checked
        self.keeps = len(self) * self.channels * self.size**2 <= KEPT_BYTES
        self.kept: dict[int, ImageSample] = {}
        if not len(self):
            raise StageError(f"{folder} holds no images of the {split} split; run `smalti {self.stage}` again")

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def pixels(self, index: int) -> np.ndarray:
        """Return uint8 (C, H, W), not to be written to."""
        return self.read(index).pixels

    def read(self, index: int) -> ImageSample:
        """Return an image and what it has."""
        found = self.kept.get(index)
        if found is None:
            found = self._decoded(index)
            if self.keeps and get_worker_info() is None:
                self.kept[index] = found
        return found

    def key(self, index: int) -> str:
        """Return the key of an image."""
        return self.sample(index)[1].key

    def sample(self, index: int) -> tuple[Path, SampleIndex]:
        """Return where an image and what goes with it lie: a local shard, and the members in it."""
        number = bisect_right(self.ends, index)
        before = self.ends[number - 1] if number else 0
        path = self._shard(number)
        return path, _shard_index(path)[index - before]

    def _decoded(self, index: int) -> ImageSample:
        path, sample = self.sample(index)
        with path.open("rb") as file:
            pixels = checked_pixels(file, sample, path, self.size, self.channels)
            label = read_class(file, sample, len(self.class_names), path, self.stage)
            caption = (
                read_member(file, sample.members["txt"]).decode(errors="replace") if "txt" in sample.members else ""
            )
        return ImageSample(pixels, label, sample.key, caption)

    def _shard(self, number: int) -> Path:
        path = self.checked.get(number)
        if path is None or not path.exists():  # the cache may have made room
            path = self.cache.shard(self.folder / self.receipts[number]["shard"], self.receipts[number])
            check_count(path, len(_shard_index(path)), self.sizes[number], self.stage)
            self.checked[number] = path
        return path


def checked_pixels(file: BinaryIO, sample: SampleIndex, shard: Path, size: int, channels: int) -> np.ndarray:
    """Return the image of a sample as uint8 (C, H, W).

    Args:
        file: the open shard.
        sample: which one.
        shard: its name in messages.
        size: of either side in pixels.
        channels: 1 or 3.

    Raises:
        StageError: there is none, or it cannot be decoded; names shard and key.
    """
    extension = next((extension for extension in sample.members if extension in FORMATS), None)
    try:
        if extension is None:
            raise BadImageError(f"has no image among {sorted(sample.members)}")
        return pixels_of(read_member(file, sample.members[extension]), size, channels)
    except BadImageError as error:
        raise StageError(f"sample {sample.key} of {shard}: {error}; make that shard again") from error


def sample_pixels(path: Path, sample: SampleIndex, size: int, channels: int) -> np.ndarray:
    """Do the same with a shard that is not open."""
    with path.open("rb") as file:
        return checked_pixels(file, sample, path, size, channels)


@lru_cache(maxsize=256)
def _shard_index(path: Path) -> list[SampleIndex]:
    return index_shard(path)


def shift_pixels(pixels: np.ndarray, down: int, right: int) -> np.ndarray:
    """Move (C, H, W) pixels, repeating the edge."""
    _, height, width = pixels.shape
    rows = np.clip(np.arange(height) - down, 0, height - 1)
    columns = np.clip(np.arange(width) - right, 0, width - 1)
    return pixels[:, rows[:, None], columns[None]]


@lru_cache(maxsize=4)
def augmentations(seed: int, block: int, shift: int) -> np.ndarray:
    """Return the random changes of a block of draws: whether to flip, and by how much to move down and right, (N, 3).

    Args:
        seed: of the run.
        block: number of the block of N = AUGMENTED_DRAWS draws.
        shift: pixels to move by at most.
    """
    highest = [2, shift + 1, shift + 1]
    return np.random.default_rng((seed, 2, block)).integers([0, -shift, -shift], highest, (AUGMENTED_DRAWS, 3))


class TrainingImages:
    """Augmented images by draw: a function of (seed, draw)."""

    def __init__(self, shards: ImageShards, augment: AugmentConfig, seed: int, window: int = 0) -> None:
        self.shards, self.augment, self.seed, self.window = shards, augment, seed, window

    def __getitem__(self, draw: int) -> ImageSample:
        sample = self.shards.read(drawn_sample(self.seed, draw, self.shards.sizes, self.window))
        pixels = sample.pixels
        block, place = divmod(draw, AUGMENTED_DRAWS)
        flip, down, right = augmentations(self.seed, block, self.augment.shift)[place]
        if self.augment.flip and flip:
            pixels = pixels[:, :, ::-1]
        if down or right:
            pixels = shift_pixels(pixels, down, right)
        return sample._replace(pixels=pixels)


class ValidationImages:
    """Images by index; filling for the tail, index -1."""

    def __init__(self, shards: ImageShards) -> None:
        self.shards = shards

    def __getitem__(self, index: int) -> ImageSample:
        if index >= 0:
            return self.shards.read(index)
        nothing = np.zeros((self.shards.channels, self.shards.size, self.shards.size), np.uint8)
        return ImageSample(nothing, 0, "", "", counts=0.0)


def to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 (B, C, H, W) to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> np.ndarray:
    """Float (B, C, H, W) in [-1, 1] to uint8 of the same shape, on the CPU."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
