"""What a digit that a model has drawn is worth, whatever the model: the judge of all rungs of the ladder.

N images of 16 pixels, grey.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.digits import fit_judge, reduced
from pipelines.data.images import to_unit_range
from pipelines.metrics.classifier import train_classifier
from pipelines.metrics.distances import distances, kernel_distance

# Of real val digits so many are told with more confidence than is asked for, and lie farther from any training image.
MOST_REAL = 0.95


class Worth(NamedTuple):
    """Figures of drawn digits.

    Attributes:
        recognised: share that is taken for the class that was asked for; None where none was.
        as_real: share that is told apart from all other digits as surely as 95% of real val digits are.
        kid: in features of a small classifier, and its standard error.
        kid_error: see kid.
        too_near: share nearer to a training image, in pixels, than 95% of val images are to theirs.
    """

    recognised: float | None
    as_real: float
    kid: float
    kid_error: float
    too_near: float


class Judge:
    """Who judges, made from real digits alone.

    Digits are recognised by the support vector classifier of `benchmarks.digits`, which knows all 1,797 real ones; how
    sure it is of one is its smallest margin against another class. Features are those of the small classifier of
    `evaluate`, trained on the train split.

    Args:
        train: uint8 (N, 1, 16, 16).
        labels: int64 (N,).
        val: uint8, of the val split.
    """

    def __init__(self, train: Tensor, labels: Tensor, val: Tensor) -> None:
        self.svc = fit_judge().set_params(decision_function_shape="ovo")
        self.network = train_classifier(train, labels, 10, seed=0)
        self.train = train
        self.least_margin = float(np.quantile(self._margins(val), 1 - MOST_REAL))
        self.least_distance = float(np.quantile(self._nearest(val), 1 - MOST_REAL))
        self.real = self._features(train)

    def __call__(self, images: Tensor, asked: Tensor | None) -> Worth:
        """Judge drawn digits, uint8 (N, 1, 16, 16), of the classes (N,) that were asked for, if any were."""
        known = self.svc.predict(reduced(images[:, 0].double().numpy() / 255))
        kid = kernel_distance(self.real, self._features(images))
        return Worth(
            None if asked is None else float((known == asked.numpy()).mean()),
            float((self._margins(images) >= self.least_margin).mean()),
            kid.value,
            kid.error,
            float((self._nearest(images) < self.least_distance).mean()),
        )

    def _margins(self, images: Tensor) -> np.ndarray:
        """Return how far each image is from being taken for another class than it is, (N,)."""
        pairs = self.svc.decision_function(reduced(images[:, 0].double().numpy() / 255))  # (N, 45), first against other
        won = np.full((len(images), 10, 10), np.inf)
        first, other = np.triu_indices(10, 1)
        won[:, first, other], won[:, other, first] = pairs, -pairs
        return won.min(2).max(1)

    def _nearest(self, images: Tensor) -> np.ndarray:
        """Return the distance of each image to the nearest training image, (N,)."""
        return distances(images.flatten(1).double(), self.train.flatten(1).double()).min(1).values.numpy()

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        """Return features (N, 128)."""
        return self.network.stages(to_unit_range(images)).mean((2, 3))
