"""From one image or class to another: what the latents between them decode to.

C channels, H W pixels, d channels of a continuous grid, h w grid, T cells of all levels, n steps, m cells that differ.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prior import HierarchicalPrior
from tokenizer import HierarchicalVQVAE

# Grids that a prior judges at once.
BATCH = 256
# By the set of cells that have changed: the sum of nats up to there, and the order in which they did.
Orders = dict[frozenset[int], tuple[float, tuple[int, ...]]]
# Vectors at an angle of a smaller sine lie on a line through 0, on which no arc is the shortest.
LEAST_SINE = 1e-6


class Interpolated(NamedTuple):
    """Steps from one to the other, both included.

    Attributes:
        images: (n, C, H, W) in [-1, 1].
        stored: what they are decoded from, of each level, (n, h, w) or (n, d, h, w).
        shares: of the way, float64 (n,) from 0 to 1; of codes the share of those that differ that have changed.
        nats: -log p of each under the prior, float64 (n,); None of numbers.
    """

    images: Tensor
    stored: list[Tensor]
    shares: Tensor
    nats: Tensor | None


class Path(NamedTuple):
    """Grids of which each differs from the one before in one code: of each level (m + 1, h, w), and nats (m + 1,)."""

    codes: list[Tensor]
    nats: Tensor


@torch.no_grad()
def interpolate(
    tokenizer: HierarchicalVQVAE,
    prior: HierarchicalPrior | None,
    first: Sequence[Tensor],
    last: Sequence[Tensor],
    steps: int = 8,
    label: int | None = None,
    beam: int = 4,
) -> Interpolated:
    """Return images on the way from one to another: both ends are what they decode to.

    Numbers go straight, those of a Gaussian bottleneck on an arc, level by level; codes on the `likely_path`, of which
    steps at even distances are taken: fewer than were asked for where fewer codes differ.

    Args:
        tokenizer: in eval mode; a conditional one is given no class, as the way may lead from one to another.
        prior: of its codes; not looked at where levels hold numbers.
        first: what is stored of an image, (1, h, w) or (1, d, h, w) per level: encoded, drawn, or the mean of a class.
        last: of another.
        steps: n, at least 2.
        label: see `likely_path`.
        beam: see `likely_path`.

    Raises:
        ValueError: there are too few steps, or codes without a prior.
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, both ends, got {steps}")
    if None in tokenizer.codebook_sizes:
        shares = torch.linspace(0, 1, steps, dtype=torch.float64)
        between = slerp if tokenizer.bottlenecks[0].noise_channels else lerp
        stored = [between(one[0], other[0], shares) for one, other in zip(first, last, strict=True)]
        return Interpolated(tokenizer.decode(stored), stored, shares, None)
    if prior is None:
        raise ValueError("codes have no order, so the path between them needs a prior; give one")
    path = likely_path(prior, first, last, label, beam)
    changes = len(path.nats) - 1
    shown = torch.linspace(0, changes, min(steps, changes + 1), dtype=torch.float64).round().long()
    stored = [level[shown.to(level.device)] for level in path.codes]
    return Interpolated(tokenizer.decode(stored), stored, shown.double() / max(changes, 1), path.nats[shown])


def lerp(first: Tensor, last: Tensor, shares: Tensor) -> Tensor:
    """Return the points on the line between two tensors of any shape (…), float32 (n, …), at shares (n,) of it."""
    way = shares.to(first.device).view(-1, *[1] * first.ndim)
    return ((1 - way) * first.double() + way * last.double()).float()


def slerp(first: Tensor, last: Tensor, shares: Tensor) -> Tensor:
    """Return points on the arc between two tensors, each taken as one vector: float32 (n, …).

    Numbers drawn from N(0, I) lie near a sphere, which a line leaves. The angle grows evenly, and so does the norm,
    from that of the first to that of the last. Vectors on one line through 0 are joined by that line.

    Source: Shoemake 1985, section 3.3; White 2016, section 2.1.
    """
    one, other = first.double(), last.double()
    lengths = one.norm(), other.norm()
    if not all(lengths):
        return lerp(first, last, shares)
    one, other = one / lengths[0], other / lengths[1]
    angle = torch.acos((one * other).sum().clamp(-1, 1))
    if angle.sin() < LEAST_SINE:
        return lerp(first, last, shares)
    way = shares.to(first.device).view(-1, *[1] * first.ndim)
    turned = (((1 - way) * angle).sin() * one + (way * angle).sin() * other) / angle.sin()
    return (((1 - way) * lengths[0] + way * lengths[1]) * turned).float()


@torch.no_grad()
def likely_path(
    prior: HierarchicalPrior, first: Sequence[Tensor], last: Sequence[Tensor], label: int | None = None, beam: int = 4
) -> Path:
    """Return a path between two sets of codes, of which each step changes one code from the first's to the last's.

    All changes of a coarser level come before those of finer ones. In what order they come within a level is searched
    for the least sum of nats over all grids of the path, keeping the best `beam` sets of changed codes after each step:
    1 is the greedy path, and with all sets kept it is the best. That takes about beam * m^2 / 2 likelihoods per level.

    Args:
        prior: of the codes.
        first: codes int64 (1, h, w) per level, coarse to fine.
        last: the same.
        label: class that the prior is given; None for none.
        beam: at least 1.

    Raises:
        ValueError: the beam holds nothing, or the prior needs a class.
    """
    if beam < 1:
        raise ValueError(f"beam must be at least 1, got {beam}")
    start, end = (torch.cat([level.flatten() for level in codes]) for codes in (first, last))  # (T,) each
    grids = [tuple(level.shape[1:]) for level in first]
    sizes = [h * w for h, w in grids]

    def changed(sets: Sequence[Sequence[int]]) -> list[Tensor]:
        rows = start.repeat(len(sets), 1)
        for row, places in zip(rows, sets, strict=True):
            row[list(places)] = end[list(places)]
        return [level.view(-1, *grid) for level, grid in zip(rows.split(sizes, 1), grids, strict=True)]

    def nats(sets: Sequence[Sequence[int]]) -> Tensor:
        parts = [sets[at : at + BATCH] for at in range(0, len(sets), BATCH)]
        return torch.cat([prior.nll(changed(p), None if label is None else [label] * len(p)).cpu() for p in parts])

    kept: Orders = {frozenset(): (0.0, ())}
    differ = torch.split(start != end, sizes)
    for level, mask in enumerate(differ):
        left = {sum(sizes[:level]) + place for place in mask.nonzero()[:, 0].tolist()}
        for _ in left:
            found = _extended(kept, left)
            added = nats([order for _, order in found.values()]).tolist()
            summed = [
                (places, (cost + more, order))
                for (places, (cost, order)), more in zip(found.items(), added, strict=True)
            ]
            kept = dict(sorted(summed, key=lambda one: one[1])[:beam])
    _, order = next(iter(kept.values()))
    steps = [order[:number] for number in range(len(order) + 1)]
    return Path(changed(steps), nats(steps))


def _extended(kept: Orders, left: set[int]) -> Orders:
    """Return every set with one more of what is left; of two orders that lead to one set the one of fewer nats."""
    found: Orders = {}
    for places, (cost, order) in kept.items():
        for place in sorted(left - places):
            reached = places | {place}
            if reached not in found or cost < found[reached][0]:
                found[reached] = (cost, (*order, place))
    return found
