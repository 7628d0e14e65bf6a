"""What watches a training between its steps: NaN, the progress bar, averages of weights."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pipelines.errors import StageError
from pipelines.progress import progress_bar
from tokenizer.bottlenecks.ema import young_decay


class StopOnNonFinite(Callback):
    """Ends training with a sentence when the loss is NaN or infinite, before such weights reach a checkpoint.

    The losses are looked at when something is logged, validated or saved, not at every step, which would stall a GPU;
    those of all processes, because one that has met NaN spoils the weights of the others.

    Args:
        last: the checkpoint to go on from.
    """

    def __init__(self, last: Path) -> None:
        self.last = last
        self.bad: Tensor | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        finite = torch.isfinite(outputs["loss"].detach())
        self.bad = ~finite if self.bad is None else self.bad | ~finite
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.check(trainer.global_step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._look_at(pl_module.parameters(), pl_module.device)
        self.check(trainer.global_step)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._look_at(checkpoint["state_dict"].values(), pl_module.device)
        self.check(trainer.global_step)

    def _look_at(self, weights: Iterable[Tensor], device: torch.device) -> None:
        # On the device of the module also where weights were gathered on the host: NCCL sums nothing that lies there.
        bad = torch.zeros((), dtype=torch.bool, device=device) if self.bad is None else self.bad
        for tensor in weights:
            if tensor.is_floating_point():
                bad = bad | ~torch.isfinite(tensor).all().to(bad.device)
        self.bad = bad

    def check(self, step: int) -> None:
        """Raise StageError if a loss since the start was not finite; to be called by all processes."""
        if self.bad is None:
            return
        if torch.distributed.is_initialized():
            bad = self.bad.int()
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
            self.bad = bad.bool()
        if bool(self.bad):
            kept = f"the last good checkpoint is kept in {self.last}" if self.last.exists() else "no checkpoint yet"
            raise StageError(
                f"the loss became NaN or infinite by step {step}; {kept}; begin again with --redo and a lower "
                "learning_rate or a gradient_clip"
            )


class ClipGradients(Callback):
    """Scales gradients down to a norm, over all parameters together, before each optimizer step of either stage.

    Lightning's own way refuses fused optimizers under bfloat16, which has no gradient scaler that they could unscale.

    Args:
        largest_norm: that is left.
    """

    def __init__(self, largest_norm: float) -> None:
        self.largest_norm = largest_norm

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        strategy = trainer.strategy
        if isinstance(strategy, FSDPStrategy):  # the norm of all shards together
            assert strategy.model is not None
            strategy.model.clip_grad_norm_(self.largest_norm)  # type: ignore[operator]
        else:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.largest_norm)


class Progress(Callback):
    """The progress bar of a training job, on its first process.

    Args:
        title: what is trained.
        monitor: the validation figure shown beside it.
    """

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
            name = self.monitor.replace("_per_", "/").replace("_", " ")  # short: a bar has 80 columns
            self.bar.set_postfix_str(f"{name} {float(trainer.callback_metrics[self.monitor]):.4g}", refresh=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bar.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


class Average(AveragedModel):
    """Averaged weights and buffers, on the device of the model; their count stays on the host, or each step would wait.

    The average forgets its start sooner while it is young; see `young_decay`.

    Args:
        model: whose weights are averaged.
        decay: d, of the grown average.
        device: of the model.
    """

    def __init__(self, model: nn.Module, decay: float, device: torch.device) -> None:
        super().__init__(model, use_buffers=True)
        self.module.to(device)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        averaged, current = (
            [tensor for tensor in (*part.parameters(), *part.buffers()) if tensor.is_floating_point()]
            for part in (self.module, model)
        )
        number = int(self.n_averaged)
        if number:
            torch._foreach_lerp_(averaged, current, 1 - young_decay(self.decay, number))
        else:
            torch._foreach_copy_(averaged, current)
        self.n_averaged += 1


class AverageWeights(WeightAveraging):
    """Keeps an `Average` beside the model, which validates, and is exported, in the model's place.

    Args:
        decay: see `Average`.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._average_model = Average(pl_module, self.decay, trainer.strategy.root_device)
