"""Records of work: how long the command that finished a stage took, on what, with which versions.

They are for people to read. Nothing is judged by them, so they lie beside the stages' folders, whose bytes depend on
neither time nor place.
"""

from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import yaml

from pipelines.storage.paths import read_bytes, write_text
from pipelines.storage.yaml import read_yaml

# Packages whose versions change figures.
PACKAGES = ("smalti", "torch", "lightning", "numpy", "pillow")


def record_of(root: Path, stage: str) -> Path:
    """Return the file of a stage's record in a run folder; of train-prior each level has its own."""
    return root / f".made-{stage}.yaml"


def write_record(root: Path, stage: str, seconds: float, hardware: str) -> None:
    """Keep how a stage was finished.

    Args:
        root: of the run.
        stage: "pack", "train-prior-level0", …
        seconds: of the command that finished it; what earlier ones took that were stopped is not in it.
        hardware: where.
    """
    versions = {"python": python_version()} | {name: version(name) for name in PACKAGES}
    contents = {"seconds": round(seconds, 1), "hardware": hardware, "versions": versions}
    write_text(record_of(root, stage), yaml.safe_dump(contents, sort_keys=False))


def read_record(root: Path, stage: str) -> dict[str, Any]:
    """Return the record of a stage; empty where there is none, as of work done before records were kept."""
    with suppress(OSError, ValueError):
        record = read_yaml(read_bytes(record_of(root, stage)))
        if isinstance(record, dict):
            return record
    return {}


def recorded_seconds(root: Path, stages: Sequence[str]) -> float | None:
    """Return what the commands that finished these stages took in all; None where nothing was recorded."""
    records = [path for stage in stages for path in root.glob(record_of(root, f"{stage}*").name)]
    stages = [path.stem.removeprefix(".made-") for path in records]
    found = [read_record(root, stage).get("seconds") for stage in stages]
    seconds = [one for one in found if isinstance(one, int | float)]
    return round(sum(seconds), 1) if seconds else None
