"""Curves of training: the rows of metrics.csv as charts, one of each figure."""

import csv
import io
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.errors import StageError
from pipelines.storage.paths import exists, read_bytes

# Rows drawn of training; validations are drawn all.
MOST_ROWS = 1500
# Lines of fewer values show each of them.
FEW_POINTS = 20
# The same as nats, in another unit.
LEFT_OUT = ("bits_per_code",)
COLUMN = re.compile(r"^(?:(train|val)_)?(?:level(\d+)_)?(.+)$")


class Line(NamedTuple):
    """A line of a chart: its name, its level if it is of one, whether of the val split, and a value or None a step."""

    name: str
    level: int | None
    val: bool
    values: list[float | None]


class Chart(NamedTuple):
    """One figure over the steps of training in a stage's folder."""

    title: str
    folder: str
    figure: str
    steps: list[int]
    lines: list[Line]

    @property
    def data(self) -> dict[str, Any]:
        """What the page's script draws."""
        lines = [
            {
                "name": line.name,
                "level": line.level,
                "val": line.val,
                "points": line.val or len(line.values) - line.values.count(None) < FEW_POINTS,
            }
            for line in self.lines
        ]
        return {"x": "step", "steps": self.steps, "lines": lines, "values": [line.values for line in self.lines]}


def read_rows(folder: Path) -> list[dict[str, float]]:
    """Return the rows of a stage's metrics.csv, each with its step; a line that is half written is left out."""
    path = folder / "metrics.csv"
    if not exists(path):
        return []
    rows = []
    try:
        found = list(csv.DictReader(io.StringIO(read_bytes(path).decode(errors="replace"))))
    except csv.Error as error:
        raise StageError(f"{path} cannot be read ({error}); its curves are left out") from error
    for row in found:
        values = {name: number for name, text in row.items() if (number := _number(text)) is not None}
        if "step" in values and None not in row.values():
            rows.append(values)
    return rows


def charts(rows: list[dict[str, float]], title: str, folder: str) -> list[Chart]:
    """Return a chart of each figure, its lines the splits and levels that have it.

    Args:
        rows: as `read_rows` returns them.
        title: of what is trained.
        folder: name of its folder.
    """
    every = math.ceil(len(rows) / MOST_ROWS)
    rows = [row for number, row in enumerate(rows) if number % every == 0 or any(key[:4] == "val_" for key in row)]
    found: dict[str, list[Line]] = {}
    for column in sorted({name for row in rows for name in row} - {"step"}):
        split, level, figure = COLUMN.fullmatch(column).groups()  # type: ignore[union-attr]  # it matches all
        if figure in LEFT_OUT:
            continue
        values = [_finite(row.get(column)) for row in rows]
        name = " ".join(([f"level {level}"] if level else []) + ([split] if split else [])) or figure
        found.setdefault(figure, []).append(Line(name, int(level) if level else None, split == "val", values))
    steps = [int(row["step"]) + 1 for row in rows]
    return [Chart(title, folder, figure, steps, lines) for figure, lines in sorted(found.items(), key=_importance)]


def _importance(item: tuple[str, Any]) -> tuple[int, str]:
    """Losses first, then what is of the whole image, then what is of levels."""
    order = ("loss", "nats_per_code", "nats_per_value", "mse", "psnr", "l1", "perplexity", "usage", "active")
    return (order.index(item[0]) if item[0] in order else len(order)), item[0]


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
