"""Samples as they are read back, by index: their images, and their codes and classes.

B batch, h w code grid.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipelines.data.codes import code_sample
from pipelines.data.images import ImageShards
from pipelines.storage.cache import Cache
from pipelines.storage.manifest import Kind, level_entries


class Samples(ImageShards):
    """A set of samples.

    Args:
        folder: a `samples` folder, local or remote.
        levels: (h, w), K and channels of each level, coarse to fine.
        cache: for its shards.
    """

    kind: Kind = "samples"
    stage = "sample"

    def __init__(self, folder: Path, levels: Sequence[tuple[tuple[int, int], int | None, int]], cache: Cache) -> None:
        super().__init__(folder, "samples", cache)
        self.levels = level_entries(levels)

    def batch(self, indices: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """Return what `Codes.batch` does: codes int64 (B, h, w) or values float32 per level, and classes (B,)."""
        found = [self._codes(index) for index in indices]
        levels = zip(*(grids for grids, _ in found), strict=True)
        kinds = [np.int64 if level["codebook_size"] else np.float32 for level in self.levels]
        codes = [torch.from_numpy(np.stack(one).astype(kind)) for one, kind in zip(levels, kinds, strict=True)]
        return codes, torch.tensor([label for _, label in found])

    def _codes(self, index: int) -> tuple[list[np.ndarray], int]:
        path, sample = self.sample(index)
        with path.open("rb") as file:
            return code_sample(file, sample, {"levels": self.levels, "class_names": self.class_names}, path)
