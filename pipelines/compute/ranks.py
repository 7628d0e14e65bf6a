"""What the processes of one job do together."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor

from pipelines.compute.devices import ComputeConfig, in_slurm_step, this_worker
from pipelines.errors import ConfigError, StageError

# Words in which gloo and NCCL say that another process is not there any more.
LOST = ("onnection closed", "onnection reset", "onnection refused", "imed out", "imeout", "NCCL", "Broken pipe")


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add a tensor up over all processes, in place; nothing to do when there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


@contextmanager
def adding_up(compute: ComputeConfig) -> Iterator[None]:
    """Let `sum_over_ranks` add up tensors on the CPU over the processes of this job, in the block.

    Raises:
        ConfigError: the environment does not say where they meet.
        StageError: another process has died, or does not answer for compute.timeout_s.
    """
    rank, world_size = this_worker()
    if world_size == 1:
        yield
        return
    if in_slurm_step():
        from lightning.fabric.plugins.environments import SLURMEnvironment  # seconds to import

        place = SLURMEnvironment()
        os.environ |= {"MASTER_ADDR": place.main_address, "MASTER_PORT": str(place.main_port)}
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ConfigError(
            f"the processes of a job must know where they meet, but the environment lacks {' and '.join(missing)}; "
            "set MASTER_ADDR and MASTER_PORT for each, or start them with torchrun"
        )
    try:
        patience = timedelta(seconds=compute.timeout_s)
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size, timeout=patience)
        yield
    except (RuntimeError, torch.distributed.DistError) as error:
        if not any(word in str(error) for word in LOST):
            raise
        raise StageError(
            f"another process of this job died, or has not answered for {compute.timeout_s} s (compute.timeout_s): "
            f"{str(error).splitlines()[0]}; give the same command again"
        ) from error
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
