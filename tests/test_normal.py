import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy import stats

from prior import HierarchicalPrior, LevelConfig, LevelPrior, MixtureConfig, NormalConfig

GRIDS = [(1, 2), (2, 4)]


def normal_prior(
    channels: Sequence[int] = (3, 2),
    grids: Sequence[tuple[int, int]] = GRIDS,
    size: NormalConfig | MixtureConfig | None = None,
) -> HierarchicalPrior:
    levels = []
    for number in range(2):
        config = LevelConfig(
            level=number,
            grids=list(grids[: number + 1]),
            codebook_sizes=[None] * (number + 1),
            class_names=[],
            size=size or NormalConfig(),
            channels=list(channels[: number + 1]),
            num_levels=2,
        )
        levels.append(LevelPrior(config))
    return HierarchicalPrior(levels).eval()


def test_the_likelihood_is_the_density_of_independent_normals() -> None:
    values = [torch.randn(5, 3, 1, 2), torch.randn(5, 2, 2, 4)]
    found = normal_prior().nll(values)
    densities = [torch.distributions.Normal(0.0, 1.0).log_prob(one.double()).flatten(1).sum(1) for one in values]
    assert torch.allclose(found, -(densities[0] + densities[1]))
    assert found.dtype == torch.float64


def test_what_is_drawn_is_standard_normal_and_its_variance_the_temperature() -> None:
    prior = normal_prior()
    for temperature in (1.0, 0.5):
        drawn = prior.sample(temperature=temperature, indices=range(400))
        values = torch.cat([one.flatten() for one in drawn]).numpy() / math.sqrt(temperature)
        assert stats.kstest(values, "norm").pvalue > 0.01


def test_a_sample_is_that_of_its_index_whichever_batch_draws_it() -> None:
    prior = normal_prior()
    together = prior.sample(seed=3, indices=[0, 1, 2])
    alone = prior.sample(seed=3, indices=[2])
    assert all(torch.equal(one[2:], other) for one, other in zip(together, alone, strict=True))
    assert [tuple(one.shape) for one in together] == [(3, 3, 1, 2), (3, 2, 2, 4)]
    assert all(bool(torch.isfinite(one).all()) for one in prior.sample(indices=range(50)))


def test_what_says_nothing_of_numbers_is_refused() -> None:
    prior = normal_prior()
    with pytest.raises(ValueError, match="a continuous level knows temperature alone"):
        prior.sample(top_k=3)
    with pytest.raises(ValueError, match="level 0 values must be finite floats, and some are NaN or infinite"):
        normal_prior().nll([torch.full((1, 3, 1, 2), math.nan), torch.zeros(1, 2, 2, 4)])
    with pytest.raises(ValueError, match="level 0 values must be finite floats of 4 dimensions"):
        prior.nll([torch.zeros(1, 3, 1, 2, dtype=torch.int64), torch.zeros(1, 2, 2, 4)])
    with pytest.raises(ValueError, match=r"level 1 values must be \(B, 2, 2, 4\)"):
        prior.nll([np.zeros((1, 3, 1, 2), np.float32), torch.zeros(1, 2, 4, 2)])
    with pytest.raises(ValueError, match="level 0 is of codes, which normal is no prior for"):
        LevelConfig(level=0, grids=[(2, 2)], codebook_sizes=[8], class_names=[], size=NormalConfig())


def test_it_is_saved_and_loaded(tmp_path) -> None:  # type: ignore[no-untyped-def]
    prior = normal_prior()
    prior.save_pretrained(tmp_path)
    loaded = HierarchicalPrior.from_pretrained(tmp_path)
    pairs = zip(loaded.sample(indices=[1, 5]), prior.sample(indices=[1, 5]), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
