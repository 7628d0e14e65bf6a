"""Variants of an image: what else its latents could have been, or what fits its coarse levels as well.

C channels, H W pixels, n variants.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pipelines.data.noise import noise_for
from prior import HierarchicalPrior, Known
from tokenizer import HierarchicalVQVAE


class Varied(NamedTuple):
    """Variants of an image: (n, C, H, W) in [-1, 1], and what they are decoded from, of each level."""

    images: Tensor
    stored: list[Tensor]


@torch.no_grad()
def vary(
    tokenizer: HierarchicalVQVAE,
    prior: HierarchicalPrior | None,
    image: Tensor,
    count: int = 8,
    keep: int | None = None,
    label: int | None = None,
    seed: int = 0,
    temperature: float = 1.0,
) -> Varied:
    """Return variants of an image, for a look at what latents leave open, or as augmentation.

    Variant i is a function of weights, image, settings, seed and i.

    Args:
        tokenizer: in eval mode.
        prior: of its levels; looked at where levels are kept.
        image: (1, C, H, W) in [-1, 1].
        count: n.
        keep: levels, from the coarsest on, that stay as they are encoded; the finer ones are drawn from the prior given
            them. None draws q(z | x) again where bottlenecks draw, and keeps all levels but the finest where not.
        label: class that the models are given; None for none.
        seed: of all that is drawn.
        temperature: of what the prior draws.

    Raises:
        ValueError: nothing is left to be kept or to be drawn, or it needs a prior.
    """
    levels = len(tokenizer.levels)
    classes = None if label is None else [label] * count
    if keep is None and any(part.noise_channels for part in tokenizer.bottlenecks):
        streams = [(seed, level) for level in range(len(tokenizer.bottlenecks))]
        stored = tokenizer.encode(image.expand(count, -1, -1, -1), noise_for(tokenizer, streams, range(count)), classes)
        return Varied(tokenizer.decode(stored, classes), stored)
    if levels == 1:
        raise ValueError("a tokenizer of one level that draws nothing has no variants: there is nothing finer to draw")
    keep = levels - 1 if keep is None else keep
    if not 0 < keep < levels:
        raise ValueError(f"of {levels} levels 1 to {levels - 1} can be kept and the finer ones drawn, got {keep}")
    if prior is None:
        raise ValueError("levels that are drawn again need a prior; give one")
    encoded = tokenizer.encode(image, classes=classes and classes[:1])
    kept = [level.expand(count, *level.shape[1:]) for level in encoded[:keep]]
    known = [Known(level, torch.ones(count, *level.shape[-2:], dtype=torch.bool)) for level in kept]
    stored = prior.sample(classes, seed, temperature, indices=range(count), known=known)
    return Varied(tokenizer.decode(stored, classes), stored)
