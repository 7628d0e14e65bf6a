"""What a metric of `evaluate` is: it sees batches of splits, and gives its figures once all is seen."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipelines.compute.ranks import sum_over_ranks
from pipelines.metrics.subject import Seen, Subject

# What is no further below 0 rounds to it, as the tables of `evaluate` round.
ROUNDED = 0.5e-4


class Metric:
    """A metric: a class in a file of this room, and a place in METRICS. It is made where all that it needs is there.

    Its figures are the same on any number of processes, each of which sees some of the batches: what it keeps stands in
    `Rows`. (The sums of torchmetrics' Metric depend on that number in their last bits; its functions serve here.)

    Attributes:
        name: where its figures stand in `metrics.json`; a dot leads one deeper, "prior.calibration".
        needs: what it is shown, as "SPLIT.WHAT"; see `Subject.there`.
        more_is_better: figures that are better the higher they are; of the others neither is, or less is.
        less_is_better: figures that are better the lower they are.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    more_is_better: ClassVar[tuple[str, ...]] = ()
    less_is_better: ClassVar[tuple[str, ...]] = ()

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    def update(self, seen: Seen) -> None:
        """See a batch of one of the splits that it needs, once each, in any order."""
        raise NotImplementedError

    def compute(self) -> dict[str, Any]:
        """Return the figures, plain data; called once, on all ranks together. Nothing for none."""
        raise NotImplementedError

    @classmethod
    def table(cls, figures: dict[str, Any]) -> list[str]:
        """Return what a terminal of 80 columns shows of the figures, read from `metrics.json`, in lines."""
        shown = (f"  {name} {value:.5g}" for name, value in figures.items() if isinstance(value, int | float))
        return [f"{cls.name}:", *shown]


class Rows:
    """Numbers by row, a row per image or per part of a split, of which each rank fills its own.

    Adding zeros changes nothing, so the sum over ranks is exact.

    Args:
        count: rows.
        shape: of one.
        dtype: of its numbers.
    """

    def __init__(self, count: int, *shape: int, dtype: torch.dtype = torch.float64) -> None:
        self.values = torch.zeros(count, *shape, dtype=dtype)

    def put(self, rows: Sequence[int], values: Tensor) -> None:
        """Fill rows."""
        self.values[rows] = values.detach().to("cpu", self.values.dtype)

    def add(self, row: int, values: Tensor) -> None:
        """Add to a row."""
        self.values[row] += values.detach().to("cpu", self.values.dtype)

    def all(self) -> Tensor:
        """Return all rows, of all ranks; to be called once, by all of them."""
        return sum_over_ranks(self.values)


def figures_of(figures: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the figures of the metric of a name from those of `metrics.json`, {} where there are none."""
    for part in name.split("."):
        found = figures.get(part, {})
        figures = found if isinstance(found, dict) else {}
    return figures


def title(name: str, figures: dict[str, Any]) -> str:
    """Return the first line of a table of the val split."""
    doubt = "" if figures.get("held_out", True) else ", which may have been trained on"
    return f"{name}: val split of {figures['images']} images{doubt}"


def shown(value: float) -> str:
    """Return a figure as people read it; what is below 0 by no more than an estimate's noise has no sign."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if -ROUNDED <= value < 0:
        return "0.0000"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
