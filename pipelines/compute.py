"""Where to run: device, threads, and which of several workers this process is."""

import os
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Where to run. None of this changes what is computed, but for the rounding of the kind of device.

    Attributes:
        accelerator: "auto", "cpu", "gpu" or what else Lightning knows.
        devices: "auto" or a number of devices on each node.
        num_nodes: nodes of a training job.
        num_workers: processes that decode images; -1 chooses.
        threads: CPU threads of this process; 0 leaves them as they are.
        logger: where training reports besides metrics.csv: "csv" (nowhere else), "wandb" or "tensorboard".
    """

    accelerator: str = "auto"
    devices: str | int = "auto"
    num_nodes: int = 1
    num_workers: int = -1
    threads: int = 0
    logger: str = "csv"

    def __post_init__(self) -> None:
        if self.logger not in ("csv", "wandb", "tensorboard"):
            raise ValueError(f"compute.logger must be csv, wandb or tensorboard, got {self.logger}")
        if self.num_workers < -1 or self.threads < 0 or self.num_nodes < 1:
            raise ValueError("compute.num_workers, threads and num_nodes must not be negative")


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
    # Lightning's own launcher names the place in the node to the children that it starts.
    return Worker(int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def on_gpu(compute: ComputeConfig) -> bool:
    """Whether this section means a CUDA GPU, and there is one."""
    return compute.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def several_processes(compute: ComputeConfig) -> bool:
    """Whether Lightning trains in more than one process."""
    devices = torch.cuda.device_count() if compute.devices == "auto" and on_gpu(compute) else compute.devices
    return devices not in ("auto", "1", 1) or compute.num_nodes > 1 or this_worker().world_size > 1


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
