"""Ending a training when asked to: all processes after the same step, with a checkpoint."""

import signal
from contextlib import ExitStack
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from pipelines.compute.signals import Interrupted, hear_no_more, requeue, signals_handled_by
from pipelines.training.checkpoints import KeepLast


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
        self.handlers = ExitStack()  # those that training found, put back at its end
        self.listening = False  # whether training has begun

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.step = trainer.global_step
        if trainer.world_size > 1:
            self.group = torch.distributed.new_group(backend="gloo")
            # Lightning asks the first process at every micro-batch and waits for the answer, which would stall a GPU.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        self.handlers.enter_context(signals_handled_by(self._note))
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
        hear_no_more()
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
        self.handlers.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.handlers.close()
