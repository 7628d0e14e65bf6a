"""Samples: by class, with how likely the priors find them, and beside what is nearest among training images.

N images, C channels, H W pixels.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from pipelines.metrics.copies import Nearest, nearest
from pipelines.report.pictures import Picture, picture
from pipelines.report.reading import Images

# Samples shown of a class, classes shown, and samples where there are no classes.
OF_CLASS, MOST_CLASSES, WITHOUT_CLASS = 10, 12, 24
# Samples shown beside their nearest training images.
NEAREST = 8


class Sample(NamedTuple):
    """A sample and what stands below it."""

    picture: Picture
    label: str


class Neighbours(NamedTuple):
    """Samples beside the training images nearest to them.

    Attributes:
        pairs: sample, training image, and how far apart: those samples that are nearest to any.
        samples: median distance of samples to the nearest training image, in grey levels.
        val: the same of val images; None where none were read.
        train: training images that were looked at.
    """

    pairs: list[tuple[Picture, Picture, str]]
    samples: float
    val: float | None
    train: int


def by_class(samples: Images, bits: np.ndarray | None, class_names: list[str]) -> list[tuple[str, list[Sample]]]:
    """Return classes with their samples, likeliest first; one group where there are no classes.

    Args:
        samples: as read.
        bits: -log2 p of each under the priors, (N,); None where not all priors are there.
        class_names: empty where there are none.
    """
    labels = sorted(set(samples.classes.tolist()))
    groups = []
    for label in labels[:MOST_CLASSES]:
        name = class_names[label] if 0 <= label < len(class_names) else "samples"
        places = np.flatnonzero(samples.classes == label)
        if bits is not None:
            places = places[np.argsort(bits[places], kind="stable")]
        places = places[:: max(1, len(places) // OF_CLASS)] if len(labels) > 1 else places
        most = OF_CLASS if len(labels) > 1 else WITHOUT_CLASS
        shown = [
            Sample(
                picture(samples.pixels[place], f"sample {samples.keys[place]}, {name}"),
                f"{bits[place]:.0f} bits" if bits is not None else "",
            )
            for place in places[:most]
        ]
        groups.append((name, shown))
    return groups


def apart(pixels: np.ndarray, train: np.ndarray) -> Nearest:
    """Return, of each image, the nearest training image and how far it is: RMS difference, in grey levels.

    Args:
        pixels: uint8 (N, C, H, W).
        train: uint8 (T, C, H, W).
    """
    found = nearest(torch.from_numpy(pixels).flatten(1), torch.from_numpy(train).flatten(1))
    return Nearest(found.distances / math.sqrt(pixels[0].size), found.rows)


def neighbours(samples: Images, train: Images, val: Images | None) -> Neighbours:
    """Return samples beside the training images nearest to them in pixels.

    Args:
        samples: as read.
        train: as read.
        val: as read, for comparison: no training image was among them.
    """
    distances, rows = (one.numpy() for one in apart(samples.pixels, train.pixels))
    pairs = [
        (
            picture(samples.pixels[place], f"sample {samples.keys[place]}"),
            picture(train.pixels[rows[place]], f"training image {train.keys[rows[place]]}"),
            f"{distances[place]:.1f}",
        )
        for place in np.argsort(distances, kind="stable")[:NEAREST]
    ]
    of_val = float(apart(val.pixels, train.pixels).distances.median()) if val else None
    return Neighbours(pairs, float(np.median(distances)), of_val, len(train.pixels))
