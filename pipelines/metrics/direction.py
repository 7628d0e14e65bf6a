"""Whether more or less of a figure is better, as its metric says."""

import re

from pipelines.metrics import METRICS

# What stands in a figure's name besides its metric's words for it.
BESIDE = re.compile(r"\.(level\d+|given_class|without_class)\b")


def direction(name: str) -> str:
    """Return "more is better" or "less is better" of a figure by its name in `metrics.json`; "" where neither is."""
    bare = BESIDE.sub("", name)
    for metric in METRICS:
        for figures, told in ((metric.more_is_better, "more is better"), (metric.less_is_better, "less is better")):
            if bare in {f"{metric.name}.{figure}" for figure in figures}:
                return told
    return ""
