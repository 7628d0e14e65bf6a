"""From logits to codes: filters, each sample's own stream of uniforms, and the inverse of the cumulative distribution.

B batch, K codebook_size.
"""

import numpy as np
import torch
from torch import Tensor


def uniforms(seed: int, index: int, count: int) -> np.ndarray:
    """Return the stream of uniforms in [0, 1) of one sample, float64 (count,), one for each of its codes.

    A function of (seed, index) alone, by a counter-based generator, so that a sample is the same whichever batch,
    process or machine draws it.

    Source: Salmon et al. 2011 (Philox).
    """
    return np.random.Generator(np.random.Philox(key=[seed, index])).random(count)


def filtered_probabilities(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Return the distribution to draw from, float64 (B, K): first temperature, then top-k, then top-p.

    Args:
        logits: float, (B, K).
        temperature: divides the logits; above 0.
        top_k: keep the k likeliest codes; 0 keeps all.
        top_p: keep the fewest likeliest codes that together reach this probability; 1 keeps all.

    Raises:
        ValueError: a setting is out of its range.

    Source: Fan et al. 2018 (top-k); Holtzman et al. 2020, section 3.1 (top-p, the nucleus).
    """
    check_sampling(temperature, top_k, top_p)
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
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}; for the likeliest code set top_k to 1")
    if top_k < 0:
        raise ValueError(f"top_k must be 0 (all codes) or more, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    if not guidance >= 0:
        raise ValueError(f"guidance must be 0 or more, got {guidance}")


def inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Return the first code whose cumulative probability exceeds the uniform: int64 (B,).

    Args:
        probabilities: float64 (B, K), summing to 1 up to rounding.
        uniform: float64 (B,) in [0, 1).
    """
    cumulative = probabilities.cumsum(-1)
    threshold = uniform[:, None] * cumulative[:, -1:]  # the sum itself, so that rounding leaves no gap at the end
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=probabilities.shape[-1] - 1)
