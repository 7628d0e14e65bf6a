"""No bottleneck but the number of channels: a plain autoencoder.

B batch, D code_dim, h w grid.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenizer.bottlenecks.averages import Averages
from tokenizer.bottlenecks.bottleneck import Bottled, Settings, VectorSizes
from tokenizer.bottlenecks.numbers import Numbers
from tokenizer.checks import float_tensor


@dataclass(frozen=True, kw_only=True)
class IdentityConfig(Settings):
    """There is nothing to choose."""

    unread: ClassVar[tuple[str, ...]] = ("codebook_size", "normalize")

    def build(self, sizes: VectorSizes) -> "Identity":
        """Return what passes code_dim numbers per cell."""
        return Identity(sizes.code_dim)


class Identity(Numbers):
    """Features are what is seen and stored, as they are; always in float32.

    Nothing draws them towards N(0, I): how far they are from it, the figures tell.

    Args:
        code_dim: D.

    Source: Hinton and Salakhutdinov 2006.
    """

    def __init__(self, code_dim: int) -> None:
        super().__init__(code_dim, code_dim)

    def forward(self, features: Tensor, noise: Tensor | None = None) -> Bottled:
        """Pass features (B, D, h, w).

        Raises:
            ValueError: they are no floats, or have another number of channels.
        """
        features = float_tensor("features", features, ("B", self.features, "h", "w"))
        observed = features.detach().movedim(1, -1).flatten(0, 2)
        return Bottled(seen=features, stored=(features,), losses={}, observed=observed)

    def figures(self) -> Averages:
        """Return mean and standard deviation of all numbers, of nothing yet; N(0, I) has 0 and 1."""
        return Averages(self.zero.device, _moments, _spread)


def _moments(output: Bottled) -> Tensor:
    """Return the mean of each image's numbers and of their squares, (B, 2)."""
    values = output.stored[0].double().flatten(1)
    return torch.stack([values.mean(1), values.square().mean(1)], 1)


def _spread(moments: Tensor) -> dict[str, float]:
    mean, square = moments
    return {"mean": float(mean), "std": float((square - mean.square()).clamp(min=0).sqrt())}
