"""Noise that does not depend on who draws it: a function of seed, step and place in the global batch."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def normals(seed: int, step: int, places: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return standard normal numbers for samples: float32 (B, *shape), the same whichever process draws which of them.

    Args:
        seed: of the run, and of what the noise is for.
        step: optimizer steps before this one.
        places: place of each sample in the global batch.
        shape: of one sample's noise.

    Source: Salmon et al. 2011 (Philox).
    """
    drawn = []
    for place in places:
        key = np.array([(seed << 32 | step) % 2**64, place], np.uint64)
        drawn.append(np.random.Generator(np.random.Philox(key=key)).standard_normal(tuple(shape), np.float32))
    return torch.from_numpy(np.stack(drawn))
