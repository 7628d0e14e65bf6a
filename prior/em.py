"""How a mixture is fitted: by EM from a seeded start.

N samples, n numbers of each, K components, C classes.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prior.mixture import Mixture

# Variances fall to no less than this share of the mean variance of all numbers, and not below the second.
LEAST_SHARE, LEAST_VARIANCE = 1e-4, 1e-12


@torch.no_grad()
def em(mixture: Mixture, values: Tensor, classes: Tensor | None, seed: int) -> Iterator[float]:
    """Fit a mixture in place, a step each time the next nats per number are asked for; they are of what it is then.

    What is fitted is p(x | class): each class has weights of its own, of components that all share. The weights without
    class are those of all samples, so that it is one joint distribution of classes and numbers.

    Args:
        mixture: what it holds is not looked at.
        values: float (N, n).
        classes: int64 (N,); None where there are none.
        seed: of the start.

    Raises:
        ValueError: there are fewer samples than components.

    Source: Dempster et al. 1977, section 4.3.
    """
    values = values.double()
    floor = float((LEAST_SHARE * values.var(0, correction=0).mean()).clamp(min=LEAST_VARIANCE))
    shares = F.one_hot(_nearest(values, _start(values, len(mixture.means), seed)), len(mixture.means)).double()
    while True:
        _maximize(mixture, values, classes, shares, floor)
        logs = torch.cat(
            [
                mixture.log_weights(labels, len(some)) + mixture.log_parts(some).sum(2)
                for some, labels in mixture.chunks(values, classes)
            ]
        )
        yield -float(logs.logsumexp(1).sum()) / values.numel()
        shares = logs.softmax(1)


def set_weights(mixture: Mixture, counts: Tensor, totals: Tensor) -> None:
    """Set the weights of components: by the samples of each class that they have, float (C, K), and of all, (K,).

    A class without samples has the weights of all.
    """
    counts = torch.where(counts.sum(1, keepdim=True) > 0, counts, totals)
    counts = torch.cat([counts, totals[None]])
    mixture.weights.copy_(counts / counts.sum(1, keepdim=True))


def _maximize(mixture: Mixture, values: Tensor, classes: Tensor | None, shares: Tensor, floor: float) -> None:
    """Set a mixture to the likeliest of samples that have these shares (N, K) of components; no variance is less."""
    totals = shares.sum(0)
    counts = totals.new_zeros(len(mixture.weights) - 1, len(totals))
    if classes is not None:
        counts.index_add_(0, classes, shares)
    set_weights(mixture, counts, totals)
    kept = totals > 1e-9  # a component that has no sample stays where it is
    means = (shares.T @ values) / totals.clamp(min=1e-9)[:, None]
    mixture.means.copy_(torch.where(kept[:, None], means, mixture.means))
    if not mixture.full:
        squares = (shares.T @ values.square()) / totals.clamp(min=1e-9)[:, None]
        scales = (squares - means.square()).clamp(min=floor).sqrt()
        mixture.scales.copy_(torch.where(kept[:, None], scales, mixture.scales))
        return
    for k in kept.nonzero()[:, 0].tolist():
        apart = values - means[k]
        sizes, axes = torch.linalg.eigh((shares[:, k, None] / totals[k] * apart).T @ apart)
        mixture.scales[k] = torch.linalg.cholesky(axes @ (sizes.clamp(min=floor)[:, None] * axes.T))


def _nearest(values: Tensor, centres: Tensor) -> Tensor:
    """Return the number of the nearest centre of each sample, int64 (N,)."""
    return torch.cat([torch.cdist(some, centres).argmin(1) for some in values.split(4096)])


def _start(values: Tensor, components: int, seed: int) -> Tensor:
    """Return samples (K, n) that lie apart, each drawn by its squared distance to those before it.

    Raises:
        ValueError: there are fewer samples than that.

    Source: Arthur and Vassilvitskii 2007, section 2.2.
    """
    if len(values) < components:
        raise ValueError(f"components must be at most as many as samples, {len(values)}, got {components}")
    uniforms = torch.from_numpy(np.random.default_rng(seed).random(components))
    chosen = [int(uniforms[0] * len(values))]
    least = (values - values[chosen[0]]).square().sum(1)
    for uniform in uniforms[1:].tolist():
        reached = least.cumsum(0)
        chosen.append(int(torch.searchsorted(reached, uniform * reached[-1], right=True).clamp(max=len(values) - 1)))
        least = torch.minimum(least, (values - values[chosen[-1]]).square().sum(1))
    return values[chosen]
