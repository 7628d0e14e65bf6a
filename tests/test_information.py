"""Laws of the estimates of what latents tell, on models small enough that the truth can be enumerated."""

import math
from itertools import combinations, product

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from pipelines.metrics.information import importance_bounds, information, sample_information

# x is one of six images, all equally likely; z one of three values. What is not given is random.
IMAGES, VALUES = 6, 3


def tables() -> tuple[Tensor, Tensor, Tensor]:
    """log q(z | x) (x, z), log p(z) (z,) and log p(x | z) (x, z), float64."""
    q = (2 * torch.randn(IMAGES, VALUES, dtype=torch.float64)).log_softmax(1)
    return q, torch.randn(VALUES, dtype=torch.float64).log_softmax(0), 2 * torch.randn(IMAGES, VALUES).double()


def draws_of(log_q: Tensor, images: list[int]) -> list[tuple[float, list[int]]]:
    """Every way in which a value may be drawn for each image, with its probability."""
    found = product(range(VALUES), repeat=len(images))
    return [(float(sum(log_q[n, z] for n, z in zip(images, drawn, strict=True)).exp()), list(drawn)) for drawn in found]


def expected(log_q: Tensor, images: list[int]) -> tuple[float, float]:
    """The mean over all draws for some of the images of both estimates, by enumeration."""
    means = [0.0, 0.0]
    groups, sizes = torch.zeros(len(images), dtype=torch.int64), torch.tensor([IMAGES])
    for probability, drawn in draws_of(log_q, images):
        found = information(log_q[images][:, drawn].T, groups, sizes)
        means = [mean + probability * float(one.mean()) for mean, one in zip(means, found, strict=True)]
    return means[0], means[1]


def truth(log_q: Tensor) -> float:
    """I(x, z) = E log q(z | x) / q_agg(z)."""
    aggregated = log_q.exp().mean(0).log()
    return float((log_q.exp() * (log_q - aggregated)).sum(1).mean())


def test_the_three_parts_are_those_enumerated_and_add_up_to_the_bound() -> None:
    log_q, log_p, log_likelihood = tables()
    mutual, at_least = expected(log_q, list(range(IMAGES)))
    assert mutual == pytest.approx(truth(log_q), abs=1e-12) and at_least == pytest.approx(mutual, abs=1e-12)
    q, aggregated = log_q.exp(), log_q.exp().mean(0)
    rate = float((q * (log_q - log_p)).sum(1).mean())
    marginal = float((aggregated * (aggregated.log() - log_p)).sum())
    assert rate - mutual == pytest.approx(marginal, abs=1e-12) and marginal > 0
    distortion = float(-(q * log_likelihood).sum(1).mean())
    bound = float(-(q * (log_likelihood + log_p - log_q)).sum(1).mean())
    assert distortion + mutual + marginal == pytest.approx(bound, abs=1e-12)


@pytest.mark.parametrize("number", [2, 3, 4])
def test_of_some_of_the_images_one_estimate_is_too_high_and_one_too_low_by_no_more_than_is_said(number: int) -> None:
    """Means over all choices of the images and all draws."""
    log_q, _, _ = tables()
    means = [expected(log_q, list(images)) for images in combinations(range(IMAGES), number)]
    high, low = (sum(one) / len(means) for one in zip(*means, strict=True))
    mutual = truth(log_q)
    assert low < mutual - 1e-3 < mutual + 1e-3 < high
    assert mutual - low <= math.log(IMAGES / number)
    assert high <= math.log(IMAGES) and low <= math.log(number)


def test_the_share_of_an_image_is_estimated_without_bias_from_any_others() -> None:
    log_q, _, _ = tables()
    found = []
    for others in combinations(range(1, IMAGES), 2):
        images = [0, *others]
        log_pairs = log_q[images, 2].expand(3, 3)  # value 2 is drawn for each
        own = information(log_pairs, torch.zeros(3, dtype=torch.int64), torch.tensor([IMAGES])).estimate[0]
        found.append((log_q[0, 2] - own).exp())
    assert float(torch.stack(found).mean()) == pytest.approx(float(log_q[:, 2].exp().mean()))


def test_given_the_group_each_group_is_judged_by_itself() -> None:
    log_q = torch.randn(5, 5, dtype=torch.float64)
    groups, sizes = torch.tensor([0, 1, 0, 1, 1]), torch.tensor([4, 7])
    together = information(log_q, groups, sizes)
    for group in (0, 1):
        own = (groups == group).nonzero()[:, 0]
        alone = information(log_q[own][:, own], torch.zeros_like(own), sizes[group : group + 1])
        assert torch.allclose(together.estimate[own], alone.estimate)
        assert torch.allclose(together.at_least[own], alone.at_least)


def test_one_image_tells_nothing_and_images_that_share_nothing_tell_their_number() -> None:
    one, all_of_them = torch.zeros(1, dtype=torch.int64), torch.tensor([1])
    assert information(torch.tensor([[-3.0]]).double(), one, all_of_them).estimate.tolist() == [0]
    apart = torch.full((4, 4), -1e5, dtype=torch.float64).fill_diagonal_(2)
    found = information(apart, torch.zeros(4, dtype=torch.int64), torch.tensor([100]))
    assert found.estimate.tolist() == pytest.approx([math.log(100)] * 4)
    assert found.at_least.tolist() == pytest.approx([math.log(4)] * 4)


def test_codes_tell_the_entropy_of_their_own_histogram_and_within_groups_theirs() -> None:
    marks = torch.tensor([7, 7, -2, 9, 7, 7])
    no_groups, groups = torch.zeros(6, dtype=torch.int64), torch.tensor([0, 0, 0, 1, 1, 1])
    shares = torch.tensor([4, 1, 1]) / 6
    assert float(sample_information(marks, no_groups).mean()) == pytest.approx(float(-(shares * shares.log()).sum()))
    assert sample_information(marks, groups).exp().tolist() == pytest.approx([1.5, 1.5, 3, 3, 1.5, 1.5])
    assert sample_information(torch.arange(6), no_groups).tolist() == pytest.approx([math.log(6)] * 6)


def test_bounds_of_more_draws_are_nearer_and_none_is_beyond_log_p() -> None:
    """Means over every way to draw three values for an image."""
    log_q, log_p, log_likelihood = tables()
    log_weights = (log_likelihood + log_p - log_q)[0]
    exact = -float((log_likelihood + log_p)[0].logsumexp(0))
    means = torch.zeros(3, dtype=torch.float64)
    for drawn in product(range(VALUES), repeat=3):
        means += log_q[0, list(drawn)].sum().exp() * importance_bounds(log_weights[list(drawn)], [1, 2, 3])
    assert float(means[0]) == pytest.approx(-float((log_q[0].exp() * log_weights).sum()))
    one, two, three = means.tolist()
    assert one > two + 1e-3 > two > three + 1e-3 > three > exact


def test_a_hundred_draws_come_near_to_log_p() -> None:
    log_q, log_p, log_likelihood = tables()
    log_q = (log_q / 4).log_softmax(1)  # so that no value is all but never drawn
    log_weights = log_likelihood + log_p - log_q
    drawn = torch.multinomial(log_q.exp(), 100 * 2000, replacement=True).view(IMAGES, 2000, 100)
    found = importance_bounds(log_weights[torch.arange(IMAGES)[:, None, None], drawn], [1, 10, 100]).mean(1)
    exact = -(log_likelihood + log_p).logsumexp(1)
    assert (found[:, 0] > found[:, 1]).all() and (found[:, 1] > found[:, 2]).all()
    assert torch.allclose(found[:, 2], exact, atol=0.1) and not torch.allclose(found[:, 0], exact, atol=0.1)


def test_with_the_exact_posterior_one_draw_is_log_p_whichever_it_is() -> None:
    _, log_p, log_likelihood = tables()
    joint = log_likelihood + log_p
    found = importance_bounds((joint - joint.log_softmax(1))[..., None], [1])[..., 0]
    assert torch.allclose(found, -joint.logsumexp(1, keepdim=True).expand(-1, VALUES))


def test_bounds_are_nested_each_of_the_first_draws() -> None:
    log_weights = torch.randn(5, 20, dtype=torch.float64)
    found = importance_bounds(log_weights, [1, 10, 20])
    for number, draws in enumerate([1, 10, 20]):
        assert torch.allclose(found[:, number], -log_weights[:, :draws].exp().mean(1).log())


def test_of_linear_gaussians_all_is_known_in_closed_form() -> None:
    """x = z + noise of variance 0.25, so x is of N(0, 1.25); q(z | x) = N(0.6 x, 0.3) is not the posterior."""
    number, noise, slope, variance = 2000, 0.25, 0.6, 0.3
    x = Normal(0.0, math.sqrt(1 + noise)).icdf((torch.arange(number).double() + 0.5) / number)
    q = Normal(slope * x, math.sqrt(variance))
    z = q.sample()
    log_q = q.log_prob(z[:, None])  # (N, N), row by row what was drawn
    groups, sizes = torch.zeros(number, dtype=torch.int64), torch.tensor([number])
    aggregated = Normal(0.0, math.sqrt(slope**2 * (1 + noise) + variance))
    mutual = float(information(log_q, groups, sizes).estimate.mean())
    assert mutual == pytest.approx(0.5 * math.log(aggregated.variance / variance), abs=0.03)
    prior = Normal(torch.tensor(0.0).double(), 1.0)
    rate = float(kl_divergence(q, prior).mean())
    assert rate - mutual == pytest.approx(float(kl_divergence(aggregated, prior)), abs=0.03)

    log_weights = Normal(z, math.sqrt(noise)).log_prob(x) + prior.log_prob(z) - q.log_prob(z)
    exact = -Normal(0.0, math.sqrt(1 + noise)).log_prob(x)
    assert float(importance_bounds(log_weights[:, None], [1]).mean()) > float(exact.mean()) + 0.01
    posterior = Normal(x / (1 + noise), math.sqrt(noise / (1 + noise)))
    z = posterior.sample((3,)).T  # (N, 3)
    log_weights = (Normal(z, math.sqrt(noise)).log_prob(x[:, None]) + prior.log_prob(z)).T - posterior.log_prob(z.T)
    assert torch.allclose(importance_bounds(log_weights.T, [1, 3]), exact[:, None].expand(-1, 2))
