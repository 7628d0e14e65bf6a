"""What a tokenizer makes of the images that were read: codes, reconstructions, and which are good and bad.

N images, C channels, H W pixels, h w grid.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.data.images import to_uint8, to_unit_range
from pipelines.report.pictures import Picture, heat, picture
from pipelines.report.reading import Images
from tokenizer import HierarchicalVQVAE

# Values of images that pass the tokenizer at once.
BATCH_VALUES = 2**21
# Images shown of the best, of the middle and of the worst, and of those decoded level by level.
SHOWN, STAIRS = 5, 8
# Images whose PSNR is taken of each row of these.
MEASURED = 64


class Tokenized(NamedTuple):
    """A split through a tokenizer.

    Attributes:
        levels: what is stored of each, coarse to fine: (N, h, w) or (N, d, h, w).
        errors: mean squared error of each image, of values in [-1, 1], float64 (N,).
        reconstructions: uint8 (N, C, H, W).
    """

    levels: list[Tensor]
    errors: np.ndarray
    reconstructions: np.ndarray


class Row(NamedTuple):
    """A row of pictures with what it is."""

    title: str
    pictures: list[Picture]


class Reconstructed(NamedTuple):
    """An image beside its reconstruction and where they differ."""

    image: Picture
    reconstruction: Picture
    error: Picture
    label: str


class Quality(NamedTuple):
    """Reconstructions to look at.

    Attributes:
        ranked: best, median and worst, each with its images.
        most: grey levels of error that are shown brightest.
        stairs: rows of images, then of what the first levels decode to, one more each, and of all levels but one.
        adds: dB that each level adds to all others, by level; where levels stand by themselves.
        measured: images that this, and the PSNR in the titles of rows, is of.
    """

    ranked: list[tuple[str, list[Reconstructed]]]
    most: float
    stairs: list[Row]
    adds: dict[int, float]
    measured: int


@torch.no_grad()
def tokenized(tokenizer: HierarchicalVQVAE, images: Images) -> Tokenized:
    """Pass images through a tokenizer, which is in eval mode and stays where it is."""
    device = next(tokenizer.parameters()).device
    size = max(1, BATCH_VALUES // images.pixels[0].size)
    levels: list[list[Tensor]] = [[] for _ in tokenizer.levels]
    errors, reconstructions = [], []
    for first in range(0, len(images.pixels), size):
        batch = to_unit_range(torch.from_numpy(images.pixels[first : first + size]).to(device))
        output = tokenizer(batch, classes=images.classes[first : first + size])
        errors.append((output.reconstruction.float() - batch).double().square().flatten(1).mean(1).cpu().numpy())
        reconstructions.append(to_uint8(output.reconstruction))
        grids = (stored for level in output.levels for stored in level.stored)
        for level, grid in zip(levels, grids, strict=True):
            level.append(grid.cpu())
    return Tokenized([torch.cat(level) for level in levels], np.concatenate(errors), np.concatenate(reconstructions))


def ranked(errors: np.ndarray, number: int) -> dict[str, list[int]]:
    """Return the places of the smallest errors, of those around the median and of the largest.

    Args:
        errors: (N,).
        number: of each; fewer where there are not three times as many.
    """
    number = max(1, min(number, len(errors) // 3))
    order = np.argsort(errors, kind="stable").tolist()
    first = (len(order) - number) // 2
    return {"best": order[:number], "median": order[first : first + number], "worst": order[: -number - 1 : -1]}


def quality(tokenizer: HierarchicalVQVAE, images: Images, found: Tokenized, class_names: list[str]) -> Quality:
    """Return reconstructions of images to look at.

    Args:
        tokenizer: that made them.
        images: of the val split.
        found: what it made of them.
        class_names: empty where there are none.
    """
    places = ranked(found.errors, SHOWN)
    differences = {
        place: np.abs(images.pixels[place].astype(float) - found.reconstructions[place]).mean(0)
        for group in places.values()
        for place in group
    }  # (H, W) each, in grey levels
    most = max(1.0, *(float(np.quantile(one, 0.99)) for one in differences.values()))
    shown = [
        (name, [_reconstructed(images, found, place, differences[place], most, class_names) for place in group])
        for name, group in places.items()
    ]
    measured = min(MEASURED, len(images.pixels))
    return Quality(shown, most, *stairs(tokenizer, images, found, measured), measured)


def _reconstructed(
    images: Images, found: Tokenized, place: int, difference: np.ndarray, most: float, class_names: list[str]
) -> Reconstructed:
    name = named(images, place, class_names)
    return Reconstructed(
        picture(images.pixels[place], f"{name}"),
        picture(found.reconstructions[place], f"reconstruction of {name}"),
        picture(heat(difference, 0, most), f"where the reconstruction of {name} errs"),
        f"{psnr(found.errors[place]):.1f} dB",
    )


def stairs(
    tokenizer: HierarchicalVQVAE, images: Images, found: Tokenized, number: int
) -> tuple[list[Row], dict[int, float]]:
    """Return rows of pictures: the first images, what each prefix of their levels decodes to, and all levels but one.

    Titles hold the PSNR of the mean squared error over so many images. Beside them, the dB that each level adds to all
    the others.
    """
    pixels, classes = images.pixels[:number], images.classes[:number]
    levels = [level[:number] for level in found.levels]
    last = len(levels) - 1
    given: dict[str, list[Tensor | None]] = {"level 0 alone": [levels[0]]} if last else {}
    for level in range(1, last):
        given[f"levels 0 to {level}"] = [*levels[: level + 1]]
    given["all levels"] = [*levels]
    if all(len(part.sizes) == 1 for part in tokenizer.bottlenecks):
        given |= {f"without level {n}": [*levels[:n], None, *levels[n + 1 :]] for n in range(last)}
    reached = {}
    rows = [Row("image", [picture(one, f"val image {place + 1}") for place, one in enumerate(pixels[:STAIRS])])]
    for title, some in given.items():
        decoded = _decoded(tokenizer, some, classes)
        reached[title] = psnr(np.square((decoded.astype(np.float64) - pixels) / 127.5).mean())
        pictures = [picture(one, f"{title} of val image {n + 1}") for n, one in enumerate(decoded[:STAIRS])]
        rows.append(Row(f"{title}: {reached[title]:.1f} dB", pictures))
    without = {n: reached[f"without level {n}"] for n in range(last) if f"without level {n}" in reached}
    return rows, {n: reached["all levels"] - one for n, one in without.items()}


def psnr(error: float) -> float:
    """Return 10 log10(4 / error) of a mean squared error of values in [-1, 1], in dB."""
    return 10 * math.log10(4 / max(error, 1e-12))


def _decoded(tokenizer: HierarchicalVQVAE, levels: Sequence[Tensor | None], classes: np.ndarray) -> np.ndarray:
    """Decode many images a batch at a time: uint8 (N, C, H, W)."""
    step = max(1, BATCH_VALUES // (tokenizer.channels * tokenizer.image_size**2))
    (number,) = {len(level) for level in levels if level is not None}
    parts = [slice(first, first + step) for first in range(0, number, step)]
    decoded = (tokenizer.decode([one if one is None else one[part] for one in levels], classes[part]) for part in parts)
    return np.concatenate([to_uint8(images) for images in decoded])


def named(images: Images, place: int, class_names: list[str]) -> str:
    """Return what to call an image: its key, and its class if it has one."""
    label = int(images.classes[place])
    return f"{images.keys[place]}, {class_names[label]}" if 0 <= label < len(class_names) else images.keys[place]
