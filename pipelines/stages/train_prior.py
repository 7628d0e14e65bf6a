"""Stage train-prior: code shards become a prior per level.

B batch, h w code grid, K codebook_size.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.compute.devices import ComputeConfig
from pipelines.compute.ranks import sum_over_ranks
from pipelines.data.codes import CodeBatch, Codes, TrainingCodes, ValidationCodes, as_it_is, posteriors
from pipelines.errors import ConfigError
from pipelines.storage.manifest import CodesManifest, classes_for_prior, read_manifest
from pipelines.training.fit import StepData, export, fit, keep_metrics, make_optimizer, seed_step
from pipelines.training.mixtures import drawn_rows, fit_mixture, publish_unlearned, put_at_images
from pipelines.training.sections import PriorConfig
from prior import LevelConfig, LevelPrior, NormalConfig
from prior.flow import Flow
from prior.mixture import MOST_NUMBERS, Mixture

logger = logging.getLogger(__name__)

# Validation loss above training loss by this share of it, or by these nats per number: the prior learns its training
# set by heart.
GAP_WARNED_OF = 0.15


def level_config(
    config: PriorConfig,
    level: int,
    grids: list[tuple[int, int]],
    codebook_sizes: Sequence[int | None],
    class_names: list[str],
    tokenizer: str,
    channels: Sequence[int] = (),
) -> LevelConfig:
    """Return what a level's prior is.

    Args:
        config: the section for this level, no lists.
        level: 0 for the coarsest.
        grids: (h, w) of all levels.
        codebook_sizes: K of all levels, None of continuous ones.
        class_names: empty when the data has none, or the network is not to know them.
        tokenizer: fingerprint of the tokenizer that made the codes.
        channels: of all levels, where some are continuous.
    """
    network = "transformer" if config.network == "auto" else str(config.network)
    size = NormalConfig() if network == "normal" else getattr(config, network)
    return LevelConfig(
        level=level,
        grids=grids[: level + 1],
        codebook_sizes=list(codebook_sizes[: level + 1]),
        class_names=class_names,
        size=size,
        tokenizer=tokenizer,
        unconditional=config.class_dropout > 0 or not class_names or network == "mixture",
        num_levels=len(grids),
        channels=list(channels[: level + 1]),
    )


def check_prior(config: PriorConfig, level: int, manifest: CodesManifest) -> None:
    """Judge, before anything is touched, whether codes can have such a prior; nothing is computed.

    Args:
        config: the section for this level, no lists.
        level: 0 for the coarsest.
        manifest: of the codes.

    Raises:
        ConfigError: the network cannot be built for that level.
    """
    mixture = replace(config.mixture, components=config.mixture.components or 1)  # 0 are as many as there are images
    with torch.device("meta"):
        _built(replace(config, mixture=mixture), level, manifest)


def _built(config: PriorConfig, level: int, manifest: CodesManifest) -> LevelPrior:
    """Return a level's new prior."""
    levels = manifest["levels"]
    grids, sizes = [(one["grid"][0], one["grid"][1]) for one in levels], [one["codebook_size"] for one in levels]
    channels = [] if all(sizes) else [one.get("channels", 1) for one in levels]
    class_names = classes_for_prior(manifest, str(config.network))
    settings = level_config(config, level, grids, sizes, class_names, manifest["tokenizer"], channels)
    assert isinstance(config.dropout, float | int)
    try:
        return LevelPrior(settings, config.dropout)
    except ValueError as error:
        raise ConfigError(f"level {level} can have no prior of prior.{config.network}: {error}") from error


def train_prior(
    config: PriorConfig, level: int, seed: int, compute: ComputeConfig, codes: Path, unpacked: Path, folder: Path
) -> None:
    """Train one level's prior and export the checkpoint of the best validation likelihood.

    Args:
        config: the section for this level, no lists.
        level: 0 for the coarsest.
        seed: of weights, batches and dropout.
        compute: where.
        codes: the `codes` folder.
        unpacked: local folder for the unpacked codes.
        folder: of the stage and level.
    """
    manifest = read_manifest(codes, "codes", "encode")
    train, val = (Codes(codes, split, unpacked, compute.cache) for split in ("train", "val"))
    pl.seed_everything(seed, workers=True, verbose=False)
    training = config.training
    assert isinstance(training.steps, int) and isinstance(training.batch_size, int)
    at_images = config.network == "mixture" and config.mixture.at == "images"
    if at_images:
        assert isinstance(config.mixture.components, int)
        rows = drawn_rows(len(train), config.mixture.components or len(train), seed)
        config = replace(config, mixture=replace(config.mixture, components=len(rows)))
    if compute.threads:
        torch.set_num_threads(compute.threads)
    model = _built(config, level, manifest)
    if not list(model.parameters()):
        if at_images:
            put_at_images(model, posteriors(codes, level, rows, compute.cache), train.labels[rows])
        elif isinstance(model.network, Mixture):
            fit_mixture(model, train, val, seed, folder)
        publish_unlearned(model, val, folder)
        return
    if isinstance(model.network, Flow):
        rows = drawn_rows(len(train), MOST_NUMBERS // model.num_uniforms, seed)
        model.network.standardize(torch.from_numpy(train.levels[level][rows]))
    module = PriorTraining(model, config, seed)
    data = StepData(
        TrainingCodes(train, seed),
        ValidationCodes(val),
        len(val),
        training.steps,
        training.batch_size,
        training.micro_batches,
        0,
        as_it_is,
    )
    best = fit(module, data, training, compute, folder, f"val_nats_per_{module.unit}", f"train-prior level {level}")
    if module.global_rank > 0:
        return
    export(model, best, folder)


class PriorTraining(pl.LightningModule):
    """Loss and validation likelihood of one level of stage two.

    Args:
        model: trained in place.
        config: the section for this level, no lists.
        seed: of dropout.
    """

    def __init__(self, model: LevelPrior, config: PriorConfig, seed: int) -> None:
        super().__init__()
        self.model = model
        self.level = model.config.level
        self.unit = "value" if model.config.codebook_sizes[-1] is None else "code"
        self.config, self.seed = config, seed
        self.micro = 0
        self.train_nats = 0.0
        self.warned = False

    def configure_optimizers(self) -> Any:
        return make_optimizer(self.model.parameters(), self.config.training)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        keep_metrics(self, checkpoint)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_step(self.seed, self.global_step, self.micro, self.global_rank)
        self.micro = (self.micro + 1) % self.config.training.micro_batches

    def training_step(self, batch: CodeBatch, batch_idx: int) -> Tensor:
        codes, classes = batch.codes, batch.classes
        no_class = len(self.model.config.class_names)
        hidden = torch.rand(classes.shape, device=classes.device) < self.config.class_dropout
        found = self.model(codes[self.level], codes[: self.level], torch.where(hidden, no_class, classes))
        if self.unit == "value":
            loss = found.mean()
        else:
            loss = F.cross_entropy(found.flatten(0, 2).float(), codes[self.level].flatten())
        self.log(f"train_nats_per_{self.unit}", loss.detach())
        return loss

    def on_validation_epoch_start(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: CodeBatch, batch_idx: int) -> None:
        codes, classes, mask = batch.codes, batch.classes, batch.mask.double()
        nats = self.model.nll(codes[self.level], codes[: self.level], classes)
        self.sums += torch.stack([(nats * mask).sum(), mask.sum() * codes[self.level][0].numel()])

    def on_validation_epoch_end(self) -> None:
        nats, number = sum_over_ranks(self.sums).tolist()
        val = nats / number
        bits = {} if self.unit == "value" else {"val_bits_per_code": val / math.log(2)}
        self.log_dict({f"val_nats_per_{self.unit}": val} | bits)
        train = float(self.trainer.callback_metrics.get(f"train_nats_per_{self.unit}", math.nan))
        # Of a density the nats themselves may be anything, and only their difference says something.
        if val - train > GAP_WARNED_OF * (1 if self.unit == "value" else val) and not self.warned:
            self.warned = True
            logger.warning(
                "level %d: validation is at %.3f nats per %s, training at %.3f: they part, and the best checkpoint "
                "may be behind; more encode.views, more dropout or a smaller network would help",
                self.level,
                val,
                self.unit,
                train,
            )
