"""How good a tokenizer is: figures over a whole split, from sums in float64.

B batch, C channels, H W pixels.
"""

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipelines.compute.ranks import sum_over_ranks
from tokenizer import Autoencoded, HierarchicalVQVAE
from tokenizer.bottlenecks.bottleneck import Settings


def level_warnings(family: Settings, figures: Mapping[str, float]) -> list[str]:
    """Return what bottlenecks warn of where these are figures of a split, those of levels by names "levelN_NAME"."""
    levels: dict[int, dict[str, float]] = {}
    for name, value in figures.items():
        if match := re.fullmatch(r"level(\d+)_(\w+)", name):
            levels.setdefault(int(match[1]), {})[match[2]] = value
    return [f"level {level} {warning}" for level, own in sorted(levels.items()) for warning in family.warnings(own)]


class TokenizerQuality:
    """Adds up errors and what bottlenecks tell of themselves, and turns them into figures once all is seen.

    PSNR is that of the mean squared error over the split, for values in [-1, 1]: 10 log10(4 / MSE).

    Args:
        model: whose bottlenecks are looked at.
    """

    def __init__(self, model: HierarchicalVQVAE) -> None:
        self.of_levels = [bottleneck.figures() for bottleneck in model.bottlenecks]
        self.errors = torch.zeros(3, dtype=torch.float64, device=next(model.parameters()).device)
        self.losses: dict[str, Tensor] = {}  # sums over images, by level and name

    def add(
        self,
        images: Tensor,
        output: Autoencoded,
        mask: Tensor,
        losses: Sequence[dict[str, Tensor]] | None = None,
    ) -> None:
        """Add a batch.

        Args:
            images: (B, C, H, W) in [-1, 1].
            output: what the model made of them.
            mask: (B,), 1 for images that count, 0 for filling.
            losses: further ones of each level by name, (B,) each.
        """
        mask = mask.double()
        errors = (output.reconstruction.float() - images).double().flatten(1)  # (B, C*H*W)
        per_image = torch.stack([torch.ones_like(mask), errors.square().mean(1), errors.abs().mean(1)])
        self.errors += (per_image * mask).sum(1)
        first = 0  # of the level's stored grids
        further = losses or [{} for _ in output.levels]
        for level, more, figures in zip(output.levels, further, self.of_levels, strict=True):
            figures.update(level, mask)
            for name, values in (level.losses | more).items():
                found = (values.double() * mask).sum()
                self.losses[f"level{first}_{name}"] = self.losses.get(f"level{first}_{name}", 0) + found
            first += len(level.stored)

    def sums(self) -> list[Tensor]:
        """Return all that is added up, the same tensors for all that have seen anything of one model."""
        return [self.errors, *self.losses.values(), *(one for figures in self.of_levels for one in figures.sums)]

    def figures(self) -> dict[str, float]:
        """Return mse, l1, psnr, and for each level its losses and what its bottleneck tells of itself; of all ranks."""
        for tensor in self.sums():
            sum_over_ranks(tensor)
        return self.compute()

    def compute(self) -> dict[str, float]:
        """Return the same of what this one has seen."""
        images, mse, l1 = self.errors.tolist()
        mse, l1 = mse / images, l1 / images
        figures = {"mse": mse, "l1": l1, "psnr": 10 * math.log10(4 / max(mse, 1e-12)) if mse == mse else math.nan}
        for level, named in enumerate(told for one in self.of_levels for told in one.compute()):
            losses = {name: value for name, value in self.losses.items() if name.startswith(f"level{level}_")}
            figures |= {name: float(value) / images for name, value in losses.items()}
            figures |= {f"level{level}_{name}": value for name, value in named.items()}
        return figures
