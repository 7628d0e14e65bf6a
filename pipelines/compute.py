"""Where to run: device, threads, and which of several workers this process is."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from pipelines.cache import Cache, default_cache_folder


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Where to run. None of this changes what is computed, but for the rounding of the kind of device.

    Attributes:
        accelerator: "auto", "cpu", "gpu" or what else Lightning knows.
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

    accelerator: str = "auto"
    devices: str | int = "auto"
    num_nodes: int = 1
    num_workers: int = -1
    threads: int = 0
    timeout_s: int = 1800
    strategy: Literal["ddp", "fsdp"] = "ddp"
    cache_dir: str = ""
    cache_gb: float = 100.0
    logger: str = "csv"

    def __post_init__(self) -> None:
        if self.devices != "auto" and not re.fullmatch(r"-1|[1-9][0-9]{0,4}", str(self.devices)):
            raise ValueError(f"compute.devices must be auto, -1 for all, or a number, got {self.devices}")
        if self.logger not in ("csv", "wandb", "tensorboard"):
            raise ValueError(f"compute.logger must be csv, wandb or tensorboard, got {self.logger}")
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
    """Ask the launcher's environment (torchrun, Slurm) which worker this is; alone if there is none."""
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in os.environ and size in os.environ:
            return Worker(int(os.environ[rank]), int(os.environ[size]))
    # Lightning's own launcher names the place in the node to the processes that it starts, and the user the node.
    local, node, per_node = (int(os.environ.get(name, 0)) for name in ("LOCAL_RANK", "NODE_RANK", "LOCAL_WORLD_SIZE"))
    return Worker(node * max(1, per_node) + local, int(os.environ.get("WORLD_SIZE", 1)))


def on_gpu(compute: ComputeConfig) -> bool:
    """Whether this section means a CUDA GPU, and there is one."""
    return compute.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


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
    """Whether somebody else, torchrun or Slurm, has started all processes of this job."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_NTASKS" in os.environ


def num_processes(compute: ComputeConfig) -> int:
    """How many processes shall decode images beside this one."""
    return len(os.sched_getaffinity(0)) if compute.num_workers == -1 else compute.num_workers


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
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")
