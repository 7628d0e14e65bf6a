"""Samples of several temperatures beside one another, as a table for the README, from copies of `metrics.json`.

    for t in 0.8 0.9 1.0; do
      smalti sample CONFIG.yaml --sample.temperature $t --sample.folder samples-$t --sample.count 10000
      smalti evaluate CONFIG.yaml --sample.folder samples-$t --evaluate.features imagenet-lite
      cp RUN/metrics.json RUN/metrics-$t.json
    done
    python -m benchmarks.temperatures RUN/metrics-*.json

Files whose figures were not made alike are refused.
"""

import json
import sys
from pathlib import Path
from typing import Any

from pipelines.metrics.metric import figures_of
from pipelines.metrics.provenance import check_alike
from pipelines.report.figures import as_told

# Metric, figure and what to call it, in the order of the rows.
ROWS = (
    ("samples", "kid", "KID x 1000"),
    ("samples.frechet", "fid", "FID"),
    ("samples", "precision", "precision"),
    ("samples", "recall", "recall"),
    ("samples", "density", "density"),
    ("samples", "coverage", "coverage"),
    ("codes.level0", "total_variation", "total variation of codes, level 0"),
    ("codes.level1", "total_variation", "the same, level 1"),
    ("classification", "trained_on_samples", "a small classifier trained on them, right about val images"),
    ("classification", "trained_on_real", "the same, trained on as many real images"),
    ("copies.features", "nearer_share", "nearer to a training image than val images are"),
)


def temperature(figures: dict[str, Any]) -> str:
    """Return the temperature that the samples were drawn with."""
    return str(figures["samples"]["made"]["splits"]["samples"]["settings"]["temperature"])


def table(files: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table, a column per file.

    Args:
        files: what each `metrics.json` holds, by what to call it.

    Raises:
        StageError: figures of two files were not made alike.
    """
    for metric in ("samples", "samples.frechet", "codes", "classification", "copies"):
        check_alike(metric, {name: figures_of(figures, metric) for name, figures in files.items()})
    made = next(iter(files.values()))["samples"]
    space = made["made"]["features"]["features"]
    head = f"{made['images']:,} samples beside {made['real_images']:,} real images, in {space}"
    lines = [[head, *(f"temperature {temperature(figures)}" for figures in files.values())]]
    lines.append(["---"] * len(lines[0]))
    for metric, figure, title in ROWS:
        found = [figures_of(figures, metric) for figures in files.values()]
        if all(figure in one for one in found):
            shown = (as_told(f"{metric}.{figure}", one[figure], one.get(f"{figure}_error")) for one in found)
            lines.append([title, *shown])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table({name: json.loads(Path(name).read_text()) for name in sys.argv[1:]}))
