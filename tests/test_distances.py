import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from pipelines.errors import StageError
from pipelines.metrics.distances import (
    Moments,
    distances,
    frechet_distance,
    kernel_distance,
    moments,
    squared_mmd,
    support,
)


class Given(torch.nn.Module):
    """A feature module for torchmetrics, of features that are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


@pytest.fixture
def sets() -> tuple[torch.Tensor, torch.Tensor]:
    real = torch.randn(60, 8, dtype=torch.float64)
    return real, torch.randn(50, 8, dtype=torch.float64) * 1.3 + 0.4


def test_fid_of_two_gaussians_is_the_closed_form() -> None:
    spread, other = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 16.0]).double()
    real = Moments(torch.zeros(3).double(), spread.diag(), 10)
    drawn = Moments(torch.tensor([1.0, 2.0, 0.0]).double(), other.diag(), 10)
    by_hand = 5 + float((spread.sqrt() - other.sqrt()).square().sum())  # covariances that commute
    assert frechet_distance(real, drawn) == pytest.approx(by_hand, abs=1e-9)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    turned = [Moments(turn @ m.mean, turn @ m.covariance @ turn.T, 10) for m in (real, drawn)]
    assert frechet_distance(*turned) == pytest.approx(by_hand, abs=1e-9)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-9)


def test_moments_and_fid_are_those_of_numpy_and_torchmetrics(sets: tuple[torch.Tensor, torch.Tensor]) -> None:
    for features in sets:
        found = moments(features)
        torch.testing.assert_close(found.covariance, torch.from_numpy(np.cov(features.numpy().T)))
    peer = FrechetInceptionDistance(feature=Given(8)).set_dtype(torch.float64)
    for features, real in zip(sets, (True, False), strict=True):
        peer.update(features, real=real)
    assert frechet_distance(*map(moments, sets)) == pytest.approx(float(peer.compute()), abs=1e-4)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save")
def test_kid_is_that_of_torchmetrics_on_each_block(sets: tuple[torch.Tensor, torch.Tensor]) -> None:
    real, drawn = sets[0][:50], sets[1]
    expected = []
    generator = torch.Generator().manual_seed(3)
    blocks = [torch.randperm(50, generator=generator).tensor_split(10) for _ in range(2)]
    for mine, theirs in zip(*blocks, strict=True):
        peer = KernelInceptionDistance(feature=Given(8), subsets=1, subset_size=5)
        peer.update(real[mine], real=True)
        peer.update(drawn[theirs], real=False)
        expected.append(float(peer.compute()[0]))
    found = kernel_distance(real, drawn, seed=3)
    assert found.value == pytest.approx(np.mean(expected), abs=1e-4)
    assert found.error == pytest.approx(np.std(expected, ddof=1) / 10**0.5, abs=1e-4)


def test_kid_of_two_halves_covers_0_and_grows_with_blur_and_noise() -> None:
    images = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
    half, other = images[::2], images[1::2]
    # Of raw values KID is blind to noise of mean 0: their products keep their means.
    space = torch.nn.Sequential(torch.nn.Conv2d(1, 64, 3), torch.nn.ReLU(), torch.nn.AvgPool2d(3), torch.nn.Flatten())
    blurred = [torch.nn.functional.avg_pool2d(other, size, 1, size // 2) for size in (1, 3, 5)]
    noised = [other + torch.randn(other.shape) * scale for scale in (0.0, 0.5, 1.0)]
    for worse in (blurred, noised):
        found = [kernel_distance(space(half).detach(), space(one).detach()) for one in worse]
        assert abs(found[0].value) < 2 * found[0].error
        assert found[0].value + 2 * found[0].error < found[1].value < found[2].value


def test_kid_of_pairs_is_the_same_figure_with_a_smaller_error(sets: tuple[torch.Tensor, torch.Tensor]) -> None:
    real = sets[0]
    made = real + 0.3 + 0.1 * torch.randn_like(real)
    paired, apart = (kernel_distance(real, made, paired=paired) for paired in (True, False))
    assert abs(paired.value - apart.value) < 2 * apart.error and paired.error < apart.error / 2
    x, y = real[:3] @ real[:3].T / 8 + 1, real[:3] @ made[:3].T / 8 + 1
    off = ~torch.eye(3, dtype=torch.bool)
    z = made[:3] @ made[:3].T / 8 + 1
    by_hand = float(x[off].pow(3).mean() + z[off].pow(3).mean() - 2 * y[off].pow(3).mean())
    assert squared_mmd(real[:3], made[:3], paired=True) == pytest.approx(by_hand)


def naive_support(real: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    """The definitions, point by point."""

    def ball(points: np.ndarray, i: int, k: int) -> float:
        return sorted(np.linalg.norm(points[i] - other) for j, other in enumerate(points) if j != i)[k - 1]

    def near(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a - b))

    ns, ms = range(len(real)), range(len(drawn))
    wide = [ball(real, i, 5) for i in ns]
    return {
        "precision": np.mean([any(near(d, real[i]) <= ball(real, i, 3) for i in ns) for d in drawn]),
        "recall": np.mean([any(near(r, drawn[j]) <= ball(drawn, j, 3) for j in ms) for r in real]),
        "density": sum(near(d, real[i]) <= wide[i] for i in ns for d in drawn) / (5 * len(drawn)),
        "coverage": np.mean([any(near(d, real[i]) <= wide[i] for d in drawn) for i in ns]),
    }


def test_support_is_that_of_a_naive_twin_whatever_the_blocks(
    sets: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, drawn = sets[0][:20, :4], sets[1][:17, :4] + 0.6
    expected = naive_support(real.numpy(), drawn.numpy())
    assert 0 < expected["precision"] < 1 and 0 < expected["recall"] < 1 and 0 < expected["coverage"] < 1
    assert support(real, drawn)._asdict() == pytest.approx(expected)
    monkeypatch.setattr("pipelines.metrics.distances.ROWS", 6)
    assert support(real, drawn)._asdict() == pytest.approx(expected)


def test_distances_by_the_product_are_those_of_differences(sets: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.testing.assert_close(distances(*sets), (sets[0][:, None] - sets[1]).norm(dim=-1))


def test_too_few_images_are_refused(sets: tuple[torch.Tensor, torch.Tensor]) -> None:
    few = sets[0][:1]
    for measure in (lambda: moments(few), lambda: kernel_distance(few, sets[1]), lambda: support(sets[0], few)):
        with pytest.raises(StageError, match="images of either set"):
            measure()


def test_a_block_of_one_kind_of_images_is_0_apart_from_itself() -> None:
    same = torch.ones(6, 4)
    assert squared_mmd(same, same) == pytest.approx(0, abs=1e-12)
