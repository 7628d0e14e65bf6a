"""Commands in processes of their own that need not load their libraries: forks of one process that has loaded them."""

import os
import resource
import runpy
import signal
import socket
import sys
from multiprocessing import get_context
from pathlib import Path

SERVER = get_context("forkserver")
# Nothing of ours, so that what is forked runs the code of the tests' own checkout.
SERVER.set_forkserver_preload(
    ["lightning.pytorch", "safetensors.torch", "x_transformers", "webdataset", "yaml", "torchmetrics.functional.image"]
)


def _run(module: str, arguments: list[str], folder: Path, environment: dict[str, str], file_limit: int) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background of a shell would inherit none
    os.environ.clear()
    os.environ.update(environment)
    if environment.get("LOCAL_RANK", "0") != "0":  # all but the first of a job end with the process that started them
        os.environ["SMALTI_PARENT"] = str(os.getppid())
    for number, name in ((1, "out"), (2, "errors")):
        os.dup2(os.open(folder / f"{name}-{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


class Job:
    """`python -m MODULE ARGUMENTS`, begun.

    Args:
        module: which is run.
        arguments: of its command line.
        folder: where what it says is kept.
        environment: over that of this process.
        file_limit: bytes of the largest file that it may write, as on a full disk; 0 for any.
    """

    def __init__(
        self, module: str, *arguments: str | Path, folder: Path, file_limit: int = 0, **environment: object
    ) -> None:
        named = {name: str(value) for name, value in environment.items()}
        given = [str(argument) for argument in arguments]
        self.folder = folder
        self.process = SERVER.Process(target=_run, args=(module, given, folder, os.environ | named, file_limit))
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    @property
    def code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self.process.exitcode

    @property
    def out(self) -> str:
        return (self.folder / f"out-{self.pid}").read_text()

    @property
    def errors(self) -> str:
        return (self.folder / f"errors-{self.pid}").read_text()

    @property
    def ended(self) -> float:
        """When it last said something, in seconds of the epoch."""
        return (self.folder / f"errors-{self.pid}").stat().st_mtime

    def wait(self, seconds: float = 120) -> int | None:
        self.process.join(seconds)
        return self.code


def ranks(count: int, module: str, *arguments: str | Path, folder: Path, **environment: object) -> list[Job]:
    """Start all processes of a job, each as Lightning's launcher would start it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1], "NODE_RANK": 0, "WORLD_SIZE": count}
    environment |= place | {"OMP_NUM_THREADS": 1}
    return [Job(module, *arguments, folder=folder, **environment, LOCAL_RANK=rank) for rank in range(count)]
