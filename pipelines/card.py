"""The card of a generator, the README.md that the hub shows: what it draws, how well, and how to load it."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipelines.errors import StageError
from pipelines.metrics.metric import shown
from pipelines.storage.fingerprint import manifest_digest, model_fingerprints
from pipelines.storage.manifest import read_manifest, receipts_of
from pipelines.storage.paths import read_bytes
from prior import HierarchicalPrior
from tokenizer import HierarchicalVQVAE
from tokenizer.hub import tag

# Class names that a card lists.
SHOWN_CLASSES = 20
HEAD = """\
---
library_name: smalti
pipeline_tag: unconditional-image-generation
tags: [{tags}]
---

# A smalti generator
"""
# The hub's tags of priors, by network; N(0, I) has none.
PRIOR_TAGS = {
    "transformer": "autoregressive",
    "pixelsnail": "autoregressive",
    "mixture": "gaussian-mixture",
    "flow": "normalizing-flow",
}
LICENCE = """\
Not stated. Say here how the weights may be used, and name the licence in the head of this file as `license:`.
"""


def is_run(folder: Path) -> bool:
    """Whether a folder of models is that of a run, and not a published one."""
    return (folder / "prior" / "level0" / "config.yaml").exists()


def files_about(folder: Path, tokenizer: HierarchicalVQVAE, prior: HierarchicalPrior) -> dict[str, bytes]:
    """Return what a folder tells of its generator, by path: figures, sample grid and card, as far as it has them.

    Args:
        folder: a published one, which has its card, or that of a run, for which a card is written.
        tokenizer: of the generator.
        prior: of the generator.
    """
    levels = [f"prior/level{number}" for number in range(len(prior.levels))]
    names = ["metrics.json", "tokenizer/metrics.json", *(f"{level}/metrics.json" for level in levels)]
    names += [] if is_run(folder) else ["README.md", "grid.png"]
    about = {name: read_bytes(folder / name) for name in names if (folder / name).is_file()}
    if not is_run(folder):
        return about
    marks, drawn_with = model_fingerprints(tokenizer, prior), {}
    with suppress(StageError, OSError):  # a run may do without samples
        manifest = read_manifest(folder / "samples", "samples", "sample")
        if manifest["fingerprints"].items() >= marks.items():  # and a classifier, where one chose
            about["grid.png"] = read_bytes(folder / "samples" / "grid.png")
            drawn_with = manifest["settings"]
    card = model_card(tokenizer, prior, about, _data(folder, marks["tokenizer"]), drawn_with)
    return about | {"README.md": card.encode()}


def model_card(
    tokenizer: HierarchicalVQVAE,
    prior: HierarchicalPrior,
    about: dict[str, bytes],
    data: str = "",
    drawn_with: dict[str, Any] | None = None,
) -> str:
    """Return a card. The licence is for the owner to say, and so are data of which nothing is known.

    Args:
        tokenizer: of the generator.
        prior: of the generator.
        about: see `files_about`.
        data: what it was trained on, a sentence.
        drawn_with: the settings of the sample grid.
    """
    size, channels, names = tokenizer.image_size, tokenizer.channels, prior.class_names
    listed = ", ".join(f"`{' '.join(name.split())}`" for name in names[:SHOWN_CLASSES])
    pairs = zip(tokenizer.levels, prior.levels, strict=True)
    levels = [
        (number, f"{level.grid[0]}x{level.grid[1]}", level.codebook_size or "continuous", one.config.network)
        for number, (level, one) in enumerate(pairs)
    ]
    rows = _figures(about, len(levels))
    figures = _table(["", "figure", "all", *(f"level {number}" for number, *_ in levels)], rows)
    sections = {
        "Load": _how_to_load(f"classes={names[:3]!r}" if names else "count=3", size, channels),
        "Levels": _table(["level", "grid", "codebook", "prior"], levels),
        "Classes": f"{len(names)}: {listed}{', …' if len(names) > SHOWN_CLASSES else ''}\n" if names else "None.\n",
        "Data": f"{data or 'Not recorded. Say here what it was trained on.'}\n",
        "Figures, on the validation split": figures if rows else "None are recorded.\n",
        "Licence": LICENCE,
    }
    called = tokenizer.bottleneck.called
    networks = [PRIOR_TAGS[network] for *_, network in levels if network in PRIOR_TAGS]
    tags = ", ".join(dict.fromkeys(["image-generation", "image-tokenizer", tag(called), *networks]))
    known = "conditional " if tokenizer.num_classes else ""
    intro = (
        f"Draws {'grey' if channels == 1 else 'RGB'} images of {size}x{size} pixels: a prior per level draws what "
        f"stands for one, coarse to fine, and a tokenizer ({known}{called}) decodes it.\n"
    )
    body = "\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    drawn = dict(drawn_with or {})
    if not any(tokenizer.codebook_sizes):  # what chooses among codes says nothing of numbers
        drawn = {name: drawn[name] for name in ("seed", "temperature") if name in drawn}
    return "\n".join([HEAD.format(tags=tags), intro, *_grid(about, drawn), body])


def _how_to_load(classes: str, size: int, channels: int) -> str:
    return (
        "```python\nfrom pipelines import Generator\n\n"
        'gen = Generator.from_pretrained("FOLDER_OR_REPOSITORY")\n'
        f"images, codes = gen.sample({classes}, seed=0)  # images: (B, {channels}, {size}, {size}) in [-1, 1]\n```\n\n"
        "or `smalti sample FOLDER_OR_REPOSITORY --run_dir drawn --sample.count 100`.\n"
    )


def _grid(about: dict[str, bytes], drawn_with: dict[str, Any]) -> list[str]:
    """Return the lines that show the sample grid, none where there is none."""
    if "grid.png" not in about:
        return []
    named = [name for name in ("seed", "temperature", "top_k", "top_p", "guidance") if name in drawn_with]
    told = f"Drawn with {', '.join(f'{name} {drawn_with[name]}' for name in named)}.\n"
    return ["![samples](grid.png)\n", *([told] if named else [])]


def _data(folder: Path, tokenizer: str) -> str:
    """Return a sentence on a run's images, if it has those whose codes this tokenizer, by fingerprint, has made."""
    with suppress(StageError):
        images = read_manifest(folder / "images", "images", "pack")
        codes = read_manifest(folder / "codes", "codes", "encode")
        if codes["tokenizer"] == tokenizer and codes["made_from"] == manifest_digest(images):
            train, val = (sum(one["samples"] for one in receipts_of(images, split)) for split in ("train", "val"))
            source = _without_places(str(images.get("made_from")))
            return f"The priors learned codes of {train} images of `{source}`; {val} more are the validation split."
    return ""


def _without_places(source: str) -> str:
    """Return a source without what may be private in it: the folders above, and what follows a URL's "?"."""
    kind, colon, name = source.partition(":")
    return source if kind == "hf" else kind + colon + name.partition("?")[0].rstrip("/").rpartition("/")[2]


def _figures(about: dict[str, bytes], num_levels: int) -> list[list[str]]:
    """Return rows of part, figure, and its value of all levels and of each one.

    Values are those of `evaluate`; of a part that it has not measured, those with which training ended.
    """
    own = {
        "tokenizer": _read(about, "tokenizer/metrics.json"),
        "prior": {f"level{number}": _read(about, f"prior/level{number}/metrics.json") for number in range(num_levels)},
    }
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for part, figures in (own | _read(about, "metrics.json")).items():
        for level, name, value in _flat(figures):
            rows.setdefault((part, name), {})[level] = shown(value)
    columns = ["", *map(str, range(num_levels))]
    return [[part, name, *(found.get(column, "") for column in columns)] for (part, name), found in rows.items()]


def _flat(figures: Any) -> Iterator[tuple[str, str, float]]:
    """Yield level ("" of all), name and value from "psnr", "val_level0_usage" and "level0": {"bits_per_code": …}."""
    for name, value in figures.items() if isinstance(figures, dict) else ():
        if name == "made":  # what figures are of
            continue
        level, rest = re.findall(r"^(?:val_)?(?:level(\d+)(?:_|$))?(.*)", name)[0]
        if isinstance(value, int | float):
            yield level, rest, value
        for inner, below, number in _flat(value):
            yield level or inner, " ".join(one for one in (rest, below) if one not in ("", "total")), number


def _read(about: dict[str, bytes], name: str) -> dict[str, Any]:
    """Return the figures of a file; none where it is missing or holds none."""
    try:
        figures = json.loads(about.get(name, b"{}"))
    except (ValueError, RecursionError):
        return {}
    return figures if isinstance(figures, dict) else {}


def _table(head: list[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
