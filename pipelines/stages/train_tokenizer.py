"""Stage train-tokenizer: image shards become a tokenizer.

B batch, C channels, H W pixels, D code_dim, K codebook_size.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from pipelines.compute.devices import ComputeConfig, num_loaders
from pipelines.compute.ranks import sum_over_ranks
from pipelines.data.images import (
    ImageShards,
    TrainingImages,
    ValidationImages,
    to_uint8,
    to_unit_range,
)
from pipelines.data.pictures import picture_grid
from pipelines.metrics.quality import TokenizerQuality
from pipelines.storage.paths import whole
from pipelines.training.fit import StepData, export, fit, keep_metrics, make_optimizer, seed_step
from pipelines.training.loggers import log_picture
from pipelines.training.sections import TokenizerSection, TrainingConfig
from tokenizer import CodebookEMA, HierarchicalVQVAE, TokenizerLoss
from tokenizer.bottlenecks.ema import Statistics, assignment_statistics, candidate_positions, take_owned

logger = logging.getLogger(__name__)

# Images shown in reconstructions.png.
NUM_SHOWN = 10
# Images that are encoded at once for the start of the codebooks.
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
    train, val = (ImageShards(images, split, compute.cache) for split in ("train", "val"))
    pl.seed_everything(seed, workers=True, verbose=False)
    model = HierarchicalVQVAE(section.model, train.size, train.channels)
    module = TokenizerTraining(model, section, training, seed, folder)
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
    )
    best = fit(module, data, training, compute, folder, "val_loss", "train-tokenizer")
    if module.global_rank > 0:
        return
    export(model, best, folder)


class TokenizerTraining(pl.LightningModule):
    """Loss, codebook steps and validation figures of stage one.

    Args:
        model: trained in place.
        section: loss and codebook settings.
        training: optimizer and schedule.
        seed: of k-means and revival.
        folder: where reconstructions.png goes.
    """

    emas: Sequence[CodebookEMA]

    def __init__(
        self,
        model: HierarchicalVQVAE,
        section: TokenizerSection,
        training: TrainingConfig,
        seed: int,
        folder: Path,
    ) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.loss = TokenizerLoss(section.loss, section.codebook.commitment_weight)
        emas = (CodebookEMA(book, section.codebook) for book in model.codebooks)
        self.emas = nn.ModuleList(emas)  # type: ignore[assignment]  # a ModuleList of these
        self.training_config, self.seed, self.folder = training, seed, folder
        self.statistics: list[Statistics] | None = None  # of the micro-batches since the last optimizer step
        self.micro = 0
        self.revived = torch.zeros(len(self.emas), dtype=torch.int64)
        self.shown: tuple[Tensor, Tensor, Tensor] | None = None

    def configure_optimizers(self) -> Any:
        return make_optimizer(self.model.parameters(), self.training_config)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        keep_metrics(self, checkpoint)
        checkpoint["revived"] = self.revived

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.revived = checkpoint["revived"]

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        seed_step(self.seed, self.global_step, self.micro, self.global_rank)
        if self.global_step == 0 and self.micro == 0:
            assert isinstance(self.training_config.batch_size, int)
            self._start_codebooks(range(self.training_config.batch_size))

    @torch.no_grad()
    def _start_codebooks(self, draws: range) -> None:
        """Set each codebook to k-means centres of the images of these draws, coarse to fine, the same on every rank.

        START_IMAGES are encoded at once, whatever the micro-batches and processes: another number changes the last bits
        of latents, and those of an untrained encoder lie so close together that such bits tip some to another centre.
        """
        train = self.trainer.datamodule.train  # type: ignore[attr-defined]
        mine = range(self.global_rank * START_IMAGES, len(draws), self.trainer.world_size * START_IMAGES)
        parts = {first: torch.stack([train[draw] for draw in draws[first : first + START_IMAGES]]) for first in mine}
        for level, (codebook, ema) in enumerate(zip(self.model.codebooks, self.emas, strict=True)):
            per_image, dim = math.prod(self.model.grids[level]), codebook.vectors.shape[1]
            latents = codebook.vectors.new_zeros(len(draws), per_image, dim)  # zero where another rank encodes
            for first, pixels in parts.items():
                images = to_unit_range(pixels.to(self.device))
                output = self.model.forward(images)  # what is compiled is compiled for the size of a micro-batch
                latents[first : first + len(pixels)] = output.levels[level].latents.view(-1, per_image, dim)
            ema.start(codebook, sum_over_ranks(latents).flatten(0, 1), self.seed + level)
            if self.trainer.world_size > 1:
                for tensor in (codebook.vectors, ema.sums):
                    torch.distributed.broadcast(tensor, src=0)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        images = to_unit_range(batch).contiguous(memory_format=torch.channels_last)
        output = self.model(images)
        loss = self.loss(output.reconstruction, images, [level.commitment for level in output.levels])
        self._collect(output.levels, len(images))
        mse = (output.reconstruction.detach().float() - images).square().mean()
        self.log_dict({"train_loss": loss.detach(), "train_mse": mse})
        return loss

    @torch.no_grad()
    def _collect(self, levels: list, batch_size: int) -> None:
        """Add a micro-batch's statistics to those of the step."""
        config = self.training_config
        found = []
        for number, output in enumerate(levels):
            size = len(self.model.codebooks[number].vectors)
            latents_per_image = len(output.latents) // batch_size
            total = batch_size * config.micro_batches * self.trainer.world_size * latents_per_image
            place = (self.micro * self.trainer.world_size + self.global_rank) * batch_size
            step_seed = (self.seed * 1_000_003 + self.global_step) * 101 + number
            candidates = take_owned(
                output.latents, candidate_positions(total, size, step_seed), place * latents_per_image
            )
            found.append(assignment_statistics(output, size, candidates))
        if self.statistics is not None:
            found = [
                Statistics(*(a + b for a, b in zip(old, new, strict=True)))
                for old, new in zip(self.statistics, found, strict=True)
            ]
        self.statistics = found
        self.micro += 1

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self._update_codebooks()

    @torch.no_grad()
    def _update_codebooks(self) -> None:
        """One EMA step of all codebooks, from the statistics of all micro-batches and ranks: one all-reduce."""
        assert self.statistics is not None
        parts = [part for statistics in self.statistics for part in statistics]
        flat = sum_over_ranks(torch.cat([part.flatten() for part in parts]))
        summed = [
            chunk.view_as(part) for chunk, part in zip(flat.split([p.numel() for p in parts]), parts, strict=True)
        ]
        revived = [
            ema.update(codebook, Statistics(*summed[3 * level : 3 * level + 3]), self.global_step - 1)
            for level, (codebook, ema) in enumerate(zip(self.model.codebooks, self.emas, strict=True))
        ]
        self.revived = self.revived.to(flat.device, non_blocking=True) + torch.stack(revived)
        self.statistics, self.micro = None, 0

    def on_validation_epoch_start(self) -> None:
        self.quality = TokenizerQuality(self.model)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        pixels, mask = batch
        images = to_unit_range(pixels).contiguous(memory_format=torch.channels_last)
        output = self.model(images)
        self.quality.add(images, output, mask)
        if batch_idx == 0:
            shown = slice(0, min(NUM_SHOWN, len(images)))
            top = self.model.decode([output.levels[0].codes[shown]])
            self.shown = (images[shown], output.reconstruction[shown], top)

    def on_validation_epoch_end(self) -> None:
        figures = self.quality.figures()
        reconstruction = figures["mse"] if self.loss.reconstruction == "mse" else figures["l1"]
        levels = range(self.model.config.num_levels)
        commitment = sum(figures[f"level{level}_commitment"] for level in levels) / len(levels)
        figures["loss"] = reconstruction + self.loss.commitment_weight * commitment
        self.log_dict({f"val_{name}": value for name, value in figures.items()}, rank_zero_only=False)
        self.log_dict({f"level{level}_revived": float(self.revived[level]) for level in levels})
        for level in levels:
            if figures[f"level{level}_usage"] < 0.1:
                logger.warning(
                    "level %d uses %.1f%% of its codes: it has collapsed, and samples will be noise; "
                    "lower the learning rate, raise revival_threshold or use fewer codes",
                    level,
                    100 * figures[f"level{level}_usage"],
                )
        if self.global_rank == 0 and self.shown is not None:
            picture = picture_grid([list(to_uint8(row)) for row in self.shown])
            with whole(self.folder / "reconstructions.png") as temporary:
                picture.save(temporary, "PNG")
            log_picture(self.trainer.loggers, "reconstructions", picture, self.global_step)
