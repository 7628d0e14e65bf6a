"""Which worker a process is, and on which GPU, by the environment of whoever started it."""

import os

import pytest
import torch

from pipelines.compute.devices import ComputeConfig, Worker, inference_device, started_by_a_launcher, this_worker
from pipelines.errors import ConfigError

NAMES = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}
# Environment, worker, GPU of two, whether a launcher has started all processes.
LAUNCHERS = {
    "by hand": ({}, Worker(0, 1), 0, False),
    "torchrun": (TORCHRUN | {"RANK": "3", "LOCAL_RANK": "1"}, Worker(3, 4), 1, True),
    "torchrun in a batch script": (BATCH | TORCHRUN | {"RANK": "3", "LOCAL_RANK": "1"}, Worker(3, 4), 1, True),
    "torchrun in a step": (BATCH | STEP | TORCHRUN | {"RANK": "2", "LOCAL_RANK": "0"}, Worker(2, 4), 0, True),
    "independent commands": ({"RANK": "2", "WORLD_SIZE": "3"}, Worker(2, 3), 0, True),
    "srun": (BATCH | STEP | {"SLURM_PROCID": "3", "SLURM_LOCALID": "1"}, Worker(3, 4), 1, True),
    "srun, more tasks than GPUs": (BATCH | STEP | {"SLURM_PROCID": "3", "SLURM_LOCALID": "3"}, Worker(3, 4), 1, True),
    "srun of fewer tasks": (BATCH | STEP | {"SLURM_STEP_NUM_TASKS": "1"}, Worker(0, 1), 0, True),
    "sbatch without srun": (BATCH, Worker(0, 1), 0, False),
    "salloc": ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, Worker(0, 1), 0, False),
    "Lightning": ({"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}, Worker(1, 2), 1, False),
    "Lightning in a batch script": (BATCH | {"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, Worker(1, 2), 1, False),
    "Lightning on the second node": (
        {"LOCAL_RANK": "1", "NODE_RANK": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"},
        Worker(3, 4),
        1,
        False,
    ),
    "a node named by hand": ({"NODE_RANK": "1", "WORLD_SIZE": "2"}, Worker(1, 2), 0, False),
    "the first node named by hand": ({"NODE_RANK": "0"}, Worker(0, 1), 0, False),
}
REFUSED = {
    "a node without a number of processes": ({"NODE_RANK": "1"}, "but says process 1 of 1"),
    "a rank past the last": ({"RANK": "4", "WORLD_SIZE": "4"}, "but says process 4 of 4"),
    "a number without a rank": ({"WORLD_SIZE": "4"}, "but says WORLD_SIZE 4 without a rank"),
    "no number": ({"RANK": "first", "WORLD_SIZE": "4"}, "RANK in the environment must be a number, got 'first'"),
}


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    for name in (*NAMES, *(name for name in os.environ if name.startswith("SLURM"))):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in request.param.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("given", "worker", "gpu", "launched"), LAUNCHERS.values(), ids=LAUNCHERS, indirect=["given"])
@pytest.mark.usefixtures("given")
def test_a_process_knows_its_place_by_whoever_started_it(worker: Worker, gpu: int, launched: bool) -> None:
    assert this_worker() == worker
    assert inference_device(ComputeConfig()) == torch.device("cuda", gpu)
    assert started_by_a_launcher() == launched


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED, indirect=["given"])
@pytest.mark.usefixtures("given")
def test_an_environment_that_names_half_a_place_is_refused(message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        this_worker()
