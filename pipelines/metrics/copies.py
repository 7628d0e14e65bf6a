"""Whether samples repeat training images: how near each comes to one, beside held-out images, which cannot repeat any.

N samples or held-out images, T training images, d numbers of each.
"""

from typing import Any

import torch
from torch import Tensor

# Share of held-out images nearer to the training set than the distance that counts as too near.
TOO_NEAR = 0.01
# Queries that are held against training images at once.
ROWS = 1000


class Nearest:
    """Finds each image's nearest training image, while those come by in any order; of several, the first row.

    Args:
        queries: (N, d) floats for Euclidean distances; integers for the share of places that differ (Hamming).
    """

    def __init__(self, queries: Tensor) -> None:
        self.queries = queries
        self.distances = torch.full((len(queries),), torch.inf, dtype=torch.float64)
        self.rows = torch.full((len(queries),), -1)

    def update(self, rows: Tensor, training: Tensor) -> None:
        """See training images.

        Args:
            rows: of each in its split, int64 (B,).
            training: (B, d), of the kind of the queries.
        """
        for start in range(0, len(self.queries), ROWS):
            here = slice(start, start + ROWS)
            asked = self.queries[here]
            found = self._between(asked, training).cpu()  # (N, B)
            ties = torch.where(found == found.min(1, keepdim=True).values, rows, torch.iinfo(torch.int64).max)
            best = ties.argmin(1)
            distance = self._apart(asked, training[best.to(training.device)]).cpu()
            row = ties.gather(1, best[:, None])[:, 0]
            before, held = self.distances[here], self.rows[here]
            nearer = (distance < before) | ((distance == before) & (row < held))
            self.distances[here] = torch.where(nearer, distance, before)
            self.rows[here] = torch.where(nearer, row, held)

    def _between(self, asked: Tensor, training: Tensor) -> Tensor:
        """Return distances (N, B), by the product: near enough to choose by."""
        if asked.is_floating_point():
            return torch.cdist(asked, training, compute_mode="use_mm_for_euclid_dist")
        return (asked[:, None] != training).double().mean(2)

    def _apart(self, asked: Tensor, other: Tensor) -> Tensor:
        """Return distances (N,) by differences: 0 for equal ones."""
        if asked.is_floating_point():
            return (asked.double() - other.double()).norm(dim=1)
        return (asked != other).double().mean(1)


def copies(samples: Tensor, held_out: Tensor) -> dict[str, Any]:
    """Return what the distances to the nearest training image say of samples, beside held-out images.

    `nearer_share` is the chance that a random sample is nearer than a random held-out image, ties by half: 0.5 where
    samples are as new as held-out images, 1 where all are copies. `z` measures how far it is from 0.5 by chance, in
    standard deviations (Mann and Whitney, ties accounted for): below -5 samples copy. `too_near_share` is the share of
    samples at least as near as the nearest 1% of held-out images, and sees a few copies among new samples too; of
    distances that take few values, as of codes, look at the share of held-out images beside it.

    Args:
        samples: distances, float64 (N,).
        held_out: the same of held-out images (M,).

    Source: Meehan et al. 2020, section 3.1 (the test, here over the whole space at once).
    """
    ordered = held_out.sort().values
    below, upto = (torch.searchsorted(ordered, samples, right=right) for right in (False, True))
    further = (below + upto).double().sum() / 2  # held-out images nearer than a sample, over all pairs
    n, m = len(samples), len(held_out)
    _, ties = torch.cat([samples, held_out]).unique(return_counts=True)
    ties = ties.double()
    pairs = (n + m) * (n + m - 1)
    variance = n * m / 12 * (n + m + 1 - float((ties**3 - ties).sum()) / pairs)
    threshold = ordered[int(TOO_NEAR * (m - 1))]
    shares = {"too_near_share": threshold, "equal_share": 0}
    return {
        "median": float(samples.median()),
        "median_held_out": float(held_out.median()),
        "nearer_share": 1 - float(further) / (n * m),
        "z": (float(further) - n * m / 2) / variance**0.5 if variance > 0 else 0.0,
        **{name: float((samples <= most).double().mean()) for name, most in shares.items()},
        **{f"{name}_held_out": float((held_out <= most).double().mean()) for name, most in shares.items()},
    }
