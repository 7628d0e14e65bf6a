"""What bottlenecks that store numbers have in common: the decoder sees the numbers themselves.

B batch, C features, D code_dim, h w grid.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenizer.checks import Float32Module, float_tensor


class Numbers(Float32Module):
    """A bottleneck of D numbers per cell, without its `forward` and figures; always in float32.

    Args:
        features: C, channels that it reads.
        code_dim: D.
        noise_channels: channels of noise that it is given in training.
    """

    zero: Tensor
    sizes = (None,)

    def __init__(self, features: int, code_dim: int, noise_channels: int = 0) -> None:
        super().__init__()
        self.features, self.channels, self.noise_channels = features, code_dim, noise_channels
        # Where tensors without parameters go is where this is.
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def lookup(self, stored: Sequence[Tensor]) -> Tensor:
        """Return the numbers (B, D, h, w) as they are."""
        (values,) = stored
        return float_tensor("values", values, ("B", self.channels, "h", "w"))

    def blank(self) -> Tensor:
        """Return zeros (D,): the mean of N(0, I), or units none of which is active."""
        return self.zero.expand(self.channels)
