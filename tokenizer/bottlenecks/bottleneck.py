"""What a bottleneck is: the hierarchy, its training and its figures know no more of one than this.

A family is one file of this room: its settings, the module, and its learner if it has one.

B batch, C features, D channels that the decoder sees, d channels of a continuous grid, h w grid, K values of a grid.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

# A level that uses less of its codes, or of its units, has collapsed.
LEAST_USED = 0.1


class StoredGrid(NamedTuple):
    """One grid that stands for an image in shards: a level, for the priors.

    Attributes:
        grid: (h, w).
        codebook_size: K, how many values a cell can take; None where it holds real numbers.
        channels: d, numbers of a cell; 1 where K is given.
    """

    grid: tuple[int, int]
    codebook_size: int | None
    channels: int = 1


class Bottled(NamedTuple):
    """What a bottleneck makes of a batch of features.

    Attributes:
        seen: (B, D, h, w), what the decoder sees; gradients go through it to the features.
        stored: what shards hold of it: int64 (B, h, w) grids, or one float32 (B, d, h, w).
        losses: by name, float (B,) each, to be weighted by the settings' `weights`.
        observed: float32 (B*h*w, channels), detached: what a learner and figures look at; empty where they do not.
        averaged: by name, (B, n) each: what `Settings.batch_losses` wants the mean of over the global batch.
        posterior: the features that q(z | x) is made of, see `Bottleneck.log_posterior`; None where nothing is drawn.
        contracted: (B, …), what the loss "contraction" is to hold still while images move; see `Settings.probes`.
    """

    seen: Tensor
    stored: tuple[Tensor, ...]
    losses: dict[str, Tensor]
    observed: Tensor
    averaged: Mapping[str, Tensor] = {}
    posterior: Tensor | None = None
    contracted: Tensor | None = None


class Figures(Protocol):
    """Figures of a bottleneck over a split: sums that add up over batches and ranks, then numbers by name."""

    sums: Sequence[Tensor]

    def update(self, output: Bottled, mask: Tensor) -> None:
        """Add a batch; mask (B,) is 1 for images that count, 0 for filling."""

    def compute(self) -> list[dict[str, float]]:
        """Return the figures of what has been added, of each stored grid."""


class Bottleneck(Protocol):
    """A module between encoder features and decoder input.

    Attributes:
        features: C, channels that it reads.
        channels: D, channels that it gives.
        sizes: K of each stored grid; None where it is continuous.
        noise_channels: channels of the standard normal noise that it is given in training; 0 for none.
    """

    features: int
    channels: int
    sizes: tuple[int | None, ...]
    noise_channels: int

    def __call__(self, features: Tensor, noise: Tensor | None = None) -> Bottled:
        """Features (B, C, h, w) of any precision through the bottleneck. Pure: no buffer changes.

        Args:
            features: (B, C, h, w).
            noise: float32 (B, noise_channels, h, w); None for none.
        """

    def lookup(self, stored: Sequence[Tensor]) -> Tensor:
        """Return what the decoder sees (B, D, h, w) for what is stored."""

    def log_posterior(self, posterior: Tensor, stored: Sequence[Tensor]) -> Tensor:
        """Return log q(z | x) in nats of what is stored, summed over the grid; float64, of the leading sizes of both.

        A density where numbers are stored. Asked only of bottlenecks that take noise; the others need not have it.

        Args:
            posterior: features (…, C, h, w), as `Bottled.posterior` holds them.
            stored: what is stored, (…, h, w) or (…, d, h, w) each. Leading sizes broadcast: (N, 1) and (M,) make pairs.
        """

    def blank(self) -> Tensor:
        """Return what stands for a level that is absent, (D,)."""

    def figures(self) -> Figures:
        """Return figures of validation that have seen nothing yet."""


class Place(NamedTuple):
    """Where a micro-batch lies in its step: it holds images first, first + 1, … of so many, drawn with a seed."""

    first: int
    of: int
    seed: int


class Learner(Protocol):
    """What moves a bottleneck where gradients do not, once per optimizer step. Its tensors are training's alone."""

    def start(self, bottleneck: Any, observed: Tensor, seed: int) -> None:
        """Begin from what the bottleneck observes (N, C) of the first batch, the same on every rank."""

    def statistics(self, bottleneck: Any, output: Bottled, place: Place) -> Sequence[Tensor]:
        """Return float tensors that add up over micro-batches and ranks."""

    def update(self, bottleneck: Any, statistics: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Take one step with sums of all micro-batches and ranks; return what is counted of it, by name."""


@dataclass(frozen=True, kw_only=True)
class VectorSizes:
    """What all vector quantisers are told of a level: K, D, and whether vectors are of unit length."""

    codebook_size: int
    code_dim: int
    normalize: bool


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a family: how it is built, and what of it is trained and how.

    Attributes:
        of_model: names of the settings that are part of the model; the rest is training's.
        unread: names of what it is told by `VectorSizes` and does not use.
        rate: name of the loss that is what a continuous level takes of an image, KL(q || N(0, I)) in nats; "" where
            numbers are not drawn, and of codes, which take what their prior says.
        called: what a tokenizer of this family is called, as a card says it.
        mend: what brings codes or units into use that are not.
        whole_batch: whether it has losses that are no means over images, but of the global batch as a whole. A step is
            then not the sum of its micro-batches, and must be one.
        probes: backward passes that the loss "contraction" may take per level: the squared norm of the Jacobian of
            `Bottled.contracted` by the images, which training adds to the bottleneck's own; 0 where there is none.
    """

    of_model: ClassVar[tuple[str, ...]] = ()
    unread: ClassVar[tuple[str, ...]] = ()
    rate: ClassVar[str] = ""
    called: ClassVar[str] = "autoencoder"
    mend: ClassVar[str] = "a lower learning rate or fewer codes"

    probes = 0

    @property
    def whole_batch(self) -> bool:
        """See the class: those that have `batch_losses`."""
        return type(self).batch_losses is not Settings.batch_losses

    def build(self, sizes: VectorSizes) -> Any:
        """Return a `Bottleneck` for one level."""
        raise NotImplementedError

    def weights(self, num_levels: int, num_values: int) -> dict[str, float]:
        """Return the weight of each of its losses, for N levels and images of so many values."""
        return {}

    def shares(self, step: int) -> dict[str, float]:
        """Return by name which share of its weight a loss has in a step of training; 1 where it is not named."""
        return {}

    def batch_losses(self, averaged: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return scalar losses by name of what is averaged over the global batch, and of nothing else.

        Args:
            averaged: the mean (n,) of each `Bottled.averaged`, the same on every rank.
        """
        return {}

    def warnings(self, figures: Mapping[str, float]) -> list[str]:
        """Return what to warn of where a stored grid has these figures, as what goes on from "level N"."""
        if (usage := figures.get("usage", 1.0)) < LEAST_USED:
            return [f"uses {usage:.1%} of its codes: it has collapsed, and samples will be noise; try {self.mend}"]
        if (alive := figures.get("alive", 1.0)) < LEAST_USED:
            return [f"uses {alive:.1%} of its units, the others are dead: it has collapsed; try {self.mend}"]
        return []

    def learner(self, bottleneck: Any) -> Any:
        """Return what moves the bottleneck besides gradients, a `Learner`; None where gradients move everything."""
        return None


def per_image(values: Tensor) -> Tensor:
    """Return the mean of each image's values: (B, …) to (B,)."""
    return values.flatten(1).mean(1)


def no_observation(features: Tensor) -> Tensor:
    """Return what a bottleneck without learner observes: nothing."""
    return torch.empty(0, features.shape[1], device=features.device)
