"""The plane of a run whose images are two numbers each: what it decodes to, and where images lie on it.

N images, C channels, H W pixels.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.data.images import to_uint8
from pipelines.report.pictures import Picture, sheet
from pipelines.report.reading import Images
from tokenizer import HierarchicalVQVAE

# Points a side that are decoded, and pixels a side that the plot of images has.
SIDE, PLOT = 15, 360
# The share of points that each side of an axis may leave out, and the part of the axis that is added on each side.
LEFT_OUT, MARGIN = 0.01, 0.05
# Classes that are told apart; those beyond are left out.
MOST_CLASSES = 20
# Okabe and Ito's colours without yellow and black, which one of the page's schemes would swallow; and shapes, as paths
# around a point. Six and five: neighbours differ in both, and no two of thirty are alike.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SHAPES = (
    "m-3,0a3,3 0 1,0 6,0a3,3 0 1,0 -6,0z",
    "m-2.7,-2.7h5.4v5.4h-5.4z",
    "m0,-3.6l3.4,6.2h-6.8z",
    "m0,-4l3.4,4l-3.4,4l-3.4,-4z",
    "m-1,-3.4h2v2.4h2.4v2h-2.4v2.4h-2v-2.4h-2.4v-2h2.4z",
)


class Group(NamedTuple):
    """Images of a class on the plane: its name and colour, a path that draws them, one of the mark alone, a middle."""

    name: str
    colour: str
    path: str
    mark: str
    middle: tuple[float, float]


class Plane(NamedTuple):
    """The plane.

    Attributes:
        decoded: SIDE x SIDE of its points at even distances, the second number rising upwards.
        groups: images by class; one group where there are no classes.
        size: of the plot, in its own units.
        low: what each number is at the left and lower edge of both pictures.
        high: the same at the other edges.
        images: how many were encoded.
        outside: of those, how many lie beyond the edges.
        normal: whether the prior that images are drawn towards is N(0, I), of which the edges then leave room too.
        conditional: whether the tokenizer is given classes, of which the decoded points have none.
    """

    decoded: Picture
    groups: list[Group]
    size: int
    low: tuple[float, float]
    high: tuple[float, float]
    images: int
    outside: int
    normal: bool
    conditional: bool


def is_plane(tokenizer: HierarchicalVQVAE) -> bool:
    """Whether an image is two numbers and no more."""
    return [tuple(level) for level in tokenizer.levels] == [((1, 1), None, 2)]


@torch.no_grad()
def plane(tokenizer: HierarchicalVQVAE, images: Images, numbers: Tensor, class_names: list[str]) -> Plane:
    """Return the plane of a tokenizer.

    Args:
        tokenizer: in eval mode.
        images: of the val split.
        numbers: what they are encoded as, (N, 2, 1, 1): of a Gaussian the means.
        class_names: empty where there are none.
    """
    points = numbers.flatten(1).double().cpu()  # (N, 2)
    normal = bool(tokenizer.bottlenecks[0].noise_channels)
    low, high = limits(points, normal)
    grid = (low + (high - low) * even()).view(-1, 2, 1, 1).float()
    decoded = to_uint8(tokenizer.decode([grid.to(next(tokenizer.parameters()).device)]))
    _, channels, height, width = decoded.shape
    rows = decoded.reshape(SIDE, SIDE, channels, height, width).transpose(2, 0, 3, 1, 4)
    canvas = rows.reshape(channels, SIDE * height, SIDE * width)
    seen = ((points >= low) & (points <= high)).all(1).numpy()
    places = ((points - low) / (high - low) * PLOT).numpy()[seen]
    places[:, 1] = PLOT - places[:, 1]
    return Plane(
        sheet(canvas, f"{SIDE} by {SIDE} points of the plane, decoded"),
        _groups(places, images.classes[seen], class_names),
        PLOT,
        (float(low[0]), float(low[1])),
        (float(high[0]), float(high[1])),
        len(points),
        int((~seen).sum()),
        normal,
        bool(tokenizer.num_classes),
    )


def limits(points: Tensor, normal: bool) -> tuple[Tensor, Tensor]:
    """Return between which values either number is shown, float64 (2,) each: where nearly all points lie.

    Args:
        points: float64 (N, 2).
        normal: whether N(0, I) is to be seen too, as far as it would leave out as much.
    """
    shares = torch.tensor([LEFT_OUT, 1 - LEFT_OUT], dtype=torch.float64)
    low, high = torch.quantile(points, shares, dim=0)
    if normal:
        edges = torch.special.ndtri(shares)
        low, high = low.minimum(edges[0]), high.maximum(edges[1])
    room = ((high - low) * MARGIN).clamp(min=1e-6)
    return low - room, high + room


def even() -> Tensor:
    """Return points of the unit square at even distances, float64 (SIDE, SIDE, 2), the highest row first."""
    found = (torch.arange(SIDE, dtype=torch.float64) + 0.5) / SIDE
    return torch.stack(torch.meshgrid(found, found.flip(0), indexing="xy"), -1)


def _groups(places: np.ndarray, classes: np.ndarray, class_names: list[str]) -> list[Group]:
    found = []
    for number, label in enumerate(sorted(set(classes.tolist()))[:MOST_CLASSES]):
        own, shape = places[classes == label], SHAPES[number % len(SHAPES)]
        path = "".join(f"M{x:.1f},{y:.1f}{shape}" for x, y in own)
        name = class_names[label] if 0 <= label < len(class_names) else "val images"
        x, y = np.median(own, 0)
        found.append(Group(name, COLOURS[number % len(COLOURS)], path, f"M6,6{shape}", (float(x), float(y))))
    return found
