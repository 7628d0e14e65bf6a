"""What training of both stages shares: loaders, schedule, weight averaging, checkpoints, the Trainer."""

import logging
import math
import os
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.data import DataLoader
from x_transformers.x_transformers import Attention, FeedForward

from pipelines.compute.devices import ComputeConfig, in_slurm_step, on_gpu, several_processes
from pipelines.compute.launching import GO_ON, Together
from pipelines.compute.ranks import LOST
from pipelines.data.batches import TrainingBatches, ValidationBatches
from pipelines.errors import ConfigError, StageError
from pipelines.storage.folders import publish_model
from pipelines.storage.paths import exists, write_json
from pipelines.training.callbacks import AverageWeights, ClipGradients, Progress, StopOnNonFinite
from pipelines.training.checkpoints import KeepBest, KeepLast, WholeCheckpoints
from pipelines.training.leaving import Leave
from pipelines.training.loggers import make_loggers
from pipelines.training.sections import TrainingConfig
from prior import LevelPrior
from prior.pixelsnail import CausalAttention, GatedResidualBlock
from tokenizer import HierarchicalVQVAE
from tokenizer.networks import ResidualBlock

logger = logging.getLogger(__name__)

# Parts of the networks that hold much between forward and backward: what activation checkpointing computes again, and
# what FSDP shards one by one.
BLOCKS = (ResidualBlock, GatedResidualBlock, CausalAttention, Attention, FeedForward)


class StepData(pl.LightningDataModule):
    """Loaders for a training job that counts in steps.

    Args:
        train: data set by draw.
        val: data set by index, -1 for filling.
        num_val: samples in val.
        steps: optimizer steps of the whole job.
        batch_size: global.
        micro_batches: of one optimizer step.
        num_workers: processes that load.
        collate: how a list of samples becomes a batch; torch's default if None.
    """

    def __init__(
        self,
        train: Any,
        val: Any,
        num_val: int,
        steps: int,
        batch_size: int,
        micro_batches: int,
        num_workers: int,
        collate: Any = None,
    ) -> None:
        super().__init__()
        self.train, self.val, self.num_val = train, val, num_val
        self.steps, self.batch_size, self.micro_batches = steps, batch_size, micro_batches
        self.options = {"num_workers": num_workers, "collate_fn": collate, "pin_memory": torch.cuda.is_available()}

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        batches = TrainingBatches(
            self.trainer.global_step,
            self.steps,
            self.batch_size,
            self.micro_batches,
            self.trainer.global_rank,
            self.trainer.world_size,
        )
        return DataLoader(self.train, batch_sampler=batches, **self.options)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        batches = ValidationBatches(self.num_val, self.batch_size, self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(self.val, batch_sampler=batches, **self.options)  # type: ignore[arg-type]


def learning_rate_factor(step: int, warmup_steps: int, steps: int) -> float:
    """Return the share of the peak learning rate at a step: linear warm-up, then half a cosine to zero.

    Source: Loshchilov and Hutter 2017, equation 5, one cycle.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, done))


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainingConfig) -> Any:
    """Return AdamW and its schedule as Lightning wants them; vectors (biases, norms) are not decayed."""
    assert isinstance(config.learning_rate, float | int) and isinstance(config.steps, int)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    warmup_steps, steps = config.warmup_steps, config.steps
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.beta2), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, warmup_steps, steps)
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def seed_step(seed: int, step: int, micro: int, rank: int) -> None:
    """Seed torch as a function of the place in training, so that a resumed run draws what an uninterrupted one does."""
    torch.manual_seed((((seed * 1_000_003 + step) * 1009 + micro) * 10007 + rank) % 2**63)


def fit(
    module: pl.LightningModule,
    data: StepData,
    config: TrainingConfig,
    compute: ComputeConfig,
    folder: Path,
    monitor: str,
    title: str,
) -> dict[str, Any]:
    """Train, going on from the last checkpoint if there is one.

    Args:
        module: holds the model as `model`.
        data: its loaders.
        config: one level's settings, no lists.
        compute: where.
        folder: of the stage.
        monitor: the validation figure, lower is better, that picks the best checkpoint.
        title: of the progress bar.

    Returns:
        The best checkpoint: `state_dict` and `metrics`.

    Raises:
        StageError: the loss became NaN or infinite.
    """
    assert isinstance(config.steps, int) and isinstance(module.model, nn.Module)
    _check_strategy(config, compute)
    checkpoints = folder / "checkpoints"
    last, best = checkpoints / "last.ckpt", checkpoints / "best.ckpt"
    if compute.threads:
        torch.set_num_threads(compute.threads)
    stop_on_nan = StopOnNonFinite(last)
    keep = KeepLast(last, config.checkpoint_every, min(config.val_every, config.steps))
    leave = Leave(keep)
    callbacks: list[Callback] = [
        stop_on_nan,
        Progress(title, monitor),
        KeepBest(best, monitor),
        keep,
        leave,
    ]
    if config.weight_ema:
        callbacks.insert(0, AverageWeights(config.weight_ema))
    if config.gradient_clip:
        callbacks.append(ClipGradients(config.gradient_clip))
    if config.patience:
        callbacks.append(EarlyStopping(monitor, patience=config.patience, min_delta=0.0))
    if config.activation_checkpointing:
        apply_activation_checkpointing(
            module.model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda part: isinstance(part, BLOCKS)
        )
    if config.compile is True or (config.compile == "auto" and on_gpu(compute)):
        module.model.compile()
    try:
        trainer = _trainer(config, compute, folder, callbacks)
    except (MisconfigurationException, ImportError, ValueError) as error:
        raise ConfigError(f"compute cannot be had here: {error}") from error
    if data.batch_size % (trainer.world_size * config.micro_batches):
        raise ConfigError(
            f"batch_size must be a multiple of processes * micro_batches, got {data.batch_size} for "
            f"{trainer.world_size} * {config.micro_batches}"
        )
    logger.info(
        "%s: %.3gM parameters, %d steps of %d, %s",
        title,
        sum(parameter.numel() for parameter in module.model.parameters()) / 1e6,
        config.steps,
        data.batch_size,
        trainer.precision,
    )
    given = {name: value for name, value in os.environ.items() if name == "WORLD_SIZE"}
    try:
        with Together(trainer.strategy.launcher):
            trainer.fit(module, datamodule=data, ckpt_path=str(last) if exists(last) else None, weights_only=True)
            stop_on_nan.check(trainer.global_step)
        os.environ.update(given)  # Lightning takes it away at the end, and later stages ask
    except SystemExit as error:  # Lightning's answer to Ctrl-C
        raise KeyboardInterrupt from error
    except torch.OutOfMemoryError as error:
        raise StageError(
            "the device's memory is full; raise micro_batches, turn on activation_checkpointing or lower batch_size"
        ) from error
    except (RuntimeError, LookupError, TypeError, AttributeError) as error:
        if not leave.listening and exists(last):  # it has not begun: Lightning could not make sense of the checkpoint
            raise StageError(f"{last} does not belong to this training ({error}); remove it to begin again") from error
        if trainer.world_size > 1 and any(word in str(error) for word in LOST):
            raise StageError(
                f"another process of this job died, or has not answered for {compute.timeout_s} s "
                f"(compute.timeout_s): {str(error).splitlines()[0]}; {GO_ON}"
            ) from error
        raise
    return WholeCheckpoints().load_checkpoint(best)


def _trainer(config: TrainingConfig, compute: ComputeConfig, folder: Path, callbacks: list[Callback]) -> pl.Trainer:
    assert isinstance(config.steps, int)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):  # they speak of themselves, each in its own way
        logging.getLogger(name).setLevel(logging.WARNING)
    plugins: list[Any] = [WholeCheckpoints()]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        # `Leave` answers Slurm's signals between steps. Without srun nobody has started the other tasks.
        plugins.append(SLURMEnvironment(auto_requeue=False) if in_slurm_step() else LightningEnvironment())
    return pl.Trainer(
        accelerator="cuda" if on_gpu(compute) else "cpu",
        devices=compute.devices,
        num_nodes=compute.num_nodes,
        strategy=_strategy(compute),
        plugins=plugins,
        precision=_precision(config.precision, compute),  # type: ignore[arg-type]
        max_steps=config.steps,
        max_epochs=-1,
        val_check_interval=min(config.val_every, config.steps) * config.micro_batches,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        accumulate_grad_batches=config.micro_batches,
        log_every_n_steps=min(config.log_every, config.steps),
        callbacks=callbacks,
        logger=make_loggers(compute.logger, folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=str(folder),
    )


def export(model: HierarchicalVQVAE | LevelPrior, checkpoint: dict[str, Any], folder: Path) -> None:
    """Put a checkpoint's weights into the model, and its figures and files into the stage's folder.

    `metrics.json` comes first, `model.safetensors`, which makes the stage complete, last.
    """
    prefix = "model."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    try:
        model.load_state_dict(weights)
        metrics = checkpoint["metrics"]
    except (RuntimeError, KeyError, TypeError) as error:
        raise StageError(
            f"{folder}/checkpoints/best.ckpt does not belong to this training ({error}); add --redo to train again"
        ) from error
    write_json(folder / "metrics.json", metrics)
    publish_model(model, folder)


def keep_metrics(module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Put the validation figures into a checkpoint, for the export of the best."""
    figures = module.trainer.callback_metrics
    checkpoint["metrics"] = {name: float(value) for name, value in figures.items() if name.startswith("val_")}


def _precision(precision: str, compute: ComputeConfig) -> str:
    """bfloat16 where it is fast: on GPUs that have it, and on CPUs with matrix or vector units for it."""
    if precision != "auto":
        return precision
    if on_gpu(compute):
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "32-true"


def _strategy(compute: ComputeConfig) -> Any:
    """DDP for several processes. Buffers are not broadcast: every rank computes the same codebooks by itself."""
    patience = timedelta(seconds=compute.timeout_s)
    if compute.strategy == "fsdp":
        return FSDPStrategy(auto_wrap_policy=set(BLOCKS), state_dict_type="full", timeout=patience)
    return DDPStrategy(broadcast_buffers=False, timeout=patience) if several_processes(compute) else "auto"


def _check_strategy(config: TrainingConfig, compute: ComputeConfig) -> None:
    if compute.strategy == "fsdp" and not on_gpu(compute):
        raise ConfigError("compute.strategy fsdp needs GPUs, and there are none here; use ddp")
    if compute.strategy == "fsdp" and config.weight_ema:
        raise ConfigError("compute.strategy fsdp keeps no averaged weights; set weight_ema to 0")
