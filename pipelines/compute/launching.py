"""The processes of a job on one node: started by Lightning's launcher, watched, ended together."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from pipelines.compute.devices import ComputeConfig, local_processes, started_by_a_launcher
from pipelines.compute.signals import PARENT
from pipelines.errors import StageError

# A process that was told to end is killed after this.
PATIENCE_S = 10.0
GO_ON = "all are stopped, and the same command goes on from the last checkpoint"


@contextmanager
def workers_of(compute: ComputeConfig) -> Iterator[None]:
    """Run the block in as many processes of this node as asked for; the first waits for the others at its end.

    The others are this same command, which Lightning's launcher starts again. They share no collective: each does its
    part and ends. All have the same number of threads, on which the last bits of what is drawn depend.

    Raises:
        StageError: one of them failed.
    """
    count = local_processes(compute)
    if count == 1 or started_by_a_launcher() or "LOCAL_RANK" in os.environ:
        yield
        return
    from lightning.fabric.plugins.environments import LightningEnvironment  # seconds to import, seldom used
    from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

    before, threads = dict(os.environ), torch.get_num_threads()
    os.environ |= {PARENT: str(os.getpid()), "LOCAL_WORLD_SIZE": str(count)}
    if "OMP_NUM_THREADS" not in os.environ:  # which would have set this process's threads too
        torch.set_num_threads(max(1, threads // count))
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), count, compute.num_nodes)
    children: list[subprocess.Popen] = launcher.launch(launcher.procs.copy)
    launcher.procs.clear()  # so that its observer, which kills this process when one of them fails, sees none
    try:
        yield
        codes = [child.wait() for child in children]
    finally:
        end(children)
        os.environ.clear()
        os.environ.update(before)
        torch.set_num_threads(threads)
    failed = sum(code != 0 for code in codes)
    if failed:
        raise StageError(f"{failed} of {count} processes failed, see above; the same command does what they left")


def end(children: list[subprocess.Popen]) -> None:
    """End processes: ask them, and kill those that do not listen."""
    for child in children:
        if child.poll() is None:
            child.terminate()
    deadline = time.monotonic() + PATIENCE_S
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


class Together:
    """Keeps the processes that Lightning starts for a job together: when one fails, all end, and none is left over.

    Lightning's own observer kills this process without a word when one of the others fails, so they are taken from it.

    Args:
        launcher: of Lightning, with the list of processes that it will have started; None if it starts none.
    """

    def __init__(self, launcher: Any) -> None:
        self.launcher = launcher
        self.children: list[subprocess.Popen] = []
        self.over = threading.Event()

    def __enter__(self) -> "Together":
        if self.launcher is not None:
            os.environ[PARENT] = str(os.getpid())  # they end with this one
            threading.Thread(target=self._look, daemon=True, name="together").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self.over.set()
        self._take_over()
        for child in self.children if kind is None else []:
            with suppress(subprocess.TimeoutExpired):
                child.wait(60)
        end(self.children)

    def _take_over(self) -> None:
        started = getattr(self.launcher, "procs", [])
        self.children += started
        started.clear()

    def _look(self) -> None:
        """End this process when another fails and this one does not notice, as in a collective on GPUs."""
        while not self.over.wait(0.2):
            self._take_over()
            failed = next((number for number, child in enumerate(self.children, 1) if child.poll()), None)
            if failed is None:
                continue
            if self.over.wait(PATIENCE_S):  # the failure came up here too
                return
            code = self.children[failed - 1].returncode
            print(f"smalti: error: process {failed} of this job ended with code {code}; {GO_ON}", file=sys.stderr)
            end(self.children)
            os._exit(1)
