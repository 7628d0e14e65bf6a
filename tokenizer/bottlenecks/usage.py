"""How evenly the values of stored grids are used: figures of every discrete bottleneck.

B batch, h w grid, K values.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenizer.bottlenecks.bottleneck import Bottled


def entropy(counts: Tensor) -> float:
    """Return the entropy in nats of a histogram (K,) of counts."""
    shares = counts.double() / counts.sum().clamp(min=1)
    return float(-(shares * shares.clamp(min=1e-300).log()).sum())


class CodeUsage:
    """Perplexity and usage, the share of values that occur, of each stored grid.

    Args:
        sizes: K of each stored grid.
        device: where codes are.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.sums = [torch.zeros(size, dtype=torch.float64, device=device) for size in sizes]

    def update(self, output: Bottled, mask: Tensor) -> None:
        """Count the codes (B, h, w) of the images that count."""
        for counts, codes in zip(self.sums, output.stored, strict=True):
            weights = mask.double()[:, None, None].expand_as(codes)
            counts.index_add_(0, codes.flatten(), weights.flatten())

    def compute(self) -> list[dict[str, float]]:
        """Return perplexity and usage of each stored grid."""
        return [
            {"perplexity": math.exp(entropy(counts)), "usage": float((counts > 0).double().mean())}
            for counts in self.sums
        ]
