"""Finite scalar quantisation: each channel is rounded to a few values, and a code names the combination.

B batch, D channels, L values of a channel, h w grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from tokenizer.bottlenecks.bottleneck import Bottled, Settings, VectorSizes, no_observation
from tokenizer.bottlenecks.usage import CodeUsage
from tokenizer.checks import Float32Module, check_codes, code_grids, float_tensor

# Codes are int64, and a prior has a logit for each.
MAX_CODES = 2**31


@dataclass(frozen=True, kw_only=True)
class FSQConfig(Settings):
    """Finite scalar quantisation.

    Attributes:
        levels: L of each channel; their product is K, the number of codes. The paper's for K of about 2^8, 2^10, 2^12
            and 2^14: [8, 6, 5], [8, 5, 5, 5], [7, 5, 5, 5, 5], [8, 8, 8, 6, 5].
    """

    of_model: ClassVar[tuple[str, ...]] = ("levels",)
    called: ClassVar[str] = "FSQ autoencoder"
    unread: ClassVar[tuple[str, ...]] = ("codebook_size", "code_dim", "normalize")

    levels: list[int] = field(default_factory=lambda: [8, 5, 5, 5])

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 3 or prod(self.levels) > MAX_CODES:
            raise ValueError(
                f"levels must name 3 or more values for each channel, of at most {MAX_CODES} combinations, "
                f"got {self.levels}"
            )

    def build(self, sizes: VectorSizes) -> "FSQ":
        """Return the quantiser of one level; K and D follow from the values of its channels."""
        return FSQ(self.levels)


class FSQ(Float32Module):
    """Bounds each channel by a tanh and rounds it to L values in [-1, 1], evenly spaced; always in float32.

    A code is the number whose digits, in the bases L, are the channels' values, the first channel the lowest digit.

    Args:
        levels: L of each channel.

    Source: Mentzer et al. 2023, section 3.1 and appendix A.1.
    """

    values: Tensor
    bases: Tensor
    noise_channels = 0

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.features = self.channels = len(levels)
        self.sizes = (prod(levels),)
        bases = np.cumprod([1, *levels[:-1]])
        self.register_buffer("values", torch.tensor(levels, dtype=torch.float32), persistent=False)
        self.register_buffer("bases", torch.from_numpy(bases.astype(np.int64)), persistent=False)

    def forward(self, features: Tensor, noise: Tensor | None = None) -> Bottled:
        """Round features (B, D, h, w); the gradient is that of the bounded features.

        Raises:
            ValueError: they are no floats, or have another number of channels.
        """
        features = float_tensor("features", features, ("B", "D", "h", "w"))
        if features.shape[1] != self.features:
            raise ValueError(f"features must have {self.features} channels, got {features.shape[1]}")
        with torch.autocast(features.device.type, enabled=False):
            values = self.values[:, None, None]
            # Just under (L - 1) / 2 each way; an even L has one value more below 0 than above.
            half = (values - 1) * (1 - 1e-3) / 2
            offset = torch.where(values % 2 == 0, 0.5, 0.0)
            bounded = torch.tanh(features + torch.atanh(offset / half)) * half - offset
            rounded = bounded + (bounded.round() - bounded).detach()
            digits = (rounded.detach() + torch.div(values, 2, rounding_mode="floor")).round().long()
            codes = (digits * self.bases[:, None, None]).sum(1)
            seen = rounded / torch.div(values, 2, rounding_mode="floor")
        return Bottled(seen=seen, stored=(codes,), losses={}, observed=no_observation(features))

    def lookup(self, stored: Sequence[Tensor | np.ndarray]) -> Tensor:
        """Return the rounded channels (B, D, h, w) of a grid of codes (B, h, w).

        Raises:
            ValueError: they are no integers, have another shape, or one is out of range.
        """
        (codes,) = stored
        codes = code_grids("codes", codes, self.values.device)
        check_codes(codes, self.sizes[0])
        levels = self.values.long()[:, None, None]
        digits = torch.div(codes[:, None], self.bases[:, None, None], rounding_mode="floor") % levels
        return (digits - levels // 2) / (levels // 2)

    def blank(self) -> Tensor:
        """Return the middle of every channel (D,)."""
        return torch.zeros(self.channels, device=self.values.device)

    def figures(self) -> CodeUsage:
        """Return perplexity and usage, which have seen nothing yet."""
        return CodeUsage(self.sizes, self.values.device)
