import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.data.images import ImageShards, to_unit_range
from pipelines.metrics.bound import SCALES, Bound, bound_figures, fitted_scales, grey_levels, interval95, pixel_nats
from pipelines.metrics.metric import shown
from pipelines.storage.cache import Cache
from tokenizer import HierarchicalVQVAE

EDGES_AND_BETWEEN = [0.0, 0.3, 0.5, 17.25, 127.5, 254.6, 255.0]


@pytest.mark.parametrize("scale", [SCALES[0], 0.5, 3.0, 40.0, SCALES[-1]])
def test_the_likelihood_of_all_256_values_sums_to_1(scale: float) -> None:
    values = torch.arange(256)[:, None]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        means = torch.tensor(EDGES_AND_BETWEEN, dtype=dtype)
        total = pixel_nats(values, means, scale).neg().exp().double().sum(0)
        assert torch.allclose(total, torch.ones_like(total), rtol=0, atol=tolerance)


@pytest.mark.parametrize("scale", [0.5, 3.0, 40.0])
def test_a_value_has_the_logistic_between_its_edges_and_0_and_255_have_the_tails(scale: float) -> None:
    values, means = torch.arange(256)[:, None], torch.tensor(EDGES_AND_BETWEEN, dtype=torch.float64)
    upper = torch.sigmoid((values + 0.5 - means) / scale).where(values < 255, 1)
    lower = torch.sigmoid((values - 0.5 - means) / scale).where(values > 0, 0)
    found = pixel_nats(values, means, scale).neg().exp()
    assert torch.allclose(found, upper - lower, rtol=0, atol=1e-12)


def test_what_is_all_but_impossible_costs_what_it_must_and_no_more() -> None:
    worst = float(pixel_nats(torch.tensor(255, dtype=torch.uint8), torch.tensor(0.0), SCALES[0]))
    assert worst == pytest.approx(254.5 / SCALES[0])


def test_each_channel_has_its_own_scale() -> None:
    values, means = torch.randint(256, (2, 3, 4, 4)), torch.rand(2, 3, 4, 4) * 255
    scales = torch.tensor([1.0, 5.0, 30.0])
    together = pixel_nats(values, means, scales[:, None, None])
    for channel, scale in enumerate(scales.tolist()):
        assert torch.equal(together[:, channel], pixel_nats(values[:, channel], means[:, channel], scale))


def test_no_other_scale_makes_the_training_images_likelier(tiny_run: Path, cache: Cache) -> None:
    tokenizer = HierarchicalVQVAE.from_pretrained(tiny_run.parent / "run" / "tokenizer")
    train = ImageShards(tiny_run.parent / "run" / "images", "train", cache)
    assert len(train) > 1000  # so that all but a few of the images below are in the sample
    (scale,) = fitted_scales(tokenizer, train, seed=0).tolist()
    pixels = torch.from_numpy(np.stack([train.pixels(row) for row in range(len(train))]))
    with torch.no_grad():
        means = grey_levels(tokenizer(to_unit_range(pixels)).reconstruction).double()
    others = [-4, -2, -1, -0.25, 0, 0.25, 1, 2, 4]
    costs = {power: float(pixel_nats(pixels, means, scale * 2**power).sum()) for power in others}
    assert min(costs, key=lambda power: costs[power]) == 0


def test_the_scale_is_a_function_of_images_and_seed(tiny_run: Path, cache: Cache) -> None:
    tokenizer = HierarchicalVQVAE.from_pretrained(tiny_run.parent / "run" / "tokenizer")
    train = ImageShards(tiny_run.parent / "run" / "images", "train", cache)
    assert torch.equal(fitted_scales(tokenizer, train, seed=1), fitted_scales(tokenizer, train, seed=1))


def test_the_bound_is_rate_plus_distortion_of_each_image() -> None:
    rates = {"given_class": torch.tensor([1.0, 3.0]).double(), "without_class": torch.tensor([2.0, 4.0]).double()}
    found = bound_figures(rates, torch.tensor([10.0, 30.0]).double(), dims=4)
    unit = 4 * math.log(2)
    assert found["images"] == 2
    assert found["distortion_bits_per_dim"] == pytest.approx(20 / unit)
    assert found["rate_bits_per_dim"] == pytest.approx({"given_class": 2 / unit, "without_class": 3 / unit})
    assert found["bits_per_dim"] == pytest.approx({"given_class": 22 / unit, "without_class": 23 / unit})
    half = 1.96 * math.sqrt(2 * 11**2) / math.sqrt(2)  # of 11 and 33
    assert found["bits_per_dim_interval95"]["given_class"] == pytest.approx([(22 - half) / unit, (22 + half) / unit])


def test_an_interval_is_that_of_the_mean_and_one_image_has_none() -> None:
    values = torch.randn(50, dtype=torch.float64)
    low, high = interval95(values) or (0, 0)
    assert (low + high) / 2 == pytest.approx(float(values.mean()))
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(values.numpy(), ddof=1) / math.sqrt(50))
    assert interval95(values[:1]) is None


def test_the_noise_of_an_estimate_of_zero_is_shown_without_sign() -> None:
    rates = {"without_class": torch.tensor([-4e-5, 1e-5]).double()}
    figures = bound_figures(rates, torch.zeros(2).double(), dims=4) | {"held_out": True}
    assert figures["bits_per_dim"]["without_class"] < 0 and "-0.0000 " not in "\n".join(Bound.table(figures)[3:])
    assert (shown(-3.8e-7), shown(-0.01), shown(3.8e-7), shown(0)) == ("0.0000", "-0.01", "3.8e-07", "0")
