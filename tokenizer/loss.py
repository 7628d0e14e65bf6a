"""What stage one minimises: reconstruction and commitment."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn


class TokenizerLoss(nn.Module):
    """reconstruction + commitment_weight * the mean commitment of the levels.

    A module, because a perceptual or adversarial loss would own parameters; this one has none.

    Args:
        reconstruction: "mse" or "l1", averaged over every element, so neither term grows with the batch.
        commitment_weight: beta of van den Oord et al. 2017, equation 3. There is no codebook term: EMA has its place.
    """

    def __init__(self, reconstruction: Literal["mse", "l1"], commitment_weight: float) -> None:
        super().__init__()
        self.reconstruction = reconstruction
        self.commitment_weight = commitment_weight

    def forward(self, reconstruction: Tensor, images: Tensor, commitments: list[Tensor]) -> Tensor:
        """Return the scalar loss of reconstructions (B, C, H, W) against images, with one commitment per level."""
        distance = F.mse_loss if self.reconstruction == "mse" else F.l1_loss
        commitment = sum(commitments, start=images.new_zeros(())) / len(commitments)
        return distance(reconstruction.float(), images) + self.commitment_weight * commitment
