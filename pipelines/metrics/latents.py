"""What stands for the val images, gathered, and what it tells of them.

C features of a bottleneck, h w grid, N images, M of them that are paired.
"""

import hashlib
import math

import torch
from torch import Tensor

from pipelines.compute.devices import this_worker
from pipelines.data.batches import epoch_permutation
from pipelines.metrics.information import information, sample_information
from pipelines.metrics.metric import Rows
from pipelines.metrics.subject import Seen, Subject
from tokenizer.posterior import Summands, log_posterior

# Numbers that pairs are compared in, M * M * features: so many images are paired, at most.
PAIRED_NUMBERS = 2**30
# Of these at once.
NUMBERS_AT_ONCE = 2**22


class Marks:
    """Gathers which images have the same codes.

    Args:
        subject: whose codes are looked at.
    """

    paired = 0

    def __init__(self, subject: Subject) -> None:
        self._rows = Rows(subject.splits["val"].count, dtype=torch.int64)

    def update(self, seen: Seen) -> None:
        """See a batch of the val split."""
        codes = torch.cat([grid.flatten(1) for grid in seen.codes], 1).cpu().numpy()
        found = [int.from_bytes(hashlib.sha256(row.tobytes()).digest()[:8], "big", signed=True) for row in codes]
        self._rows.put(seen.rows, torch.tensor(found))

    def compute(self) -> Tensor:
        """Return a number for the codes of each image, int64 (N,), the same for the same codes; called once."""
        return self._rows.all()

    def told(self, found: Tensor, groups: Tensor) -> dict[str, Tensor]:
        """Return what codes tell of images in nats, given the group (N,) that an image is of; see `Surgery`."""
        return {"mutual_information_at_least": sample_information(found, groups)}


class Pairs:
    """Gathers what was drawn for M of the val images and what q(z | x) is made of, then pairs them.

    A finer level's q(z | x) depends on what was drawn of the coarser ones: those of the image that z was drawn for.

    Args:
        subject: whose tokenizer draws; its seed chooses the images where there are too many.
    """

    def __init__(self, subject: Subject) -> None:
        assert subject.tokenizer
        self.tokenizer, self.device, count = subject.tokenizer, subject.device, subject.splits["val"].count
        levels = list(zip(self.tokenizer.bottlenecks, self.tokenizer.level_grids, strict=True))
        shapes = [(part.features, *grid) for part, grid in levels]
        self.numbers = sum(math.prod(shape) for shape in shapes)
        chosen = epoch_permutation(subject.seed, 0, (count,))[: max(2, math.isqrt(PAIRED_NUMBERS // self.numbers))]
        self.chosen: list[int] = sorted(chosen.tolist())
        self._places = {row: place for place, row in enumerate(self.chosen)}
        self.paired = number = len(self.chosen)
        self._of_image = [Rows(number, *shape, dtype=torch.float32) for shape in shapes]
        self._of_stored = [Rows(number, *shape, dtype=torch.float32) for shape in shapes[1:]]
        self._stored = [
            Rows(number, *level.grid, dtype=torch.int64)
            if level.codebook_size
            else Rows(number, level.channels, *level.grid, dtype=torch.float32)
            for level in self.tokenizer.levels
        ]

    def update(self, seen: Seen) -> None:
        """See a batch of the val split."""
        own = [number for number, row in enumerate(seen.rows) if row in self._places]
        places = [self._places[seen.rows[number]] for number in own]
        of_image, of_stored = zip(*seen.posterior, strict=True)
        found = [*of_image, *of_stored[1:], *seen.codes]
        for rows, values in zip([*self._of_image, *self._of_stored, *self._stored], found, strict=True):
            rows.put(places, values[own])

    def compute(self) -> Tensor:
        """Return log q(z_n | x_m) in nats, float64 (M, M), row n; to be called once, on all ranks together."""
        of_image, of_stored, stored = (
            [rows.all().to(self.device) for rows in kept] for kept in (self._of_image, self._of_stored, self._stored)
        )
        parts = [Summands(*one) for one in zip(of_image, [None, *of_stored], strict=True)]
        number, (rank, world_size) = len(self.chosen), this_worker()
        found, step = Rows(number, number), max(1, NUMBERS_AT_ONCE // (number * self.numbers))
        for turn, first in enumerate(range(0, number, step)):
            if turn % world_size == rank:
                rows = slice(first, min(first + step, number))
                drawn = [grid[rows, None] for grid in stored]
                log_q = log_posterior(self.tokenizer, [part.pairs(rows) for part in parts], drawn)
                found.put(range(rows.start, rows.stop), log_q)
        return found.all()

    def told(self, found: Tensor, groups: Tensor) -> dict[str, Tensor]:
        """Return what z tells of images in nats, given the group (N,) that an image is of; see `information`."""
        estimate, at_least = information(found, groups[self.chosen], groups.bincount())
        return {"mutual_information": estimate, "mutual_information_at_least": at_least}
