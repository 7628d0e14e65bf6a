"""The head of a page: what went in, which models came of it, the stages, and the figures that matter.

h w grid, K codebook_size.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pipelines.finished import Finished, what_came_of
from pipelines.report.figures import Figure, LevelFigures, read_figures
from pipelines.storage.fingerprint import manifest_digest, prior_fingerprint, tokenizer_fingerprint
from pipelines.storage.folders import is_complete, plain_data
from pipelines.storage.manifest import Manifest, read_manifest, receipts_of
from pipelines.storage.paths import exists, read_bytes
from pipelines.storage.record import read_record
from prior import LevelPrior
from prior.mixture import Mixture
from tokenizer import HierarchicalVQVAE

# Characters of a fingerprint that people compare.
SHORT = 12


class Stage(NamedTuple):
    """A stage as it stands.

    Attributes:
        name: its command.
        state: "done", "begun", "not yet" or "elsewhere".
        came: what came of it, in a few words.
        seconds: of the command that finished it; "" where nobody kept them.
        hardware: where.
        fingerprint: of what it made.
    """

    name: str
    state: str
    came: str = ""
    seconds: str = ""
    hardware: str = ""
    fingerprint: str = ""


class Fact(NamedTuple):
    """A line on what the run is."""

    name: str
    value: str


class Head(NamedTuple):
    """The head of a page."""

    facts: list[Fact]
    figures: list[Figure]
    by_level: list[LevelFigures]
    stages: list[Stage]
    versions: list[str]
    settings: str


def images_facts(finished: Finished) -> list[Fact]:
    """Return what went in, as the images' manifest has it."""
    manifest = read_manifest(finished.images, "images", "pack")
    size, names = manifest["image_size"], manifest["class_names"]
    counts = ", ".join(f"{_total(manifest, split):,} {split}" for split in ("train", "val"))
    skipped = f"; {manifest.get('skipped')} left out that could not be used" if manifest.get("skipped") else ""
    shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    return [
        Fact("source", str(manifest.get("made_from"))),
        Fact("images", f"{counts}{skipped}"),
        Fact("pixels", f"{size}x{size}, {'grey' if manifest['channels'] == 1 else 'RGB'}"),
        Fact("classes", f"{len(names)}: {shown}" if names else "none"),
    ]


def tokenizer_facts(tokenizer: HierarchicalVQVAE) -> list[Fact]:
    """Return what an image becomes, and what that takes."""
    pixels = 8 * tokenizer.channels * tokenizer.image_size**2
    grids = " + ".join(
        f"{h}x{w} of {f'{size:,} codes' if size else f'{channels} numbers'}"
        for (h, w), size, channels in tokenizer.levels
    )
    facts = [Fact("an image becomes", grids), Fact("tokenizer", f"{_millions(tokenizer)} parameters")]
    if all(tokenizer.codebook_sizes):
        bits = sum(h * w * math.log2(size) for (h, w), size, _ in tokenizer.levels if size)
        facts.append(Fact("bits per image", f"{bits:,.0f} as codes, at most; {pixels:,} as pixels of 8 bits"))
    return facts


def prior_facts(levels: dict[int, LevelPrior]) -> list[Fact]:
    """Return what the priors are."""
    return [Fact("priors", ", ".join(f"level {n} {_sized(one)}" for n, one in sorted(levels.items())))]


def _sized(prior: LevelPrior) -> str:
    """Return the network of a prior and how large it is: N(0, I) has no size, and a mixture no parameters."""
    if isinstance(prior.network, Mixture):
        return f"mixture of {len(prior.network.means):,} components"
    size = f" of {_millions(prior)} parameters" if any(True for _ in prior.parameters()) else ""
    return f"{prior.config.network}{size}"


def stages(
    finished: Finished,
    num_levels: int,
    tokenizer: HierarchicalVQVAE | None,
    priors: dict[int, LevelPrior],
    steps: dict[str, int],
) -> list[Stage]:
    """Return the stages as they stand.

    Args:
        finished: the run's folders.
        num_levels: of codes.
        tokenizer: the finished one, if there is one.
        priors: finished ones, by level.
        steps: of trainings that have begun, the last one logged, by folder name.
    """
    folders = _folders(finished, num_levels)
    marks = {f"train-prior level {level}": prior_fingerprint(prior) for level, prior in priors.items()}
    marks |= {"train-tokenizer": tokenizer_fingerprint(tokenizer)} if tokenizer else {}
    rows = [_stage(name, folder, marks.get(name, ""), steps.get(folder.name)) for name, folder in folders.items()]
    if source := finished.config.tokenizer.from_:
        rows[1] = Stage("train-tokenizer", "elsewhere", source, fingerprint=marks.get("train-tokenizer", "")[:SHORT])
    return [*rows, _evaluated(finished.root)]


def _stage(name: str, folder: Path, mark: str, step: int | None) -> Stage:
    if not is_complete(folder):
        begun = exists(folder / "config.yaml")
        return Stage(name, "begun" if begun else "not yet", f"at step {step:,}" if begun and step else "")
    if exists(folder / "manifest.json"):
        mark = manifest_digest(json.loads(read_bytes(folder / "manifest.json")))
    return Stage(name, "done", what_came_of(folder), *_where(_record(name, folder)), mark[:SHORT])


def _evaluated(root: Path) -> Stage:
    if not (figures := read_figures(root)):
        return Stage("evaluate", "not yet")
    return Stage("evaluate", "done", f"figures of {', '.join(figures)}", *_where(read_record(root, "evaluate")))


def _where(record: dict[str, Any]) -> tuple[str, str]:
    """Return seconds and hardware of a record, as people read them."""
    return f"{record['seconds']:,.0f}" if "seconds" in record else "", str(record.get("hardware", ""))


def versions(finished: Finished, rows: list[Stage]) -> list[str]:
    """Return the versions of packages that stages were made with, each set once."""
    folders = _folders(finished, len(rows)) | {"evaluate": finished.root / "metrics.json"}
    records = [_record(row.name, folders[row.name]).get("versions", {}) for row in rows if row.state == "done"]
    return sorted({", ".join(f"{package} {found}" for package, found in one.items()) for one in records if one})


def _folders(finished: Finished, num_levels: int) -> dict[str, Path]:
    root = finished.root
    folders = {"pack": finished.images, "train-tokenizer": root / "tokenizer", "encode": finished.codes}
    folders |= {f"train-prior level {level}": finished.level(level) for level in range(num_levels)}
    return folders | {"sample": root / finished.config.sample.folder}


def _record(stage: str, folder: Path) -> dict[str, Any]:
    return read_record(folder.parents[1] if "prior" in stage else folder.parent, stage.replace(" level ", "-level"))


def settings_of(finished: Finished) -> str:
    """Return the run's settings as YAML."""
    return yaml.safe_dump(plain_data(finished.config), sort_keys=False)


def _total(manifest: Manifest, split: str) -> int:
    return sum(receipt["samples"] for receipt in receipts_of(manifest, split))


def _millions(model: Any) -> str:
    number = sum(parameter.numel() for parameter in model.parameters())
    return f"{number / 1e6:.3g}M" if number >= 1e5 else f"{number:,}"
