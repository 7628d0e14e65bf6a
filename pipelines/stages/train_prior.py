"""Stage train-prior: code shards become a prior per level.

B batch, h w code grid, K codebook_size.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.compute.devices import ComputeConfig
from pipelines.compute.ranks import sum_over_ranks
from pipelines.data.batches import ValidationBatches
from pipelines.data.codes import CodeBatch, Codes, TrainingCodes, ValidationCodes, as_it_is
from pipelines.storage.folders import publish_model
from pipelines.storage.manifest import classes_for_prior, read_manifest
from pipelines.storage.paths import write_json
from pipelines.training.fit import StepData, export, fit, keep_metrics, make_optimizer, seed_step
from pipelines.training.sections import PriorConfig
from prior import LevelConfig, LevelPrior, NormalConfig

logger = logging.getLogger(__name__)

# Validation loss above training loss by this share of it: the prior learns its training set by heart.
GAP_WARNED_OF = 0.15
# Samples judged at once where there is nothing to train.
FIXED_BATCH = 1000


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
    sizes: dict[str, Any] = {
        "transformer": config.transformer,
        "pixelsnail": config.pixelsnail,
        "normal": NormalConfig(),
    }
    return LevelConfig(
        level=level,
        grids=grids[: level + 1],
        codebook_sizes=list(codebook_sizes[: level + 1]),
        class_names=class_names,
        size=sizes.get(str(config.network), config.transformer),
        tokenizer=tokenizer,
        unconditional=config.class_dropout > 0 or not class_names,
        num_levels=len(grids),
        channels=list(channels[: level + 1]),
    )


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
    assert isinstance(config.dropout, float | int)
    class_names = classes_for_prior(manifest, str(config.network))
    about = (train.grids, train.codebook_sizes, class_names, manifest["tokenizer"])
    channels = [] if all(train.codebook_sizes) else train.channels
    settings = level_config(config, level, *about, channels)
    model = LevelPrior(settings, config.dropout)
    if not list(model.parameters()):
        publish_fixed(model, val, folder)
        return
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
    best = fit(module, data, training, compute, folder, "val_nats_per_code", f"train-prior level {level}")
    if module.global_rank > 0:
        return
    export(model, best, folder)


def publish_fixed(model: LevelPrior, val: Codes, folder: Path) -> None:
    """Publish a prior that has nothing to learn, with its figure on the val split.

    Args:
        model: of one level.
        val: the val split.
        folder: of the stage and level.
    """
    nats, level = 0.0, model.config.level
    for indices in ValidationBatches(len(val), FIXED_BATCH):
        codes, _ = val.batch([index for index in indices if index >= 0])
        nats += float(model.nll_unchecked(codes[level], codes[:level], None).sum())
    write_json(folder / "metrics.json", {"val_nats_per_value": nats / (len(val) * model.num_uniforms)})
    publish_model(model, folder)


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
        logits = self.model(codes[self.level], codes[: self.level], torch.where(hidden, no_class, classes))
        loss = F.cross_entropy(logits.flatten(0, 2).float(), codes[self.level].flatten())
        self.log("train_nats_per_code", loss.detach())
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
        self.log_dict({"val_nats_per_code": val, "val_bits_per_code": val / math.log(2)})
        train = float(self.trainer.callback_metrics.get("train_nats_per_code", math.nan))
        if val - train > GAP_WARNED_OF * val and not self.warned:
            self.warned = True
            logger.warning(
                "level %d: validation is at %.3f nats per code, training at %.3f: they part, and the best checkpoint "
                "may be behind; more encode.views, more dropout or a smaller network would help",
                self.level,
                val,
                train,
            )
