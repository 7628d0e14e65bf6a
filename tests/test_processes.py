"""Real processes: asked to leave, killed, hanging, started by torchrun; what is left, and whether it goes on."""

import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from pipelines.compute.devices import ComputeConfig
from pipelines.compute.launching import workers_of
from pipelines.compute.signals import SIGNALS, Interrupted, leave, signals_handled_by
from tests.jobs import Job

SMALTI = "pipelines.cli"
# A job starts in some seconds; a machine that runs other tests beside needs more. So does a process that Lightning has
# started, for which the first waits no longer than compute.timeout_s either.
START_S, END_S, TIMEOUT_S = 120, 60, 30
Start = Callable[..., Job]


@pytest.fixture(scope="module")
def endless(
    tiny_run: Path, tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path]
) -> Callable[..., Path]:
    """A tokenizer's training that would take hours."""

    def write(**compute: object) -> Path:
        training = {"steps": 1000000, "val_every": 50, "checkpoint_every": 10}
        images = str(tiny_run.parent / "run" / "images")
        changes = {"images": {"from": images}, "tokenizer": {"training": training}, "compute": compute}
        return write_config(tmp_path_factory.mktemp("job"), changes)

    return write


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Begin a command; whatever is left of it at the end is killed. The others of a job are Lightning's to start."""
    jobs: list[Job] = []

    def begin(module: str, *arguments: str | Path) -> Job:
        jobs.append(Job(module, *arguments, folder=tmp_path_factory.mktemp("said")))
        return jobs[-1]

    yield begin
    for job in jobs:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def job_of_two(endless: Callable[..., Path], start: Start) -> tuple[Job, list[int]]:
    """Return a training of two processes that has saved a checkpoint, and all its processes but the first."""
    config = endless(devices=2, timeout_s=TIMEOUT_S)
    job = start(SMALTI, "train-tokenizer", config)
    wait_for(last(config).exists)
    return job, children(job)


@pytest.fixture(scope="module")
def hung(endless: Callable[..., Path], start: Start) -> tuple[Job, list[int], float]:
    """A job of which one process has stopped, that one, and when; the job takes time to tell, which other tests use."""
    job, others = job_of_two(endless, start)
    for pid in others:
        os.kill(pid, signal.SIGSTOP)
    return job, others, time.time()


def last(config: Path) -> Path:
    return config.parent / "run" / "tokenizer" / "checkpoints" / "last.ckpt"


def step_of(config: Path) -> int:
    return torch.load(last(config), weights_only=True)["global_step"]


def wait_for(condition: Callable[[], object], seconds: float = START_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass in time"
        time.sleep(0.05)


def children(job: Job) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (signal.SIGINT, "smalti: interrupted; the same command goes on from what is done"),
        (signal.SIGTERM, "smalti: stopped by SIGTERM, saved at step"),
        (signal.SIGUSR1, "smalti: stopped by SIGUSR1, saved at step"),
    ],
)
def test_a_training_that_is_asked_to_leave_does_and_the_same_command_goes_on(
    asked: signal.Signals, says: str, endless: Callable[..., Path], start: Start, smalti: Callable[..., tuple[int, str]]
) -> None:
    config = endless()
    job = start(SMALTI, "train-tokenizer", config)
    wait_for(last(config).exists)
    begun = time.monotonic()
    os.kill(job.pid, asked)
    assert job.wait(END_S) == 1
    assert time.monotonic() - begun < 30
    assert says in job.errors
    assert "Traceback" not in job.errors
    step = step_of(config)
    if asked != signal.SIGINT:
        assert f"saved at step {step};" in job.errors
    assert not list((config.parent / "run").rglob("*.tmp"))
    steps = (step // 50 + 1) * 50
    for path in (config, config.parent / "run" / "tokenizer" / "config.yaml"):  # as if begun with fewer steps to go
        path.write_text(path.read_text().replace("steps: 1000000", f"steps: {steps}"))
    assert smalti("train-tokenizer", config)[0] == 0
    assert step_of(config) == steps


def leave_and_put_back_what_was_found() -> None:
    """What Lightning does when it is torn down."""
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, leave)


def test_who_leaves_hears_no_further_signals_and_who_stays_hears_as_before() -> None:
    before = [signal.getsignal(signum) for signum in SIGNALS]
    try:
        with signals_handled_by(leave):
            pass
        assert [signal.getsignal(signum) for signum in SIGNALS] == before
        heard: list[int] = []
        with signals_handled_by(lambda signum, _: heard.append(signum)):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == [signal.SIGUSR1]
        with pytest.raises(Interrupted), signals_handled_by(leave):
            leave_and_put_back_what_was_found()
        assert all(signal.getsignal(signum) is signal.SIG_IGN for signum in SIGNALS)
    finally:
        for signum, handler in zip(SIGNALS, before, strict=True):
            signal.signal(signum, handler)


def test_all_processes_of_a_job_leave_after_the_same_step(endless: Callable[..., Path], start: Start) -> None:
    config = endless(devices=2)
    job = start(SMALTI, "train-tokenizer", config)
    wait_for(last(config).exists)
    others = children(job)
    assert others
    os.kill(job.pid, signal.SIGTERM)  # the first process alone
    assert job.wait(END_S) == 1
    assert job.errors.count(f"saved at step {step_of(config)};") == 2
    assert not any(map(alive, others))


def assert_told(job: Job, others: list[int]) -> None:
    assert job.wait(END_S) == 1
    told = f"another process of this job died, or has not answered for {TIMEOUT_S} s (compute.timeout_s)"
    assert f"smalti: error: {told}" in job.errors
    assert "the same command goes on from the last checkpoint" in job.errors
    assert others
    assert not any(map(alive, others))


def test_a_job_ends_with_a_sentence_when_one_of_its_processes_dies(
    hung: tuple[Job, list[int], float], endless: Callable[..., Path], start: Start
) -> None:
    job, others = job_of_two(endless, start)
    for pid in others:
        os.kill(pid, signal.SIGKILL)
    begun = time.time()
    assert_told(job, others)
    assert job.ended - begun < 20


def test_no_process_outlives_the_one_that_started_it(
    endless: Callable[..., Path], start: Start, picture_folder: Path, tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    config = endless(devices=2)
    training = start(SMALTI, "train-tokenizer", config)
    wait_for(last(config).exists)
    many = {"source": f"folder:{picture_folder}", "shard_size": 1, "channels": 3}
    packing = start(SMALTI, "pack", write_config(tmp_path / "pack", {"images": many, "compute": {"num_workers": 2}}))
    wait_for(lambda: packing.code is not None or len(children(packing)) >= 2)
    others = children(training) + children(packing)
    assert len(others) >= 3
    for job in (training, packing):
        os.kill(job.pid, signal.SIGKILL)
        job.wait()
    wait_for(lambda: not any(map(alive, others)), 30)


@pytest.mark.parametrize(("stage", "folder"), [("encode", "codes"), ("sample", "samples")])
def test_two_nodes_of_torchrun_write_the_bytes_of_one_process(
    stage: str, folder: str, start: Start, tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    run = tiny_run.parent / "run"
    changes: dict = {"tokenizer": {"from": str(run / "tokenizer")}, "images": {"from": str(run / "images")}}
    if stage == "sample":
        changes["codes"] = {"from": str(run / "codes")}
        shutil.copytree(run / "prior", tmp_path / "run" / "prior")
    config = write_config(tmp_path, changes)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    torchrun = ["torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    torchrun += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    nodes = [start(*torchrun, f"--node-rank={node}", "-m", SMALTI, stage, config) for node in range(2)]
    for node in nodes:
        assert node.wait(START_S) == 0, node.errors
    for path in (run / folder).iterdir():
        if path.name != "config.yaml":
            assert (tmp_path / "run" / folder / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("given", ["", "3"])
def test_all_processes_of_a_node_have_the_same_number_of_threads(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning sets it for the first one only; what is drawn on a CPU depends on it."""
    from lightning.fabric.strategies.launchers import subprocess_script

    tells = "import os, sys; open(sys.argv[1], 'w').write(os.environ['OMP_NUM_THREADS'])"
    command = [sys.executable, "-c", tells, str(tmp_path / "threads")]
    monkeypatch.setattr(subprocess_script, "_basic_subprocess_cmd", lambda: command)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(int(given or 4))
    try:
        if given:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        with workers_of(ComputeConfig(accelerator="cpu", devices=2)):
            mine = torch.get_num_threads()
        assert (tmp_path / "threads").read_text() == str(mine) == (given or "2")
        assert torch.get_num_threads() == int(given or 4)
        assert os.environ.get("OMP_NUM_THREADS", "") == given
    finally:
        torch.set_num_threads(before)


def test_processes_of_one_node_share_the_shards(
    start: Start, tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    """Started by Lightning, with the same arguments; the first alone empties the folder that is made again."""
    run = tiny_run.parent / "run"
    changes = {"tokenizer": {"from": str(run / "tokenizer")}, "images": {"from": str(run / "images")}}
    config = write_config(tmp_path, changes | {"compute": {"devices": 2}})
    for redo in ([], ["--redo", "encode"]):
        job = start(SMALTI, "encode", config, *redo)
        assert job.wait(START_S) == 0, job.errors
    for path in (run / "codes").iterdir():
        if path.name != "config.yaml":
            assert (tmp_path / "run" / "codes" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_job_ends_with_a_sentence_when_one_of_its_processes_hangs(hung: tuple[Job, list[int], float]) -> None:
    job, others, begun = hung
    assert_told(job, others)
    assert job.ended - begun < TIMEOUT_S + 40
