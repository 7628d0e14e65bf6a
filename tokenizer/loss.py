"""What stage one minimises: reconstruction, and what the bottleneck asks for."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

# Standard deviation that a learned one begins with: a rough reconstruction's error, of values in [-1, 1].
FIRST_SCALE = 0.2
Reconstruction = Literal["mse", "l1", "gaussian", "bernoulli"]


class TokenizerLoss(nn.Module):
    """reconstruction + the weighted losses of all bottlenecks.

    Args:
        reconstruction: "mse" or "l1"; or -log p(image | what is stored) in nats: "gaussian" around the reconstruction,
            or "bernoulli" of values in [0, 1], a likelihood where these are 0 or 1. Averaged over every element, so
            that no term grows with the batch.
        weights: of the bottleneck's losses, by name; each level's mean over images counts, and what is of a batch.
        scale: standard deviation of "gaussian", of values in [-1, 1]; 0 learns it, one for all values.

    Source: Rybkin et al. 2021, section 3 (the learned scale).
    """

    def __init__(self, reconstruction: Reconstruction, weights: Mapping[str, float], scale: float = 0.0) -> None:
        super().__init__()
        self.reconstruction, self.weights = reconstruction, dict(weights)
        if reconstruction == "gaussian":
            self.log_scale = nn.Parameter(torch.tensor(math.log(scale or FIRST_SCALE)), requires_grad=not scale)

    def forward(
        self,
        reconstruction: Tensor,
        images: Tensor,
        losses: Sequence[Mapping[str, Tensor]],
        shares: Mapping[str, float] | None = None,
    ) -> Tensor:
        """Return the scalar loss of reconstructions (B, C, H, W) against images.

        Args:
            reconstruction: (B, C, H, W), of "bernoulli" the logits of it, `Autoencoded.logits`.
            images: (B, C, H, W).
            losses: of each level by name, (B,) each, or a scalar where it is of the batch as a whole.
            shares: of the weights, by name; all of them where none is given.
        """
        weights = {name: weight * (shares or {}).get(name, 1.0) for name, weight in self.weights.items()}
        asked = [weights[name] * values.mean() for level in losses for name, values in level.items()]
        return self.of_values(reconstruction, images).mean() + sum(asked, start=images.new_zeros(()))

    def of_values(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Return the loss of the reconstruction by itself, of each value (B, C, H, W)."""
        given = reconstruction.float()
        if self.reconstruction == "bernoulli":
            return F.binary_cross_entropy_with_logits(given, (images + 1) / 2, reduction="none")
        if self.reconstruction == "gaussian":
            squares = ((given - images) / self.log_scale.exp()).square()
            return 0.5 * squares + self.log_scale + 0.5 * math.log(2 * math.pi)
        return (F.mse_loss if self.reconstruction == "mse" else F.l1_loss)(given, images, reduction="none")


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
