"""The bound on the pixels: what an image takes in its codes, and in its 8-bit values given those.

log p(x) >= log p(x, codes) = log p(codes) + log p(x | codes), as x could have come of other codes too. The rate is
-log p(codes) under the priors, the distortion -log p(x | codes) around the reconstruction.

B batch, C channels, H W pixels.
"""

import math
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.data.batches import epoch_permutation
from pipelines.data.images import ImageShards, to_unit_range
from pipelines.metrics.metric import Metric, Rows, title
from pipelines.metrics.subject import BATCH_SIZE, Seen, Subject
from pipelines.progress import progress_bar
from tokenizer import HierarchicalVQVAE

# Training images that scales are fitted to, and the shards that they are drawn from, so that few are fetched.
FITTED_IMAGES, FITTED_SHARDS = 1000, 8
# Scales to choose from, in grey levels. The best of them costs less than 0.001 bits per value more than any other.
SCALES = [2 ** (power / 16) for power in range(-4 * 16, 7 * 16 + 1)]
# Reconstructions are counted to an eighth of a grey level while scales are fitted.
PARTS = 8
OF = {"given_class": "p(x | class)", "without_class": "p(x)"}


class Bound(Metric):
    """The bound in bits per dimension, rate + distortion, with a 95% interval over images.

    The rate of what is drawn from q(z | x) is log q(z | x) - log p(z), of one draw: the codes of `gumbel` save the
    entropy of q. Under N(0, I) it is KL(q(z | x) || N(0, I)) itself (Kingma and Welling 2014, equation 3); that of a
    finer level depends on what was drawn of the coarser ones, and is taken where they are drawn, once.
    """

    name = "bound"
    needs = ("val.images", "val.decoded", "val.nats", "val.rate", "train.images")
    less_is_better: ClassVar[tuple[str, ...]] = ("bits_per_dim", "distortion_bits_per_dim", "rate_bits_per_dim")

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        assert subject.tokenizer
        val, self.train = subject.splits["val"], subject.splits["train"].images
        self.scales = scales_of(subject)
        self.distortion = Rows(val.count)
        self.rates = {condition: Rows(val.count) for condition in subject.conditions}
        assert subject.prior
        self.learned = any(level.config.network != "normal" for level in subject.prior.levels)
        self.rate = "" if self.learned else subject.tokenizer.bottleneck.rate  # the loss that is the rate under N(0, I)

    def update(self, seen: Seen) -> None:
        if seen.split != "val":
            return
        scales = self.scales.float().to(seen.decoded.device)[:, None, None]
        nats = pixel_nats(seen.pixels.to(seen.decoded.device), grey_levels(seen.decoded), scales)
        self.distortion.put(seen.rows, nats.flatten(1).sum(1, dtype=torch.float64))
        for condition, rates in self.rates.items():
            rates.put(seen.rows, self._divergence(seen) if self.rate else seen.rate(condition))

    def compute(self) -> dict[str, Any]:
        fitted = {
            "fitted_to_images": min(len(self.train), FITTED_IMAGES),
            "scales_grey_levels": self.scales.tolist(),
        }
        rates = {condition: rows.all() for condition, rows in self.rates.items()}
        return fitted | bound_figures(rates, self.distortion.all(), self.subject.dims)

    def _divergence(self, seen: Seen) -> Tensor:
        """Return KL(q || N(0, I)) of each image in nats, float64 (B,), of the levels as they are drawn."""
        return torch.stack([level.losses[self.rate].double() for level in seen.output.levels]).sum(0).cpu()

    @classmethod
    def table(cls, figures: dict[str, Any]) -> list[str]:
        lines = [
            title("bound on the pixels", figures),
            "  bits per image dimension at most: rate of the codes + distortion",
        ]
        lines.append(f"  {'-log2 of':<13} {'rate':>9} {'distortion':>11} {'bound':>9}   95% interval over images")
        for what, bits in figures["bits_per_dim"].items():
            rate, interval = figures["rate_bits_per_dim"][what], figures["bits_per_dim_interval95"][what]
            shown = "-" if interval is None else f"{interval[0]:z.4f} to {interval[1]:z.4f}"
            lines.append(
                f"  {OF[what]:<13} {rate:>z9.4f} {figures['distortion_bits_per_dim']:>z11.4f} {bits:>z9.4f}   {shown}"
            )
        return lines


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


def scales_of(subject: Subject) -> Tensor:
    """Return the scale of each channel, float64 (C,), fitted once for all metrics of a subject."""
    if "scales" not in subject.gathered:
        assert subject.tokenizer
        train = subject.splits["train"].images
        subject.gathered["scales"] = fitted_scales(subject.tokenizer, train, subject.seed)
    return subject.gathered["scales"]


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
            classes = [shards.read(int(row)).label for row in rows] if shards.class_names else None
            output = grey_levels(tokenizer(to_unit_range(pixels.to(device)), classes=classes).reconstruction).cpu()
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
