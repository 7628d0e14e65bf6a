"""How far the codes of samples are from those of images: distances of their histograms, which need no network.

K codebook_size.
"""

import math
from typing import Any

import torch
from torch import Tensor

from pipelines.metrics.metric import Metric, Rows, title
from pipelines.metrics.subject import Seen, Subject
from tokenizer.bottlenecks.usage import entropy


class CodeHistograms(Metric):
    """Distances between the histograms of the samples' codes and of the val split's, per level of codes.

    `total_variation` is half the sum of the differences of their shares, `jensen_shannon_bits` the divergence of Lin
    1991 in bits; both lie in [0, 1]. Beside them the same between two halves of the val split, its images in turn: what
    chance alone makes of so many, and below which nothing can be told. They see how often codes are drawn, not where.
    """

    name = "codes"
    needs = ("val.codes", "samples.codes")
    less_is_better = ("total_variation", "jensen_shannon_bits")

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        assert subject.tokenizer
        self.sizes = [size or 0 for size in subject.tokenizer.codebook_sizes]
        # Of the samples, and of the val split's even and odd images; whole numbers, whose sums are exact in any order.
        self.counts = [Rows(3, size) for size in self.sizes]

    def update(self, seen: Seen) -> None:
        rows = (
            torch.tensor(seen.rows) % 2 + 1 if seen.split == "val" else torch.zeros(len(seen.rows), dtype=torch.int64)
        )
        for counts, size, codes in zip(self.counts, self.sizes, seen.codes, strict=True):
            for row in range(3) if size else ():
                counts.add(row, torch.bincount(codes[rows.to(codes.device) == row].flatten(), minlength=size))

    def compute(self) -> dict[str, Any]:
        levels: dict[str, Any] = {}
        for number, counts in enumerate(self.counts):
            if not self.sizes[number]:
                continue
            drawn, even, odd = counts.all()
            levels[f"level{number}"] = {
                "total_variation": total_variation(drawn, even + odd),
                "total_variation_of_halves": total_variation(even, odd),
                "jensen_shannon_bits": jensen_shannon_bits(drawn, even + odd),
                "jensen_shannon_bits_of_halves": jensen_shannon_bits(even, odd),
            }
        splits = self.subject.splits
        return levels and {"images": splits["val"].count, "samples": splits["samples"].count, **levels}

    @classmethod
    def table(cls, figures: dict[str, Any]) -> list[str]:
        lines = [
            title(f"codes of {figures['samples']} samples", figures),
            "  distance of histograms, in [0, 1]; halves: of two halves of val, chance alone",
            f"  level  {'total variation':>16} {'halves':>9}   {'Jensen-Shannon, bits':>20} {'halves':>9}",
        ]
        for name, level in figures.items():
            if name.startswith("level"):
                varied, diverged = level["total_variation"], level["jensen_shannon_bits"]
                halves = level["total_variation_of_halves"], level["jensen_shannon_bits_of_halves"]
                number = name.removeprefix("level")
                lines.append(f"  {number:>5}  {varied:>16.4f} {halves[0]:>9.4f}   {diverged:>20.4f} {halves[1]:>9.4f}")
        return lines


def total_variation(one: Tensor, other: Tensor) -> float:
    """Return half the sum of the absolute differences of two histograms' shares, in [0, 1]; counts (K,)."""
    return float((one / one.sum() - other / other.sum()).abs().sum() / 2)


def jensen_shannon_bits(one: Tensor, other: Tensor) -> float:
    """Return the entropy of the mean of two histograms' shares less the mean of their entropies, in bits, in [0, 1].

    Source: Lin 1991, equation 4.1, with equal weights.
    """
    shares = one / one.sum(), other / other.sum()
    return max(0.0, _bits((shares[0] + shares[1]) / 2) - (_bits(shares[0]) + _bits(shares[1])) / 2)


def _bits(shares: Tensor) -> float:
    return entropy(shares) / math.log(2)
