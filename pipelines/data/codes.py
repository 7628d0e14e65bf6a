"""Codes as training reads them: unpacked from their shards once, into arrays that are memory-mapped.

B batch, h w code grid, K codebook_size.
"""

import io
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.data.batches import drawn_sample
from pipelines.errors import StageError
from pipelines.storage.cache import Cache
from pipelines.storage.fingerprint import digest
from pipelines.storage.manifest import CodesManifest, Level, read_manifest, receipts_of
from pipelines.storage.paths import sweep, whole
from pipelines.storage.shards import (
    POSTERIOR,
    SampleIndex,
    check_count,
    code_dtype,
    index_shard,
    level_shape,
    read_class,
    read_member,
)


class Codes:
    """One split of a code data set, memory-mapped: unpacked from its shards once.

    Args:
        folder: a `codes` folder, local or remote.
        split: "train" or "val".
        unpacked: local folder for the unpacked arrays.
        cache: for the shards.
    """

    def __init__(self, folder: Path, split: str, unpacked: Path, cache: Cache) -> None:
        manifest = read_manifest(folder, "codes", "encode")
        self.grids = [(level["grid"][0], level["grid"][1]) for level in manifest["levels"]]
        self.codebook_sizes = [level["codebook_size"] for level in manifest["levels"]]
        self.class_names: list[str] = manifest["class_names"]
        paths = unpack_codes(folder, manifest, split, unpacked, cache)
        self.channels = [level.get("channels", 1) for level in manifest["levels"]]
        self.levels = [np.load(path, mmap_mode="r") for path in paths[:-1]]  # (N, h, w) or (N, d, h, w) each
        self.labels = np.load(paths[-1], mmap_mode="r")  # (N,)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: list[int]) -> tuple[list[Tensor], Tensor]:
        """Return what is stored per level and classes (B,); zeros for the filling of the tail, index -1.

        Codes are int64 (B, h, w); continuous levels float32 (B, d, h, w).
        """
        rows = np.maximum(indices, 0)
        kinds = [np.int64 if size else np.float32 for size in self.codebook_sizes]
        codes = [torch.from_numpy(level[rows].astype(kind)) for level, kind in zip(self.levels, kinds, strict=True)]
        return codes, torch.from_numpy(self.labels[rows].astype(np.int64))


def unpack_codes(folder: Path, manifest: CodesManifest, split: str, unpacked: Path, cache: Cache) -> list[Path]:
    """Write a split's codes and classes as plain arrays, unless they are there: their names hold the shards' hashes.

    Returns:
        The paths, one per level and the classes last.

    Raises:
        StageError: a shard is not what the manifest says.
    """
    unpacked.mkdir(parents=True, exist_ok=True)
    sweep(unpacked)
    receipts = receipts_of(manifest, split)
    stamp = digest([receipt["sha256"] for receipt in receipts])[:16]
    num_levels = len(manifest["levels"])
    names = [f"level{level}" for level in range(num_levels)] + ["classes"]
    paths = [unpacked / f"{split}-{stamp}-{name}.npy" for name in names]
    if all(path.exists() for path in paths):
        return paths
    count = sum(receipt["samples"] for receipt in receipts)
    if not count:
        raise StageError(f"{folder} holds no codes of the {split} split; run `smalti encode` again")
    shapes = [(count, *level_shape(level)) for level in manifest["levels"]] + [(count,)]
    dtypes = [code_dtype(level["codebook_size"]) for level in manifest["levels"]] + [np.dtype(np.int32)]
    with ExitStack() as stack:
        # Levels train as jobs of their own that may unpack at the same time: each writes its own files.
        written = [stack.enter_context(whole(path)) for path in paths]
        arrays = [
            np.lib.format.open_memmap(path, "w+", dtype, shape)
            for path, dtype, shape in zip(written, dtypes, shapes, strict=True)
        ]
        row = 0
        for receipt in receipts:
            shard = folder / receipt["shard"]
            found = _unpack_shard(cache.shard(shard, receipt), shard, manifest, arrays, row)
            check_count(shard, found, receipt["samples"], "encode")
            row += found
        for array in arrays:
            array.flush()
    for stale in unpacked.glob(f"{split}-{'[0-9a-f]' * len(stamp)}-*.npy"):
        if stamp not in stale.name:
            stale.unlink(missing_ok=True)
    return paths


def _unpack_shard(path: Path, shard: Path, manifest: CodesManifest, arrays: Sequence[np.ndarray], row: int) -> int:
    """Copy a code shard's grids and classes into the arrays from a row on; return how many samples it has."""
    samples = index_shard(path)
    if row + len(samples) > len(arrays[-1]):
        return len(samples)
    with path.open("rb") as file:
        for number, sample in enumerate(samples, row):
            codes, label = code_sample(file, sample, manifest, shard)
            for array, grid in zip(arrays, codes, strict=False):
                array[number] = grid
            arrays[-1][number] = label
    return len(samples)


def code_sample(
    file: BinaryIO, sample: SampleIndex, manifest: Mapping[str, Any], shard: Path
) -> tuple[list[np.ndarray], int]:
    """Return the grids of a sample, coarse to fine, and its class index, 0 where there are no classes.

    Args:
        file: the open shard.
        sample: which one.
        manifest: of the codes.
        shard: its name in messages.

    Raises:
        StageError: a grid is missing or not what the manifest says, or the class does not exist; names it.
    """
    name, mend = f"sample {sample.key} of {shard}", "run `smalti encode` again"
    codes = []
    for number, level in enumerate(manifest["levels"]):
        member = sample.members.get(f"level{number}.npy")
        if member is None:
            raise StageError(f"{name} lacks level{number}.npy; {mend}")
        codes.append(_grid(read_member(file, member), level, name))
    return codes, read_class(file, sample, len(manifest["class_names"]), shard, "encode")


def _grid(data: bytes, level: Level, name: str) -> np.ndarray:
    """Read a level's array; what its header claims is believed only if it is what the level is."""
    wanted = (level_shape(level), code_dtype(level["codebook_size"]))
    # Up to where versions 1 and 2 of the format say that values begin.
    first = (
        10 + int.from_bytes(data[8:10], "little") if data[6:8] == b"\1\0" else 12 + int.from_bytes(data[8:12], "little")
    )
    try:
        shape, fortran, dtype = _header(data[:first])
    except Exception as error:  # a header that lies raises many kinds
        raise StageError(f"{name} holds no readable array ({error}); run `smalti encode` again") from error
    if (shape, dtype) != wanted or fortran or len(data) - first != dtype.itemsize * math.prod(shape):
        raise StageError(
            f"{name} must hold codes of {wanted[0]} in {wanted[1]}, has {shape} in {dtype}; run `smalti encode` again"
        )
    array = np.frombuffer(data, dtype, offset=first).reshape(shape)
    if level["codebook_size"] is None:
        if not np.isfinite(array).all():
            raise StageError(f"{name} must hold finite numbers, and does not; run `smalti encode` again")
    elif array.max() >= level["codebook_size"]:
        raise StageError(
            f"{name} must hold codes below {level['codebook_size']}, has {array.max()}; run `smalti encode` again"
        )
    return array


# Every grid of a level begins with the same bytes, and reading them takes longer than all else that is done with it.
@lru_cache(64)
def _header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return what an npy header says: shape, Fortran's order or not, dtype."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)


def posteriors(folder: Path, level: int, rows: np.ndarray, cache: Cache) -> np.ndarray:
    """Return mean and log-variance of q(z | x) of samples of the train split, float32 (N, 2d, h, w).

    Args:
        folder: of codes.
        level: of which.
        rows: places of the samples in the split, int64 (N,), rising.
        cache: for the shards.

    Raises:
        StageError: a shard lacks them, or holds something else.
    """
    manifest = read_manifest(folder, "codes", "encode")
    channels, h, w = level_shape(manifest["levels"][level])
    described: Level = {"grid": [h, w], "codebook_size": None, "channels": 2 * channels}
    found, first = [], 0
    for receipt in receipts_of(manifest, "train"):
        own = rows[(rows >= first) & (rows < first + receipt["samples"])] - first
        first += receipt["samples"]
        if not len(own):
            continue
        shard = folder / receipt["shard"]
        path = cache.shard(shard, receipt)
        samples = index_shard(path)
        with path.open("rb") as file:
            for sample in (samples[row] for row in own):
                name, member = f"sample {sample.key} of {shard}", sample.members.get(f"level{level}.{POSTERIOR}")
                if member is None:
                    raise StageError(
                        f"{name} lacks level{level}.{POSTERIOR}; set encode.posterior to true and run `smalti encode`"
                    )
                found.append(_grid(read_member(file, member), described, name))
    return np.stack(found)


class CodeBatch(NamedTuple):
    """A batch of what is stored, as training reads it.

    Attributes:
        codes: per level, coarse to fine: int64 (B, h, w), or float32 (B, d, h, w) of a continuous one.
        classes: int64 (B,), 0 where there are none.
        mask: (B,), 1 for samples that count, 0 for filling.
    """

    codes: list[Tensor]
    classes: Tensor
    mask: Tensor


class TrainingCodes:
    """Batches of draws."""

    def __init__(self, codes: Codes, seed: int) -> None:
        self.codes, self.seed = codes, seed

    def __getitems__(self, draws: list[int]) -> CodeBatch:
        rows = [drawn_sample(self.seed, draw, (len(self.codes),)) for draw in draws]
        return CodeBatch(*self.codes.batch(rows), torch.ones(len(rows)))


class ValidationCodes:
    """Batches of indices, -1 filling the tail."""

    def __init__(self, codes: Codes) -> None:
        self.codes = codes

    def __getitems__(self, indices: list[int]) -> CodeBatch:
        return CodeBatch(*self.codes.batch(indices), torch.tensor([float(index >= 0) for index in indices]))


def as_it_is(batch: Any) -> Any:
    """Collate nothing: the data set returns whole batches."""
    return batch
