"""The bottleneck of a contractive autoencoder: numbers that change little where the image changes a little.

B batch, D code_dim, h w grid.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokenizer.bottlenecks.bottleneck import Bottled, Settings, VectorSizes
from tokenizer.bottlenecks.identity import Identity


@dataclass(frozen=True, kw_only=True)
class ContractiveConfig(Settings):
    """What makes an encoder contract.

    Attributes:
        weight: of the contraction, the squared Frobenius norm of the Jacobian d(numbers) / d(values of the image),
            beside a squared error that is summed over the values of an image as it is.
        probes: backward passes per level and step that it may take. A level of no more numbers per image is taken
            exactly, one number after the other; of others it is Hutchinson's estimate from so many random directions.

    Rifai's decoder has the encoder's weights, and cannot put back what is taken from the scale of the numbers; this one
    can, by larger weights, unless `training.weight_decay` holds them. How large numbers are, the figures tell.

    Source: Rifai et al. 2011, equation 2; Hutchinson 1990.
    """

    unread: ClassVar[tuple[str, ...]] = ("codebook_size", "normalize")
    called: ClassVar[str] = "contractive autoencoder"
    mend: ClassVar[str] = "a lower weight or fewer channels"

    weight: float = 0.1
    probes: int = 4

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"weight must not be negative, got {self.weight}")
        if self.probes < 1:
            raise ValueError(f"probes must be at least 1, got {self.probes}")

    def build(self, sizes: VectorSizes) -> "Contractive":
        """Return the bottleneck of one level, of code_dim numbers per cell."""
        return Contractive(sizes.code_dim)

    def weights(self, num_levels: int, num_values: int) -> dict[str, float]:
        """Return the weight of the contraction of an image, of its sum over levels."""
        return {"contraction": self.weight / num_values}


class Contractive(Identity):
    """Features are what is seen and stored, as they are; training contracts them.

    Args:
        code_dim: D.
    """

    def forward(self, features: Tensor, noise: Tensor | None = None) -> Bottled:
        """Pass features (B, D, h, w).

        Raises:
            ValueError: they are no floats, or have another number of channels.
        """
        output = super().forward(features)
        return output._replace(contracted=output.seen)
