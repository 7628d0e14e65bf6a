"""The figures of a run, each with what it means in a few words; docs/figures.md says the rest."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.storage.paths import exists, read_bytes

# By pattern of their names: what a person is told of them, in this order.
MEANINGS = {
    r"tokenizer\.psnr": ("reconstruction, PSNR in dB", "how near reconstructions are in pixels; more is better"),
    r"tokenizer\.ssim": ("reconstruction, SSIM", "how alike they are in structure, 1 at most; more is better"),
    r"tokenizer\.level(\d+)_usage": ("level {}: share of codes in use", "near 1 is good; below 0.1 it has collapsed"),
    r"tokenizer\.level(\d+)_perplexity": ("level {}: perplexity", "as many codes, evenly used, would say as much"),
    r"tokenizer\.level(\d+)_active": ("level {}: share of active units", "channels that tell images apart"),
    r"prior\.level(\d+)\.bits_per_code\.given_class": ("level {}: bits a code, given the class", "less is better"),
    r"prior\.level(\d+)\.bits_per_code\.without_class": ("level {}: bits a code, without class", "less is better"),
    r"prior\.level(\d+)\.histogram_bits": ("level {}: bits a code by the histogram", "what the prior must stay below"),
    r"prior\.level(\d+)\.nats_per_code": ("level {}: nats a code", "as training saw it last; less is better"),
    r"prior\.level(\d+)\.nats_per_value(?:\.\w+)?": (
        "level {}: nats a value",
        "of a density: no bits, may be negative",
    ),
    r"bound\.bits_per_dim\.given_class": ("bound, bits a dimension, given the class", "codes and what they leave open"),
    r"bound\.bits_per_dim\.without_class": (
        "bound, bits a dimension",
        "codes and what they leave open; less is better",
    ),
}


class Figure(NamedTuple):
    """A figure: its name in metrics.json, what people call it, its value, and what it means."""

    key: str
    name: str
    value: str
    meaning: str


def figures_of(root: Path, num_levels: int) -> dict[str, float]:
    """Return the figures of a run by name, "tokenizer.psnr": those of `evaluate`, else those that training ended with.

    Args:
        root: of the run.
        num_levels: of codes.
    """
    found = {f"tokenizer.{name}": value for name, value in flat(_read(root / "tokenizer"))}
    for level in range(num_levels):
        named = flat(_read(root / "prior" / f"level{level}"))
        found |= {f"prior.level{level}.{name}": value for name, value in named}
    measured = _read(root)
    parts = tuple(f"{part}." for part in measured)
    found = {name.replace(".val_", "."): value for name, value in found.items() if not name.startswith(parts)}
    return found | dict(flat(measured))


def told(figures: dict[str, float]) -> list[Figure]:
    """Return the figures that matter, with their meanings, in the order of MEANINGS."""
    rows = []
    for pattern, (name, meaning) in MEANINGS.items():
        for key, value in figures.items():
            if match := re.fullmatch(pattern, key):
                share = key.endswith(("_usage", "_active"))
                told_as = f"{value:.1%}" if share else shown(value)
                rows.append(Figure(key, name.format(*match.groups()), told_as, meaning))
    return rows


def flat(figures: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Yield "part.figure" and value of nested figures that are numbers."""
    for name, value in figures.items() if isinstance(figures, dict) else ():
        if isinstance(value, int | float):
            yield f"{path}{name}", value
        yield from flat(value, f"{path}{name}.")


def shown(value: float) -> str:
    """Return a figure as people read it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_bytes(folder / "metrics.json")) if exists(folder / "metrics.json") else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
