"""q(z | x), what is drawn for an image, over all levels of one draw.

B batch, C features of a bottleneck, d channels of a continuous grid, h w grid.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.bottlenecks.bottleneck import Bottleneck
from tokenizer.classes import Classes
from tokenizer.hierarchy import HierarchicalVQVAE


class Summands(NamedTuple):
    """What a bottleneck is given, (B, C, h, w), in two parts.

    Attributes:
        of_image: of its own features.
        of_stored: of the coarser levels as stored; None of the coarsest.
    """

    of_image: Tensor
    of_stored: Tensor | None

    @property
    def total(self) -> Tensor:
        """Both of the same image, (B, C, h, w)."""
        return self.of_image if self.of_stored is None else self.of_stored + self.of_image

    def pairs(self, rows: slice) -> Tensor:
        """Return the latter of each of some images beside the former of each image, (rows or 1, B, C, h, w)."""
        return self.of_image[None] if self.of_stored is None else self.of_stored[rows, None] + self.of_image


@torch.no_grad()
def summands(
    model: HierarchicalVQVAE, images: Tensor, stored: Sequence[Tensor], classes: Classes = None
) -> list[Summands]:
    """Return what each bottleneck is given of images where the coarser levels are as stored.

    Projections are linear: image m beside what is stored of image n gives the posterior of both,
    `of_stored[n] + of_image[m]`. So pairs need no pass through the networks.

    Args:
        model: in eval mode.
        images: float32 (B, C, H, W) in [-1, 1].
        stored: what is stored of as many images, coarse to fine.
        classes: of the images, see `HierarchicalVQVAE.forward`.
    """
    found: list[Summands] = []
    seen = None  # of all coarser levels, on the grid of the last one
    levels = zip(model.features(images, classes), model.projections, _by_bottleneck(model, stored), strict=True)
    for level, (features, projection, (bottleneck, own)) in enumerate(levels):
        assert isinstance(projection, nn.Conv2d)
        weight, width = projection.weight, features.shape[1]  # those of the coarser levels come first
        of_image, of_stored = F.conv2d(features, weight[:, -width:], projection.bias), None
        if seen is not None:
            of_stored = F.conv2d(model.context_decoders[level - 1](seen), weight[:, :-width])
        found.append(Summands(of_image, of_stored))
        seen = model.stack(seen, bottleneck.lookup(own), level)
    return found


def log_posterior(model: HierarchicalVQVAE, posteriors: Sequence[Tensor], stored: Sequence[Tensor]) -> Tensor:
    """Return log q(z | x) in nats, summed over levels; float64, of the leading sizes that both broadcast to.

    Args:
        model: whose bottlenecks draw.
        posteriors: (…, C, h, w) of each bottleneck: `Bottled.posterior`, or `summands` added up.
        stored: what is stored, (…, h, w) or (…, d, h, w), coarse to fine.
    """
    parts = zip(_by_bottleneck(model, stored), posteriors, strict=True)
    return torch.stack([bottleneck.log_posterior(given, own) for (bottleneck, own), given in parts]).sum(0)


def _by_bottleneck(model: HierarchicalVQVAE, stored: Sequence[Tensor]) -> Iterator[tuple[Bottleneck, list[Tensor]]]:
    """Yield each bottleneck with the grids that are its own."""
    grids = iter(stored)
    for bottleneck in model.bottlenecks:
        yield bottleneck, [next(grids) for _ in bottleneck.sizes]
