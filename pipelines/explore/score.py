"""How unlikely images are: what reconstructions err by, the bound of -log p, and where in the image both come from.

B batch, C channels, H W pixels, h w grid.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipelines.data.images import to_unit_range
from pipelines.data.noise import stored_noise
from pipelines.metrics.bound import grey_levels, pixel_nats
from prior import HierarchicalPrior
from tokenizer import Autoencoded, HierarchicalVQVAE
from tokenizer.posterior import log_posterior


class Scores(NamedTuple):
    """Of each image.

    Attributes:
        mse: mean squared error of its values in [-1, 1], float64 (B,).
        distortion: -log p(x | what is stored) of its 8-bit values, in nats, float64 (B,).
        rate: nats of what is stored, float64 (B,): -log p(codes) under the prior; of numbers KL(q(z | x) || N(0, I)),
            or under another prior log q(z | x) - log p(z) of one draw, whose mean is the KL. None of numbers that are
            not drawn, which have no density given the image.
        pixel_nats: the distortion where it is, float32 (B, H, W), summed over channels.
        code_nats: the rate of codes where it is, float64 (B, h, w) per level; none of numbers.
        images: what they were reconstructed as, (B, C, H, W) in [-1, 1].
    """

    mse: Tensor
    distortion: Tensor
    rate: Tensor | None
    pixel_nats: Tensor
    code_nats: list[Tensor]
    images: Tensor

    @property
    def bound(self) -> Tensor | None:
        """Rate + distortion, at least -log p(x) in nats, float64 (B,)."""
        return None if self.rate is None else self.rate + self.distortion


@torch.no_grad()
def score(
    tokenizer: HierarchicalVQVAE,
    prior: HierarchicalPrior | None,
    pixels: Tensor,
    scales: Tensor,
    labels: Tensor | None = None,
    places: Sequence[int] | None = None,
) -> Scores:
    """Score images: the more, the less they are like what the models learned.

    Args:
        tokenizer: in eval mode.
        prior: of its levels; without one codes have no rate, and numbers that of N(0, I).
        pixels: uint8 (B, C, H, W).
        scales: of the likelihood of pixels, float64 (C,), in grey levels: `fitted_scales` of training images.
        labels: class that the models are given of each, int64 (B,); None for none.
        places: of the images, by which numbers are drawn: of each its `stored_place` draws what `encode` stores of it,
            which `evaluate` takes for its bound; from 0 on if None.

    Source: An and Cho 2015 (reconstruction probability); the bound is that of `pipelines.metrics.bound`.
    """
    device = next(tokenizer.parameters()).device
    pixels = pixels.to(device)
    images = to_unit_range(pixels)
    numbers = None in tokenizer.codebook_sizes
    noise = stored_noise(tokenizer, places or range(len(images))) if numbers else None
    output = tokenizer(images, noise, labels)
    decoded = output.reconstruction.clamp(-1, 1)
    nats = pixel_nats(pixels, grey_levels(decoded), scales.float().to(device)[:, None, None])
    rate, maps = None, []
    if numbers and tokenizer.bottleneck.rate:
        rate = _rate_of_numbers(tokenizer, prior, output, labels)
    elif not numbers and prior:
        codes = [grid for level in output.levels for grid in level.stored]
        given = None if labels is None else labels.to(device)
        maps = [level.nats_unchecked(codes[n], codes[:n], given) for n, level in enumerate(prior.levels)]
        rate = torch.stack([level.flatten(1).sum(1) for level in maps]).sum(0)
    mse = (decoded - images).double().square().flatten(1).mean(1)
    distortion = nats.flatten(1).sum(1, dtype=torch.float64)
    return Scores(mse, distortion, rate, nats.sum(1), maps, decoded)


def _rate_of_numbers(
    tokenizer: HierarchicalVQVAE, prior: HierarchicalPrior | None, output: Autoencoded, labels: Tensor | None
) -> Tensor:
    if prior is None or {level.config.network for level in prior.levels} == {"normal"}:
        return torch.stack([level.losses[tokenizer.bottleneck.rate].double() for level in output.levels]).sum(0)
    stored = [level.stored[0] for level in output.levels]
    posteriors = [level.posterior for level in output.levels if level.posterior is not None]  # of all of them
    return log_posterior(tokenizer, posteriors, stored) + prior.nll(stored, labels)


def area_under_roc(scores: Tensor, anomalous: Tensor) -> float:
    """Return the chance that an anomalous image scores higher than another one, equal scores counting half.

    Args:
        scores: (N,).
        anomalous: bool (N,), of which some are true and some are not.

    Raises:
        ValueError: all are alike.

    Source: Hanley and McNeil 1982; by the sum of ranks of Mann and Whitney 1947.
    """
    positive, negative = int(anomalous.sum()), int((~anomalous).sum())
    if not positive or not negative:
        raise ValueError(f"images must be anomalous and not, got {positive} and {negative} of them")
    _, places, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0).double() - (counts - 1) / 2)[places]  # the mean rank of those that are equal
    return float((ranks[anomalous].sum() - positive * (positive + 1) / 2) / (positive * negative))
