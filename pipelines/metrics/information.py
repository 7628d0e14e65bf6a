"""What latents tell of images, from likelihoods alone: mutual information, and bounds of many draws.

N images of which q_agg(z) = 1/N sum_n q(z | x_n) is, M of them that it is estimated from, K draws per image.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Information(NamedTuple):
    """log q(z_n | x_n) - log q_agg(z_n) in nats by two estimates of q_agg, (M,) each; their means bracket I(x, z).

    Both are I itself where M = N, but for the draw of z.

    Attributes:
        estimate: its mean is too high, as the logarithm of an unbiased estimate is too low: by log N - I at most.
        at_least: its mean is too low, by log(N / M) at most: I of the M images alone, averaged over choices of them.
    """

    estimate: Tensor
    at_least: Tensor


def information(log_q: Tensor, groups: Tensor, sizes: Tensor) -> Information:
    """Return what z tells of which of N images it was drawn for, given the group that the image is of.

    q_agg(z_n) is estimated as q(z_n | x_n) / N + (N - 1) / N times the mean of the others' q(z_n | x_m), all within the
    group of image n: minibatch stratified sampling, with equal weights of the others.

    Args:
        log_q: log q(z_n | x_m), float64 (M, M), row n and column m; z_n drawn for image n.
        groups: of each image, int64 (M,), such as its class; all alike where none is given.
        sizes: N of each group.

    Source: Hoffman and Johnson 2016; Chen et al. 2018, appendix C; at least: Poole et al. 2019, with a known encoder.
    """
    same = groups[:, None] == groups
    number, total = same.sum(1).double(), sizes[groups].double()  # M and N of each image's group
    others = (total - 1) / total / (number - 1).clamp(min=1)
    weights = (same * others[:, None]).diagonal_scatter(1 / total)
    own = log_q.diagonal()
    stratified = own - (log_q + weights.log()).logsumexp(1)
    return Information(stratified, own - (log_q + (same / number[:, None]).log()).logsumexp(1))


def sample_information(marks: Tensor, groups: Tensor) -> Tensor:
    """Return -log of the share of a group's images whose codes are the same, in nats, float64 (N,).

    Its mean is I(x, z) of these N images, log N where no two are alike; the entropy of codes is more, in expectation.

    Args:
        marks: of each image's codes, int64 (N,), equal for equal codes.
        groups: as of `information`.
    """
    _, place, counts = torch.stack([groups, marks], 1).unique(dim=0, return_inverse=True, return_counts=True)
    return (groups.bincount()[groups] / counts[place].double()).log()


def importance_bounds(log_weights: Tensor, samples: list[int]) -> Tensor:
    """Return bounds of -log p(x) in nats, float64 (…, number of bounds): -log of the mean weight of the first draws.

    Args:
        log_weights: log p(x, z_k) - log q(z_k | x) of each draw, float64 (…, K).
        samples: draws of each bound, K at most; each takes those of the smaller ones too.

    Source: Burda et al. 2016, equation 8.
    """
    counts = torch.tensor(samples)
    return counts.log() - log_weights.logcumsumexp(-1)[..., counts - 1]
