"""Losses of bottlenecks that are of a batch as a whole: functions of means over all its images, on all ranks.

B batch of one rank, n values.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from pipelines.compute.ranks import sum_over_ranks
from tokenizer import Bottled, HierarchicalVQVAE
from tokenizer.bottlenecks.bottleneck import Settings


def mean_over_ranks(values: Tensor, world_size: int) -> Tensor:
    """Return the mean (n,) of values (B, n) of all ranks, B of each, with gradients to those of this one.

    A loss of that mean alone is the same function on every rank, so each knows the gradient of it without being told.
    The mean of all ranks' gradients, which DDP takes, is then that of one process with the whole batch.
    """
    own = values.mean(0)
    total = sum_over_ranks(own.detach().clone()) / world_size
    return total + (own - own.detach())


def batch_losses(family: Settings, levels: Sequence[Bottled], world_size: int) -> list[dict[str, Tensor]]:
    """Return the scalar losses by name of the global batch, of each level.

    Args:
        family: of all levels.
        levels: what they made of this rank's part, of equal size on all ranks.
        world_size: number of ranks.
    """
    if not family.whole_batch:
        return [{} for _ in levels]
    means = [{name: mean_over_ranks(one, world_size) for name, one in level.averaged.items()} for level in levels]
    return [family.batch_losses(one) for one in means]


class SplitLosses:
    """The same losses of a whole split: of the means over all its images.

    Args:
        model: of whose bottlenecks they are.
    """

    def __init__(self, model: HierarchicalVQVAE) -> None:
        self.family = model.bottleneck
        self.grids = [0, *accumulate(len(part.sizes) for part in model.bottlenecks)]  # of each level the first
        self.images = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
        self.sums: dict[tuple[int, str], Tensor] = {}  # by level and name, (n,) each

    def update(self, levels: Sequence[Bottled], mask: Tensor) -> None:
        """Add a batch; mask (B,) is 1 for images that count, 0 for filling."""
        if not self.family.whole_batch:
            return
        weights = mask.double()
        self.images += weights.sum()
        for level, output in enumerate(levels):
            for name, values in output.averaged.items():
                self.sums[level, name] = self.sums.get((level, name), 0) + weights @ values.double()

    def compute(self) -> dict[str, float]:
        """Return the losses of what has been added on all ranks, as "levelN_NAME"; to be called by all of them."""
        if not self.family.whole_batch:
            return {}
        images = sum_over_ranks(self.images)
        means: list[dict[str, Tensor]] = [{} for _ in self.grids[1:]]
        for (level, name), total in self.sums.items():
            means[level][name] = sum_over_ranks(total) / images
        losses = [self.family.batch_losses(one) for one in means]
        named = zip(self.grids, losses, strict=False)
        return {f"level{grid}_{name}": float(loss) for grid, level in named for name, loss in level.items()}
