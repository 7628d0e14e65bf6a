"""Priors that no gradient trains: N(0, I), which is as it is, and mixtures, which EM fits.

N samples, n numbers of each, K components.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipelines.compute.devices import this_worker
from pipelines.data.batches import ValidationBatches
from pipelines.data.codes import Codes
from pipelines.errors import ConfigError
from pipelines.progress import progress_bar
from pipelines.storage.folders import publish_model
from pipelines.storage.paths import write_json
from pipelines.training.loggers import MetricsCSV
from prior import LevelPrior
from prior.em import em, set_weights
from prior.mixture import MOST_NUMBERS, Mixture

# Samples judged at once.
BATCH = 1000
# Steps of EM at most; steps without a better val split, or the least gain of a step in nats per value, that end it.
STEPS, PATIENCE, LEAST_GAIN = 200, 10, 1e-5


@torch.no_grad()
def fit_mixture(model: LevelPrior, train: Codes, val: Codes, seed: int, folder: Path) -> None:
    """Fit a level's mixture in place to what is stored of training images, as it was where the val split was likeliest.

    It takes seconds, so that a job that is stopped begins again. Every process of a job finds the same.

    Args:
        model: of one level.
        train: the train split.
        val: the val split.
        seed: of the start, and of the samples that are fitted to where they are too many.
        folder: of the stage; its metrics.csv gets a row a step.

    Raises:
        ConfigError: there are fewer samples than components.
    """
    mixture, level = model.network, model.config.level
    assert isinstance(mixture, Mixture)
    rows = drawn_rows(len(train), MOST_NUMBERS // max(mixture.means.shape), seed)
    values = torch.from_numpy(train.levels[level][rows].astype(np.float64)).flatten(1)
    classes = torch.from_numpy(train.labels[rows].astype(np.int64)) if model.config.class_names else None
    rank = this_worker().rank
    log, best, since, before = MetricsCSV(folder / "metrics.csv"), math.inf, 0, math.inf
    kept: dict[str, Tensor] = {}
    with progress_bar(STEPS, f"train-prior level {level}", "steps", disable=rank > 0) as bar:
        try:
            for step, nats in zip(range(STEPS), em(mixture, values, classes, seed), strict=False):
                found = val_nats(model, val)
                if rank == 0:
                    log.log_metrics({"train_nats_per_value": nats, "val_nats_per_value": found}, step)
                bar.set_postfix_str(f"val nats/value {found:.4g}")
                bar.update()
                since += 1
                if found < best or not kept:
                    best, since = found, 0
                    kept = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
                if since == PATIENCE or before - nats < LEAST_GAIN:
                    break
                before = nats
        except ValueError as error:
            raise ConfigError(f"prior.mixture of level {level}: {error}") from error
    mixture.load_state_dict(kept)


@torch.no_grad()
def put_at_images(model: LevelPrior, posteriors: np.ndarray, labels: np.ndarray) -> None:
    """Make a level's mixture, in place, the aggregated posterior of some images: the mean of their q(z | x).

    Args:
        model: of one level, of as many components.
        posteriors: mean and log-variance, (K, 2d, h, w).
        labels: class of each image, (K,).

    Source: Hoffman and Johnson 2016, section 2; Tomczak and Welling 2018, section 2.2.
    """
    mixture, num_classes = model.network, len(model.config.class_names)
    assert isinstance(mixture, Mixture)
    means, log_variances = (part.flatten(1) for part in torch.from_numpy(posteriors).chunk(2, 1))
    mixture.means.copy_(means)
    mixture.scales.copy_((0.5 * log_variances).exp())
    counts = torch.zeros(num_classes, len(means), dtype=torch.float64)
    if num_classes:
        counts[torch.from_numpy(labels.astype(np.int64)), torch.arange(len(means))] = 1
    set_weights(mixture, counts, torch.ones(len(means), dtype=torch.float64))


def publish_unlearned(model: LevelPrior, val: Codes, folder: Path) -> None:
    """Publish such a prior with its figure on the val split; the first process of a job does.

    Args:
        model: of one level.
        val: the val split.
        folder: of the stage.
    """
    if this_worker().rank == 0:
        write_json(folder / "metrics.json", {"val_nats_per_value": val_nats(model, val)})
        publish_model(model, folder)


@torch.no_grad()
def val_nats(model: LevelPrior, val: Codes) -> float:
    """Return the mean nats of a value of the val split, given the class where a prior knows classes."""
    nats, level = 0.0, model.config.level
    for indices in ValidationBatches(len(val), BATCH):
        codes, classes = val.batch([index for index in indices if index >= 0])
        given = classes if model.config.class_names else None
        nats += float(model.nll_unchecked(codes[level], codes[:level], given).sum())
    return nats / (len(val) * codes[level][0].numel())


def drawn_rows(count: int, most: int, seed: int) -> np.ndarray:
    """Return the samples that are taken of so many, in order: all, or as many as may be, chosen by seed."""
    return np.sort(np.random.default_rng(seed).permutation(count)[:most])
