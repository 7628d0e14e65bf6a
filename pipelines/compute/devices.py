"""Where to run: device, threads, and which of several workers this process is."""

import os
import platform
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from pipelines.errors import ConfigError
from pipelines.storage.cache import Cache, default_cache_folder


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Where to run. None of this changes what is computed, but for the rounding of the kind of device.

    Attributes:
        accelerator: "auto" (a CUDA GPU where there is one), "cpu", or "gpu". Apple's GPUs lack float64, in which smalti
            draws and sums; there "auto" is the CPU.
        devices: "auto" or a number of devices on each node.
        num_nodes: nodes of a training job.
        num_workers: processes that decode images; -1 chooses.
        threads: CPU threads of this process; 0 leaves them as they are.
        timeout_s: seconds that a training process waits for another before it gives the job up; longer than any step,
            validation or fetch may take.
        strategy: "ddp", or "fsdp" (GPUs only) for a prior whose training does not fit on one device.
        cache_dir: folder on local disk for fetched shards; empty for the user's cache folder.
        cache_gb: what fetched shards may take there.
        logger: where training reports besides metrics.csv: "csv" (nowhere else), "wandb" or "tensorboard".
    """

    accelerator: Literal["auto", "cpu", "gpu", "cuda"] = "auto"
    devices: str | int = "auto"
    num_nodes: int = 1
    num_workers: int = -1
    threads: int = 0
    timeout_s: int = 1800
    strategy: Literal["ddp", "fsdp"] = "ddp"
    cache_dir: str = ""
    cache_gb: float = 100.0
    logger: Literal["csv", "wandb", "tensorboard"] = "csv"

    def __post_init__(self) -> None:
        if self.devices != "auto" and not re.fullmatch(r"-1|[1-9][0-9]{0,4}", str(self.devices)):
            raise ValueError(f"compute.devices must be auto, -1 for all, or a number, got {self.devices}")
        if self.num_workers < -1 or self.threads < 0 or self.num_nodes < 1:
            raise ValueError("compute.num_workers, threads and num_nodes must not be negative")
        if self.timeout_s < 1 or not 0 < self.cache_gb < 2**40:
            raise ValueError("compute.timeout_s must be at least 1, and cache_gb above 0")

    @property
    def cache(self) -> Cache:
        """The local disk's share in reading shards."""
        folder = Path(self.cache_dir).expanduser() if self.cache_dir else default_cache_folder()
        return Cache(folder, int(self.cache_gb * 2**30))


class Worker(NamedTuple):
    """Which of `world_size` processes this one is."""

    rank: int
    world_size: int

    def share(self, items: list) -> list:
        """Return the items that are this worker's: every world_size-th."""
        return items[self.rank :: self.world_size]


def this_worker() -> Worker:
    """Ask the environment of torchrun, srun or Lightning's launcher which worker this is; alone if there is none.

    Raises:
        ConfigError: the environment names a rank without the number of processes, or a number without a rank.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _worker(_number("RANK"), _number("WORLD_SIZE"))
    if in_slurm_step():
        return _worker(_number("SLURM_PROCID"), _number("SLURM_STEP_NUM_TASKS"))
    # Lightning's own launcher names the place in the node to the processes that it starts, and the user the node.
    node, per_node = _number("NODE_RANK"), _number("LOCAL_WORLD_SIZE", 1)
    named = "LOCAL_RANK" in os.environ or "NODE_RANK" in os.environ
    return _worker(node * max(1, per_node) + _number("LOCAL_RANK"), _number("WORLD_SIZE", 1), named)


def _worker(rank: int, world_size: int, named: bool = True) -> Worker:
    if not 0 <= rank < world_size or (world_size > 1 and not named):
        found = f"process {rank} of {world_size}" if named else f"WORLD_SIZE {world_size} without a rank"
        raise ConfigError(
            f"the environment must say which of how many processes this is, but says {found}; "
            "set RANK and WORLD_SIZE for each process, or NODE_RANK and WORLD_SIZE for each node, or none of them"
        )
    return Worker(rank, world_size)


def _number(name: str, default: int = 0) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(f"{name} in the environment must be a number, got {text!r}; unset it")
    return int(text)


def in_slurm_step() -> bool:
    """Whether srun has started this process; a batch script knows the number of tasks too, and is alone."""
    return "SLURM_PROCID" in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ


def place_in_node() -> int:
    """Return which of its node's processes this one is, as its launcher says."""
    return _number("LOCAL_RANK") if "LOCAL_RANK" in os.environ or not in_slurm_step() else _number("SLURM_LOCALID")


def on_gpu(compute: ComputeConfig) -> bool:
    """Whether this section means a CUDA GPU.

    Raises:
        ConfigError: it asks for one, and there is none.
    """
    if compute.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ConfigError("compute.accelerator asks for a CUDA GPU and there is none here; set it to auto or cpu")
    return compute.accelerator != "cpu" and torch.cuda.is_available()


def described(compute: ComputeConfig) -> str:
    """Return where work is done, for a person."""
    device = torch.cuda.get_device_name() if on_gpu(compute) else "CPU"
    count = max(this_worker().world_size, local_processes(compute) * compute.num_nodes)
    return f"{device}, {count} processes" if count > 1 else device


def hardware(compute: ComputeConfig) -> str:
    """Return the same with the name of the processor and how many of its cores may be used."""
    if on_gpu(compute):
        return described(compute)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS
    return f"{described(compute)}, {cores} cores of {processor()}"


def processor() -> str:
    """Return the name of this machine's processor."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if named:
            return named[0]
    return platform.processor() or platform.machine()


def local_processes(compute: ComputeConfig) -> int:
    """How many processes a stage has on this node."""
    if compute.devices == "auto":
        return max(1, torch.cuda.device_count()) if on_gpu(compute) else 1
    devices = int(compute.devices)
    return max(1, torch.cuda.device_count()) if devices == -1 else devices


def several_processes(compute: ComputeConfig) -> bool:
    """Whether a stage has more than one process."""
    return local_processes(compute) > 1 or compute.num_nodes > 1 or this_worker().world_size > 1


def started_by_a_launcher() -> bool:
    """Whether somebody else, torchrun, srun or the user, has started all processes of this job."""
    return ("RANK" in os.environ and "WORLD_SIZE" in os.environ) or in_slurm_step()


def num_loaders(compute: ComputeConfig) -> int:
    """How many processes shall decode images beside this one."""
    if compute.num_workers >= 0:
        return compute.num_workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS


def inference_device(compute: ComputeConfig, precise: bool = True) -> torch.device:
    """Set threads and float32 precision for inference, and return the device.

    Args:
        compute: the section.
        precise: true float32, TF32 off, so that codes do not depend on the kind of GPU more than they must.
    """
    if compute.threads:
        torch.set_num_threads(compute.threads)
    torch.backends.cuda.matmul.allow_tf32 = not precise
    torch.backends.cudnn.allow_tf32 = not precise
    if on_gpu(compute):
        # Each task may see all GPUs of its node, or its own alone.
        return torch.device("cuda", place_in_node() % torch.cuda.device_count())
    return torch.device("cpu")
