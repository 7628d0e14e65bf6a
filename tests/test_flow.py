import math

import pytest
import torch
from torch import Tensor

from prior import FlowConfig, HierarchicalPrior, LevelConfig, LevelPrior
from prior.flow import Flow
from tests.priors import randomize

# A grid of several channels, one of one, a vector, and one number.
SHAPES = [(3, 2, 2), (1, 2, 4), (5, 1, 1), (1, 1, 1)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
Shape = tuple[int, int, int]


def tiny_level(shape: Shape, coarser: Shape | None = None, classes: int = 2, **sizes: int) -> LevelPrior:
    shapes = [coarser, shape] if coarser else [shape]
    config = LevelConfig(
        level=len(shapes) - 1,
        grids=[(h, w) for _, h, w in shapes],
        codebook_sizes=[None] * len(shapes),
        channels=[d for d, _, _ in shapes],
        class_names=[f"class{number}" for number in range(classes)],
        size=FlowConfig(**{"couplings": 4, "width": 8, **sizes}),
    )
    return LevelPrior(config).eval()


def tiny_flow(shape: Shape, **sizes: int) -> Flow:
    """In float64, with no layer left at its start."""
    flow = tiny_level(shape, **sizes).network.double()
    assert isinstance(flow, Flow)
    flow.standardize(3 * torch.randn(50, *shape, dtype=torch.float64) + 1)
    return randomize(flow, 0.5)  # type: ignore[return-value]


def train(
    level: LevelPrior, values: Tensor, classes: Tensor | None, steps: int = 300, rate: float = 1e-2
) -> LevelPrior:
    assert isinstance(level.network, Flow)
    level.network.standardize(values)
    optimizer = torch.optim.Adam(level.parameters(), 2e-2)
    for _ in range(steps):
        loss = level(values, [], classes).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return level


@every_shape
@torch.no_grad()
def test_the_inverse_undoes_the_flow_and_the_flow_its_inverse(shape: Shape) -> None:
    flow, values = tiny_flow(shape), torch.randn(6, *shape, dtype=torch.float64)
    condition = flow.conditioning([], torch.tensor([0, 1, 2, 0, 1, 2]), 6)
    normals, _ = flow(values, condition)
    assert torch.allclose(flow.inverse(normals, condition), values, atol=1e-9)
    assert torch.allclose(flow(flow.inverse(values, condition), condition)[0], values, atol=1e-9)
    assert not torch.allclose(normals, (values - flow.mean) / flow.std, atol=0.1)


@every_shape
def test_the_log_determinant_is_that_of_the_jacobian(shape: Shape) -> None:
    flow, values = tiny_flow(shape), torch.randn(3, *shape, dtype=torch.float64)
    for value in values:
        condition = flow.conditioning([], torch.tensor([1]), 1)
        jacobian = torch.autograd.functional.jacobian(lambda x: flow(x[None], condition)[0][0], value)  # noqa: B023
        wanted = torch.linalg.slogdet(jacobian.reshape(value.numel(), -1)).logabsdet
        assert torch.allclose(flow(value[None], condition)[1].sum(), wanted)
    nats = flow.nats(values, [], torch.tensor([1, 1, 1]))
    assert nats.shape == values.shape and nats.dtype == torch.float64


def two_humps(count: int) -> Tensor:
    return torch.randn(count) * 0.3 + torch.where(torch.arange(count) % 2 == 0, 1.5, -1.0)


@torch.no_grad()
def test_a_trained_density_of_one_number_integrates_to_1_and_draws_have_its_moments() -> None:
    """Of two humps, which no affine map makes of one."""
    values = two_humps(300).view(-1, 1, 1, 1)
    with torch.enable_grad():
        level = train(tiny_level((1, 1, 1), classes=0), values, None)
    axis = torch.arange(-8, 8, 0.005)
    density = (-level.nll(axis.view(-1, 1, 1, 1), [], None)).exp() * 0.005
    assert float(density.sum()) == pytest.approx(1, abs=1e-3)
    entropy = math.log(2) + 0.5 * math.log(2 * math.pi * math.e * 0.3**2)  # of two humps that hardly touch
    assert float(level.nll(values, [], None).mean()) == pytest.approx(entropy, abs=0.1)
    drawn = HierarchicalPrior([level]).sample(indices=range(5000))[0].flatten().double()
    mean = float((axis * density).sum())
    assert float(drawn.mean()) == pytest.approx(mean, abs=0.06)
    assert float(drawn.std()) == pytest.approx(float(((axis - mean) ** 2 * density).sum()) ** 0.5, abs=0.05)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 1, 2)], ids=str)
def test_a_trained_density_of_two_numbers_integrates_to_1_and_draws_have_its_moments(shape: Shape) -> None:
    first = two_humps(300)
    values = torch.stack([first, first**2 + 0.3 * torch.randn(300)], 1).view(-1, *shape)
    with torch.enable_grad():
        level = train(tiny_level(shape, classes=0, width=16), values, None, steps=90)
    axis = torch.arange(-12, 14, 0.1)
    cells = torch.cartesian_prod(axis, axis)
    density = (-level.nll(cells.view(-1, *shape), [], None)).exp() * 0.1**2
    assert float(density.sum()) == pytest.approx(1, abs=5e-3)
    gaussian = 0.5 * torch.logdet(values.view(-1, 2).T.cov()) + math.log(2 * math.pi * math.e)
    assert float(level.nll(values, [], None).mean()) < float(gaussian) - 0.3
    drawn = HierarchicalPrior([level]).sample(indices=range(4000))[0].flatten(1).double()
    mean = (cells * density[:, None]).sum(0)
    apart = cells - mean
    assert torch.allclose(drawn.mean(0), mean, atol=0.15)
    assert torch.allclose(drawn.T.cov(), (density[:, None] * apart).T @ apart.double(), rtol=0.15, atol=0.15)


@every_shape
def test_a_coarser_level_and_a_class_matter_and_no_class_is_one_of_its_own(shape: Shape) -> None:
    level = tiny_level(shape, coarser=(2, 1, 1))
    randomize(level)
    values, coarse = torch.randn(4, *shape), torch.randn(4, 2, 1, 1)
    found = [level.nll(values, [coarse], torch.full((4,), label)) for label in (0, 1, 2)]
    assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[1], found[2])
    assert torch.equal(level.nll(values, [coarse], None), found[2])
    assert not torch.allclose(level.nll(values, [coarse + 1], None), found[2])


@torch.no_grad()
def test_a_class_that_is_learned_is_likelier_under_its_name() -> None:
    classes = torch.arange(64) % 2
    values = torch.randn(64, 3, 1, 1) + 2 * classes[:, None, None, None]
    with torch.enable_grad():
        level = train(tiny_level((3, 1, 1)), values, classes, steps=40)
    own, other = (level.nll(values, [], labels).mean() for labels in (classes, 1 - classes))
    assert float(own) < float(other) - 1


@every_shape
@torch.no_grad()
def test_a_level_is_saved_and_loaded_and_draws_what_it_did(shape: Shape, tmp_path) -> None:  # type: ignore[no-untyped-def]
    level = tiny_level(shape)
    randomize(level)
    prior = HierarchicalPrior([level])
    prior.save_pretrained(tmp_path)
    loaded = HierarchicalPrior.from_pretrained(tmp_path)
    assert loaded.levels[0].config == level.config
    drawn = prior.sample([0, 1], seed=4)[0]
    assert torch.equal(drawn, loaded.sample([0, 1], seed=4)[0])
    assert torch.allclose(drawn[1:], prior.sample([1], seed=4, indices=[1])[0], rtol=1e-4, atol=1e-5)
    cold = prior.sample([0, 1], seed=4, temperature=1e-12)[0]
    flow = level.network
    assert isinstance(flow, Flow)
    condition = flow.conditioning([], torch.tensor([0, 1]), 2)
    assert torch.allclose(cold, flow.inverse(torch.zeros(2, *shape), condition), atol=1e-3)


def test_what_says_nothing_of_numbers_is_refused() -> None:
    prior = HierarchicalPrior([tiny_level((2, 1, 1))])
    for setting in ({"guidance": 2.0}, {"top_k": 3}, {"top_p": 0.5}):
        with pytest.raises(ValueError, match="a continuous level knows temperature alone"):
            prior.sample([0], **setting)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="couplings must be at most 200, got 201"):
        FlowConfig(couplings=201)
    with pytest.raises(ValueError, match="level 0 is of codes, which flow is no prior for"):
        LevelConfig(level=0, grids=[(2, 2)], codebook_sizes=[8], class_names=[], size=FlowConfig())
