"""The scoreboard: runs side by side, a row per run or per group of seeds, settings that differ first.

Figures are read from `metrics.json`; those that were not made alike do not stand in one column.
"""

import csv
import io
import json
from collections.abc import Sequence
from itertools import product
from math import sqrt
from typing import Any, NamedTuple

from pipelines.compared import SEED, Compared, read_run
from pipelines.config import Config, load_config
from pipelines.errors import CommandParser, ConfigError
from pipelines.metrics.direction import direction
from pipelines.metrics.metric import figures_of
from pipelines.metrics.provenance import unlike
from pipelines.storage.paths import exists, place, read_bytes, write_text

# What priors may be told, in the order of preference; one is shown of all runs.
CONDITIONS = {"given_class": "given the class", "without_class": "without class"}


# What figures are made of that are none of `evaluate`.
NOTHING: dict[str, Any] = {}


class Column(NamedTuple):
    """A figure of the scoreboard.

    Attributes:
        title: above its column.
        meaning: in a few words.
        metric: whose figure it is in `metrics.json`, "" if it is none of `evaluate`.
        figure: its name there.
        shown: as text.
    """

    title: str
    meaning: str
    metric: str
    figure: str
    shown: str = "{:z.4f}"


COLUMNS = (
    Column(
        "bits/image",
        "rate of all codes under the prior, {condition}",
        "prior",
        "rate_bits_per_image",
        "{:.2f}",
    ),
    Column("MSE", "of reconstructions, values in [-1, 1]", "tokenizer", "mse", "{:.5f}"),
    Column("bound", "bits per image dimension at most, {condition}", "bound", "bits_per_dim"),
    Column(
        "I(x,z)",
        "the bound's part that z tells of the image, of what is drawn; bits per dimension, {condition}",
        "surgery",
        "mutual_information_bits_per_dim",
    ),
    Column(
        "KL(q||p)",
        "the bound's part that another prior could save, of what is drawn, {condition}",
        "surgery",
        "marginal_kl_bits_per_dim",
    ),
    Column(
        "bound of 100",
        "importance-weighted, of 100 draws per image, {condition}",
        "importance",
        "bits_per_dim_100",
    ),
    Column("rKID", "x 1000, of reconstructions beside their images", "reconstructions", "rkid", "{:z.3f}"),
    Column("KID", "x 1000, of samples beside real images", "samples", "kid", "{:z.3f}"),
    Column("seconds", "of the commands that finished pack to sample, whatever the hardware", "", "seconds", "{:.0f}"),
    Column("parameters", "of tokenizer and priors, in millions", "", "parameters", "{:.3f}"),
)
SCALES = {"rkid": 1000, "kid": 1000, "parameters": 1e-6}


class Score(NamedTuple):
    """A figure of a row: mean over its seeds, their standard deviation where there are several."""

    mean: float
    deviation: float | None


class Row(NamedTuple):
    """A run, or runs that differ in nothing but their seed.

    Attributes:
        runs: their folders.
        seeds: of each.
        settings: by name, those that are not the same in all rows.
        scores: by title of the column; None where there is none, or none that may stand there.
    """

    runs: list[str]
    seeds: list[int]
    settings: dict[str, str]
    scores: dict[str, Score | None]

    @property
    def told_seeds(self) -> str:
        """Its seeds as text."""
        return ",".join(map(str, self.seeds))

    def shown(self, title: str) -> str:
        """Return the score of a column as text, "-" for none."""
        score = self.scores[title]
        if score is None:
            return "-"
        column = next(column for column in COLUMNS if column.title == title)
        scale = SCALES.get(column.figure, 1)
        shown = column.shown.format(score.mean * scale)
        return shown if score.deviation is None else f"{shown} +- {column.shown.format(score.deviation * scale)}"


class Scoreboard(NamedTuple):
    """Rows, what the columns mean, and why figures are missing, sentences."""

    rows: list[Row]
    meanings: dict[str, str]
    notes: list[str]

    @property
    def titles(self) -> list[str]:
        """Columns that have a score."""
        return [title for title in self.meanings if any(row.scores[title] for row in self.rows)]

    @property
    def told(self) -> list[str]:
        """What these columns mean, and the notes, sentences."""
        several = any(len(row.runs) > 1 for row in self.rows)
        told = [f"{title}: {self.meanings[title]}" for title in self.titles]
        return [*told, *["+-: standard deviation over seeds"] * several, *self.notes]


def compare(configs: Sequence[Config]) -> Scoreboard:
    """Return the scoreboard of runs that have been evaluated.

    Raises:
        ConfigError: one is named twice.
        StageError: one has not.
    """
    folders = [config.run_dir for config in configs]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), ""):
        raise ConfigError(f"runs must be named once each, {twice} is named twice; leave one out")
    return scoreboard([read_run(config) for config in configs])


def scoreboard(runs: Sequence[Compared]) -> Scoreboard:
    """Return the scoreboard of runs as they were read."""
    groups: dict[str, list[Compared]] = {}
    for run in runs:
        same = {name: value for name, value in run.settings.items() if name != SEED}
        group = json.dumps(same, sort_keys=True)
        if any(one.seed == run.seed for one in groups.get(group, [])):  # no other seed, whatever makes it differ
            group += run.config.run_dir
        groups.setdefault(group, []).append(run)
    rows = list(groups.values())
    told = [given for run in runs if (given := _conditions(run))]
    condition = next((one for one in CONDITIONS if all(one in given for given in told)), "given_class")
    columns, notes = {}, []
    for column in COLUMNS:
        columns[column.title], found = _scores(column, rows, condition)
        notes += found
    settings = [row[0].settings for row in rows]
    named = dict.fromkeys(name for one in settings for name in one if name != SEED)
    differ = [name for name in named if len({one.get(name) for one in settings}) > 1]
    made = [
        Row(
            [run.config.run_dir for run in row],
            [run.seed for run in row],
            {name: own.get(name, "–") for name in differ},
            {title: scores[number] for title, scores in columns.items()},
        )
        for number, (row, own) in enumerate(zip(rows, settings, strict=True))
    ]
    meanings = {column.title: _meaning(column, runs, condition) for column in COLUMNS}
    return Scoreboard(made, meanings, notes)


def _conditions(run: Compared) -> set[str]:
    """Return what the run's rates and bound were found for."""
    found = (figures_of(run.figures, "prior").get("rate_bits_per_image"), figures_of(run.figures, "bound"))
    return {name for one in (found[0], found[1].get("bits_per_dim")) if isinstance(one, dict) for name in one}


def _value(column: Column, run: Compared, condition: str) -> float | None:
    if not column.metric:
        return run.others[column.figure]
    value = figures_of(run.figures, column.metric).get(column.figure)
    return value.get(condition) if isinstance(value, dict) else value


def _scores(column: Column, rows: Sequence[list[Compared]], condition: str) -> tuple[list[Score | None], list[str]]:
    """Return a column's scores, one a row, and why some are missing; others must fit the first row that has one."""
    values = [[_value(column, run, condition) for run in row] for row in rows]
    scores: list[Score | None] = []
    notes: list[str] = []
    first: list[dict[str, Any]] = []
    for row, found in zip(rows, values, strict=True):
        known = [value for value in found if value is not None]
        made = [figures_of(run.figures, column.metric).get("made", {}) if column.metric else NOTHING for run in row]
        told = "" if len(known) == len(found) else f"it is not there for {len(found) - len(known)} of its runs"
        if not known and any(value is not None for row_values in values for value in row_values):
            told = "its metrics.json does not hold it" if column.metric else "nothing was recorded of it"
        elif not known:
            told = ""
        if known and not told:
            first = first or made
            told = _unlike(first, made)
        if told:
            notes.append(f"{column.title} of {row[0].config.run_dir} is left out: {told}")
        scores.append(None if told or not known else _mean(known))
    return scores, notes


def _unlike(first: Sequence[dict[str, Any]], row: Sequence[dict[str, Any]]) -> str:
    """Return why figures of a row cannot stand beside one another, or beside those of the first row; "" if they can.

    Runs of one row may have split the same images by other seeds; of two rows, one run each must have the same.
    """
    if not all(one or one is NOTHING for one in row):
        return "it does not say what it was made of; run `smalti evaluate` again"
    inside = next((told for one in row[1:] if (told := unlike(row[0], one, other_split=True))), "")
    between = [unlike(one, other) for one, other in product(first, row)]
    return inside or ("" if "" in between else f"not made like those above ({between[0]})")


def _meaning(column: Column, runs: Sequence[Compared], condition: str) -> str:
    """Return what a column shows, and in which feature space where it is of one."""
    spaces = (figures_of(run.figures, column.metric).get("made", {}).get("features") for run in runs if column.metric)
    space = next((space for space in spaces if space), None)
    told = column.meaning.format(condition=CONDITIONS[condition])
    told += f": {better}" if (better := direction(f"{column.metric}.{column.figure}")) else ""
    return f"{told}; in features of {space['features']}" if space else told


def _mean(values: Sequence[float]) -> Score:
    mean = sum(values) / len(values)
    if len(values) == 1:
        return Score(mean, None)
    return Score(mean, sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)))


def as_text(board: Scoreboard) -> str:
    """Return the scoreboard for a terminal; it is as wide as it must be."""
    settings = list(board.rows[0].settings)
    titles = board.titles
    lines = [["run", "seeds", *_short(settings), *titles]]
    for row in board.rows:
        name = " ".join(row.runs)
        lines.append([name, row.told_seeds, *row.settings.values(), *(row.shown(title) for title in titles)])
    widths = [max(len(line[number]) for line in lines) for number in range(len(lines[0]))]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([*table, "", *board.told])


def as_csv(board: Scoreboard) -> str:
    """Return the scoreboard as CSV: settings by their whole names, figures as `metrics.json` has them."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    settings = list(board.rows[0].settings)
    named = [cell for title in board.meanings for cell in (title, f"{title} deviation")]
    writer.writerow(["run", "seeds", *settings, *named])
    for row in board.rows:
        scores = [row.scores[title] for title in board.meanings]
        cells = [cell for score in scores for cell in ((score.mean, score.deviation) if score else ("", ""))]
        writer.writerow([" ".join(row.runs), " ".join(map(str, row.seeds)), *row.settings.values(), *cells])
    return out.getvalue()


def _short(names: Sequence[str]) -> list[str]:
    """Return each name's last part, with those before it where that is needed to tell it from the others."""

    def ends(name: str) -> list[str]:
        parts = name.split(".")
        return [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]

    return [next(end for end in ends(one) if sum(end in ends(other) for other in names) == 1) for one in names]


def command(arguments: Sequence[str]) -> None:
    """Do what `smalti compare` is asked for.

    Raises:
        ConfigError: wrong usage.
    """
    about = "The scoreboard of runs that have been evaluated: a row per run, or per runs that differ in their seed."
    parser = CommandParser("smalti compare", about)
    parser.add_argument("configs", metavar="CONFIG.yaml", nargs="+", help="of each run")
    parser.add_argument("--out", default="", help="file for the same as CSV")
    if {"-h", "--help"} & set(arguments):
        print(parser.format_help())
        return
    found = parser.parse_args(arguments)
    if found.out in found.configs:
        raise ConfigError(f"--out must name a file of its own, and {found.out} is one of the configs")
    if found.out and exists(out := place(found.out, writable=True)) and not read_bytes(out).startswith(b"run,seeds,"):
        raise ConfigError(f"{found.out} must not be overwritten, for it is no scoreboard; name another file")
    board = compare([load_config(name) for name in found.configs])
    print(as_text(board))
    if found.out:
        write_text(place(found.out, writable=True), as_csv(board))
