"""How likely priors find codes: nats and bits per code, and whether their probabilities are what they say.

B batch, h w code grid, K codebook_size.
"""

import math
from typing import Any

import torch
from torch import Tensor

from pipelines.metrics.metric import Metric, Rows, title
from pipelines.metrics.subject import Judged, Seen, Subject
from tokenizer.bottlenecks.usage import entropy

# Bins of equal width of the likeliest code's probability.
BINS = 15
# A histogram of less, in bits, leaves nothing to save.
LEAST_BITS = 1e-4
GIVEN = {"given_class": "given the class", "without_class": "without class"}


class Rates(Metric):
    """Exact nats and bits per code, beside what knowing nothing or the histogram gives; per level.

    "given_class" is what the priors make of codes whose class they are told, "without_class" of the same codes when
    they are not; the latter only of priors that have learned it. `uniform_bits` is log2 K, `histogram_nats` the entropy
    of the val split's own codes: nothing that knows neither class nor context can do better on it.
    `rate_bits_per_dim` is what the codes of all levels take per value of an image, and no bound on those values.

    `train_bits_per_code` are those of `train_images` images, as many as val has where there are so many, chosen
    by seed, in the first of `encode.views`: far less than val's is a prior that repeats its training. `right` is the
    share of positions where the likeliest code is the one that stands there, `calibration_error` the expected
    calibration error of that code's probability (Guo et al. 2017, equation 3, in 15 bins of equal width), `reliability`
    its bins: their positions, mean probability, and share of right ones.
    """

    name = "prior"
    needs = ("val.nats", "train.nats")
    more_is_better = ("right",)
    less_is_better = (
        *("nats_per_code", "bits_per_code", "nats_per_value", "calibration_error"),
        *("rate_bits_per_image", "rate_bits_per_dim"),
    )

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        assert subject.prior
        self.levels, self.split = subject.prior.levels, subject.splits["val"]
        self.train_images = min(self.split.count, subject.splits["train"].count)
        counts = {"val": self.split.count, "train": self.train_images}
        conditions, number = subject.conditions, len(self.levels)
        self.nats = {(split, one): Rows(count, number) for split, count in counts.items() for one in conditions}
        self.bins = {one: Rows(self.split.num_parts, number, BINS, 3) for one in conditions}
        self.counts = [Rows(1, level.config.codebook_sizes[-1] or 0) for level in self.levels]

    def update(self, seen: Seen) -> None:
        rows = [row for row in seen.rows if seen.split == "val" or row < self.train_images]
        if not rows:
            return
        for condition in self.subject.conditions:
            levels = seen.judged(condition)
            nats = torch.stack([level.nats for level in levels], 1)  # (B, levels)
            self.nats[seen.split, condition].put(rows, nats[: len(rows)])
            if seen.split == "val":
                self.bins[condition].add(seen.part, torch.stack([binned(level) for level in levels]))
        for count, codes in zip(self.counts, seen.codes if seen.split == "val" else (), strict=False):
            if size := count.values.shape[1]:
                count.add(0, torch.bincount(codes.flatten().cpu(), minlength=size))

    def compute(self) -> dict[str, Any]:
        nats = {which: rows.all() for which, rows in self.nats.items()}  # (N, levels) each
        bins = {condition: rows.all().sum(0) for condition, rows in self.bins.items()}  # (levels, BINS, 3) each
        means = {which: found.mean(0).tolist() for which, found in nats.items()}
        figures: dict[str, Any] = {"images": self.split.count, "train_images": self.train_images}
        for number, level in enumerate(self.levels):
            (h, w), size, channels = level.config.levels[-1]
            of = {split: {one: means[split, one][number] for one in bins} for split in ("val", "train")}
            if size is None:  # a density: no bits, and nothing that a histogram could say
                per_value = {one: value / (h * w * channels) for one, value in of["val"].items()}
                figures[f"level{number}"] = {"nats_per_value": per_value}
                continue
            counts = self.counts[number].all()[0]
            per_code = {one: value / (h * w) for one, value in of["val"].items()}
            train = {one: value / (h * w) / math.log(2) for one, value in of["train"].items()}
            figures[f"level{number}"] = {
                "nats_per_code": per_code,
                "bits_per_code": {one: value / math.log(2) for one, value in per_code.items()},
                "train_bits_per_code": train,
                "uniform_bits": math.log2(size),
                "histogram_nats": entropy(counts),
                "histogram_bits": entropy(counts) / math.log(2),
                **calibration({one: found[number] for one, found in bins.items()}),
            }
        if all(level.config.codebook_sizes[-1] for level in self.levels):
            totals = {one: float(nats["val", one].sum(1).mean()) for one in bins}
            figures["rate_bits_per_dim"] = {
                one: total / math.log(2) / self.subject.dims for one, total in totals.items()
            }
            figures["rate_bits_per_image"] = {one: total / math.log(2) for one, total in totals.items()}
        return figures

    @classmethod
    def table(cls, figures: dict[str, Any]) -> list[str]:
        levels = [(name.removeprefix("level"), level) for name, level in figures.items() if name.startswith("level")]
        if "rate_bits_per_dim" not in figures:
            lines = [title("priors", figures), "  level  nats per value, of a density"]
            for name, level in levels:
                found = (f"{nats:z.4f} {GIVEN[what]}" for what, nats in level["nats_per_value"].items())
                lines.append(f"  {name:>5}  {', '.join(found)}")
            return lines
        lines = [
            title("priors", figures),
            f"  level  {'saved: of the bits of the histogram':<39} nats/code  bits/code     saved",
        ]
        for name, level in levels:
            lines.append(_row(name, "uniform, log2 K", level["uniform_bits"]))
            lines.append(_row("", "val histogram, no class, no context", level["histogram_bits"]))
            for what, bits in sorted(level["bits_per_code"].items(), reverse=True):
                lines.append(_row("", f"prior {GIVEN[what]}", bits, level["histogram_bits"]))
                lines.append(
                    _row("", f"… on {figures['train_images']} training images", level["train_bits_per_code"][what])
                )
        rates = ", ".join(f"{bits:z.4f} {GIVEN[what]}" for what, bits in figures["rate_bits_per_dim"].items())
        lines += ["  rate of the codes of all levels, in bits per image dimension:", f"    {rates}"]
        lines.append("  share of positions where the likeliest code stands, and how far its")
        lines.append("  probability is from that share (calibration error, 15 bins):")
        for name, level in levels:
            shown = (
                f"{level['right'][one]:z.4f} and {level['calibration_error'][one]:z.4f} {GIVEN[one]}"
                for one in level["right"]
            )
            lines.append(f"  {name:>5}  {', '.join(shown)}")
        return lines


def _row(level: str, what: str, bits: float, histogram_bits: float | None = None) -> str:
    saved = ""
    if histogram_bits is not None:
        saved = f"{1 - bits / histogram_bits:.1%}" if histogram_bits > LEAST_BITS else "-"
    return f"  {level:>5}  {what:<39} {bits * math.log(2):>z9.4f} {bits:>z10.4f} {saved:>9}".rstrip()


def binned(level: Judged) -> Tensor:
    """Return what each bin holds: positions, the sum of their probabilities, and right ones; float64 (BINS, 3)."""
    if level.confidence is None or level.right is None:
        return torch.zeros(BINS, 3, dtype=torch.float64)
    confidence = level.confidence.double().flatten().cpu()
    held = torch.stack([torch.ones_like(confidence), confidence, level.right.double().flatten().cpu()], 1)
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    return torch.zeros(BINS, 3, dtype=torch.float64).index_add_(0, bins, held)


def calibration(bins: dict[str, Tensor]) -> dict[str, Any]:
    """Return what bins (BINS, 3) of positions, probabilities and right ones say, by condition."""
    return {
        "right": {one: float(found[:, 2].sum() / found[:, 0].sum()) for one, found in bins.items()},
        "calibration_error": {
            one: float((found[:, 1] - found[:, 2]).abs().sum() / found[:, 0].sum()) for one, found in bins.items()
        },
        "reliability": {
            one: [[int(n), confidence / max(n, 1), right / max(n, 1)] for n, confidence, right in found.tolist()]
            for one, found in bins.items()
        },
    }
