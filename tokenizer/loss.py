"""What stage one minimises: reconstruction, and what the bottleneck asks for."""

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer


class TokenizerLoss(nn.Module):
    """reconstruction + the weighted losses of all bottlenecks.

    Args:
        reconstruction: "mse" or "l1", averaged over every element, so neither term grows with the batch.
        weights: of the bottleneck's losses, by name; each level's mean over images counts, and what is of a batch.
    """

    def __init__(self, reconstruction: Literal["mse", "l1"], weights: Mapping[str, float]) -> None:
        super().__init__()
        self.reconstruction, self.weights = reconstruction, dict(weights)

    def forward(self, reconstruction: Tensor, images: Tensor, losses: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Return the scalar loss of reconstructions (B, C, H, W) against images.

        Args:
            reconstruction: (B, C, H, W).
            images: (B, C, H, W).
            losses: of each level by name, (B,) each, or a scalar where it is of the batch as a whole.
        """
        distance = F.mse_loss if self.reconstruction == "mse" else F.l1_loss
        asked = [self.weights[name] * values.mean() for level in losses for name, values in level.items()]
        return distance(reconstruction.float(), images) + sum(asked, start=images.new_zeros(()))


class OwnedLoss(Protocol):
    """A further loss of stage one, a module that may own networks and an optimizer of its own.

    What it owns is training's alone: it is neither exported nor averaged nor part of a fingerprint, and its steps are
    counted by nobody. Its parameters need no gradients where the tokenizer is trained; `own` is called where they do.

    Attributes:
        optimizer: of its own parameters; None where it has nothing to learn.
    """

    optimizer: Optimizer | None

    def __call__(self, reconstruction: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Return named parts, weighted scalars that are added to the loss of the tokenizer.

        Args:
            reconstruction: (B, C, H, W), with gradients.
            images: (B, C, H, W) in [-1, 1].
        """

    def own(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Return the scalar that its own parameters minimise, of reconstructions without gradients."""
