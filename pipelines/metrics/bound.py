"""The bound on the pixels: what an image takes in its codes, and in its 8-bit values given those.

log p(x) >= log p(x, codes) = log p(codes) + log p(x | codes), as x could have come of other codes too. The rate is
-log p(codes) under the priors, the distortion -log p(x | codes) around the reconstruction.

B batch, C channels, H W pixels.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.data.batches import ValidationBatches, epoch_permutation
from pipelines.data.codes import Codes
from pipelines.data.images import ImageShards, to_unit_range
from pipelines.data.noise import noise_for
from pipelines.errors import StageError
from pipelines.progress import progress_bar
from tokenizer import HierarchicalVQVAE

# Images at once; nothing but rounding depends on it.
BATCH_SIZE = 64
# Training images that scales are fitted to, and the shards that they are drawn from, so that few are fetched.
FITTED_IMAGES, FITTED_SHARDS = 1000, 8
# Scales to choose from, in grey levels. The best of them costs less than 0.001 bits a value more than the best of all.
SCALES = [2 ** (power / 16) for power in range(-4 * 16, 7 * 16 + 1)]
# Reconstructions are counted to an eighth of a grey level while scales are fitted.
PARTS = 8


def pixel_nats(values: Tensor, means: Tensor, scales: Tensor | float) -> Tensor:
    """Return -log p in nats of 8-bit values under logistics around their means, of the shape of all three.

    P(v) = S((v + 1/2 - m) / s) - S((v - 1/2 - m) / s), S the logistic function; 0 and 255 take the tails, so that the
    sum over all 256 values is 1. Written as S(a) S(-b) (1 - exp(b - a)), which is exact where that difference would be
    rounded to 0.

    A Gaussian in its place was looser: errors of reconstructions are small in flat parts and large at edges, and the
    logistic has the heavier tails.

    Args:
        values: whole numbers in [0, 255].
        means: float, in grey levels.
        scales: above 0, in grey levels.

    Source: Salimans et al. 2017, section 2.1, with one component.
    """
    scales = torch.as_tensor(scales, dtype=means.dtype, device=means.device)
    up_to = F.logsigmoid((values + 0.5 - means) / scales).masked_fill(values == 255, 0)
    from_on = F.logsigmoid((means - values + 0.5) / scales).masked_fill(values == 0, 0)
    inside = torch.log(-torch.expm1(-1 / scales)) * ((values > 0) & (values < 255))
    return -(up_to + from_on + inside)


def grey_levels(images: Tensor) -> Tensor:
    """[-1, 1] to [0, 255]."""
    return (images.float() + 1) * 127.5


@torch.no_grad()
def fitted_scales(tokenizer: HierarchicalVQVAE, shards: ImageShards, seed: int) -> Tensor:
    """Return the likeliest scale of each channel, float64 (C,), for a seeded sample of at most FITTED_IMAGES images.

    Args:
        tokenizer: in eval mode.
        shards: the train split.
        seed: of the sample.
    """
    device = next(tokenizer.parameters()).device
    means = 255 * PARTS + 1
    counts = torch.zeros(shards.channels, 256 * means, dtype=torch.int64)
    chosen = epoch_permutation(seed, 0, shards.sizes, FITTED_SHARDS)[:FITTED_IMAGES]
    with progress_bar(len(chosen), "fit the scales of the bound", "images") as bar:
        for first in range(0, len(chosen), BATCH_SIZE):
            rows = chosen[first : first + BATCH_SIZE]
            pixels = torch.from_numpy(np.stack([shards.pixels(int(row)) for row in rows]))  # (B, C, H, W)
            output = grey_levels(tokenizer(to_unit_range(pixels.to(device))).reconstruction).cpu()
            cells = (pixels.long() * means + (output * PARTS).round().long()).transpose(0, 1).flatten(1)
            for count, channel in zip(counts, cells, strict=True):
                count += torch.bincount(channel, minlength=len(count))
            bar.update(len(rows))
    return torch.tensor([_likeliest_scale(count, means) for count in counts], dtype=torch.float64)


def _likeliest_scale(counts: Tensor, means: int) -> float:
    """Return the one of SCALES that makes a channel's values likeliest; their counts are by value and mean."""
    cells = counts.nonzero()[:, 0]
    values, centres, weights = cells // means, (cells % means).double() / PARTS, counts[cells].double()

    def cost(number: int) -> float:
        return float((weights * pixel_nats(values, centres, SCALES[number])).sum())

    low, high = 0, len(SCALES) - 1
    while low < high:  # the cost falls up to the best scale and rises after it
        middle = (low + high) // 2
        low, high = (low, middle) if cost(middle) <= cost(middle + 1) else (middle + 1, high)
    return SCALES[low]


@torch.no_grad()
def distortion_nats(tokenizer: HierarchicalVQVAE, shards: ImageShards, codes: Codes, scales: Tensor) -> Tensor:
    """Return -log p(x | codes) of each image in nats, float64 (N,) on the CPU.

    Args:
        tokenizer: in eval mode.
        shards: a split of images.
        codes: of the same split, one of each image, in the same order.
        scales: (C,) in grey levels.

    Raises:
        StageError: there are not as many codes as images.
    """
    if len(codes) != len(shards):
        raise StageError(f"{shards.folder} holds {len(shards)} images but {len(codes)} codes of them are there")
    device = next(tokenizer.parameters()).device
    scales = scales.float().to(device)[:, None, None]
    nats = torch.zeros(len(shards), dtype=torch.float64)
    with progress_bar(len(shards), "evaluate bound", "images") as bar:
        for batch in ValidationBatches(len(shards), BATCH_SIZE):
            rows = [row for row in batch if row >= 0]
            pixels = torch.from_numpy(np.stack([shards.pixels(row) for row in rows])).to(device)
            means = grey_levels(tokenizer.decode([grid.to(device) for grid in codes.batch(rows)[0]]))
            nats[rows] = pixel_nats(pixels, means, scales).flatten(1).sum(1, dtype=torch.float64).cpu()
            bar.update(len(rows))
    return nats


@torch.no_grad()
def kl_nats(tokenizer: HierarchicalVQVAE, shards: ImageShards, seed: int) -> Tensor:
    """Return the rate of continuous levels under N(0, I), of each image in nats: KL(q(z | x) || N(0, I)), float64 (N,).

    That of a finer level depends on what was drawn of the coarser ones: it is taken where they are drawn, once.

    Args:
        tokenizer: in eval mode, its bottlenecks having a loss "kl".
        shards: a split of images.
        seed: of what is drawn.

    Source: Kingma and Welling 2014, equation 3.
    """
    device = next(tokenizer.parameters()).device
    nats = torch.zeros(len(shards), dtype=torch.float64)
    for batch in ValidationBatches(len(shards), BATCH_SIZE):
        rows = [row for row in batch if row >= 0]
        pixels = torch.from_numpy(np.stack([shards.pixels(row) for row in rows])).to(device)
        noise = noise_for(tokenizer, [(seed, level) for level in range(len(tokenizer.bottlenecks))], rows)
        levels = tokenizer(to_unit_range(pixels), noise).levels
        nats[rows] = torch.stack([level.losses["kl"].double() for level in levels]).sum(0).cpu()
    return nats


def bound_figures(rates: dict[str, Tensor], distortion: Tensor, dims: int) -> dict[str, Any]:
    """Return the bound in bits per dimension, rate + distortion, with a 95% interval over images.

    Args:
        rates: -log p(codes) of each image in nats, (N,) each: "given_class" bounds -log p(x | class), "without_class"
            bounds -log p(x).
        distortion: -log p(x | codes) of the same images in nats, (N,).
        dims: C * H * W.
    """
    unit = math.log(2) * dims
    rates = {name: rate / unit for name, rate in rates.items()}
    bits = {name: rate + distortion / unit for name, rate in rates.items()}  # (N,) each
    return {
        "images": len(distortion),
        "distortion_bits_per_dim": float(distortion.mean() / unit),
        "rate_bits_per_dim": {name: float(rate.mean()) for name, rate in rates.items()},
        "bits_per_dim": {name: float(values.mean()) for name, values in bits.items()},
        "bits_per_dim_interval95": {name: interval95(values) for name, values in bits.items()},
    }


def interval95(values: Tensor) -> list[float] | None:
    """Return the normal 95% interval of a mean over images, mean -+ 1.96 s / sqrt(n); None for one image.

    It tells what other images would change, not what another training would.
    """
    if len(values) < 2:
        return None
    mean, half = float(values.mean()), 1.96 * float(values.std()) / math.sqrt(len(values))
    return [mean - half, mean + half]
