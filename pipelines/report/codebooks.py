"""Codebooks: how evenly codes are used, what each stands for, and images as mosaics of their codes.

N images, C channels, H W pixels, h w grid, K codebook_size, s side of a cell in pixels.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.data.images import to_uint8
from pipelines.report.pictures import Picture, picture
from pipelines.report.tokenized import BATCH_VALUES, Row
from tokenizer import HierarchicalVQVAE
from tokenizer.bottlenecks.usage import entropy

# Codes that have a picture: those used most, as many as these values of pixels hold, and those in plain sight.
MOST_CODES, MOST_VALUES, IN_SIGHT = 512, 2**18, 48
# Points of the curve of use.
POINTS = 256
# Images shown as mosaics, and cells of the grids whose numbers are shown.
MOSAICS, MOST_CELLS = 8, 64


class Code(NamedTuple):
    """A code: its number, its share of all places, and its pictures, mean patch and decoded alone side by side."""

    number: int
    share: float
    picture: Picture | None


class Codebook(NamedTuple):
    """One level's codes as they are used.

    Attributes:
        level: its number.
        size: K.
        places: cells that were looked at.
        used: codes that occur in them.
        perplexity: of their histogram.
        side: of a cell in pixels.
        curve: what the page's script draws: use of codes, most used first.
        codes: those with a picture, most used first.
        alone: whether pictures show what codes decode to, too.
    """

    level: int
    size: int
    places: int
    used: int
    perplexity: float
    side: int
    curve: dict[str, Any]
    codes: list[Code]
    alone: bool


class Patches(NamedTuple):
    """Of each code of a level how often it occurs (K,), and the mean of the image cells under it (K, C, s, s)."""

    counts: Tensor
    means: Tensor


def patches(codes: Tensor, size: int, pixels: np.ndarray) -> Patches:
    """Return the use of codes, and the mean of the pixels that they stand for.

    Args:
        codes: int64 (N, h, w) in [0, K).
        size: K.
        pixels: of the same images, uint8 (N, C, H, W).
    """
    (count, h, w), (_, channels, height, width) = codes.shape, pixels.shape
    s, t = height // h, width // w
    counts, sums = torch.zeros(size), torch.zeros(size, channels * s * t)
    step = max(1, BATCH_VALUES // pixels[0].size)
    for first in range(0, count, step):
        cells = torch.from_numpy(pixels[first : first + step]).view(-1, channels, h, s, w, t)
        cells = cells.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels * s * t).float()  # (N*h*w, C*s*t)
        numbers = codes[first : first + step].flatten()
        sums.index_add_(0, numbers, cells)
        counts += torch.bincount(numbers, minlength=size)
    return Patches(counts, (sums / counts.clamp(min=1)[:, None]).view(size, channels, s, t))


def mosaic(codes: Tensor, means: Tensor) -> np.ndarray:
    """Lay the mean patches (K, C, s, t) of codes (h, w): uint8 (C, h*s, w*t)."""
    laid = means[codes]  # (h, w, C, s, t)
    h, w, channels, s, t = laid.shape
    return laid.permute(2, 0, 3, 1, 4).reshape(channels, h * s, w * t).round().to(torch.uint8).numpy()


def alone(tokenizer: HierarchicalVQVAE, level: int, numbers: Tensor) -> np.ndarray:
    """Return what codes decode to where their level holds nothing else and all other levels are blank.

    Args:
        tokenizer: one grid per bottleneck.
        level: of the codes.
        numbers: int64 (n,).

    Returns:
        uint8 (n, C, s, s), the cell in the middle of the image.
    """
    h, w = tokenizer.levels[level].grid
    s, t = tokenizer.image_size // h, tokenizer.image_size // w
    rows, columns = slice(h // 2 * s, (h // 2 + 1) * s), slice(w // 2 * t, (w // 2 + 1) * t)
    cells = []
    for some in numbers.split(max(1, BATCH_VALUES // (tokenizer.channels * tokenizer.image_size**2))):
        images = tokenizer.decode([None] * level + [some[:, None, None].expand(-1, h, w)])
        cells.append(to_uint8(images[:, :, rows, columns]))
    return np.concatenate(cells)


def codebook(tokenizer: HierarchicalVQVAE, level: int, found: Patches) -> Codebook:
    """Return one level's codes as they are used.

    Args:
        tokenizer: whose codes they are.
        level: of codes, not continuous.
        found: of the images that were read.
    """
    counts, size = found.counts, len(found.counts)
    order = torch.argsort(counts, descending=True, stable=True)
    side = found.means.shape[-1]
    shown = order[: min(MOST_CODES, max(8, MOST_VALUES // (2 * found.means[0].numel())), int((counts > 0).sum()))]
    single = all(len(part.sizes) == 1 for part in tokenizer.bottlenecks)
    tiles = found.means[shown].round().to(torch.uint8).numpy()  # (n, C, s, s)
    if single and len(shown):
        between = np.full((*tiles.shape[:3], 1), 255, np.uint8)
        tiles = np.concatenate([tiles, between, alone(tokenizer, level, shown)], -1)
    total = float(counts.sum())
    codes = [
        Code(number, float(counts[number]) / total, picture(tile, f"code {number} of level {level}", 64))
        for number, tile in zip(shown.tolist(), tiles, strict=True)
    ]
    used, perplexity = int((counts > 0).sum()), math.exp(entropy(counts))
    return Codebook(level, size, int(total), used, perplexity, side, _curve(counts[order]), codes, single)


def _curve(counts: Tensor) -> dict[str, Any]:
    """Return use by rank, in multiples of what even use would give."""
    size = len(counts)
    ranks = np.unique(np.linspace(0, size - 1, min(size, POINTS)).round().astype(int))
    use = (counts * size / counts.sum().clamp(min=1))[ranks].tolist()
    line = {"name": "times even use", "level": None, "val": True, "points": False}
    return {"x": "rank", "steps": (ranks + 1).tolist(), "lines": [line], "values": [use]}


def mosaics(pixels: np.ndarray, levels: Sequence[Tensor], found: dict[int, Patches]) -> list[Row]:
    """Return rows of pictures: the first images, then each with every cell replaced by its code's mean patch, by level.

    Args:
        pixels: uint8 (N, C, H, W).
        levels: what is stored of them per level.
        found: mean patches, by level.
    """
    number = min(MOSAICS, len(pixels))
    rows = [Row("image", [picture(one, f"val image {n + 1}") for n, one in enumerate(pixels[:number])])]
    for level, one in found.items():
        laid = [mosaic(codes, one.means) for codes in levels[level][:number]]
        h, w = levels[level].shape[1:]
        alts = [f"val image {n + 1} as its {h}x{w} codes of level {level}" for n in range(number)]
        rows.append(Row(f"level {level}, {h}x{w} codes", [picture(a, alt) for a, alt in zip(laid, alts, strict=True)]))
    return rows
