"""What a tokenizer makes of the images that were read: codes, reconstructions, and which are good and bad.

N images, C channels, H W pixels, h w grid.
"""

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
SHOWN, STAIRS = 6, 8


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
        stairs: rows of images, then of what the first levels decode to, one more each.
    """

    ranked: list[tuple[str, list[Reconstructed]]]
    most: float
    stairs: list[Row]


@torch.no_grad()
def tokenized(tokenizer: HierarchicalVQVAE, images: Images) -> Tokenized:
    """Pass images through a tokenizer, which is in eval mode and stays where it is."""
    device = next(tokenizer.parameters()).device
    size = max(1, BATCH_VALUES // images.pixels[0].size)
    levels: list[list[Tensor]] = [[] for _ in tokenizer.levels]
    errors, reconstructions = [], []
    for first in range(0, len(images.pixels), size):
        batch = to_unit_range(torch.from_numpy(images.pixels[first : first + size]).to(device))
        output = tokenizer(batch)
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
    return Quality(shown, most, stairs(tokenizer, images.pixels, found))


def _reconstructed(
    images: Images, found: Tokenized, place: int, difference: np.ndarray, most: float, class_names: list[str]
) -> Reconstructed:
    name = named(images, place, class_names)
    psnr = 10 * np.log10(4 / max(found.errors[place], 1e-12))
    return Reconstructed(
        picture(images.pixels[place], f"{name}"),
        picture(found.reconstructions[place], f"reconstruction of {name}"),
        picture(heat(difference, 0, most), f"where the reconstruction of {name} errs"),
        f"{psnr:.1f} dB",
    )


def stairs(tokenizer: HierarchicalVQVAE, pixels: np.ndarray, found: Tokenized) -> list[Row]:
    """Return rows of pictures: the first images, then what each prefix of their levels decodes to."""
    number = min(STAIRS, len(pixels))
    rows = [Row("image", [picture(one, f"val image {place + 1}") for place, one in enumerate(pixels[:number])])]
    for last in range(len(found.levels)):
        title = f"levels 0 to {last}" if last else "level 0 alone"
        decoded = to_uint8(tokenizer.decode([level[:number] for level in found.levels[: last + 1]]))
        rows.append(Row(title, [picture(one, f"{title} of val image {n + 1}") for n, one in enumerate(decoded)]))
    return rows


def named(images: Images, place: int, class_names: list[str]) -> str:
    """Return what to call an image: its key, and its class if it has one."""
    label = int(images.classes[place])
    return f"{images.keys[place]}, {class_names[label]}" if 0 <= label < len(class_names) else images.keys[place]
