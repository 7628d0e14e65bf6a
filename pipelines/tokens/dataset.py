"""Exported tokens as a torch data set: bin shards, memory-mapped.

N tokens of a record.
"""

import json
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipelines.errors import StageError
from pipelines.storage.paths import is_local, place
from pipelines.tokens.layout import TokenLayout
from pipelines.tokens.records import megatron_index

# Systems allow a process some 65,000 maps.
MAX_MAPS = 4096


class TokenDataset(Dataset[Tensor]):
    """The records of one split, in the order of the shards.

    Args:
        folder: of tokens, with bin among their formats; local.
        split: "train" or "val".

    Attributes:
        layout: what the records are.

    Raises:
        StageError: no such tokens, or a file is not what layout.json says.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        self.folder = place(folder)
        if not is_local(self.folder):
            raise StageError(f"tokens are mapped from local files, but {folder} is none; copy it here first")
        self.layout = TokenLayout.load(self.folder)
        if split not in self.layout.shards:
            raise StageError(f"{folder} must hold a split {split}, has {', '.join(self.layout.shards) or 'none'}")
        self.shards = self.layout.shards[split]
        self.ends = list(accumulate(shard["records"] for shard in self.shards))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Tensor:
        """Return the ids of a record, int64 (N,)."""
        shard, record = self._find(index)
        tokens = self._map(shard, "bin", self.layout.dtype, shard["tokens"])
        length = self.layout.length
        if length:
            first, stop = record * length, (record + 1) * length
        else:
            sizes, starts = megatron_index(self._map(shard, "idx", np.dtype(np.uint8), 42 + 20 * shard["records"]))
            first = int(starts[record]) // tokens.itemsize
            stop = first + int(sizes[record])
        return torch.from_numpy(tokens[first:stop].astype(np.int64))

    def key(self, index: int) -> str:
        """Return the key of a record."""
        shard, record = self._find(index)
        return self._lines(shard, "keys")[record]

    def caption(self, index: int) -> str | None:
        """Return the caption of a record, None where there are none."""
        shard, record = self._find(index)
        kept = f"{shard['shard']}.captions" in shard["sha256"]
        return json.loads(self._lines(shard, "captions")[record]) if kept else None

    def _map(self, shard: dict, extension: str, dtype: np.dtype, count: int) -> np.ndarray:
        name = f"{shard['shard']}.{extension}"
        return _mapped(self.folder / name, shard["sha256"].get(name), dtype, count)

    def _lines(self, shard: dict, extension: str) -> list[str]:
        name = f"{shard['shard']}.{extension}"
        return _read_lines(self.folder / name, shard["sha256"].get(name), shard["records"])

    def _find(self, index: int) -> tuple[dict, int]:
        """Return the shard that holds a record, and its number in it."""
        if isinstance(index, bool):
            raise ValueError(f"records are numbered by integers, got {index}")
        if not 0 <= index < len(self):
            raise IndexError(f"records are numbered from 0 to {len(self) - 1}, got {index}")
        number = bisect_right(self.ends, index)
        return self.shards[number], index - (self.ends[number - 1] if number else 0)


# Of a file that was made anew the checksum is another, so its old content is not kept for it.
@lru_cache(MAX_MAPS)
def _mapped(path: Path, sha256: str | None, dtype: np.dtype, count: int) -> np.ndarray:
    try:
        size = path.stat().st_size
        if size == count * dtype.itemsize:
            return np.memmap(path, dtype, "r", shape=(count,))
    except OSError as error:
        raise StageError(f"cannot read {path}: {error.strerror}; export with bin among the formats") from error
    raise StageError(f"{path} must have {count * dtype.itemsize} bytes, has {size}; run `smalti export` again")


@lru_cache(8)
def _read_lines(path: Path, sha256: str | None, count: int) -> list[str]:
    try:
        lines = path.read_bytes().decode().split("\n")[:-1]
    except (OSError, ValueError) as error:
        raise StageError(f"cannot read {path}: {error}; run `smalti export` again") from error
    if len(lines) != count:
        raise StageError(f"{path} must have {count} lines, has {len(lines)}; run `smalti export` again")
    return lines
