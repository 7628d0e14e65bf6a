"""The page: parts gathered from runs, one after the other, and written as one file."""

import logging
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import jinja2

from pipelines.config import Config
from pipelines.errors import StageError
from pipelines.report import PAGE
from pipelines.report.gather import Gathered
from pipelines.report.reading import MOST_IMAGES
from pipelines.report.side_by_side import side_by_side
from pipelines.storage.paths import make_folder, write_text

logger = logging.getLogger(__name__)

# As it lies among the templates.
UPLOT = "1.6.32"


class Source(NamedTuple):
    """A run that is reported.

    Attributes:
        command: what makes the run again, without the "smalti run" before it.
        config: of the run.
    """

    command: str
    config: Config


def report(sources: Sequence[Source]) -> Path:
    """Write the page of one run, or of several side by side, into the first one's folder; return its path.

    Raises:
        StageError: a run holds nothing yet; or a part could not be made of what is there, and the page says which.
    """
    begun = time.monotonic()
    runs = [Gathered(source.command, source.config) for source in sources]
    empty = [str(run.root) for run in runs if not run.holds_something]
    if empty:
        raise StageError(f"{', '.join(empty)} must hold something to report, and does not; run `smalti pack` first")
    path = runs[0].root / PAGE
    make_folder(path.parent)
    write_text(path, rendered(runs, time.monotonic() - begun))
    missing = [f"{run.name}: {part}: {reason}" for run in runs for part, reason in run.missing.items()]
    if missing:
        raise StageError(f"{path} lacks a part: {'; '.join(missing)}")
    return path


def rendered(runs: Sequence[Gathered], seconds: float) -> str:
    """Return the page.

    Args:
        runs: what has been gathered of each.
        seconds: that it took.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipelines.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["source"] = lambda name: (files("pipelines.report") / "templates" / name).read_text()
    names = [run.name for run in runs]
    names = [f"{name} ({place + 1})" if names.count(name) > 1 else name for place, name in enumerate(names)]
    beside = side_by_side(runs, names) if len(runs) > 1 else None
    template = environment.get_template("report.html.j2")
    return template.render(
        names=names,
        beside=beside,
        runs=runs,
        seconds=seconds,
        made=time.strftime("%Y-%m-%d %H:%M"),
        most_images=MOST_IMAGES,
        uplot=UPLOT,
    )
