"""Means over the images of a split: figures of continuous bottlenecks are functions of them.

B batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tokenizer.bottlenecks.bottleneck import Bottled


def moments(output: Bottled) -> Tensor:
    """Return what a bottleneck observed of each image and its squares, float64 (B, 2, h*w, D)."""
    images, channels = len(output.seen), output.observed.shape[1]
    values = output.observed.double().view(images, -1, channels)
    return torch.stack([values, values.square()], 1)


def variances(means: Tensor) -> Tensor:
    """Return the variance over images of each unit (D,), its mean over cells, of the means (2, h*w, D) of `moments`."""
    first, second = means
    return (second - first.square()).clamp(min=0).mean(0)


class Averages:
    """Figures, as `Bottleneck.figures` gives them, of the mean over images of what is measured of each.

    Args:
        device: where images are.
        measured: what a bottleneck's output says of its images, float64 (B, …).
        told: figures by name, of the mean (…) of that.
    """

    def __init__(
        self,
        device: torch.device,
        measured: Callable[[Bottled], Tensor],
        told: Callable[[Tensor], dict[str, float]],
    ) -> None:
        self.measured, self.told = measured, told
        self.sums = [torch.zeros((), dtype=torch.float64, device=device)] * 2  # of images, and of what is measured

    def update(self, output: Bottled, mask: Tensor) -> None:
        """Add the images that count."""
        images, total = self.sums
        self.sums = [images + mask.double().sum(), total + torch.tensordot(mask.double(), self.measured(output), 1)]

    def compute(self) -> list[dict[str, float]]:
        """Return the figures of what has been added, of the one stored grid."""
        images, total = self.sums
        return [self.told(total / images)]
