"""Stage train-tokenizer: image shards become a tokenizer.

B batch, C channels, H W pixels.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from pipelines.compute.devices import ComputeConfig, num_loaders
from pipelines.compute.ranks import sum_over_ranks
from pipelines.data.corruption import corrupted
from pipelines.data.images import (
    ImageBatch,
    ImageShards,
    TrainingImages,
    ValidationImages,
    image_batch,
    to_uint8,
    to_unit_range,
)
from pipelines.data.noise import HIDDEN_CLASSES, VALIDATION, BatchNoise
from pipelines.data.pictures import picture_grid
from pipelines.metrics.quality import TokenizerQuality, level_warnings
from pipelines.storage.paths import whole
from pipelines.training.batch_losses import SplitLosses, batch_losses
from pipelines.training.contraction import contraction, contraction_of
from pipelines.training.fit import StepData, export, fit, keep_metrics, make_optimizer, seed_step
from pipelines.training.loggers import log_picture
from pipelines.training.owned_losses import OwnedLosses
from pipelines.training.sections import TokenizerSection, TrainingConfig
from tokenizer import Autoencoded, Bottled, HierarchicalVQVAE, TokenizerLoss
from tokenizer.bottlenecks.bottleneck import Learner, Place
from tokenizer.loss import OwnedLoss

logger = logging.getLogger(__name__)

# Images shown in reconstructions.png.
NUM_SHOWN = 10
# Images that are encoded at once for the start of learners.
START_IMAGES = 8


def train_tokenizer(
    section: TokenizerSection, training: TrainingConfig, seed: int, compute: ComputeConfig, images: Path, folder: Path
) -> None:
    """Train a tokenizer and export the checkpoint of the best validation loss.

    Args:
        section: what to train.
        training: its settings for one level.
        seed: of weights, batches and revival.
        compute: where.
        images: the `images` folder.
        folder: of the stage.
    """
    if section.family.probes:  # no compiled model lets gradients of gradients through
        training = replace(training, compile=False)
    train, val = (ImageShards(images, split, compute.cache) for split in ("train", "val"))
    pl.seed_everything(seed, workers=True, verbose=False)
    model = HierarchicalVQVAE(section.model, train.size, train.channels, section.family, len(train.class_names))
    with torch.random.fork_rng():  # what losses own is drawn beside the model's weights, not among them
        module = TokenizerTraining(model, section, training, seed, folder, owned_losses(section))
    assert isinstance(training.steps, int) and isinstance(training.batch_size, int)
    # On a CPU the loader's processes would only take cores from the training itself.
    workers = num_loaders(compute) if compute.num_workers >= 0 or torch.cuda.is_available() else 0
    data = StepData(
        TrainingImages(train, section.augment, seed, section.shuffle_shards),
        ValidationImages(val),
        len(val),
        training.steps,
        training.batch_size,
        training.micro_batches,
        min(workers, 8),
        image_batch,
    )
    best = fit(module, data, training, compute, folder, "val_loss", "train-tokenizer")
    if module.global_rank > 0:
        return
    export(model, best, folder)


def owned_losses(section: TokenizerSection) -> list[OwnedLoss]:
    """Return the losses beside reconstruction and the bottleneck's own that these settings ask for: none so far."""
    return []


class TokenizerTraining(pl.LightningModule):
    """Loss, steps of what gradients do not move, and validation figures of stage one.

    Args:
        model: trained in place.
        section: loss and settings of the bottleneck.
        training: optimizer and schedule.
        seed: of learners and noise.
        folder: where reconstructions.png goes.
        losses: further ones, which may own networks.
    """

    learners: Sequence[Learner]

    def __init__(
        self,
        model: HierarchicalVQVAE,
        section: TokenizerSection,
        training: TrainingConfig,
        seed: int,
        folder: Path,
        losses: Sequence[OwnedLoss] = (),
    ) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        num_values = model.channels * model.image_size**2
        self.family = section.family
        weights = self.family.weights(model.config.num_levels, num_values)
        self.loss = TokenizerLoss(section.loss, weights, section.loss_scale)
        learners = [self.family.learner(bottleneck) for bottleneck in model.bottlenecks]
        self.learners = nn.ModuleList(one for one in learners if one is not None)  # type: ignore[assignment]
        self.class_dropout = section.class_dropout
        self.owned = OwnedLosses(losses)
        self.owned_before: list[dict[str, Any]] = []
        self.training_config, self.augment, self.seed, self.folder = training, section.augment, seed, folder
        self.statistics: list[Tensor] | None = None  # of the micro-batches since the last optimizer step
        self.micro = 0
        self.counted: dict[str, Tensor] = {}  # what learners have counted, of each stored grid
        self.shown: list[Tensor] | None = None

    def configure_optimizers(self) -> Any:
        return make_optimizer([*self.model.parameters(), *self.loss.parameters()], self.training_config)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        keep_metrics(self, checkpoint)
        checkpoint["counted"] = self.counted
        checkpoint["owned"] = self.owned.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.counted = checkpoint.get("counted", {})
        self.owned_before = checkpoint.get("owned", [])

    def on_fit_start(self) -> None:
        self.owned.to(self.device)
        if self.owned_before:  # loaded once all is where it stays: an optimizer's state follows its parameters
            self.owned.load(self.owned_before)

    def on_train_batch_start(self, batch: ImageBatch, batch_idx: int) -> None:
        seed_step(self.seed, self.global_step, self.micro, self.global_rank)
        if self.global_step == 0 and self.micro == 0 and len(self.learners):
            assert isinstance(self.training_config.batch_size, int)
            self._start_learners(range(self.training_config.batch_size))

    @torch.no_grad()
    def _start_learners(self, draws: range) -> None:
        """Start each learner from the images of these draws, coarse to fine, the same on every rank.

        START_IMAGES are encoded at once, whatever the micro-batches and processes: another number changes the last bits
        of features, and those of an untrained encoder lie so close together that such bits tip some to another code.
        """
        train = self.trainer.datamodule.train  # type: ignore[attr-defined]
        mine = range(self.global_rank * START_IMAGES, len(draws), self.trainer.world_size * START_IMAGES)
        parts = {first: image_batch([train[draw] for draw in draws[first : first + START_IMAGES]]) for first in mine}
        pairs = zip(self.model.bottlenecks, self.learners, self.model.level_grids, strict=True)
        for level, (bottleneck, learner, grid) in enumerate(pairs):
            cells = math.prod(grid)
            observed = torch.zeros(len(draws), cells, bottleneck.features, device=self.device)  # zero of other ranks
            for first, batch in parts.items():
                images, classes = to_unit_range(batch.pixels.to(self.device)), batch.classes.to(self.device)
                # Not called: what is compiled is compiled for the size of a micro-batch.
                output = self.model.forward(images, classes=classes)
                if len(found := output.levels[level].observed):  # some learners look at nothing
                    observed[first : first + len(images)] = found.view(len(images), cells, -1)
            learner.start(bottleneck, sum_over_ranks(observed).flatten(0, 1), self.seed + level)
            if self.trainer.world_size > 1:
                modules: list[Any] = [bottleneck, learner]
                for tensor in (tensor for module in modules for tensor in module.state_dict().values()):
                    torch.distributed.broadcast(tensor, src=0)

    def _noise(self, step: int, first: int, number: int, streams: int = 0) -> BatchNoise:
        """Return what is drawn beside so many images, the first of which lies there in the global batch or split."""
        return BatchNoise(self.seed, step, range(first, first + number), self.device, streams)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        images = to_unit_range(batch.pixels).contiguous(memory_format=torch.channels_last)
        first = (self.micro * self.trainer.world_size + self.global_rank) * len(images)
        noise = self._noise(self.global_step, first, len(images))
        seen = corrupted(images, self.augment, noise).detach().requires_grad_(self.family.probes > 0)
        output = self.model(seen, noise.of_levels(self.model), self._told(batch.classes, noise))
        of_batch = batch_losses(self.family, output.levels, self.trainer.world_size)
        of_images = contraction(output.levels, seen, self.family.probes, noise)
        losses = [level.losses | a | b for level, a, b in zip(output.levels, of_batch, of_images, strict=True)]
        loss = self.loss(self._given(output), images, losses, self.family.shares(self.global_step))
        parts = self.owned(output.reconstruction, images, self.training_config.micro_batches)
        loss = loss + sum(parts.values(), start=torch.zeros_like(loss))
        self._collect(output.levels, first, len(images))
        mse = (output.reconstruction.detach().float() - images).square().mean()
        named = {f"train_{name}": value.detach() for name, value in parts.items()}
        self.log_dict({"train_loss": loss.detach(), "train_mse": mse, **named})
        return loss

    def _told(self, classes: Tensor, noise: BatchNoise) -> Tensor:
        """Return classes (B,) with some of them hidden, -1, where the tokenizer looks at any."""
        if not self.model.num_classes:
            return classes
        return torch.where(noise.uniforms(HIDDEN_CLASSES, ()) < self.class_dropout, -1, classes)

    def _given(self, output: Autoencoded) -> Tensor:
        """Return what the loss is of."""
        if self.loss.reconstruction != "bernoulli":
            return output.reconstruction
        assert output.logits is not None
        return output.logits

    @torch.no_grad()
    def _collect(self, levels: list[Bottled], first: int, number: int) -> None:
        """Add a micro-batch's statistics to those of the step.

        Args:
            levels: what bottlenecks made of it.
            first: place of its first image in the global batch.
            number: of its images.
        """
        total = number * self.training_config.micro_batches * self.trainer.world_size
        found: list[Tensor] = []
        for level, (learner, output) in enumerate(zip(self.learners, levels, strict=False)):
            seed = (self.seed * 1_000_003 + self.global_step) * 101 + level
            found += learner.statistics(self.model.bottlenecks[level], output, Place(first, total, seed))
        if self.statistics is not None:
            found = [old + new for old, new in zip(self.statistics, found, strict=True)]
        self.statistics = found
        self.micro += 1

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.owned.step(self.trainer.world_size)
        self._update_learners()

    @torch.no_grad()
    def _update_learners(self) -> None:
        """One step of all learners, from the statistics of all micro-batches and ranks: one all-reduce."""
        parts, self.statistics, self.micro = self.statistics or [], None, 0
        if not self.learners:
            return
        flat = sum_over_ranks(torch.cat([part.flatten() for part in parts])) if parts else torch.empty(0)
        summed = [
            chunk.view_as(part) for chunk, part in zip(flat.split([p.numel() for p in parts]), parts, strict=True)
        ]
        each = len(summed) // len(self.learners)
        counted = [
            learner.update(bottleneck, summed[each * level : each * (level + 1)], self.global_step - 1)
            for level, (bottleneck, learner) in enumerate(zip(self.model.bottlenecks, self.learners, strict=True))
        ]
        for name in counted[0]:
            new = torch.cat([one[name].flatten() for one in counted])
            self.counted[name] = self.counted.get(name, torch.zeros_like(new)).to(new.device, non_blocking=True) + new

    def on_validation_epoch_start(self) -> None:
        self.quality, self.without_noise = TokenizerQuality(self.model), TokenizerQuality(self.model)
        self.of_corrupted = TokenizerQuality(self.model)
        self.split_losses = SplitLosses(self.model)
        self.reconstruction = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss, and images

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        mask, images = batch.mask, to_unit_range(batch.pixels).contiguous(memory_format=torch.channels_last)
        first = (batch_idx * self.trainer.world_size + self.global_rank) * len(images)
        noise = self._noise(0, first, len(images), VALIDATION)
        drawn = noise.of_levels(self.model)
        output = self.model(images, drawn, batch.classes)
        contractions = contraction_of(self.model, images, self.family.probes, noise, batch.classes)
        self.quality.add(images, output, mask, contractions)
        of_images = self.loss.of_values(self._given(output), images).double().flatten(1).mean(1)
        self.reconstruction += torch.stack([(of_images * mask).sum(), mask.double().sum()])
        if drawn is not None:
            self.without_noise.add(images, self.model(images, classes=batch.classes), mask)
        if self.augment.corrupt != "none":
            spoilt = corrupted(images, self.augment, noise)
            restored = self.model(spoilt, drawn, batch.classes)
            self.of_corrupted.add(images, restored, mask)
        self.split_losses.update(output.levels, mask)
        if batch_idx == 0:
            shown = slice(0, min(NUM_SHOWN, len(images)))
            top = self.model.decode([stored[shown] for stored in output.levels[0].stored], batch.classes[shown])
            self.shown = [images[shown], output.reconstruction[shown], top]
            if self.augment.corrupt != "none":
                self.shown += [spoilt[shown], restored.reconstruction[shown]]

    def on_validation_epoch_end(self) -> None:
        """Log the figures of the split, where bottlenecks draw those of one draw each: the loss is that of training.

        What the same images give without noise, from means or likeliest codes, is called so: `val_mse_without_noise`;
        and how well they are restored where training corrupts what it sees: `val_mse_corrupted`.
        """
        figures = self.quality.figures() | self.split_losses.compute()
        reconstruction, images = sum_over_ranks(self.reconstruction).tolist()
        levels = range(len(self.model.levels))
        weighted = (
            weight * figures.get(f"level{level}_{name}", 0.0)
            for level in levels
            for name, weight in self.loss.weights.items()
        )
        figures["loss"] = reconstruction / images + sum(weighted)
        if self.loss.reconstruction in ("gaussian", "bernoulli"):
            figures["nll"] = reconstruction / images
        if self.loss.reconstruction == "gaussian":
            figures["loss_scale"] = float(self.loss.log_scale.exp())
        beside = {"without_noise": self.without_noise} if any(p.noise_channels for p in self.model.bottlenecks) else {}
        beside |= {"corrupted": self.of_corrupted} if self.augment.corrupt != "none" else {}
        for what, quality in beside.items():
            found = quality.figures()
            figures |= {f"{name}_{what}": found[name] for name in ("mse", "l1", "psnr")}
        self.log_dict({f"val_{name}": value for name, value in figures.items()}, rank_zero_only=False)
        for name, counts in self.counted.items():
            self.log_dict({f"level{level}_{name}": float(count) for level, count in enumerate(counts)})
        for warning in level_warnings(self.model.bottleneck, figures):
            logger.warning("%s", warning)
        if self.global_rank == 0 and self.shown is not None:
            picture = picture_grid([list(to_uint8(row)) for row in self.shown])
            with whole(self.folder / "reconstructions.png") as temporary:
                picture.save(temporary, "PNG")
            log_picture(self.trainer.loggers, "reconstructions", picture, self.global_step)
