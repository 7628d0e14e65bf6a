"""What a level of numbers asks of its network: an exact density, and draws from given uniforms.

B batch, d channels, h w grid.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prior.known import Known

# Uniforms come in steps of 2^-53; what is nearer to 0 would be minus infinity.
LEAST_UNIFORM = 2.0**-54


class Continuous(nn.Module):
    """p(numbers of this level | numbers or codes of coarser levels, class).

    Attributes:
        num_uniforms: that a sample is drawn with.
    """

    num_uniforms: int

    def nats(self, values: Tensor, coarser: list[Tensor], classes: Tensor | None) -> Tensor:
        """Return each number's share of -log of the density in nats, float64 (B, d, h, w); their sum is exact.

        Args:
            values: float32 (B, d, h, w).
            coarser: what is stored of each coarser level, coarse to fine.
            classes: int64 (B,) in [0, num_classes], the last for "no class given"; None for all of them so.
        """
        raise NotImplementedError

    def draw(
        self,
        uniforms: Tensor,
        coarser: list[Tensor],
        classes: Tensor | None,
        temperature: float = 1.0,
        known: Known | None = None,
    ) -> Tensor:
        """Return values float32 (B, d, h, w).

        Args:
            uniforms: float64 (B, num_uniforms) in [0, 1).
            coarser: as of `nats`.
            classes: as of `nats`.
            temperature: factor of variances; as a temperature of logits flattens a distribution, it widens this one.
            known: what the caller puts in place of what is drawn there; a network that can conditions on it.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ContinuousConfig:
    """Settings of such a network."""

    def build(
        self, levels: Sequence[tuple[tuple[int, int], int | None, int]], num_classes: int, dropout: float
    ) -> Continuous:
        """Return the network of the last of some levels.

        Args:
            levels: (h, w), K and channels of it and all coarser ones; K None where a level is continuous.
            num_classes: 0 when the data has none.
            dropout: in training.

        Raises:
            ValueError: no such network can be.
        """
        raise NotImplementedError


def normal_nats(values: Tensor) -> Tensor:
    """Return -log of the density of N(0, 1) in nats, float64, of each number."""
    return 0.5 * (values.double().square() + math.log(2 * math.pi))


def normal_quantile(uniforms: Tensor) -> Tensor:
    """Return the numbers that N(0, 1) falls below with these probabilities, float64, always finite."""
    return torch.special.ndtri(uniforms.clamp(min=LEAST_UNIFORM))
