"""Progress: rate, time left and the figure that matters, for work that takes more than a moment.

On a terminal that is one bar which draws over itself; in a log file a line now and then.
"""

import logging
import os
import sys
import time
from typing import Any, Protocol

from tqdm import tqdm

logger = logging.getLogger(__name__)

# Shorter work is silent.
DELAY_S = 2.0
# Between the lines of a log file.
LOGGED_EVERY_S = 30.0


def counted(number: int, noun: str) -> str:
    """Return a number with what it counts: "1 shard", "1,200 shards"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


class Console(logging.Handler):
    """Lines on stderr, above the bar if there is one; of other packages only what is worth a warning.

    Lightning gives three loggers of its own a level and a way out when it is imported, whatever they had before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("smalti: %(message)s"))
        self.addFilter(lambda record: record.levelno >= logging.WARNING or record.name.startswith("pipelines."))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        tqdm.write(self.format(record), file=sys.stderr)


class Progress(Protocol):
    """Counts units done; a context manager."""

    n: int

    def update(self, n: int = 1) -> Any: ...
    def set_postfix_str(self, figure: str, refresh: bool = True) -> Any: ...
    def close(self) -> Any: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, *details: Any) -> Any: ...


class LoggedProgress:
    """Progress as lines of a log.

    Args:
        total: units in all.
        title: what is being done.
        unit: one of them.
        initial: units done before.
    """

    def __init__(self, total: int, title: str, unit: str, initial: int = 0) -> None:
        self.total, self.title, self.unit, self.n = total, title, unit, initial
        self.initial, self.figure = initial, ""
        self.start = self.told = time.monotonic()

    def update(self, n: int = 1) -> None:
        """Add units; tell of them if it is time to."""
        self.n += n
        now = time.monotonic()
        if now - self.told >= LOGGED_EVERY_S and self.n < self.total:
            self.told = now
            rate = (self.n - self.initial) / (now - self.start)
            left = tqdm.format_interval((self.total - self.n) / rate) if rate else "?"
            done = f"{self.n:,} of {self.total:,} {self.unit}, {rate:.3g} {self.unit}/s, {left} left"
            logger.info("%s: %s%s", self.title, done, self.figure and f", {self.figure}")

    def set_postfix_str(self, figure: str, refresh: bool = True) -> None:
        """Tell of a figure from now on."""
        self.figure = figure

    def close(self) -> None:
        """Nothing is left to draw."""

    def __enter__(self) -> "LoggedProgress":
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


def _can_be_drawn_on() -> bool:
    """Whether stderr is a terminal with a size: one that a container or a robot has opened may have no rows."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).lines > 0


def progress_bar(total: int, title: str, unit: str, initial: int = 0, disable: bool = False) -> Progress:
    """Return the progress of some work, on stderr; it says nothing while the work is short.

    Args:
        total: units in all.
        title: what is being done.
        unit: one of them, for the rate.
        initial: units done before.
        disable: show nothing, as on all ranks but the first.
    """
    if not disable and not _can_be_drawn_on():
        return LoggedProgress(total, title, unit, initial)
    return tqdm(
        total=total,
        desc=f"  {title}",
        unit=f" {unit}",
        initial=initial,
        delay=DELAY_S,
        mininterval=0.2,
        miniters=1,
        dynamic_ncols=True,
        leave=False,
        disable=disable,
        bar_format="{desc} {percentage:3.0f}% |{bar}| {rate_fmt}, {remaining} left{postfix}",
        file=sys.stderr,
    )
