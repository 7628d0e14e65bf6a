"""Signals: how a scheduler, or a process of the same job that is gone, makes this one leave."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# By which a scheduler asks a job to leave: before it is preempted, and before its time is up.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Names, in the environment, the process that started this one, if it belongs to the same job.
PARENT = "SMALTI_PARENT"


class Interrupted(BaseException):
    """A signal asks this process to leave.

    Args:
        signum: which.
        done: what was saved before leaving.
        requeued: whether the job has been put back into the queue already.
    """

    def __init__(self, signum: int, done: str = "", requeued: bool = False) -> None:
        super().__init__(signum, done)
        self.signum, self.done, self.requeued = signum, done, requeued


@contextmanager
def signals_handled_by(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Let a handler answer `SIGNALS` in the block; only a main thread can, another leaves them as they are.

    A process that hears no more because it is leaving does not begin to again after the block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, handler) for signum in SIGNALS}
    try:
        yield
    except Interrupted:
        hear_no_more()  # again: Lightning puts back what it found
        raise
    finally:
        for signum, old in before.items():
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, old)


def hear_no_more() -> None:
    """Ignore further signals while leaving: schedulers send several."""
    if threading.current_thread() is threading.main_thread():
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_IGN)


def leave(signum: int, frame: FrameType | None) -> None:
    """Answer a signal by leaving at once."""
    hear_no_more()
    raise Interrupted(signum)


def requeue() -> None:
    """Put this job back into Slurm's queue, if it is one of Slurm's and this is its first process."""
    from pipelines.compute.devices import this_worker  # torch, which a command that fails at once need not load

    job = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{job}_{os.environ['SLURM_ARRAY_TASK_ID']}" if job else os.environ.get("SLURM_JOB_ID")
    if job and this_worker().rank == 0:
        try:
            subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"smalti: the job could not be requeued: {error}", file=sys.stderr)


def end_with_parent() -> None:
    """End this process when the one that started it is gone, if that was a process of the same job."""
    parent = os.environ.get(PARENT)
    if parent != str(os.getppid()):
        return

    def look() -> None:
        while os.getppid() == int(parent):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=look, daemon=True, name="end with parent").start()
