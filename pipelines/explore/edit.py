"""Along the direction of an attribute: from the mean of one class towards that of another.

N images, C channels, H W pixels, D channels that the decoder sees, h w grid, n strengths.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenizer import HierarchicalVQVAE

# Images encoded at once.
BATCH = 64


@torch.no_grad()
def mean_seen(tokenizer: HierarchicalVQVAE, images: Tensor) -> list[Tensor]:
    """Return the mean over images (N, C, H, W) of what the decoder sees of them, float32 (D, h, w) per bottleneck."""
    sums: list[Tensor] = []
    for batch in images.split(BATCH):
        parts = [level.double().sum(0) for level in tokenizer.seen(tokenizer.encode(batch))]
        sums = [one + other for one, other in zip(sums, parts, strict=True)] if sums else parts
    return [(one / len(images)).float() for one in sums]


def direction(tokenizer: HierarchicalVQVAE, source: Tensor, target: Tensor) -> list[Tensor]:
    """Return what leads from the mean of some images to that of others, (D, h, w) per bottleneck.

    Args:
        tokenizer: in eval mode.
        source: images (N, C, H, W) in [-1, 1] that lack the attribute, or are of one class.
        target: images that have it, or are of another.

    Source: Radford et al. 2016, section 6.3.2; Larsen et al. 2016, section 4.1.
    """
    return [b - a for a, b in zip(mean_seen(tokenizer, source), mean_seen(tokenizer, target), strict=True)]


@torch.no_grad()
def edit(tokenizer: HierarchicalVQVAE, image: Tensor, towards: Sequence[Tensor], strengths: Sequence[float]) -> Tensor:
    """Return an image moved along a direction: (n, C, H, W) in [-1, 1], by each of the strengths.

    Strength 0 is the reconstruction, 1 the whole way from mean to mean, negative ones lead away. The decoder sees the
    moved vectors themselves, of codes too: they are not quantised again, as most steps would then change nothing.

    Args:
        tokenizer: in eval mode; a conditional one is given no class, which would hold the image to its own.
        image: (1, C, H, W) in [-1, 1].
        towards: a `direction`, (D, h, w) per bottleneck.
        strengths: n numbers.
    """
    seen = tokenizer.seen(tokenizer.encode(image))
    by = torch.tensor(strengths, dtype=torch.float32, device=image.device)[:, None, None, None]
    return tokenizer.decode_seen([level + by * step for level, step in zip(seen, towards, strict=True)])
