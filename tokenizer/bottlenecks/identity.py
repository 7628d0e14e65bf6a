"""No bottleneck but the number of channels: a plain autoencoder.

B batch, D code_dim, h w grid.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokenizer.bottlenecks.averages import Averages, moments, variances
from tokenizer.bottlenecks.bottleneck import Bottled, Settings, VectorSizes
from tokenizer.bottlenecks.numbers import Numbers
from tokenizer.checks import float_tensor

# A unit whose standard deviation over images is at most this share of its root mean square is dead: it stands still.
ALIVE = 0.01


@dataclass(frozen=True, kw_only=True)
class IdentityConfig(Settings):
    """There is nothing to choose."""

    unread: ClassVar[tuple[str, ...]] = ("codebook_size", "normalize")
    mend: ClassVar[str] = "a lower learning rate or fewer channels"

    def build(self, sizes: VectorSizes) -> "Identity":
        """Return what passes code_dim numbers per cell."""
        return Identity(sizes.code_dim)


class Identity(Numbers):
    """Features are what is seen and stored, as they are; always in float32.

    Nothing draws them towards N(0, I): how far they are from it, the figures tell.

    Args:
        code_dim: D.

    Source: Hinton and Salakhutdinov 2006.
    """

    def __init__(self, code_dim: int) -> None:
        super().__init__(code_dim, code_dim)

    def forward(self, features: Tensor, noise: Tensor | None = None) -> Bottled:
        """Pass features (B, D, h, w).

        Raises:
            ValueError: they are no floats, or have another number of channels.
        """
        features = float_tensor("features", features, ("B", self.features, "h", "w"))
        observed = features.detach().movedim(1, -1).flatten(0, 2)
        return Bottled(seen=features, stored=(features,), losses={}, observed=observed)

    def figures(self) -> Averages:
        """Return mean and standard deviation of the numbers, and the share of units that are alive; of nothing yet.

        The deviation is over images: the root of the mean variance of units, each in its own cell, so that units which
        only differ from one another have none.
        """
        return Averages(self.zero.device, moments, _spread)


def _spread(means: Tensor) -> dict[str, float]:
    of_units, squares = variances(means), means[1].mean(0)  # (D,)
    alive = (of_units > ALIVE**2 * squares).double().mean()
    return {"mean": float(means[0].mean()), "std": float(of_units.mean().sqrt()), "alive": float(alive)}
