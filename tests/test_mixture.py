import math

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import MultivariateNormal

from prior import HierarchicalPrior, Known, LevelConfig, LevelPrior, MixtureConfig, NormalConfig
from prior.em import em
from prior.mixture import Mixture

both = pytest.mark.parametrize("covariance", ["diagonal", "full"])
SHAPE = (2, 1, 2)


def tiny_mixture(covariance: str, components: int = 3, classes: int = 2) -> Mixture:
    """Of four numbers, its components apart and unlike one another."""
    mixture = Mixture(SHAPE, components, classes, covariance == "full")
    with torch.no_grad():
        mixture.weights.copy_(torch.rand(mixture.weights.shape).add(0.1))
        mixture.weights /= mixture.weights.sum(1, keepdim=True)
        mixture.means.copy_(torch.randn(mixture.means.shape))
        scales = torch.rand(mixture.scales.shape) + 0.5
        mixture.scales.copy_(scales.tril() if covariance == "full" else scales)
    return mixture


def log_density(mixture: Mixture, values: Tensor, weights: Tensor) -> Tensor:
    """Of values (B, 4), as torch knows it."""
    factors = (mixture.scales if mixture.full else torch.diag_embed(mixture.scales)).double()
    parts = MultivariateNormal(mixture.means.double(), scale_tril=factors).log_prob(values.double()[:, None])
    return (weights.double().log() + parts).logsumexp(1)


def level_of(mixture: Mixture, names: list[str]) -> LevelPrior:
    components = len(mixture.means)
    size = MixtureConfig(components=components, covariance="full" if mixture.full else "diagonal")
    place = {"level": 0, "grids": [(1, 2)], "codebook_sizes": [None], "channels": [2]}
    level = LevelPrior(LevelConfig(**place, class_names=names, size=size))  # type: ignore[arg-type]
    level.network.load_state_dict(mixture.state_dict())
    return level.eval()


@both
def test_the_nats_are_those_of_the_density_and_each_numbers_own_given_those_before_it(covariance: str) -> None:
    mixture, values, classes = tiny_mixture(covariance), torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0])
    nats = mixture.nats(values.view(5, *SHAPE), [], classes).flatten(1)
    assert torch.allclose(nats.sum(1), -log_density(mixture, values, mixture.weights[classes]))
    none = mixture.nats(values.view(5, *SHAPE), [], None).flatten(1)
    assert torch.allclose(none.sum(1), -log_density(mixture, values, mixture.weights[-1]))
    changed = values.clone()
    changed[:, 2] += 1
    moved = mixture.nats(changed.view(5, *SHAPE), [], classes).flatten(1) - nats
    assert bool((moved[:, :2] == 0).all()) and bool((moved[:, 2:].abs() > 1e-9).all())


def test_a_density_of_two_numbers_integrates_to_1() -> None:
    mixture = Mixture((1, 1, 2), 2, 0, full=True)
    with torch.no_grad():
        mixture.means.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.5]]))
        mixture.scales.copy_(torch.tensor([[[0.5, 0.0], [0.4, 0.3]], [[1.0, 0.0], [-0.5, 0.8]]]))
    axis = torch.arange(-7, 7, 0.05)
    cells = torch.cartesian_prod(axis, axis).view(-1, 1, 1, 2)
    assert float((-mixture.nats(cells, [], None).flatten(1).sum(1)).exp().sum() * 0.05**2) == pytest.approx(1, abs=1e-3)


@both
def test_draws_have_the_moments_of_the_density_and_are_those_of_their_index(covariance: str) -> None:
    prior = HierarchicalPrior([level_of(tiny_mixture(covariance, classes=1), ["a"])])
    mixture = prior.levels[0].network
    assert isinstance(mixture, Mixture) and prior.levels[0].num_uniforms == 5
    drawn = prior.sample([0] * 20000, seed=1)[0].flatten(1).double()
    weights, means = mixture.weights[0].double(), mixture.means.double()
    factors = (mixture.scales if mixture.full else torch.diag_embed(mixture.scales)).double()
    mean = weights @ means
    apart = means - mean
    covariances = factors @ factors.mT + apart[:, :, None] * apart[:, None]
    assert torch.allclose(drawn.mean(0), mean, atol=0.1)
    assert torch.allclose(drawn.T.cov(), (weights[:, None, None] * covariances).sum(0), rtol=0.05, atol=0.1)
    alone = prior.sample([0], seed=1, indices=[7])[0]
    assert torch.allclose(alone.flatten(1).double(), drawn[7:8])
    cold = prior.sample([0] * 4000, seed=1, temperature=1e-20)[0].flatten(1)
    assert torch.allclose(torch.cdist(cold, mixture.means).min(1).values, torch.zeros(4000), atol=1e-3)


@both
def test_the_rest_is_drawn_from_the_exact_conditional_of_what_is_known(covariance: str) -> None:
    """Beside draws of the whole whose known numbers lie near those given."""
    mixture = tiny_mixture(covariance, components=2, classes=0)
    prior = HierarchicalPrior([level_of(mixture, [])])
    given = torch.tensor([0.3, 0.0, -0.2, 0.0]).view(1, *SHAPE).expand(3000, -1, -1, -1)
    mask = torch.tensor([[[True, False]]]).expand(3000, -1, -1)
    found = prior.sample(seed=2, indices=range(3000), known=[Known(given, mask)])[0]
    assert torch.equal(found[..., 0], given[..., 0])
    whole = prior.sample(seed=3, indices=range(40000))[0]
    near = whole[(whole[..., 0] - given[0, ..., 0]).flatten(1).abs().amax(1) < 0.15]
    assert len(near) > 200
    for channel in range(2):
        assert stats.ks_2samp(near[:, channel, 0, 1], found[:, channel, 0, 1]).pvalue > 1e-3


@both
def test_em_never_loses_likelihood_and_its_figure_is_that_of_the_mixture_as_it_is(covariance: str) -> None:
    values = torch.cat([torch.randn(60, 4) * 0.3 + 1, torch.randn(60, 4) @ torch.randn(4, 4) - 1])
    classes = torch.arange(120) % 2
    mixture, nats = Mixture(SHAPE, 3, 2, covariance == "full"), [math.inf]
    for step, found in zip(range(12), em(mixture, values, classes, 0), strict=False):
        own = mixture.nats(values.view(-1, *SHAPE), [], classes).sum() / values.numel()
        assert found == pytest.approx(float(own), rel=1e-5)
        assert found < nats[-1] + 1e-6, step
        nats.append(found)
    assert nats[-1] < nats[1]
    again = Mixture(SHAPE, 3, 2, covariance == "full")
    for _ in zip(range(12), em(again, values, classes, 0), strict=False):
        pass
    assert all(torch.equal(one, other) for one, other in zip(mixture.buffers(), again.buffers(), strict=True))


def test_one_component_of_full_covariance_is_the_fitted_gaussian() -> None:
    values = torch.randn(500, 4) @ torch.randn(4, 4) + 3
    mixture = Mixture(SHAPE, 1, 0, full=True)
    next(em(mixture, values, None, 0))
    assert torch.allclose(mixture.means[0], values.mean(0), atol=1e-4)
    assert torch.allclose(mixture.scales[0] @ mixture.scales[0].T, values.T.cov(correction=0), rtol=1e-3, atol=1e-3)


def test_a_class_has_its_own_components_and_one_without_samples_those_of_all() -> None:
    values = torch.cat([torch.randn(50, 4) + 5, torch.randn(50, 4) - 5])
    classes = torch.arange(100) // 50 * 2
    mixture = Mixture(SHAPE, 2, 3, full=False)
    next(em(mixture, values, classes, 0))
    first, second, third, every = mixture.weights
    assert first.max() == 1 and torch.equal(third, 1 - first)
    assert torch.equal(second, every) and torch.allclose(every, torch.tensor(0.5))


def test_a_level_is_saved_and_loaded_and_stands_beside_one_that_knows_no_class(tmp_path) -> None:  # type: ignore[no-untyped-def]
    first = level_of(tiny_mixture("full"), ["a", "b"])
    place = {"level": 1, "grids": [(1, 2), (1, 2)], "codebook_sizes": [None, None], "channels": [2, 2]}
    second = LevelPrior(LevelConfig(**place, class_names=[], size=NormalConfig()))  # type: ignore[arg-type]
    HierarchicalPrior([first, second]).save_pretrained(tmp_path)
    prior = HierarchicalPrior.from_pretrained(tmp_path)
    assert prior.class_names == ["a", "b"] and prior.levels[0].config == first.config
    drawn, values = prior.sample([0, 1], seed=3), torch.randn(2, *SHAPE)
    assert [tuple(one.shape) for one in drawn] == [(2, *SHAPE), (2, *SHAPE)]
    both_classes = [prior.nll([values, values], [label, label]) for label in (0, 1)]
    assert not torch.allclose(*both_classes)


def test_what_no_mixture_can_be_is_refused() -> None:
    with pytest.raises(ValueError, match="covariance full is for at most 512 numbers"):
        MixtureConfig(covariance="full").build([((16, 16), None, 8)], 0, 0.0)
    with pytest.raises(ValueError, match="components must be at least 1 with at: clusters, got 0"):
        MixtureConfig(components=0)
    with pytest.raises(ValueError, match="covariance must be diagonal with at: images"):
        MixtureConfig(at="images", covariance="full")
    with pytest.raises(ValueError, match="components must be at most as many as samples, 3, got 4"):
        next(em(Mixture(SHAPE, 4, 0, full=False), torch.randn(3, 4), None, 0))
    with pytest.raises(ValueError, match="a continuous level knows temperature alone"):
        HierarchicalPrior([level_of(tiny_mixture("diagonal"), ["a", "b"])]).sample([0], guidance=2.0)
