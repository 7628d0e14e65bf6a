"""Checkpoints: whole or absent, the best to export and the last to go on from."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from pipelines.errors import StageError
from pipelines.storage.paths import exists, is_local, make_folder, place, retried, whole


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
