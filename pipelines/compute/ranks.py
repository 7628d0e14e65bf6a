"""What the processes of one training do together."""

import torch
from torch import Tensor


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add a tensor up over all processes, in place; nothing to do when there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor
