"""The bottleneck of a sparse autoencoder: units between 0 and 1, of which few are active at a time.

B batch, D units, h w grid.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokenizer.bottlenecks.averages import Averages
from tokenizer.bottlenecks.bottleneck import Bottled, Settings, VectorSizes, no_observation, per_image
from tokenizer.bottlenecks.numbers import Numbers
from tokenizer.checks import float_tensor

# A mean activation nearer to 0 or 1 would have no finite logarithm.
LEAST_MEAN = 1e-6
# A unit above this is active.
ACTIVE = 0.5


@dataclass(frozen=True, kw_only=True)
class SparseConfig(Settings):
    """What makes units sparse.

    Attributes:
        penalty: "kl", the divergence of each unit's mean activation from rho: each unit is active for few images;
            or "l1", the mean of all activations: few units are active, whichever. What "l1" takes from activations the
            decoder can put back by larger weights, unless `training.weight_decay` holds them.
        rho: the mean activation that "kl" asks for.
        weight: of the penalty, in its mean over units, beside the reconstruction loss.

    Source: Ng 2011, "Sparse autoencoder", section 3 (KL); Olshausen and Field 1996, equation 2 with S(x) = |x| (L1).
    """

    unread: ClassVar[tuple[str, ...]] = ("codebook_size", "normalize")
    called: ClassVar[str] = "sparse autoencoder"
    mend: ClassVar[str] = "a lower weight or a higher rho"

    penalty: Literal["kl", "l1"] = "kl"
    rho: float = 0.05
    weight: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.rho < 1:
            raise ValueError(f"rho must lie between 0 and 1, got {self.rho}")
        if not self.weight >= 0:
            raise ValueError(f"weight must not be negative, got {self.weight}")

    @property
    def whole_batch(self) -> bool:
        """The divergence of a mean is no mean of divergences."""
        return self.penalty == "kl"

    def build(self, sizes: VectorSizes) -> "Sparse":
        """Return the bottleneck of one level, of code_dim units per cell."""
        return Sparse(sizes.code_dim)

    def weights(self, num_levels: int, num_values: int) -> dict[str, float]:
        """Return the weight of the penalty, of its mean over levels."""
        weight = self.weight / num_levels
        return {"activation": 0.0, "divergence": weight} if self.whole_batch else {"activation": weight}

    def batch_losses(self, averaged: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return "divergence", of units whose mean activation is rho from those of these means (D,); nats per unit."""
        mean = averaged["activation"].clamp(LEAST_MEAN, 1 - LEAST_MEAN)
        divergence = self.rho * (self.rho / mean).log() + (1 - self.rho) * ((1 - self.rho) / (1 - mean)).log()
        return {"divergence": divergence.mean()}


class Sparse(Numbers):
    """Features through a sigmoid are what is seen and stored; always in float32.

    The loss "activation" of an image is the mean of its units. A unit is a channel: cells share it, as images do.

    Args:
        code_dim: D.
    """

    def __init__(self, code_dim: int) -> None:
        super().__init__(code_dim, code_dim)

    def forward(self, features: Tensor, noise: Tensor | None = None) -> Bottled:
        """Activate units by features (B, D, h, w).

        Raises:
            ValueError: they are no floats, or have another number of channels.
        """
        features = float_tensor("features", features, ("B", self.features, "h", "w"))
        with torch.autocast(features.device.type, enabled=False):
            units = torch.sigmoid(features)
        return Bottled(
            seen=units,
            stored=(units,),
            losses={"activation": per_image(units)},
            observed=no_observation(features),
            averaged={"activation": units.flatten(2).mean(2)},
        )

    def figures(self) -> Averages:
        """Return the share of an image's units that are above ACTIVE, and of units that ever change; of nothing yet."""
        return Averages(self.zero.device, _active, _shares)


def _active(output: Bottled) -> Tensor:
    """Return the share of each image's cells in which a unit is active, (B, D)."""
    return (output.stored[0] > ACTIVE).double().flatten(2).mean(2)


def _shares(active: Tensor) -> dict[str, float]:
    alive = (active > 0) & (active < 1)  # neither never nor always
    return {"active_share": float(active.mean()), "alive": float(alive.double().mean())}
