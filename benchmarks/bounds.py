"""Bounds of tokenizers by themselves, beside one another: rate under the prior that has learned nothing + distortion.

    python -m benchmarks.bounds IMAGES TOKENIZER [TOKENIZER ...]

Of codes the rate is log K each, of a VAE's numbers KL(q(z | x) || N(0, I)). The distortion is that of `evaluate`, and
so are the scales that are fitted to training images for it. No prior is needed; a trained one would lower the rate.
"""

import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.measure import print_table
from pipelines.compute.devices import ComputeConfig
from pipelines.data.images import ImageShards, to_unit_range
from pipelines.data.noise import noise_for
from pipelines.metrics.bound import bound_figures, fitted_scales, grey_levels, pixel_nats
from tokenizer import HierarchicalVQVAE

BATCH = 64


class Bounds(NamedTuple):
    """Of a tokenizer on a val split: MSE in [-1, 1], bits per image, bits per dimension with a 95% interval."""

    mse: float
    rate_bits: float
    rate: float
    distortion: float
    bound: float
    interval: list[float] | None


@torch.no_grad()
def bounds(tokenizer: HierarchicalVQVAE, train: ImageShards, val: ImageShards) -> Bounds:
    """Return the bounds of a tokenizer in eval mode, of one draw where it draws."""
    scales = fitted_scales(tokenizer, train, seed=0).float()[:, None, None]
    streams = [(0, level) for level in range(len(tokenizer.bottlenecks))]
    uniform = sum(math.prod(level.grid) * math.log(level.codebook_size or 1) for level in tokenizer.levels)
    rates, distortions, errors = [], [], []
    for first in range(0, len(val), BATCH):
        rows = range(first, min(first + BATCH, len(val)))
        pixels = torch.stack([torch.from_numpy(val.pixels(row)) for row in rows])
        output = tokenizer(to_unit_range(pixels), noise_for(tokenizer, streams, rows))
        rate = tokenizer.bottleneck.rate
        drawn = [level.losses[rate].double() for level in output.levels] if rate else []
        rates.append(sum(drawn, torch.full((len(rows),), 0.0 if rate else uniform, dtype=torch.float64)))
        nats = pixel_nats(pixels, grey_levels(output.reconstruction), scales)
        distortions.append(nats.flatten(1).sum(1, dtype=torch.float64))
        errors.append((output.reconstruction - to_unit_range(pixels)).square().flatten(1).mean(1))
    rate, of = torch.cat(rates), "without_class"
    figures = bound_figures({of: rate}, torch.cat(distortions), val.channels * val.size**2)
    return Bounds(
        mse=float(torch.cat(errors).mean()),
        rate_bits=float(rate.mean() / math.log(2)),
        rate=figures["rate_bits_per_dim"][of],
        distortion=figures["distortion_bits_per_dim"],
        bound=figures["bits_per_dim"][of],
        interval=figures["bits_per_dim_interval95"][of],
    )


def main(images: Path, tokenizers: list[Path]) -> None:
    """Print the bounds of tokenizers, each a folder, on the val split of a folder of packed images."""
    train, val = (ImageShards(images, split, ComputeConfig().cache) for split in ("train", "val"))
    rows = []
    for folder in tokenizers:
        found = bounds(HierarchicalVQVAE.from_pretrained(folder), train, val)
        low, high = found.interval or (math.nan, math.nan)
        figures = [f"{one:.4f}" for one in (found.rate, found.distortion, found.bound)]
        rows.append([folder, f"{found.mse:.5f}", f"{found.rate_bits:.0f}", *figures, f"{low:.4f} to {high:.4f}"])
    print_table(["tokenizer", "MSE", "bits per image", "rate", "distortion", "bound", "95% over images"], rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]])
