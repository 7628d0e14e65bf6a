"""Noise that does not depend on who draws it: a function of seed, step and place in the global batch."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.storage.fingerprint import digest
from tokenizer import HierarchicalVQVAE

# Streams of a training: from 1 on one per level for its bottleneck, and these.
CORRUPTION = 21
HIDDEN_CLASSES = 41
PROBES = 31  # the first level's, as there is one per level
# Streams of validation come so many after those of training, and all of a seed before those of the next.
VALIDATION, STREAMS = 50, 101


def normals(seed: int, step: int, places: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return standard normal numbers for samples: float32 (B, *shape), the same whichever process draws which of them.

    Args:
        seed: of the run, and of what the noise is for.
        step: optimizer steps before this one.
        places: place of each sample in the global batch.
        shape: of one sample's noise.

    Source: Salmon et al. 2011 (Philox).
    """
    drawn = [one.standard_normal(tuple(shape), np.float32) for one in _generators(seed, step, places)]
    return torch.from_numpy(np.stack(drawn))


def uniforms(seed: int, step: int, places: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return numbers in [0, 1) likewise: float32 (B, *shape)."""
    return torch.from_numpy(np.stack([one.random(tuple(shape), np.float32) for one in _generators(seed, step, places)]))


def _generators(seed: int, step: int, places: Sequence[int]) -> Iterator[np.random.Generator]:
    for place in places:
        key = np.array([(seed << 32 | step) % 2**64, place], np.uint64)
        yield np.random.Generator(np.random.Philox(key=key))


class BatchNoise(NamedTuple):
    """What is drawn beside a batch of images, in training or validation: numbered streams.

    Attributes:
        seed: of the run.
        step: of training; 0 in validation, whose figures are then of the same noise each time.
        places: of the images in the global batch, or in the split.
        device: where it is wanted.
        first: number of the first stream, VALIDATION there.
    """

    seed: int
    step: int
    places: range
    device: torch.device
    first: int = 0

    def normals(self, stream: int, shape: Sequence[int]) -> Tensor:
        """Return standard normal numbers, float32 (B, *shape)."""
        return normals(self._seed(stream), self.step, self.places, shape).to(self.device, non_blocking=True)

    def uniforms(self, stream: int, shape: Sequence[int]) -> Tensor:
        """Return numbers in [0, 1), float32 (B, *shape)."""
        return uniforms(self._seed(stream), self.step, self.places, shape).to(self.device, non_blocking=True)

    def of_levels(self, model: HierarchicalVQVAE) -> list[Tensor] | None:
        """Return what each bottleneck is given; None where none takes noise."""
        streams = [(self._seed(1 + level), self.step) for level in range(len(model.bottlenecks))]
        return noise_for(model, streams, self.places)

    def _seed(self, stream: int) -> int:
        return self.seed * STREAMS + self.first + stream


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


def stored_noise(model: HierarchicalVQVAE, places: Iterable[int]) -> list[Tensor] | None:
    """Return the noise with which images are drawn to be stored, by their `stored_place`."""
    return noise_for(model, [(level, 0) for level in range(len(model.bottlenecks))], places)


def stored_place(seed: int, split: str, key: str) -> int:
    """Return the place of an image's view where it is drawn to be stored: a function of split and key."""
    return int(digest(["encode", seed, split, key])[:16], 16)
