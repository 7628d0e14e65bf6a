"""What a report reads of a run: few images, chosen by seed, whatever the size of the run.

N images, C channels, H W pixels, h w grid, d channels of a continuous grid.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.data.batches import epoch_permutation
from pipelines.data.codes import code_sample
from pipelines.data.images import checked_pixels
from pipelines.storage.cache import Cache
from pipelines.storage.manifest import Manifest, read_manifest, receipts_of
from pipelines.storage.shards import SampleIndex, index_shard, read_member

# Images read of a run, all splits and samples together; fewer where they are large, so that minutes are enough.
MOST_IMAGES, LEAST_IMAGES, MOST_VALUES = 2000, 40, 2**27
# Shares of these; train has the rest.
SHARES = {"samples": 0.05, "val": 0.2}
# Shards that a split's images come from where these hold enough, so that few are fetched and checked.
FEW_SHARDS = 4


class Images(NamedTuple):
    """Images of a split.

    Attributes:
        keys: one each.
        pixels: uint8 (N, C, H, W).
        classes: int64 (N,), -1 where an image has none.
        total: images of the split, read or not.
    """

    keys: list[str]
    pixels: np.ndarray
    classes: np.ndarray
    total: int


class Codes(NamedTuple):
    """Codes of a split.

    Attributes:
        levels: what is stored of each, coarse to fine: int64 (N, h, w), or float32 (N, d, h, w).
        classes: int64 (N,), 0 where there are none.
        total: grids of the split, read or not.
    """

    levels: list[Tensor]
    classes: Tensor
    total: int

    def first(self, number: int) -> "Codes":
        """Return so many of them, from the first on."""
        return Codes([level[:number] for level in self.levels], self.classes[:number], self.total)


def most_read(values: int) -> dict[str, int]:
    """Return how many images of samples, val and train are read at most.

    Args:
        values: of an image, C * H * W.
    """
    most = min(MOST_IMAGES, max(LEAST_IMAGES, MOST_VALUES // values))
    few = {split: round(most * share) for split, share in SHARES.items()}
    return few | {"train": most - sum(few.values())}


def read_images(folder: Path, split: str, seed: int, cache: Cache) -> Images | None:
    """Return images of a split; None where it has none.

    Args:
        folder: of images, or of samples.
        split: "train", "val" or "samples".
        seed: of the choice.
        cache: for the shards.
    """
    manifest = read_manifest(folder, *(("samples", "sample") if split == "samples" else ("images", "pack")))
    size, channels = manifest["image_size"], manifest["channels"]
    keys, pixels, classes = [], [], []
    for file, sample, path in _chosen(folder, manifest, split, seed, cache):
        keys.append(sample.key)
        pixels.append(checked_pixels(file, sample, path, size, channels))
        classes.append(int(read_member(file, sample.members["cls"])) if "cls" in sample.members else -1)
    return Images(keys, np.stack(pixels), np.array(classes), _total(manifest, split)) if keys else None


def read_codes(
    folder: Path, split: str, seed: int, cache: Cache, levels: list[dict[str, Any]] | None = None
) -> Codes | None:
    """Return codes of a split, of the images that `read_images` chooses where there is one view of each.

    Args:
        folder: of codes, or of samples.
        split: "train", "val" or "samples".
        seed: of the choice.
        cache: for the shards.
        levels: as in manifests, of samples, whose manifest does without.
    """
    manifest = read_manifest(folder, *(("samples", "sample") if split == "samples" else ("codes", "encode")))
    about: dict[str, Any] = {**manifest} | ({"levels": levels} if levels else {})
    found, classes = [], []
    for file, sample, path in _chosen(folder, manifest, split, seed, cache):
        grids, label = code_sample(file, sample, about, path)
        found.append(grids)
        classes.append(label)
    if not found:
        return None
    stacked = [np.stack(grids) for grids in zip(*found, strict=True)]
    tensors = [torch.from_numpy(grids if grids.dtype == np.float32 else grids.astype(np.int64)) for grids in stacked]
    return Codes(tensors, torch.tensor(classes), _total(manifest, split))


def _chosen(
    folder: Path, manifest: Manifest, split: str, seed: int, cache: Cache
) -> Iterator[tuple[BinaryIO, SampleIndex, Path]]:
    """Yield an open shard, one of its samples and the shard's path for each sample of the choice, in their order."""
    receipts = receipts_of(manifest, split)
    sizes = tuple(receipt["samples"] for receipt in receipts)
    count = most_read(manifest["channels"] * manifest["image_size"] ** 2)[split]
    rows = np.sort(epoch_permutation(seed, 0, sizes, FEW_SHARDS)[:count]) if sum(sizes) else np.zeros(0, np.int64)
    ends = np.cumsum(sizes)
    numbers = np.searchsorted(ends, rows, side="right")
    for number in np.unique(numbers):
        receipt = receipts[number]
        path = cache.shard(folder / receipt["shard"], receipt)
        index = index_shard(path)
        with path.open("rb") as file:
            for row in rows[numbers == number]:
                yield file, index[row - (ends[number] - sizes[number])], path


def _total(manifest: Manifest, split: str) -> int:
    return sum(receipt["samples"] for receipt in receipts_of(manifest, split))
