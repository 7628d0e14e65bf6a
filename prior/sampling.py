"""From logits to codes: filters, each sample's own stream of uniforms, and the inverse of the cumulative distribution.

B batch, K codebook_size.
"""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prior.checks import whole_number

# Beyond this a factor of logits, or its inverse, leaves what floats can hold.
LARGEST_FACTOR = 1e30


def uniforms(seed: int, index: int, count: int) -> np.ndarray:
    """Return the stream of uniforms in [0, 1) of one sample, float64 (count,), one for each of its codes.

    A function of (seed, index) alone, by a counter-based generator, so that a sample is the same whichever batch,
    process or machine draws it.

    Raises:
        ValueError: seed, index or count is no whole number, or negative or beyond 64 bits.

    Source: Salmon et al. 2011 (Philox).
    """
    seed, index = whole_number("seed", seed, 2**64), whole_number("index", index, 2**64)
    count = whole_number("count", count, 2**63)
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64))).random(count)


def filtered_probabilities(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Return the distribution to draw from, float64 (B, K): first temperature, then top-k, then top-p.

    Args:
        logits: float, (B, K).
        temperature: divides the logits; above 0.
        top_k: keep the k likeliest codes; 0 keeps all.
        top_p: keep the fewest likeliest codes that together reach this probability; 1 keeps all.

    Raises:
        ValueError: a setting is out of its range, or logits are none. Their values are not read back: on a GPU this is
            part of a captured graph.

    Source: Fan et al. 2018 (top-k); Holtzman et al. 2020, section 3.1 (top-p, the nucleus).
    """
    check_sampling(temperature, top_k, top_p)
    if logits.ndim != 2 or not logits.is_floating_point() or not logits.shape[1]:
        raise ValueError(f"logits must be floats (B, K), got {logits.dtype} {tuple(logits.shape)}")
    probabilities = torch.softmax(logits.double() / temperature, dim=-1)
    size = logits.shape[-1]
    kept = torch.arange(size, device=logits.device).expand_as(probabilities)
    if top_k and top_k < size:
        kept = probabilities.topk(top_k).indices.sort(-1).values
        keep = torch.zeros_like(probabilities).scatter_(-1, kept, 1.0)
        probabilities = probabilities * keep
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    if top_p < 1:
        # Only what top-k kept is sorted: sorting 16384 codes takes longer than many a network.
        ordered, order = probabilities.gather(-1, kept).sort(dim=-1, descending=True, stable=True)
        order = kept.gather(-1, order)
        before = ordered.cumsum(-1) - ordered  # probability of everything likelier
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered * (before < top_p))
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def check_sampling(temperature: float, top_k: int, top_p: float, guidance: float = 1.0) -> None:
    """Raise ValueError for a setting that cannot work."""
    if not 1 / LARGEST_FACTOR <= _number(temperature) <= LARGEST_FACTOR:
        raise ValueError(
            f"temperature must be above 0 and finite, got {temperature}; the likeliest codes are those of top_k 1"
        )
    if not (isinstance(top_k, Integral) and _number(top_k) >= 0):
        raise ValueError(f"top_k must be 0 (all codes) or a whole number above, got {top_k}")
    if not 0 < _number(top_p) <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    if not 0 <= _number(guidance) <= LARGEST_FACTOR:
        raise ValueError(f"guidance must be 0 or more and finite, got {guidance}")


def _number(value: Any) -> Any:
    """Return a number as it is, and NaN, which no range holds, for what is none; truth values are none."""
    return value if isinstance(value, Real) and not isinstance(value, bool) else math.nan


def inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Return the first code whose cumulative probability exceeds the uniform: int64 (B,).

    Args:
        probabilities: float64 (B, K), summing to 1 up to rounding.
        uniform: float64 (B,) in [0, 1).

    Raises:
        ValueError: they are no float64, or not one uniform for each distribution. Values are not read back.
    """
    if not probabilities.dtype == uniform.dtype == torch.float64 or uniform.shape != probabilities.shape[:-1]:
        raise ValueError(
            "probabilities and uniforms must be float64 (B, K) and (B,), "
            f"got {probabilities.dtype} {tuple(probabilities.shape)} and {uniform.dtype} {tuple(uniform.shape)}"
        )
    cumulative = probabilities.cumsum(-1)
    threshold = uniform[:, None] * cumulative[:, -1:]  # the sum itself, so that rounding leaves no gap at the end
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=probabilities.shape[-1] - 1)


@dataclass(frozen=True)
class LevelSampling:
    """How one level is drawn; see `HierarchicalPrior.sample`. A `prior.decoder.Choose`.

    Under guidance the first half of a batch is given its class, the second half is the same samples without it: one
    batch of twice the size, and both halves get the same codes.
    """

    temperature: float
    top_k: int
    top_p: float
    guidance: float

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p, self.guidance)

    def check_continuous(self) -> None:
        """Raise ValueError for what says nothing of continuous levels."""
        if self.top_k or self.top_p != 1 or self.guidance != 1:
            raise ValueError("top_k, top_p and guidance are of codes; a continuous level knows temperature alone")

    def __call__(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Return the codes int64 (B,) of a position, from logits (B, K) and uniforms (B,)."""
        logits = logits.float()
        if self.guidance != 1:
            given, not_given = logits.chunk(2)
            logits = not_given + self.guidance * (given - not_given)
        probabilities = filtered_probabilities(logits, self.temperature, self.top_k, self.top_p)
        codes = inverse_cdf(probabilities, uniforms[: len(logits)])
        return codes if self.guidance == 1 else torch.cat([codes, codes])
