"""Tables of the page."""

from typing import NamedTuple

from torch import Tensor


class Table(NamedTuple):
    """A table of the page."""

    caption: str
    head: list[str]
    rows: list[tuple[str, ...]]


def of_codes(level: int, codes: Tensor) -> Table:
    """Return the codes of an image at a level, (h, w), as they stand."""
    rows = [(f"row {number + 1}", *map(str, row)) for number, row in enumerate(codes.tolist())]
    head = ["", *(f"column {number + 1}" for number in range(codes.shape[1]))]
    return Table(f"Codes of level {level} of the first image", head, rows)
