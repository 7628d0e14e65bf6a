"""Command explore: what can be done with a run's latents, as a picture and a table."""

import csv
import io
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipelines.config import load_config
from pipelines.data.pictures import picture_grid
from pipelines.errors import CommandParser, ConfigError, StageError, told_to_user
from pipelines.explore.opened import Opened
from pipelines.explore.shown import Shown, completions, edits, interpolation, scores, variants
from pipelines.storage.paths import exists, make_folder, place, whole, write_text

# Pixels a side of a picture in the grid, at least: keys stand above.
SMALLEST = 96
# How a file says that it is ours: a text of the picture, and the first column of the table, which counts its rows.
MARK = "smalti explore {}"


class Task(NamedTuple):
    """Something that can be done: what it is, and what shows it."""

    about: str
    show: Callable[[Opened, Namespace], Shown]


TASKS = {
    "interpolate": Task("from one image or class to another", interpolation),
    "vary": Task("variants of images: q(z | x) drawn again, or finer levels under coarse ones that stay", variants),
    "complete": Task("the rest of images of which some cells are known", completions),
    "edit": Task("images moved from the mean of one class towards that of another", edits),
    "score": Task("how unlikely images are, and where: for anomalies", scores),
}


def command(arguments: Sequence[str]) -> None:
    """Do what `smalti explore` is asked for.

    Raises:
        ConfigError: wrong usage.
        StageError: the run lacks what is needed, or a file that is not ours lies where one would be written.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        told = [f"  {name:<12} {task.about}" for name, task in TASKS.items()]
        print("smalti explore WHAT CONFIG.yaml [options of WHAT] [--section.key value ...] --out DIR\n")
        print("\n".join(["WHAT is one of these, and `smalti explore WHAT --help` lists its options:", *told]))
        return
    what, rest = arguments[0], arguments[1:]
    if what not in TASKS:
        raise ConfigError(f"there is no {what!r} to explore; there are {', '.join(TASKS)}")
    parser = parser_of(what)
    if {"-h", "--help"} & set(rest):
        print(parser.format_help())
        return
    if not rest or rest[0].startswith("-"):
        raise ConfigError(f"name a config: smalti explore {what} CONFIG.yaml --out DIR")
    asked, overrides = parser.parse_known_args(rest[1:])
    if getattr(asked, "count", 1) < 1:
        raise ConfigError(f"--count must be at least 1, got {asked.count}")
    picture, table = (place(asked.out, writable=True) / f"{what}.{kind}" for kind in ("png", "csv"))
    check_ours(picture, table, what)
    config = load_config(rest[0], overrides)
    with told_to_user():
        shown = TASKS[what].show(Opened(config), asked)
    make_folder(picture.parent)
    _save(picture_grid(shown.pictures, shown.labels, SMALLEST), picture, what)
    write_text(table, as_csv(shown.table, what))
    print(f"{what}: {shown.line}; {picture}, {table.name}")


def parser_of(what: str) -> CommandParser:
    """Return the parser of what may be asked of a task, besides the config and what overrides it."""
    parser = CommandParser(
        f"smalti explore {what} CONFIG.yaml", f"{TASKS[what].about}: DIR/{what}.png, DIR/{what}.csv."
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for both files; may hold others")
    parser.add_argument("--keys", nargs="+", default=[], help="val images, by key, or by place from 0 on")
    options: list[tuple[str, dict[str, Any]]] = []
    if what in ("interpolate", "vary", "complete"):
        options.append(("--classes", {"nargs": "+", "default": [], "help": "classes instead, by name or index"}))
    if what == "interpolate":
        options.append(("--steps", {"type": int, "default": 8, "help": "images, both ends among them"}))
        options.append(("--beam", {"type": int, "default": 4, "help": "width of the search for a path; 1 is greedy"}))
        options.append(("--index", {"type": int, "default": 0, "help": "which sample of each class, of codes"}))
    if what in ("vary", "complete"):
        options.append(("--count", {"type": int, "default": 6, "help": "of each image"}))
    if what == "vary":
        options.append(("--keep", {"type": int, "help": "levels that stay, coarse to fine; the prior draws the finer"}))
    if what == "complete":
        known = "top, bottom, left, right, fine (all but the coarsest level) or the first so many cells"
        options.append(("--known", {"default": "top", "help": known}))
        options.append(
            ("--particles", {"type": int, "default": 256, "help": "more are nearer to the exact conditional"})
        )
    if what == "edit":
        options.append(("--from", {"dest": "source", "required": True, "help": "class, by name or index"}))
        options.append(("--to", {"dest": "target", "required": True, "help": "another"}))
        strengths = {"type": float, "nargs": "+", "default": [-1.0, -0.5, 0.0, 0.5, 1.0, 1.5]}
        options.append(("--strengths", {**strengths, "help": "0 is the reconstruction, 1 from mean to mean"}))
    if what == "score":
        options.append(("--split", {"choices": ["val", "train"], "default": "val", "help": "whose images are scored"}))
        options.append(("--anomalous", {"help": "class whose images should score high, by name or index"}))
    for name, settings in options:
        parser.add_argument(name, **settings)
    return parser


def check_ours(picture: Path, table: Path, what: str) -> None:
    """Raise StageError, before anything is done, where a file would be overwritten that this task did not write."""
    for path in (picture, table):
        if exists(path) and not _is_ours(path, MARK.format(what)):
            raise StageError(
                f"{path} must not be overwritten, for `smalti explore` did not write it; choose another --out"
            )


def _is_ours(path: Path, mark: str) -> bool:
    with path.open("rb") as file:
        if path.suffix == ".csv":
            return file.readline(len(mark) + 1) == f"{mark},".encode()
        try:
            return Image.open(file).info.get("Software") == mark
        except OSError:  # no picture
            return False


def _save(image: Image.Image, path: Path, what: str) -> None:
    mark = PngInfo()
    mark.add_text("Software", MARK.format(what))
    with whole(path) as temporary:
        image.save(temporary, "PNG", pnginfo=mark)


def as_csv(rows: Sequence[dict[str, Any]], what: str) -> str:
    """Return a table as CSV, its rows numbered in the first column."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([MARK.format(what), *rows[0]])
    writer.writerows([number, *row.values()] for number, row in enumerate(rows))
    return out.getvalue()
