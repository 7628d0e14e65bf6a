"""Whether samples repeat training images: how near each comes to one, beside held-out images, which cannot repeat any.

N samples or held-out images, T training images, d numbers of each.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.metrics.metric import Metric, Rows
from pipelines.metrics.subject import Seen, Subject

# Share of held-out images nearer to the training set than the distance that counts as too near.
TOO_NEAR = 0.01
# Images of either kind that are looked at, and side in pixels at which their pixels are compared.
QUERIES, PIXELS_SIDE = 2000, 16
# Training images that queries are held against at once.
ROWS = 2000
# Samples nearest to a training image that are named.
NAMED = 20


class Nearest(NamedTuple):
    """Each image's nearest training image; of several the first.

    Attributes:
        distances: float64 (N,); 0 for equal ones.
        rows: of the training images, int64 (N,).
    """

    distances: Tensor
    rows: Tensor


def nearest(queries: Tensor, training: Tensor, hamming: bool = False) -> Nearest:
    """Return the nearest training image of each of some images.

    Args:
        queries: (N, d).
        training: (T, d), of the same type; in blocks made floats.
        hamming: take the share of numbers that differ, not the Euclidean distance.
    """
    asked = queries.float()
    least, rows = torch.full((len(asked),), torch.inf), torch.zeros(len(asked), dtype=torch.int64)
    for start in range(0, len(training), ROWS):
        block = training[start : start + ROWS].float()
        # The product is near enough to choose by, but no equal images are 0 apart in it.
        found, place = torch.cdist(asked, block, p=0.0 if hamming else 2.0).min(1)
        rows = torch.where(found < least, place + start, rows)
        least = torch.minimum(found, least)
    differences = asked.double() - training[rows].double()
    apart = (differences != 0).double().mean(1) if hamming else differences.norm(dim=1)
    return Nearest(apart, rows)


def copies(samples: Tensor, held_out: Tensor) -> dict[str, Any]:
    """Return what the distances to the nearest training image say of samples, beside held-out images.

    `nearer_share` is the chance that a random sample is nearer than a random held-out image, ties by half: 0.5 where
    samples are as new as held-out images, 1 where all are copies. `z` measures how far it is from 0.5 by chance, in
    standard deviations (Mann and Whitney, ties accounted for): below -5 samples copy. `too_near_share` is the share of
    samples at least as near as the nearest 1% of held-out images, and sees a few copies among new samples too; of
    distances that take few values, as of codes, look at the share of held-out images beside it.

    Args:
        samples: distances, float64 (N,).
        held_out: the same of held-out images (M,).

    Source: Meehan et al. 2020, section 3.1 (the test, here over the whole space at once).
    """
    ordered = held_out.sort().values
    below, upto = (torch.searchsorted(ordered, samples, right=right) for right in (False, True))
    further = (below + upto).double().sum() / 2  # held-out images nearer than a sample, over all pairs
    n, m = len(samples), len(held_out)
    _, ties = torch.cat([samples, held_out]).unique(return_counts=True)
    ties = ties.double()
    pairs = (n + m) * (n + m - 1)
    variance = n * m / 12 * (n + m + 1 - float((ties**3 - ties).sum()) / pairs)
    threshold = ordered[int(TOO_NEAR * (m - 1))]
    shares = {"too_near_share": float(threshold), "equal_share": 0.0}
    return {
        "median": float(samples.median()),
        "median_held_out": float(held_out.median()),
        "nearer_share": 1 - float(further) / (n * m),
        "z": (float(further) - n * m / 2) / variance**0.5 if variance > 0 else 0.0,
        **{name: float((samples <= most).double().mean()) for name, most in shares.items()},
        **{f"{name}_held_out": float((held_out <= most).double().mean()) for name, most in shares.items()},
    }


class Copies(Metric):
    """How near samples come to training images in pixels, features and codes, beside val images; see `copies`.

    Of at most 2,000 of either, evenly spaced. `nearest` names the samples that come nearest in features, nearest first,
    and the training image of each: their places in the packed shards.
    """

    name = "copies"
    needs = tuple(f"{name}.{what}" for name in ("train", "val", "samples") for what in ("pixels", "codes", "features"))
    less_is_better = tuple(f"{what}.too_near_share" for what in ("pixels", "codes", "features"))

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        assert subject.tokenizer
        self.rows: dict[str, dict[str, Rows]] = {}
        side, images = min(subject.tokenizer.image_size, PIXELS_SIDE), subject.tokenizer.channels
        sizes = {"pixels": (images * side**2, torch.uint8)}
        if all(subject.tokenizer.codebook_sizes):  # of numbers none are equal
            sizes["codes"] = (sum(h * w for h, w in subject.tokenizer.grids), torch.int32)
        for name in ("train", "val", "samples"):
            count = subject.splits[name].count
            self.rows[name] = {what: Rows(count, size, dtype=dtype) for what, (size, dtype) in sizes.items()}

    def update(self, seen: Seen) -> None:
        rows = self.rows[seen.split]
        rows["pixels"].put(seen.rows, shrunk(seen.pixels, PIXELS_SIDE).flatten(1))
        if "codes" in rows:
            rows["codes"].put(seen.rows, torch.cat([grid.flatten(1) for grid in seen.codes], 1))

    def compute(self) -> dict[str, Any]:
        found = {name: {what: one.all() for what, one in rows.items()} for name, rows in self.rows.items()}
        for name, of_split in found.items():
            of_split["features"] = self.subject.gathered[f"{name}.features"]
        looked_at = {name: evenly(len(found[name]["pixels"])) for name in ("val", "samples")}
        figures: dict[str, Any] = {"images": len(looked_at["samples"]), "held_out_images": len(looked_at["val"])}
        figures["training_images"] = len(found["train"]["pixels"])
        for what, training in found["train"].items():
            held_out, samples = (
                nearest(found[name][what][rows], training, what == "codes") for name, rows in looked_at.items()
            )
            figures[what] = copies(samples.distances, held_out.distances)
        first = samples.distances.argsort(stable=True)[:NAMED]  # in features, the last
        figures["nearest"] = {
            "samples": looked_at["samples"][first].tolist(),
            "training": self.subject.splits["train"].rows[samples.rows[first].numpy()].tolist(),
            "distances": samples.distances[first].tolist(),
        }
        return figures

    @classmethod
    def table(cls, figures: dict[str, Any]) -> list[str]:
        lines = [
            f"copies: {figures['images']} samples beside {figures['held_out_images']} val images, "
            f"nearest of {figures['training_images']} training images",
            f"  {'':<10} {'nearer than val':>15} {'z':>7} {'too near':>9} {'val':>7} {'equal':>7} {'val':>7}",
        ]
        for what in ("pixels", "codes", "features"):
            if told := figures.get(what):
                shares = (f"{what}{of}" for what in ("too_near_share", "equal_share") for of in ("", "_held_out"))
                too_near, too_near_val, equal, equal_val = (f"{told[share]:.1%}" for share in shares)
                lines.append(
                    f"  {what:<10} {told['nearer_share']:>15.1%} {told['z']:>7.1f} {too_near:>9} {too_near_val:>7} "
                    f"{equal:>7} {equal_val:>7}"
                )
        return lines


def evenly(count: int) -> Tensor:
    """Return at most 2,000 rows, evenly spaced: int64."""
    return torch.linspace(0, count - 1, min(count, QUERIES), dtype=torch.float64).round().long()


def shrunk(pixels: Tensor, side: int) -> Tensor:
    """Return uint8 images (B, C, H, W) at so many pixels a side at most, antialiased."""
    if pixels.shape[-1] <= side:
        return pixels
    small = F.interpolate(pixels.float(), (side, side), mode="bilinear", antialias=True)
    return small.round().to(torch.uint8)
