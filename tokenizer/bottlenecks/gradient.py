"""The codebook of the first VQ-VAE: its vectors are moved by gradients, with the encoder.

K codebook_size, D code_dim, N latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from tokenizer.bottlenecks.bottleneck import Bottled, Place, Settings, VectorSizes
from tokenizer.bottlenecks.codebook import Codebook
from tokenizer.bottlenecks.kmeans import kmeans


@dataclass(frozen=True, kw_only=True)
class GradientConfig(Settings):
    """How codebooks learn by gradients.

    Attributes:
        codebook_weight: weight of the loss that draws codes to latents, beside the reconstruction loss.
        commitment_weight: weight of the loss that draws latents to codes.
        kmeans_iterations: Lloyd iterations of the start from the first batch; 0 starts from latents drawn from it.
        gradient: how that of the decoder goes back to latents: "straight", as if the codebook were not there, or
            "rotation" (Fifty et al. 2024).

    Source: van den Oord et al. 2017, equation 3.
    """

    called: ClassVar[str] = "VQ-VAE"

    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    kmeans_iterations: int = 10
    gradient: Literal["straight", "rotation"] = field(default="straight", metadata={"introduced": "straight"})

    def __post_init__(self) -> None:
        for name in ("codebook_weight", "commitment_weight", "kmeans_iterations"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def build(self, sizes: VectorSizes) -> Codebook:
        """Return a codebook for one level."""
        return Codebook(sizes.codebook_size, sizes.code_dim, sizes.normalize, learned=True, gradient=self.gradient)

    def weights(self, num_levels: int, num_values: int) -> dict[str, float]:
        """Return the weights of both losses, of their mean over levels."""
        return {"commitment": self.commitment_weight / num_levels, "codebook": self.codebook_weight / num_levels}

    def learner(self, bottleneck: Codebook) -> "KMeansStart":
        """Return what starts the codebook."""
        return KMeansStart(self.kmeans_iterations)


class KMeansStart(nn.Module):
    """A learner that sets a codebook to k-means centres of the first batch, and leaves the rest to gradients."""

    def __init__(self, iterations: int) -> None:
        super().__init__()
        self.iterations = iterations

    @torch.no_grad()
    def start(self, codebook: Codebook, latents: Tensor, seed: int) -> None:
        """Set the codebook; see `Learner.start`."""
        centres = kmeans(latents, len(codebook.vectors), self.iterations, codebook.normalize, seed)
        codebook.vectors.copy_(centres)

    def statistics(self, codebook: Codebook, output: Bottled, place: Place) -> Sequence[Tensor]:
        """None are needed."""
        return ()

    def update(self, codebook: Codebook, statistics: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Nothing is left to do."""
        return {}
