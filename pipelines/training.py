"""What training of both stages shares: settings, schedule, weight averaging, checkpoints, the Trainer."""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from pipelines.compute import ComputeConfig, on_gpu, several_processes
from pipelines.data import StepData
from pipelines.errors import ConfigError, StageError
from pipelines.metrics_log import make_loggers
from pipelines.progress import progress_bar
from pipelines.shards import write_json
from pipelines.stage import publish_model
from prior import LevelPrior
from tokenizer import HierarchicalVQVAE

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained; `steps`, `batch_size` and `learning_rate` may be lists of one value a level.

    Attributes:
        steps: optimizer steps.
        batch_size: global, over all processes and micro-batches.
        micro_batches: parts of a batch that a process takes one after the other, to save memory.
        learning_rate: the peak, reached after warm-up; a cosine takes it to zero.
        warmup_steps: of linear warm-up.
        weight_decay: of AdamW; 0 makes it Adam.
        beta2: of Adam.
        gradient_clip: largest norm of the gradient; 0 turns clipping off.
        weight_ema: decay of the averaged weights, which are the ones evaluated and exported; 0 turns averaging off.
        val_every: steps between validations; a validation ends training too.
        checkpoint_every: steps between checkpoints to go on from.
        patience: validations without improvement after which training stops; 0 never stops early.
        log_every: steps between rows of metrics.csv.
        precision: "auto" (bf16 where the hardware has it), "32-true", "bf16-mixed" or what else Lightning knows.
        compile: torch.compile the model; "auto" does on a GPU.
    """

    steps: int | list[int] = 100000
    batch_size: int | list[int] = 128
    micro_batches: int = 1
    learning_rate: float | list[float] = 3e-4
    warmup_steps: int = 0
    weight_decay: float = 0.0
    beta2: float = 0.999
    gradient_clip: float = 0.0
    weight_ema: float = 0.0
    val_every: int = 5000
    checkpoint_every: int = 1000
    patience: int = 0
    log_every: int = 50
    precision: str = "auto"
    compile: bool | str = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batches", "val_every", "checkpoint_every", "log_every"):
            values = getattr(self, name)
            if min(values if isinstance(values, list) else [values]) < 1:
                raise ValueError(f"{name} must be at least 1, got {values}")
        rates = self.learning_rate if isinstance(self.learning_rate, list) else [self.learning_rate]
        if not min(rates) > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2 must lie in [0, 1), got {self.beta2}")
        if not 0 <= self.weight_ema < 1:
            raise ValueError(f"weight_ema must lie in [0, 1), got {self.weight_ema}")
        if self.compile not in (True, False, "auto"):
            raise ValueError(f"compile must be true, false or auto, got {self.compile}")
        for name in ("warmup_steps", "weight_decay", "gradient_clip", "patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for steps in self.steps if isinstance(self.steps, list) else [self.steps]:
            if steps > self.val_every and steps % self.val_every:
                raise ValueError(f"steps must be a multiple of val_every ({self.val_every}), got {steps}")
        for batch in self.batch_size if isinstance(self.batch_size, list) else [self.batch_size]:
            if batch % self.micro_batches:
                raise ValueError(f"batch_size must be a multiple of micro_batches ({self.micro_batches}), got {batch}")


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


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add a tensor up over all processes, in place; nothing to do when there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


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
    assert isinstance(config.steps, int)
    checkpoints = folder / "checkpoints"
    last, best = checkpoints / "last.ckpt", checkpoints / "best.ckpt"
    if compute.threads:
        torch.set_num_threads(compute.threads)
    stop_on_nan = _StopOnNonFinite(last)
    callbacks: list[Callback] = [
        stop_on_nan,
        _Progress(title, monitor),
        ModelCheckpoint(checkpoints, "best", monitor=monitor, enable_version_counter=False),
        _KeepLast(last, config.checkpoint_every, min(config.val_every, config.steps)),
    ]
    if config.weight_ema:
        callbacks.insert(0, WeightAveraging(multi_avg_fn=_averaging(config.weight_ema)))
    if config.patience:
        callbacks.append(EarlyStopping(monitor, patience=config.patience, min_delta=0.0))
    if config.compile is True or (config.compile == "auto" and on_gpu(compute)):
        model = module.model
        assert isinstance(model, nn.Module)
        model.compile()
    try:
        trainer = _trainer(config, compute, folder, callbacks)
    except (MisconfigurationException, ImportError, ValueError) as error:
        raise ConfigError(f"compute cannot be had here: {error}") from error
    if data.batch_size % (trainer.world_size * config.micro_batches):
        raise ConfigError(
            f"batch_size must be a multiple of processes * micro_batches, got {data.batch_size} for "
            f"{trainer.world_size} * {config.micro_batches}"
        )
    try:
        trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None, weights_only=True)
    except SystemExit as error:  # Lightning's answer to Ctrl-C
        raise KeyboardInterrupt from error
    stop_on_nan.check(trainer.global_step)
    return torch.load(best, map_location="cpu", weights_only=True)


def _trainer(config: TrainingConfig, compute: ComputeConfig, folder: Path, callbacks: list[Callback]) -> pl.Trainer:
    assert isinstance(config.steps, int)
    return pl.Trainer(
        accelerator=compute.accelerator,
        devices=compute.devices,
        num_nodes=compute.num_nodes,
        strategy=_strategy(compute),
        precision=_precision(config.precision, compute),  # type: ignore[arg-type]
        max_steps=config.steps,
        max_epochs=-1,
        val_check_interval=min(config.val_every, config.steps) * config.micro_batches,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        accumulate_grad_batches=config.micro_batches,
        gradient_clip_val=config.gradient_clip or None,
        log_every_n_steps=min(config.log_every, config.steps),
        callbacks=callbacks,
        logger=make_loggers(compute.logger, folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )


def export(model: HierarchicalVQVAE | LevelPrior, checkpoint: dict[str, Any], folder: Path) -> None:
    """Put a checkpoint's weights into the model, and its figures and files into the stage's folder.

    `metrics.json` comes first, `model.safetensors`, which makes the stage complete, last.
    """
    prefix = "model."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    model.load_state_dict(weights)
    write_json(folder / "metrics.json", checkpoint["metrics"])
    staging = folder / "export"
    model.save_pretrained(staging)
    publish_model(staging, folder)


def keep_metrics(module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Put the validation figures into a checkpoint, for the export of the best."""
    figures = module.trainer.callback_metrics
    checkpoint["metrics"] = {name: float(value) for name, value in figures.items() if name.startswith("val_")}


class _KeepLast(Checkpoint):
    """Writes the checkpoint to go on from: every so many steps, and after each validation.

    Where both fall together the validation comes first, so that going on never skips one.
    """

    def __init__(self, path: Path, every: int, val_every: int) -> None:
        self.path, self.every, self.val_every = path, every, val_every
        self.saved = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        step = trainer.global_step
        if step != self.saved and step % self.every == 0 and step % self.val_every:
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        self.saved = trainer.global_step
        trainer.save_checkpoint(self.path)


class _StopOnNonFinite(Callback):
    """Ends training with a sentence when the loss is NaN or infinite, before such weights reach a checkpoint.

    The losses are looked at when something is logged or saved, not at every step, which would stall a GPU.
    """

    def __init__(self, last: Path) -> None:
        self.last = last
        self.bad: Tensor | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        finite = torch.isfinite(outputs["loss"].detach())
        self.bad = ~finite if self.bad is None else self.bad | ~finite
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.check(trainer.global_step)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.check(trainer.global_step)

    def check(self, step: int) -> None:
        if self.bad is not None and bool(self.bad):
            kept = f"the last good checkpoint is kept in {self.last}" if self.last.exists() else "no checkpoint yet"
            raise StageError(
                f"the loss became NaN or infinite by step {step}; {kept}; begin again with --redo and a lower "
                "learning_rate or a gradient_clip"
            )


class _Progress(Callback):
    def __init__(self, title: str, monitor: str) -> None:
        self.title, self.monitor = title, monitor

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bar = progress_bar(
            trainer.max_steps, self.title, "steps", initial=trainer.global_step, disable=not trainer.is_global_zero
        )

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.bar.update(trainer.global_step - self.bar.n)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.monitor in trainer.callback_metrics:
            figure = float(trainer.callback_metrics[self.monitor])
            self.bar.set_postfix_str(f"{self.monitor} {figure:.4g}", refresh=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bar.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


def _averaging(decay: float) -> Any:
    """Return an average that forgets its start sooner while it is young: decay min(d, (1 + n) / (10 + n))."""

    def average(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor | int) -> None:
        young = (1 + int(num_averaged)) / (10 + int(num_averaged))
        torch._foreach_lerp_(averaged, current, 1 - min(decay, young))

    return average


def _precision(precision: str, compute: ComputeConfig) -> str:
    """bfloat16 where it is fast: on GPUs that have it, and on CPUs with matrix or vector units for it."""
    if precision != "auto":
        return precision
    if on_gpu(compute):
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "32-true"


def _strategy(compute: ComputeConfig) -> Any:
    """DDP for several processes. Buffers are not broadcast: every rank computes the same codebooks by itself."""
    return DDPStrategy(broadcast_buffers=False) if several_processes(compute) else "auto"
