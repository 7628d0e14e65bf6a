"""The figures of a run, each with what it means in a few words; docs/figures.md says the rest."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.errors import StageError
from pipelines.metrics.direction import direction
from pipelines.metrics.metric import shown
from pipelines.storage.paths import exists, read_bytes

# Of what is told with the class and without it, by pattern of their names: what a person is told.
PARTS = {
    r"prior\.rate_bits_per_image": ("bits per image", "what codes take"),
    r"bound\.bits_per_dim": ("bound, bits per value", "codes and the rest"),
    r"surgery\.mutual_information_bits_per_dim": (
        "I(x, z), bits per value",
        "what codes tell of images, of the bound; at most log2 of their number",
    ),
    r"surgery\.mutual_information_at_most_bits_per_dim": (
        "I(x, z), bits per value, at most",
        "entropy of the codes, by the best prior there is",
    ),
    r"surgery\.marginal_kl_bits_per_dim": (
        "marginal KL, bits per value",
        "what another prior could save of the bound",
    ),
    r"surgery\.marginal_kl_at_most_bits_per_dim": (
        "marginal KL, bits per value, at most",
        "what another prior could save of the bound",
    ),
    r"importance\.bits_per_dim_100": (
        "bound of 100 draws, bits per value",
        "nearer to log p than that of one",
    ),
}
# The same of all that the page tells, in this order.
MEANINGS = {
    r"tokenizer\.psnr": ("reconstructions: PSNR, dB", "how near they are in pixels"),
    r"tokenizer\.ssim": ("reconstructions: SSIM", "how alike they are in structure, 1 at most"),
    r"tokenizer\.ms_ssim": ("reconstructions: MS-SSIM", "the same at five scales"),
    r"reconstructions\.rkid": ("reconstructions: rKID x 1000", "how far from real images in features"),
    r"reconstructions\.rfid": ("reconstructions: rFID", "the same; trust it from 10,000 images on"),
    r"tokenizer\.level(\d+)_usage": (
        "level {}: share of codes in use",
        "near 100% is good; below 10% it collapsed",
    ),
    r"tokenizer\.level(\d+)_perplexity": ("level {}: perplexity", "as many codes, evenly used, would say as much"),
    r"tokenizer\.level(\d+)_kl": ("level {}: KL, nats per image", "what it says of an image; near 0 it says nothing"),
    r"tokenizer\.level(\d+)_active": ("level {}: share of active units", "channels that tell images apart"),
    r"prior\.level(\d+)\.histogram_bits": (
        "level {}: bits per code by the histogram",
        "what the prior must stay below",
    ),
    r"prior\.level(\d+)\.bits_per_code\.given_class": ("level {}: bits per code, given the class", ""),
    r"prior\.level(\d+)\.bits_per_code\.without_class": ("level {}: bits per code, without class", ""),
    r"prior\.level(\d+)\.train_bits_per_code\.given_class": (
        "level {}: bits per code of training images, given the class",
        "far below those of val, it has learned by heart",
    ),
    r"prior\.level(\d+)\.right\.given_class": ("level {}: likeliest code is right", "share of positions"),
    r"prior\.level(\d+)\.calibration_error\.given_class": (
        "level {}: calibration error",
        "how far the likeliest code's probability is from how often it is right",
    ),
    r"prior\.level(\d+)\.nats_per_code": ("level {}: nats per code", "as training saw it last"),
    r"prior\.level(\d+)\.nats_per_value": ("level {}: nats per value", "of a density, as training saw it last"),
    r"prior\.level(\d+)\.nats_per_value\.given_class": (
        "level {}: nats per value, given the class",
        "of a density, may be negative",
    ),
    r"prior\.level(\d+)\.nats_per_value\.without_class": (
        "level {}: nats per value, without class",
        "of a density, may be negative",
    ),
    **{
        rf"{pattern}\.{condition}": (f"{name}{given}", meaning)
        for pattern, (name, meaning) in PARTS.items()
        for condition, given in (("given_class", ", given the class"), ("without_class", ""))
    },
    r"samples\.kid": ("samples: KID x 1000", "how far from real images in features"),
    r"samples\.frechet\.fid": ("samples: FID", "the same; trust it from 10,000 images on"),
    r"samples\.precision": ("samples: precision", "share that could be real"),
    r"samples\.recall": ("samples: recall", "share of real images that could be samples"),
    r"samples\.density": ("samples: density", "how deep among real images they lie"),
    r"samples\.coverage": ("samples: coverage", "share of real images with a sample nearby"),
    r"codes\.level(\d+)\.total_variation": ("level {}: samples' codes, total variation", "0 to 1"),
    r"copies\.features\.too_near_share": (
        "samples: too near a training image",
        "at least as near as 1% of val images are",
    ),
    r"copies\.features\.nearer_share": (
        "samples: nearer to training images than val images are",
        "50% is chance, 100% is copying",
    ),
    r"classification\.trained_on_samples": ("classifier trained on samples: right", "of val images"),
    r"classification\.trained_on_real": ("classifier trained on real images: right", "what that could be at best"),
}
# How values are shown: as shares, and times a thousand with their standard errors.
SHARES = ("_usage", "_active", ".right.given_class", "_share", ".trained_on_samples", ".trained_on_real")
THOUSANDS = ("kid",)


class Figure(NamedTuple):
    """A figure.

    Attributes:
        key: its name in metrics.json.
        name: what people call it, "level 0: perplexity".
        value: as people read it.
        meaning: what it says.
        level: that it is of; None where it is of all.
    """

    key: str
    name: str
    value: str
    meaning: str
    level: int | None


class LevelFigures(NamedTuple):
    """A figure of levels: what people call it, what it says, and its value of each level."""

    name: str
    meaning: str
    values: list[str]


def figures_of(root: Path, num_levels: int) -> dict[str, float]:
    """Return the figures of a run by name, "tokenizer.psnr": those of `evaluate`, else those that training ended with.

    Args:
        root: of the run.
        num_levels: of codes.
    """
    found = {f"tokenizer.{name}": value for name, value in flat(read_figures(root / "tokenizer"))}
    for level in range(num_levels):
        named = flat(read_figures(root / "prior" / f"level{level}"))
        found |= {f"prior.level{level}.{name}": value for name, value in named}
    measured = read_figures(root)
    parts = tuple(f"{part}." for part in measured)
    found = {name.replace(".val_", "."): value for name, value in found.items() if not name.startswith(parts)}
    return found | dict(flat(measured))


def told(figures: dict[str, float]) -> list[Figure]:
    """Return the figures that matter, with their meanings, in the order of MEANINGS."""
    rows = []
    for pattern, (name, meaning) in MEANINGS.items():
        for key, value in figures.items():
            if match := re.fullmatch(pattern, key):
                level = int(match[1]) if match.groups() else None
                error = figures.get(f"{key}_error")
                what = "; ".join(words for words in (meaning, direction(key)) if words)
                rows.append(Figure(key, name.format(*match.groups()), as_told(key, value, error), what, level))
    return rows


def by_level(figures: list[Figure], num_levels: int) -> list[LevelFigures]:
    """Return the figures that are of levels, a row of all levels each."""
    rows: dict[str, LevelFigures] = {}
    for one in (one for one in figures if one.level is not None and one.level < num_levels):
        name = one.name.partition(": ")[2]
        row = rows.setdefault(name, LevelFigures(name, one.meaning, ["–"] * num_levels))
        row.values[one.level] = one.value  # type: ignore[index]  # those without a level are left out
    return list(rows.values())


def as_told(key: str, value: float, error: float | None = None) -> str:
    """Return a figure as people read it, by its name.

    Args:
        key: its name in metrics.json.
        value: of it.
        error: its standard error, if it has one.
    """
    if key.endswith(SHARES):
        return f"{value:.1%}"
    if key.endswith(THOUSANDS):
        return f"{1000 * value:z.3f}" + (f" ± {1000 * error:.3f}" if error is not None else "")
    return shown(value)


def flat(figures: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Yield "part.figure" and value of nested figures that are numbers."""
    for name, value in figures.items() if isinstance(figures, dict) else ():
        if isinstance(value, int | float):
            yield f"{path}{name}", value
        yield from flat(value, f"{path}{name}.")


def read_figures(folder: Path) -> dict[str, Any]:
    """Return what a folder's metrics.json holds, nothing where there is none.

    Raises:
        StageError: there is one, and it cannot be read.
    """
    path = folder / "metrics.json"
    if not exists(path):
        return {}
    try:
        found = json.loads(read_bytes(path))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise StageError(f"{path} cannot be read; remove it, or make it again by the command that wrote it")
    return found
