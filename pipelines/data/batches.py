"""The order of training: the global batch at step t is a function of (seed, t) alone.

A draw is one place in the endless sequence of epochs, each a permutation of all samples; step t takes the draws from
t * batch_size on. Resuming is seeking.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np


@lru_cache(maxsize=4)
def epoch_permutation(seed: int, epoch: int, shards: tuple[int, ...], window: int = 0) -> np.ndarray:
    """Return the order of one epoch, int64 (N,).

    Args:
        seed: of the run.
        epoch: number of the pass over the data.
        shards: samples in each shard, N in all.
        window: shards mixed with one another at a time, in a random order of shards, so that few are read at once; 0
            mixes all.
    """
    generator = np.random.default_rng((seed, epoch))
    if not window or window >= len(shards):
        return generator.permutation(sum(shards))
    starts = np.cumsum([0, *shards[:-1]])
    order = generator.permutation(len(shards))
    windows = [order[first : first + window] for first in range(0, len(shards), window)]
    parts = [np.concatenate([starts[shard] + np.arange(shards[shard]) for shard in part]) for part in windows]
    return np.concatenate([generator.permutation(part) for part in parts])


def drawn_sample(seed: int, draw: int, shards: tuple[int, ...], window: int = 0) -> int:
    """Return the sample at a draw; the other arguments are those of `epoch_permutation`."""
    epoch, place = divmod(draw, sum(shards))
    return int(epoch_permutation(seed, epoch, shards, window)[place])


class TrainingBatches(NamedTuple):
    """Draws of this rank's part of each micro-batch, for torch's `batch_sampler`.

    Micro-batch m of step t is the m-th part of the global batch, and rank r takes the r-th slice of that.

    Attributes:
        start: first step, where a resumed run goes on.
        stop: step after the last.
        batch_size: global, a multiple of micro_batches * world_size.
        micro_batches: of one optimizer step.
        rank: of this process.
        world_size: number of processes.
    """

    start: int
    stop: int
    batch_size: int
    micro_batches: int = 1
    rank: int = 0
    world_size: int = 1

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        size = self.batch_size // (self.micro_batches * self.world_size)
        for step in range(self.start, self.stop):
            for micro in range(self.micro_batches):
                first = step * self.batch_size + (micro * self.world_size + self.rank) * size
                yield list(range(first, first + size))

    def __len__(self) -> int:
        # Lightning counts the batches before a resume too.
        return self.stop * self.micro_batches


class ValidationBatches(NamedTuple):
    """Every sample once, in equal numbers of equal batches on every rank; -1 fills the tail and is masked out.

    Attributes:
        num_samples: of the split.
        batch_size: global; rounded down to a multiple of world_size.
        rank: of this process.
        world_size: number of processes.
    """

    num_samples: int
    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        size = max(1, self.batch_size // self.world_size)
        for number in range(len(self)):
            first = (number * self.world_size + self.rank) * size
            yield [index if index < self.num_samples else -1 for index in range(first, first + size)]

    def __len__(self) -> int:
        return -(-self.num_samples // (max(1, self.batch_size // self.world_size) * self.world_size))
