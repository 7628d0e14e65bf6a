"""N(0, I): the prior that variational autoencoders are trained against. It knows no class and nothing to learn.

B batch, d channels, h w grid.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prior.continuous import Continuous, ContinuousConfig, normal_nats, normal_quantile
from prior.known import Known


@dataclass(frozen=True, kw_only=True)
class NormalConfig(ContinuousConfig):
    """There is nothing to choose."""

    def build(
        self, levels: Sequence[tuple[tuple[int, int], int | None, int]], num_classes: int, dropout: float
    ) -> "Normal":
        """See `ContinuousConfig`."""
        grid, _, channels = levels[-1]
        return Normal((channels, *grid))


class Normal(Continuous):
    """Independent standard normal numbers, of one level.

    Args:
        shape: (d, h, w).
    """

    zero: Tensor

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape, self.num_uniforms = tuple(shape), math.prod(shape)
        self.register_buffer("zero", torch.zeros(()), persistent=False)  # is where the module is

    def nats(self, values: Tensor, coarser: list[Tensor], classes: Tensor | None) -> Tensor:
        """See `Continuous`."""
        return normal_nats(values)

    def draw(
        self,
        uniforms: Tensor,
        coarser: list[Tensor],
        classes: Tensor | None,
        temperature: float = 1.0,
        known: Known | None = None,
    ) -> Tensor:
        """See `Continuous`: what is known says nothing of the rest."""
        return (normal_quantile(uniforms) * math.sqrt(temperature)).float().view(-1, *self.shape)
