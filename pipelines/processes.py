"""The processes of a job on one node: started by Lightning's launcher, watched, ended together."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from pipelines.compute import ComputeConfig, local_processes, started_by_a_launcher
from pipelines.errors import StageError
from pipelines.signals import PARENT

# A process that was told to end is killed after this.
PATIENCE_S = 10.0
GO_ON = "all are stopped, and the same command goes on from the last checkpoint"


@contextmanager
def workers_of(compute: ComputeConfig) -> Iterator[None]:
    """Run the block in as many processes of this node as asked for; the first waits for the others at its end.

    The others are this same command, which Lightning's launcher starts again. They share no collective: each does its
    part and ends.

    Raises:
        StageError: one of them failed.
    """
    count = local_processes(compute)
    if count == 1 or started_by_a_launcher() or "LOCAL_RANK" in os.environ:
        yield
        return
    before = dict(os.environ)
    os.environ |= {PARENT: str(os.getpid()), "LOCAL_WORLD_SIZE": str(count)}
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), count, compute.num_nodes)
    children = launcher.launch(lambda: take_over(launcher))
    try:
        yield
        codes = [child.wait() for child in children]
    finally:
        end(children)
        os.environ.clear()
        os.environ.update(before)
    failed = sum(code != 0 for code in codes)
    if failed:
        raise StageError(f"{failed} of {count} processes failed, see above; the same command does what they left")


def take_over(launcher: _SubprocessScriptLauncher) -> list[subprocess.Popen]:
    """Take the launcher's children into our own care.

    Its observer would kill this process without a word when one of them fails.
    """
    children = list(launcher.procs)
    launcher.procs.clear()
    return children


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


def watch(children: list[subprocess.Popen]) -> threading.Event:
    """End this process when one of the children fails and this one does not notice, as in a collective on GPUs.

    Returns:
        An event that ends the watch.
    """
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.5):
            failed = next((number for number, child in enumerate(children, 1) if child.poll()), None)
            if failed is None:
                continue
            if over.wait(PATIENCE_S):  # the failure came up here too
                return
            code = children[failed - 1].returncode
            print(f"smalti: error: process {failed} of this job ended with code {code}; {GO_ON}", file=sys.stderr)
            end(children)
            os._exit(1)

    threading.Thread(target=look, daemon=True, name="watch").start()
    return over
