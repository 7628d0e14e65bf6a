"""What a person should be warned of when they look at a run."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from pipelines.metrics.quality import level_warnings
from pipelines.report.codebooks import Codebook
from pipelines.report.curves import Chart
from pipelines.report.likelihoods import Maps
from tokenizer.bottlenecks.bottleneck import LEAST_USED, Settings

# A level that adds less, in dB, to what the others decode to is hardly looked at.
LEAST_ADDED = 0.5
# Codes that occur nowhere are told of where each had this many chances, and where they are this share of all.
CHANCES, DEAD_SHARE = 20, 0.02
# Validation above training by this share of it: the prior learns its training set by heart.
GAP = 0.15
# Classes are looked for where each would have this many images.
IMAGES_A_CLASS = 20
# Validation that ends above its best by this share of it has turned.
TURNED = 0.02


def of_bottlenecks(family: Settings, figures: dict[str, float], codebooks: Sequence[Codebook]) -> Iterator[str]:
    """Yield what bottlenecks warn of, and warnings of dead codes.

    Args:
        family: of the bottlenecks.
        figures: of the run, by name.
        codebooks: how codes are used in the images that were read, which counts more.
    """
    told = {name.removeprefix("tokenizer."): value for name, value in figures.items() if name.startswith("tokenizer.")}
    seen = {f"level{one.level}_usage": one.used / one.size for one in codebooks if one.places >= CHANCES}
    yield from (f"L{warning[1:]}." for warning in level_warnings(family, told | seen))
    for one in codebooks:
        dead = one.size - one.used
        if one.used >= LEAST_USED * one.size and dead > DEAD_SHARE * one.size and one.places >= CHANCES * one.size:
            yield (
                f"Level {one.level}: {dead:,} of its {one.size:,} codes occur nowhere in {one.places:,} places: they "
                f"are dead. Try {family.mend}."
            )


def of_levels(adds: dict[int, float], bits: Sequence[float | None]) -> Iterator[str]:
    """Yield warnings of levels that the decoder hardly looks at.

    Args:
        adds: dB that each level adds to all others.
        bits: that each takes of an image at most; None of continuous ones.
    """
    for level, decibels in adds.items():
        if decibels < LEAST_ADDED:
            whole = sum(one or 0 for one in bits)
            share = f", though it takes {(bits[level] or 0) / whole:.0%} of the bits of an image" if all(bits) else ""
            less = "a smaller codebook" if all(bits) else "fewer channels"
            yield (
                f"The decoder hardly looks at level {level}: without it reconstructions lose {decibels:.1f} dB"
                f"{share}. A coarser stride for it, or {less} for finer levels, would leave it more to say."
            )


def of_priors(found: Sequence[Maps]) -> Iterator[str]:
    """Yield warnings of priors that have learned their training set by heart."""
    for one in found:
        if one.train and one.unit == "nats per code" and one.val.nats - one.train.nats > GAP * one.val.nats:
            yield (
                f"The prior of level {one.level} is overfit: {one.val.nats:.3f} nats per code on the val split, "
                f"{one.train.nats:.3f} on what it was trained on. More encode.views, more dropout or a smaller network "
                "would help."
            )


def of_classes(where: str, classes: np.ndarray, class_names: Sequence[str]) -> Iterator[str]:
    """Yield a warning of classes that have no image.

    Args:
        where: what the images are.
        classes: of those that were read, (N,).
        class_names: of all.
    """
    absent = [name for label, name in enumerate(class_names) if label not in set(classes.tolist())]
    if absent and len(classes) >= IMAGES_A_CLASS * len(class_names):
        shown = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
        yield f"None of {len(classes):,} {where} is of class {shown}."


def of_curves(charts: Sequence[Chart]) -> Iterator[str]:
    """Yield warnings of validation that got worse again; the best checkpoint is the one that is kept."""
    for chart in charts:
        for line in chart.lines if chart.figure in ("loss", "nats_per_code") else ():
            points = [(value, step) for value, step in zip(line.values, chart.steps, strict=True) if value is not None]
            (best, at), (last, end) = min(points, default=(0.0, 0)), points[-1] if points else (0.0, 0)
            if line.val and last - best > TURNED * math.fabs(best):
                yield (
                    f"{chart.title}: validation was best at step {at:,}, {best:.4g}, and is {last:.4g} at {end:,}. "
                    "The best is kept; the steps after it were for nothing."
                )


def of_figures(figures: dict[str, float]) -> Iterator[str]:
    """Yield warnings of figures that may have been measured on training data."""
    known = {name.removesuffix(".held_out"): value for name, value in figures.items() if name.endswith(".held_out")}
    if doubtful := sorted(part for part, value in known.items() if not value):
        yield f"Figures of {', '.join(doubtful)}: the val split may have been trained on."
