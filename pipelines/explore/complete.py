"""The rest of codes of which some cells are known, wherever these lie: particles under the prior.

h w grid, K codebook_size, P particles, T cells of a level, n completions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prior import HierarchicalPrior, Known, LevelPrior, inverse_cdf, uniforms
from prior.known import checked_known

# Particles are drawn anew from one another where fewer of them count than this share.
RESAMPLED = 0.5


class Completions(NamedTuple):
    """Completions of what is known.

    Attributes:
        stored: of each level (n, h, w), or (n, d, h, w): draws of equal weight.
        ess: effective sample size, the smallest that was met on the way: of so many independent completions the
            particles are worth. As many as there are particles where nothing known comes after anything drawn.
        distinct: different grids among the particles at the end.
        known_nats: -log p of what is known, estimated: the estimate of p has no bias. NaN of numbers.
    """

    stored: list[Tensor]
    ess: float
    distinct: int
    known_nats: float


@torch.no_grad()
def complete(
    prior: HierarchicalPrior,
    known: Sequence[Known | None],
    label: int | None = None,
    count: int = 8,
    particles: int = 256,
    seed: int = 0,
) -> Completions:
    """Draw what is not known of one image's levels, given all that is known, before it and after it.

    A raster prior that only keeps cells, as `HierarchicalPrior.complete` does, does not condition on later ones. Here
    particles go through the levels, coarse to fine, and through each in raster order. A cell that is not known is drawn
    given all before it; a known one multiplies a particle's weight by its probability given all before it. These
    weights, over their sum, turn draws of p(unknown cell | cells before) into draws of p(unknown cells | known cells).
    Before a cell is drawn, particles are drawn anew by their weights where these have become uneven. What is known and
    comes first, a prefix, weighs all particles alike, and its completion is exact; else it is so for many particles,
    and `ess` says how many count.

    Args:
        prior: of codes; or N(0, I) or mixtures over numbers, which know the distribution of the rest given any of them.
        known: of each level, coarse to fine, cells of one image, values (1, h, w) and mask (1, h, w); see `Known`.
        label: class that the prior is given; None for none.
        count: n, at most P; of one particle several where few count.
        particles: P, each with uniforms of its own, a function of (seed, particle).
        seed: of all that is drawn.

    Raises:
        ValueError: there are fewer particles than completions, what is known is not of one image, or a prior over
            numbers does not know how they depend on one another.

    Source: Gordon et al. 1993 (resampling in between); Doucet and Johansen 2011, section 3.5; systematic resampling:
    Kitagawa 1996, appendix.
    """
    if not 1 <= count <= particles:
        raise ValueError(f"count must be from 1 to {particles}, the number of particles, got {count}")
    networks = {level.config.network for level in prior.levels}
    levels, device = prior.levels[-1].config.levels, prior.levels[0].device
    given = checked_known(known, levels, device, 1)
    classes = None if label is None else [label] * particles
    if networks <= {"normal", "mixture"}:
        everywhere = [one and Known(*(part.expand(count, *part.shape[1:]) for part in one)) for one in given]
        told = classes[:count] if classes and prior.class_names else None
        stored = prior.sample(told, seed, indices=range(count), known=everywhere)
        return Completions(stored, particles, particles, float("nan"))
    if None in prior.levels[-1].config.codebook_sizes:
        raise ValueError(
            f"numbers are completed under normal and mixture alone, and this is {', '.join(sorted(networks))}"
        )
    sizes = [level.num_uniforms for level in prior.levels]
    streams = np.stack([uniforms(seed, index, sum(sizes)) for index in range(particles + 1)])
    parts = torch.from_numpy(streams).to(device).split(sizes, 1)  # the last row is that of resampling
    cloud = _Cloud(particles, device)
    for level, one, stream in zip(prior.levels, given, parts, strict=True):
        _pass_level(cloud, level, classes, one, stream)
    flat = torch.cat([codes.flatten(1) for codes in cloud.codes], 1)
    ess = min(cloud.least, cloud.effective())
    chosen = cloud.picked(count, float(uniforms(seed, particles + 1, 1)[0]))
    stored = [codes[chosen] for codes in cloud.codes]
    return Completions(stored, ess, len(flat.unique(dim=0)), -cloud.log_known)


class _Cloud:
    """Particles: codes of the levels that have been passed, and log weights float64 (P,), of mean 1 once drawn anew."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.codes: list[Tensor] = []
        self.weights = torch.zeros(count, dtype=torch.float64, device=device)
        self.least = float(count)
        self.before = 0.0  # log of the mean weights of all times that they were drawn anew

    def effective(self) -> float:
        """Return 1 over the sum of squares of weights that sum to 1."""
        return float(1 / torch.softmax(self.weights, 0).square().sum())

    @property
    def log_known(self) -> float:
        """The log of the mean weight: of p(what is known so far)."""
        return self.before + float(self.weights.logsumexp(0)) - float(np.log(len(self.weights)))

    def picked(self, number: int, uniform: float) -> Tensor:
        """Return particles by systematic resampling, int64 (number,)."""
        places = (torch.arange(number, device=self.weights.device) + uniform) / number
        ends = torch.softmax(self.weights, 0).cumsum(0)
        return torch.searchsorted(ends, places * ends[-1], right=True).clamp(max=len(ends) - 1)

    def drawn_anew(self, uniform: float) -> Tensor | None:
        """Return which particles take whose places, where weights are uneven; None where they are not."""
        effective = self.effective()
        self.least = min(self.least, effective)
        if effective >= RESAMPLED * len(self.weights):
            return None
        chosen = self.picked(len(self.weights), uniform)
        self.before, self.codes = self.log_known, [codes[chosen] for codes in self.codes]
        self.weights = torch.zeros_like(self.weights)
        return chosen


def _pass_level(
    cloud: _Cloud, level: LevelPrior, classes: Sequence[int] | None, known: Known | None, stream: Tensor
) -> None:
    """Draw and weigh the cells of a level.

    Args:
        cloud: gets its codes.
        level: its prior.
        classes: P of the same; None for none.
        known: cells (1, h, w).
        stream: uniforms float64 (P + 1, T).
    """
    grid, count = level.config.grids[-1], len(cloud.weights)
    length = grid[0] * grid[1]
    given = [False] * length if known is None else known.mask.flatten().tolist()
    values = [0] * length if known is None else known.values.flatten().tolist()
    drawn = torch.zeros(count, length, dtype=torch.int64, device=cloud.weights.device)
    decoder = level.decoder(cloud.codes, classes, count)

    def step(place: int) -> Tensor:
        return decoder.step(drawn[:, place - 1].contiguous() if place else None)

    for place in range(length):
        logits = step(place)
        if given[place]:
            drawn[:, place] = values[place]
            cloud.weights = cloud.weights + torch.log_softmax(logits.double(), -1)[:, values[place]]
            continue
        chosen = cloud.drawn_anew(float(stream[count, place]))
        if chosen is not None:  # decoders keep what they have seen, so they see it again
            drawn = drawn[chosen]
            decoder = level.decoder(cloud.codes, classes, count)
            logits = [step(earlier) for earlier in range(place + 1)][-1]
        drawn[:, place] = inverse_cdf(torch.softmax(logits.double(), -1), stream[:count, place].contiguous())
    cloud.codes.append(drawn.view(count, *grid))
