"""How far one set of images is from another, in a feature space: FID, KID, precision, recall, density, coverage.

All in float64, in blocks: 50,000 x 1,280 features take 0.5 GB, and distances of them as much again.
N real and M drawn images, d features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pipelines.errors import StageError

# Images of a block that KID is estimated on; fewer where there are fewer than ten such blocks.
KID_BLOCK, KID_BLOCKS = 1000, 10
# Neighbours that a ball reaches to: of precision and recall, and of density and coverage, as their papers have them.
PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5
# Rows of a block of distances.
ROWS = 1000
# Below so many images FID is mostly its bias.
FID_IMAGES = 10_000


class Moments(NamedTuple):
    """Mean (d,) and unbiased covariance (d, d) of features, float64, and how many images they are of."""

    mean: Tensor
    covariance: Tensor
    images: int


def moments(features: Tensor) -> Moments:
    """Return the moments of features (N, d)."""
    features = features.double()
    if len(features) < 2:
        raise StageError(f"FID needs two images of either set or more, got {len(features)}")
    mean = features.mean(0)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=features.device)
    for rows in features.split(ROWS):
        centred = rows - mean
        covariance += centred.T @ centred
    return Moments(mean, covariance / (len(features) - 1), len(features))


def frechet_distance(real: Moments, drawn: Moments) -> float:
    """Return |m - n|^2 + tr(A + B - 2 (A B)^(1/2)) of Gaussians N(m, A) and N(n, B): FID, of their features.

    The trace of the root is that of (A^(1/2) B A^(1/2))^(1/2), which is symmetric: its eigenvalues are real.

    Source: Dowson and Landau 1982; Heusel et al. 2017, equation 6.
    """
    values, vectors = torch.linalg.eigh(real.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ drawn.covariance @ root).clamp(min=0).sqrt().sum()
    traces = real.covariance.trace() + drawn.covariance.trace()
    return float((real.mean - drawn.mean).square().sum() + traces - 2 * shared)


class Estimate(NamedTuple):
    """A figure and its standard error."""

    value: float
    error: float


def kernel_distance(real: Tensor, drawn: Tensor, seed: int = 0, paired: bool = False) -> Estimate:
    """Return KID: the mean of unbiased estimates on disjoint random blocks, and the standard error of that mean.

    Blocks share no image, so that their spread is an honest error; that of overlapping subsets, which papers give, is
    the spread of a subset and no error of the mean. It may be negative where both sets are alike.

    Args:
        real: (N, d).
        drawn: (M, d).
        seed: of the blocks.
        paired: row n of both is one image and what was made of it: pairs stay in one block, and errors are smaller.

    Raises:
        StageError: there are fewer than four images in either set.

    Source: Bińkowski et al. 2018, section 4; Zaremba et al. 2013 (blocks).
    """
    fewest = min(len(real), len(drawn))
    if fewest < 4:
        raise StageError(f"KID needs four images of either set or more, got {fewest}")
    blocks = min(max(KID_BLOCKS, fewest // KID_BLOCK), fewest // 2)
    generator = torch.Generator().manual_seed(seed)
    mine, theirs = (torch.randperm(len(one), generator=generator).tensor_split(blocks) for one in (real, drawn))
    rows = zip(mine, mine if paired else theirs, strict=True)
    pairs = [(real[one[:KID_BLOCK]], drawn[other[:KID_BLOCK]]) for one, other in rows]
    found = torch.tensor([squared_mmd(x, y, paired) for x, y in pairs], dtype=torch.float64)
    return Estimate(float(found.mean()), float(found.std() / blocks**0.5))


def squared_mmd(real: Tensor, drawn: Tensor, paired: bool = False) -> float:
    """Return the unbiased squared maximum mean discrepancy under the kernel (x . y / d + 1)^3; float64.

    Of pairs, no image is held against what was made of it either.

    Source: Gretton et al. 2012, lemma 6; Bińkowski et al. 2018, section 4 (kernel).
    """

    def mean(x: Tensor, y: Tensor, apart: bool) -> Tensor:
        kernel = (x @ y.T / x.shape[1] + 1).pow(3)
        return (kernel.sum() - kernel.trace()) / (len(x) * (len(x) - 1)) if apart else kernel.mean()

    real, drawn = real.double(), drawn.double()
    return float(mean(real, real, True) + mean(drawn, drawn, True) - 2 * mean(real, drawn, paired))


class Support(NamedTuple):
    """Shares in [0, 1], but for density, which may pass 1.

    Attributes:
        precision: of drawn images that lie in a ball around a real one: how many look real.
        recall: of real images that lie in a ball around a drawn one: how much of the real ones is reached.
        density: in how many balls of real images a drawn one lies, over their expected number.
        coverage: of real images in whose ball a drawn one lies.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def support(real: Tensor, drawn: Tensor) -> Support:
    """Return precision and recall, density and coverage.

    An image's ball reaches to its k-th nearest neighbour in its own set: k 3 for the first two, 5 for the others.

    Args:
        real: (N, d).
        drawn: (M, d).

    Raises:
        StageError: a set has no more images than a ball has neighbours.

    Source: Kynkäänniemi et al. 2019, equation 1; Naeem et al. 2020, equations 3 and 4.
    """
    real, drawn = real.double(), drawn.double()
    if (fewest := min(len(real), len(drawn))) <= DENSITY_NEIGHBOURS:
        raise StageError(f"density and coverage need more than {DENSITY_NEIGHBOURS} images of either set, got {fewest}")
    near, far = radii(real)
    near_drawn, _ = radii(drawn)
    precise = balls = 0
    recalled, covered = torch.zeros(2, len(real), dtype=torch.bool, device=real.device)
    for rows, reach in zip(drawn.split(ROWS), near_drawn.split(ROWS), strict=True):
        between = distances(rows, real)  # (rows, N)
        precise += int((between <= near).any(1).sum())
        inside = between <= far
        balls += int(inside.sum())
        covered |= inside.any(0)
        recalled |= (between <= reach[:, None]).any(0)
    return Support(
        precision=precise / len(drawn),
        recall=float(recalled.double().mean()),
        density=balls / (DENSITY_NEIGHBOURS * len(drawn)),
        coverage=float(covered.double().mean()),
    )


def radii(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distances of each image to its 3rd and 5th neighbour in the set, without itself: float64 (N,) each."""
    found = []
    for start in range(0, len(features), ROWS):
        between = distances(features[start : start + ROWS], features)
        rows = torch.arange(len(between), device=between.device)
        between[rows, start + rows] = 0  # itself, without rounding
        found.append(between.topk(DENSITY_NEIGHBOURS + 1, largest=False).values)
    ordered = torch.cat(found)
    return ordered[:, PRECISION_NEIGHBOURS], ordered[:, DENSITY_NEIGHBOURS]


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Return Euclidean distances (N, M) of float64 rows, by the matrix product."""
    return torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist")
