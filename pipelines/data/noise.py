"""Noise that does not depend on who draws it: a function of seed, step and place in the global batch."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from tokenizer import HierarchicalVQVAE


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


def noise_for(
    model: HierarchicalVQVAE, streams: Sequence[tuple[int, int]], places: Iterable[int]
) -> list[Tensor] | None:
    """Return what each bottleneck is given, on the model's device; None where none takes noise.

    Args:
        model: whose bottlenecks are told apart by their streams.
        streams: seed and step of each level.
        places: of the images; not asked for where there is no noise.
    """
    if not any(bottleneck.noise_channels for bottleneck in model.bottlenecks):
        return None
    places, device = list(places), next(model.parameters()).device
    levels = zip(streams, model.bottlenecks, model.level_grids, strict=True)
    drawn = [normals(*stream, places, (part.noise_channels, *grid)) for stream, part, grid in levels]
    return [noise.to(device, non_blocking=True) for noise in drawn]
