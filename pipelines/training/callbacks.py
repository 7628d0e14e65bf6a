"""What happens between training steps: checkpoints, leaving when asked, stopping on NaN, the progress bar."""

import math
import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pipelines.compute.signals import Interrupted, requeue, signals_handled_by
from pipelines.errors import StageError
from pipelines.progress import progress_bar
from pipelines.storage.paths import exists, is_local, make_folder, place, retried, whole
from tokenizer.bottlenecks.ema import young_decay


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are either the old or the new one, locally and in object stores; read as plain data."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = place(path)
        make_folder(target.parent)
        with whole(target) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's words for what went wrong while it wrote
                reason: BaseException | None = error
                while reason is not None and not isinstance(reason, OSError):
                    reason = reason.__context__
                raise reason or error from None

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        source = place(path)
        try:
            if is_local(source):
                checkpoint = torch.load(source, map_location=map_location, weights_only=True)
            else:
                checkpoint = retried(lambda: _load_remote(source, map_location), f"read {source}")
            if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
                raise ValueError("it holds no weights")
            for part in ("state_dict", "current_model_state"):
                if part in checkpoint:
                    checkpoint[part] = {_renamed(name): tensor for name, tensor in checkpoint[part].items()}
        except OSError:
            raise
        except Exception as error:  # torch raises many kinds on files that are not its own
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise StageError(
                f"{source} is no checkpoint that can be read ({reason}); remove it to go on without, from the beginning"
            ) from error
        return checkpoint


def _renamed(name: str) -> str:
    """Return what a tensor of a training is called now that was saved under what it was called once."""
    return name.replace("model.codebooks.", "model.bottlenecks.").replace("emas.", "learners.")


def _load_remote(source: Path, map_location: Any) -> dict[str, Any]:
    with source.open("rb") as file:
        return torch.load(file, map_location=map_location, weights_only=True)


class KeepBest(Checkpoint):
    """Writes the checkpoint to export: that of the lowest validation figure.

    Lightning's ModelCheckpoint forgets the figure when the folder is not where it was; here no path is kept. The figure
    stands where ModelCheckpoint puts it, whose checkpoints are gone on from too.

    Args:
        path: of the checkpoint.
        monitor: the validation figure.
    """

    def __init__(self, path: Path, monitor: str) -> None:
        self.path, self.monitor = path, monitor
        self.figure: float | None = None  # the lowest so far

    @property
    def state_key(self) -> str:
        """Where checkpoints keep the figure."""
        every = {"every_n_train_steps": 0, "every_n_epochs": 1, "train_time_interval": None}
        settings = {"monitor": self.monitor, "mode": "min", **every}
        return f"ModelCheckpoint{settings}"

    def state_dict(self) -> dict[str, Any]:
        return {"best_model_score": self.figure}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        figure = state_dict["best_model_score"]
        if figure is not None and not exists(self.path):
            raise StageError(
                f"{self.path}, the best checkpoint of this training so far, must be there to go on, and is not; put it "
                "back, or add --redo to train again"
            )
        self.figure = None if figure is None else float(figure)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        figure = float(trainer.callback_metrics[self.monitor].nan_to_num(nan=math.inf, posinf=math.inf))
        # Saving is done by all processes together, so they must agree.
        if trainer.strategy.reduce_boolean_decision(self.figure is None or figure < self.figure):
            self.figure = figure
            trainer.save_checkpoint(str(self.path))


class KeepLast(Checkpoint):
    """Writes the checkpoint to go on from: every so many steps, one step before each validation, and after it.

    Never between the last step before a validation and the validation itself, so that going on skips none.

    Args:
        path: of the checkpoint.
        every: steps between checkpoints.
        val_every: steps between validations.
    """

    def __init__(self, path: Path, every: int, val_every: int) -> None:
        self.path, self.every, self.val_every = path, every, val_every
        self.saved = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.saved = trainer.global_step  # where a job goes on is saved; not again inside the step that follows

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        step = trainer.global_step
        if step % self.every == 0 or (step + 1) % self.val_every == 0:
            self.save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.saved = 0  # whatever was saved at this step was not yet validated
        trainer.save_checkpoint(str(self.path))
        self.saved = trainer.global_step

    def save(self, trainer: pl.Trainer) -> int:
        """Save unless a validation is due or this step has been saved; return the step to go on from."""
        if trainer.global_step != self.saved and trainer.global_step % self.val_every:
            # Lightning logs a step after this; killed in between, the job would go on after it, its row lost.
            trainer._logger_connector.update_train_step_metrics()
            trainer.save_checkpoint(str(self.path))
            self.saved = trainer.global_step
        return self.saved


class Leave(Callback):
    """Ends training on a signal, all processes after the same step, with a checkpoint.

    Each process may get the signal at another step, or not at all. So at every step each tells the others whether it
    did, and all look at the answers one step later, when they have long been there: no process waits for them.

    Args:
        keep: saves the checkpoint.
    """

    def __init__(self, keep: KeepLast) -> None:
        self.keep = keep
        self.signum = 0
        self.step = 0
        self.answers: tuple[Any, Tensor] | None = None
        self.group: Any = None
        self.handlers: Any = None
        self.listening = False  # whether training has begun

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.step = trainer.global_step
        if trainer.world_size > 1:
            self.group = torch.distributed.new_group(backend="gloo")
            # Lightning asks the first process at every micro-batch and waits for the answer, which would stall a GPU.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        self.handlers = signals_handled_by(self._note)
        self.handlers.__enter__()
        self.listening = True

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step != self.step:  # else inside a step of several micro-batches
            self.step = trainer.global_step
            if signum := self._asked():
                self._leave(signum, self.keep.save(trainer))

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if signum := self._asked():
            self._leave(signum, self.keep.saved)

    def _leave(self, signum: int, step: int) -> None:
        requeued = signum == signal.SIGUSR1
        if requeued:
            requeue()
            if self.group is not None:  # a job one of whose processes has ended may be taken for failed
                torch.distributed.barrier(self.group)
        raise Interrupted(signum, f"saved at step {step}", requeued)

    def _asked(self) -> int:
        """The signal that any process had got when this was last called, 0 for none."""
        if self.group is None:
            return self.signum
        asked = 0
        if self.answers is not None:
            work, answer = self.answers
            work.wait()
            asked = int(answer)
        flag = torch.tensor(self.signum)
        work = torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, self.group, async_op=True)
        self.answers = work, flag
        return asked

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_listening()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop_listening(exception)

    def _stop_listening(self, exception: BaseException | None = None) -> None:
        if self.handlers is not None:
            handlers, self.handlers = self.handlers, None
            with suppress(BaseException):
                handlers.__exit__(type(exception) if exception else None, exception, None)


class StopOnNonFinite(Callback):
    """Ends training with a sentence when the loss is NaN or infinite, before such weights reach a checkpoint.

    The losses are looked at when something is logged or saved, not at every step, which would stall a GPU; those of
    all processes, because one that has met NaN spoils the weights of the others.

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

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        # On the device of the module also where weights were gathered on the host: NCCL sums nothing that lies there.
        bad = torch.zeros((), dtype=torch.bool, device=pl_module.device) if self.bad is None else self.bad
        for tensor in checkpoint["state_dict"].values():
            if tensor.is_floating_point():
                bad = bad | ~torch.isfinite(tensor).all().to(bad.device)
        self.bad = bad
        self.check(trainer.global_step)

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
