"""Several runs beside one another: what was set differently, and what came of it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from pipelines.compare import Scoreboard, scoreboard
from pipelines.metrics import METRICS
from pipelines.metrics.metric import figures_of
from pipelines.metrics.provenance import unlike
from pipelines.report.curves import Chart, Line
from pipelines.report.figures import told
from pipelines.report.gather import Gathered
from pipelines.report.pictures import picture
from pipelines.report.tables import Table
from pipelines.report.tokenized import Row, psnr
from pipelines.storage.fingerprint import manifest_digest
from pipelines.storage.manifest import read_manifest

# Curves that are laid over one another, of the val split, and images that are shown as every run gives them back.
OVERLAID, SHOWN = ("loss", "psnr", "perplexity", "nats_per_code"), 8


class SideBySide(NamedTuple):
    """Runs beside one another.

    Attributes:
        scores: the scoreboard of `smalti compare`, a column per row of it; settings that differ come first.
        told: what its columns mean, and why scores are missing.
        figures: those that matter, a row each, a column per run.
        refused: what was not measured as the first run's was, and how that differs.
        charts: curves of all runs, one of each figure.
        reconstructions: the same images as each run gives them back; empty where runs have other images.
    """

    scores: Table
    told: list[str]
    figures: Table
    refused: list[str]
    charts: list[Chart]
    reconstructions: list[Row]


def side_by_side(runs: Sequence[Gathered], names: Sequence[str]) -> SideBySide:
    """Return runs beside one another.

    Args:
        runs: two or more.
        names: of each.
    """
    there = [(name, one) for run, name in zip(runs, names, strict=True) if (one := run.compared)]
    board = scoreboard([one._replace(config=replace(one.config, run_dir=name)) for name, one in there])
    apart = [made_otherwise(runs[0].measured, run.measured) for run in runs]
    values, refused = [], []
    for run, name, parts in zip(runs, names, apart, strict=True):
        left_out = tuple(f"{part}." for part in parts)
        values.append({one.name: one.value for one in told(run.figures) if not one.key.startswith(left_out)})
        refused += [f"{part} of {name}: {reason}" for part, reason in parts.items()]
    return SideBySide(
        _scores(board),
        board.told,
        Table("Figures", ["figure", *names], _rows(values)),
        refused,
        overlaid([run.charts for run in runs], names),
        _reconstructions(runs, names),
    )


def made_otherwise(first: dict[str, Any], other: dict[str, Any]) -> dict[str, str]:
    """Return the parts of another run's metrics.json that were not made as the first one's, and what differs.

    Args:
        first: metrics.json of the first run.
        other: of the other.
    """
    found = {}
    for metric in METRICS:
        one, two = figures_of(first, metric.name), figures_of(other, metric.name)
        if "made" in one and "made" in two and (reason := unlike(one["made"], two["made"])):
            found[metric.name] = reason
    return found


def overlaid(charts: Sequence[Sequence[Chart]], names: Sequence[str]) -> list[Chart]:
    """Return one chart of each figure and level that more than one run has on the val split, a line a run.

    Args:
        charts: of each run.
        names: of the runs.
    """
    found: dict[tuple[str, str, int | None], list[tuple[str, dict[int, float]]]] = {}
    for name, some in zip(names, charts, strict=True):
        for chart in (one for one in some if one.figure in OVERLAID):
            for line in (one for one in chart.lines if one.val):
                points = {
                    step: value for step, value in zip(chart.steps, line.values, strict=True) if value is not None
                }
                found.setdefault((chart.title, chart.figure, line.level), []).append((name, points))
    merged = []
    for (title, figure, level), lines in found.items():
        if len(lines) > 1:
            steps = sorted({step for _, points in lines for step in points})
            drawn = [Line(name, None, True, [points.get(step) for step in steps]) for name, points in lines]
            where = f"{title}, level {level}" if level is not None else title
            merged.append(Chart(where, "", figure, steps, drawn))
    return merged


def _scores(board: Scoreboard) -> Table:
    """The scoreboard, a column per row of it: seeds, the settings that differ, then the scores."""
    columns = [
        {"seeds": row.told_seeds} | row.settings | {title: row.shown(title) for title in board.titles}
        for row in board.rows
    ]
    return Table("Scoreboard", ["what", *(", ".join(row.runs) for row in board.rows)], _rows(columns))


def _rows(columns: Sequence[dict[str, str]]) -> list[tuple[str, ...]]:
    names = list(dict.fromkeys(name for column in columns for name in column))
    return [(name, *(column.get(name, "–") for column in columns)) for name in names]


def _reconstructions(runs: Sequence[Gathered], names: Sequence[str]) -> list[Row]:
    """The first val images of all runs, if they have the same, above what each makes of them."""
    if not all(run.quality for run in runs):
        return []
    if len({manifest_digest(read_manifest(run.finished.images, "images", "pack")) for run in runs}) > 1:
        return []
    pixels = runs[0].images["val"].pixels[:SHOWN]
    rows = [Row("image", [picture(one, f"val image {number + 1}") for number, one in enumerate(pixels)])]
    for run, name in zip(runs, names, strict=True):
        found = run.tokenized["val"]
        pictures = [
            picture(one, f"val image {number + 1} as {name} gives it back")
            for number, one in enumerate(found.reconstructions[:SHOWN])
        ]
        mean = psnr(float(found.errors.mean()))
        rows.append(Row(f"{name}: {mean:.2f} dB over {len(found.errors):,} val images", pictures))
    return rows
