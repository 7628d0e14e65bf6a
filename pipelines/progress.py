"""The progress bar: rate and time left, for work that takes more than a moment."""

import sys
from typing import Any

from tqdm import tqdm

# Shorter work is silent.
DELAY_S = 2.0
# In a log file, where a bar cannot draw over itself, it says less.
LOGGED_EVERY_S = 15.0


def progress_bar(total: int, title: str, unit: str, initial: int = 0, disable: bool = False) -> Any:
    """Return a tqdm bar on stderr that stays away while work is short.

    Args:
        total: units in all.
        title: what is being done.
        unit: one of them, for the rate.
        initial: units done before.
        disable: show nothing, as on all ranks but the first.
    """
    return tqdm(
        total=total,
        desc=title,
        unit=f" {unit}",
        initial=initial,
        delay=DELAY_S,
        mininterval=0.2 if sys.stderr.isatty() else LOGGED_EVERY_S,
        maxinterval=LOGGED_EVERY_S,
        miniters=1,
        disable=disable,
        file=sys.stderr,
    )
