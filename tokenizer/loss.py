"""What stage one minimises: reconstruction, and what the bottleneck asks for."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn


class TokenizerLoss(nn.Module):
    """reconstruction + the weighted losses of all bottlenecks.

    Args:
        reconstruction: "mse" or "l1", averaged over every element, so neither term grows with the batch.
        weights: of the bottleneck's losses, by name; each level's mean over images counts.
    """

    def __init__(self, reconstruction: Literal["mse", "l1"], weights: Mapping[str, float]) -> None:
        super().__init__()
        self.reconstruction, self.weights = reconstruction, dict(weights)

    def forward(self, reconstruction: Tensor, images: Tensor, losses: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Return the scalar loss of reconstructions (B, C, H, W) against images.

        Args:
            reconstruction: (B, C, H, W).
            images: (B, C, H, W).
            losses: of each level by name, (B,) each.
        """
        distance = F.mse_loss if self.reconstruction == "mse" else F.l1_loss
        asked = [self.weights[name] * values.mean() for level in losses for name, values in level.items()]
        return distance(reconstruction.float(), images) + sum(asked, start=images.new_zeros(()))
