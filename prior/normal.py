"""N(0, I): the prior that variational autoencoders are trained against. It knows no class and nothing to learn.

B batch, d channels, h w grid.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Uniforms come in steps of 2^-53; what is nearer to 0 would be minus infinity.
LEAST_UNIFORM = 2.0**-54


@dataclass(frozen=True, kw_only=True)
class NormalConfig:
    """There is nothing to choose."""


class Normal(nn.Module):
    """Independent standard normal numbers, of one level.

    Args:
        shape: (d, h, w).
    """

    zero: Tensor

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.register_buffer("zero", torch.zeros(()), persistent=False)  # is where the module is

    def nats(self, values: Tensor) -> Tensor:
        """Return -log of the density in nats, float64, of each of the values (B, d, h, w)."""
        return 0.5 * (values.double().square() + math.log(2 * math.pi))

    def draw(self, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
        """Return values float32 (B, d, h, w), by the normal quantile.

        Args:
            uniforms: float64 (B, d*h*w) in [0, 1).
            temperature: variance; as a temperature of logits flattens a distribution, it widens this one.
        """
        values = torch.special.ndtri(uniforms.clamp(min=LEAST_UNIFORM)) * math.sqrt(temperature)
        return values.float().view(-1, *self.shape)
