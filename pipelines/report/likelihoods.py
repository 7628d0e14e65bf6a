"""What priors make of codes: nats at each position, by class, on what they learned and on what they did not.

N images, h w grid, d channels of a continuous grid, K codebook_size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.report.pictures import Picture, heat, picture
from pipelines.report.reading import Codes
from prior import LevelPrior

# Multiplications that a level's prior is asked for on a split, at most; images that it sees at least; logits at once.
MOST_WORK, LEAST_SEEN, MOST_LOGITS = 5e11, 4, 2**25
# Images shown with what each position of them costs.
SHOWN = 8
# Classes in the table.
MOST_CLASSES = 100


class Costs(NamedTuple):
    """What a level's prior makes of a split: nats at each position, float32 (N, h, w), and which images they are of."""

    nats: Tensor
    rows: list[int]


class Maps(NamedTuple):
    """One level's prior.

    Attributes:
        level: its number.
        val: nats per code on the val split, a map of positions, from how many images.
        train: the same of the training split.
        low: nats shown darkest.
        high: nats shown brightest.
        images: val images, each with the map of its own.
        most: nats shown brightest there.
        unit: "nats per code" or "nats per cell, of a density".
    """

    level: int
    val: "Split"
    train: "Split | None"
    low: float
    high: float
    images: list[tuple[Picture | None, Picture, str]]
    most: float
    unit: str


class Split(NamedTuple):
    """Mean nats of a split, their map, and how many images that is."""

    nats: float
    map: Picture
    images: int


def position_nats(level: LevelPrior, codes: Tensor, coarser: list[Tensor], classes: Tensor | None) -> Tensor:
    """Return -log p of each position given those before it, float32 (N, h, w); their sum is `nll`.

    Args:
        level: a prior.
        codes: its own, int64 (N, h, w), or float32 (N, d, h, w) of a continuous level, whose nats are of a density.
        coarser: of the coarser levels.
        classes: int64 (N,); None for none.
    """
    nats = level.nats_unchecked(codes, coarser, classes)
    return (nats.sum(1) if nats.ndim == 4 else nats).float()


@torch.no_grad()
def costs(level: LevelPrior, codes: Codes) -> Costs:
    """Return what a prior makes of codes, of as many as can be asked for in seconds.

    Args:
        level: a prior in eval mode.
        codes: of a split.
    """
    number = level.config.level
    positions, size = codes.levels[number][0].numel(), level.config.codebook_sizes[-1] or 1
    parameters = sum(parameter.numel() for parameter in level.parameters())
    most = int(max(LEAST_SEEN, MOST_WORK // max(1, 2 * parameters * positions)))
    rows = np.unique(np.linspace(0, len(codes.classes) - 1, min(most, len(codes.classes))).round().astype(int))
    given = bool(level.config.class_names)
    nats = []
    for some in torch.from_numpy(rows).split(max(1, MOST_LOGITS // (positions * size))):
        grids = [one[some].to(level.device) for one in codes.levels[: number + 1]]
        classes = codes.classes[some].to(level.device) if given else None
        nats.append(position_nats(level, grids[-1], grids[:-1], classes).cpu())
    return Costs(torch.cat(nats), rows.tolist())


def maps(level: LevelPrior, val: Costs, train: Costs | None, pixels: np.ndarray | None) -> Maps:
    """Return what a level's prior costs, as maps.

    Args:
        level: the prior.
        val: what it makes of the val split.
        train: of the training split, if that was read.
        pixels: of val images, uint8 (N, C, H, W), in the order of the codes; None where they are not at hand.
    """
    number = level.config.level
    means = [one.nats.mean(0).numpy() for one in (val, train) if one]
    low, high = min(float(one.min()) for one in means), max(float(one.max()) for one in means)

    def split(costs_: Costs, name: str) -> Split:
        mean = costs_.nats.mean(0).numpy()
        alt = f"nats by position, level {number}, {name} split: {mean.min():.2f} to {mean.max():.2f}"
        return Split(float(mean.mean()), picture(heat(mean, low, high), alt, 96), len(costs_.rows))

    density = level.config.codebook_sizes[-1] is None
    unit = "nats per cell, of a density" if density else "nats per code"

    def cost(nats: float) -> str:
        return f"{nats:.0f} nats" if density else f"{nats / np.log(2):.0f} bits"

    most = float(np.quantile(val.nats[:SHOWN].numpy(), 0.98))
    shown = []
    for place, row in enumerate(val.rows[:SHOWN]):
        nats = val.nats[place].numpy()
        image = None if pixels is None else picture(pixels[row], f"val image {row + 1}")
        alt = f"what each position of val image {row + 1} costs at level {number}"
        shown.append((image, picture(heat(nats, min(low, 0.0), most), alt), cost(float(nats.sum()))))
    return Maps(number, split(val, "val"), split(train, "train") if train else None, low, high, shown, most, unit)


def by_class(
    found: dict[int, dict[str, Costs]], codes: dict[str, Codes], class_names: Sequence[str]
) -> list[tuple[str, ...]]:
    """Return rows of a table: a class, then its mean nats per code by level, val and train.

    Args:
        found: by level and split.
        codes: by split.
        class_names: empty where there are none.
    """
    rows = []
    for label, name in enumerate(class_names[:MOST_CLASSES]):
        row = [name]
        for splits in found.values():
            for split in ("val", "train"):
                if split in splits:
                    own = codes[split].classes[splits[split].rows] == label
                    row.append(f"{float(splits[split].nats[own].mean()):.2f}" if own.any() else "–")
        rows.append(tuple(row))
    return rows


@torch.no_grad()
def sample_bits(priors: dict[int, LevelPrior], codes: Codes, given_class: bool) -> np.ndarray:
    """Return -log2 p of samples under the priors of all their levels, (N,).

    Args:
        priors: of all levels.
        codes: of samples.
        given_class: whether each is told its class.
    """
    total = torch.zeros(len(codes.classes), dtype=torch.float64)
    for number, level in sorted(priors.items()):
        for some in torch.arange(len(total)).split(16):
            grids = [one[some].to(level.device) for one in codes.levels[: number + 1]]
            classes = codes.classes[some].to(level.device) if given_class and level.config.class_names else None
            total[some] += level.nll(grids[-1], grids[:-1], classes).double().cpu()
    return (total / np.log(2)).numpy()
