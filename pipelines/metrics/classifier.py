"""A small classifier of images: what samples teach it, and which of several samples it finds likeliest of their class.

B batch, C channels, H W pixels.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.data.images import to_unit_range

# Larger images are judged at so many pixels a side.
SIDE = 32
STEPS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 800, 64, 4e-3, 5e-2
WIDTHS = (32, 64, 128)
# Images that are judged at once.
JUDGED = 256


class _Block(nn.Module):
    """Halves the sides by a convolution, then adds what another one finds."""

    def __init__(self, before: int, channels: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(before, channels, 3, stride=2, padding=1, bias=False)
        self.stay = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels) for _ in range(2)])

    def forward(self, features: Tensor) -> Tensor:
        features = F.relu(self.norms[0](self.enter(features)))
        return features + F.relu(self.norms[1](self.stay(features)))


class Classifier(nn.Module):
    """Images (B, C, H, W) in [-1, 1] to logits (B, classes): three residual stages and a mean.

    Args:
        channels: of images, 1 or 3.
        classes: how many.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.channels, self.classes = channels, classes
        self.stages = nn.Sequential(*(_Block(*widths) for widths in pairwise((channels, *WIDTHS))))
        self.last = nn.Linear(WIDTHS[-1], classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-1] > SIDE:
            images = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
        return self.last(self.stages(images.contiguous(memory_format=torch.channels_last)).mean((2, 3)))


@torch.enable_grad()
def train_classifier(images: Tensor, labels: Tensor, classes: int, seed: int) -> Classifier:
    """Return a classifier in eval mode, after so many steps on batches that are moved by up to an eighth of a side.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,) in [0, classes).
        classes: how many.
        seed: of weights, batches and shifts, which depend on nothing else.
    """
    generator = np.random.default_rng((seed, 6))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(images.shape[1], classes).to(images.device)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS)
    edge, size = images.shape[-1] // 8, images.shape[-1]
    for _ in range(STEPS):
        rows = torch.from_numpy(generator.integers(0, len(images), BATCH_SIZE)).to(images.device)
        down, right = generator.integers(0, 2 * edge + 1, 2)
        moved = F.pad(to_unit_range(images[rows]), (edge,) * 4, mode="replicate")
        loss = F.cross_entropy(model(moved[:, :, down : down + size, right : right + size]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def judged(model: Classifier, images: Tensor) -> Tensor:
    """Return log p(class | image), float32 (N, classes), of uint8 images (N, C, H, W)."""
    return torch.cat([model(to_unit_range(part)).log_softmax(1) for part in images.split(JUDGED)])


class Accuracy(NamedTuple):
    """Share of images whose class is found: of all, and of the images of each class; None where it has none."""

    overall: float
    of_classes: list[float | None]


def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> Accuracy:
    """Return how often a classifier is right on uint8 images (N, C, H, W) with labels int64 (N,)."""
    right = (judged(model, images).argmax(1) == labels).double()
    chosen = [right[labels == one] for one in range(model.classes)]
    of_classes = [float(of_class.mean()) if len(of_class) else None for of_class in chosen]
    return Accuracy(float(right.mean()), of_classes)
