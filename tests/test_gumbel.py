"""Laws of the relaxed categorical bottleneck."""

import math

import pytest
import torch

from tokenizer.bottlenecks.bottleneck import VectorSizes
from tokenizer.bottlenecks.gumbel import Annealing, Gumbel, GumbelConfig, _gumbel


def test_codes_are_drawn_as_often_as_their_logits_say() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0])
    codes = Gumbel(4, 2, 1.0, True)(logits[None, :, None, None].expand(1, 4, 100, 100), torch.randn(1, 4, 100, 100))
    shares = codes.stored[0].flatten().bincount(minlength=4) / 10000
    assert torch.allclose(shares, logits.softmax(0), atol=0.015)


def test_noise_through_both_quantiles_is_gumbel_noise() -> None:
    torch.manual_seed(0)
    noise = _gumbel(torch.randn(100000))
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)  # Euler's constant
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)
    assert bool(_gumbel(torch.tensor([-40.0, 40.0])).isfinite().all())


def test_the_divergence_is_that_of_torch_and_zero_for_the_uniform() -> None:
    logits = torch.randn(3, 5, 2, 2)
    q = torch.distributions.Categorical(logits=logits.movedim(1, -1))
    uniform = torch.distributions.Categorical(logits=torch.zeros(3, 2, 2, 5))
    expected = torch.distributions.kl_divergence(q, uniform).flatten(1).sum(1)
    quantiser = Gumbel(5, 2, 1.0, True)
    assert torch.allclose(quantiser(logits).losses["kl"], expected, atol=1e-5)
    assert torch.allclose(quantiser(torch.ones(1, 5, 2, 2)).losses["kl"], torch.zeros(1), atol=1e-5)


def test_the_relaxation_comes_nearer_to_a_code_as_the_temperature_falls() -> None:
    torch.manual_seed(0)
    logits, noise = torch.randn(2, 6, 3, 3), torch.randn(2, 6, 3, 3)
    quantiser = Gumbel(6, 4, 1.0, straight_through=False)
    distances = []
    for temperature in (2.0, 1.0, 0.1, 0.001):
        quantiser.temperature.fill_(temperature)
        output = quantiser(logits, noise)
        distances.append((output.seen - quantiser.lookup(output.stored)).norm().item())
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-2 < distances[0]


def test_the_temperature_falls_with_the_steps_and_stays_at_its_end() -> None:
    config = GumbelConfig(temperature=1.0, final_temperature=0.25, anneal_steps=10)
    quantiser = config.build(VectorSizes(codebook_size=4, code_dim=2, normalize=False))
    learner = Annealing(config)
    found = []
    for step in (4, 9, 30):
        learner.update(quantiser, (), step)
        found.append(float(quantiser.temperature))
    assert found == pytest.approx([0.5, 0.25, 0.25])
    with pytest.raises(ValueError, match="final_temperature must lie in"):
        GumbelConfig(temperature=0.1)


def test_gradients_of_one_code_are_those_of_the_relaxation() -> None:
    torch.manual_seed(0)
    features, noise, weight = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2), torch.randn(1, 3, 2, 2)
    soft, straight = Gumbel(4, 3, 0.7, False), Gumbel(4, 3, 0.7, True)
    straight.load_state_dict(soft.state_dict())
    gradients = []
    for quantiser in (soft, straight):
        given = features.clone().requires_grad_()
        (quantiser(given, noise).seen * weight).sum().backward()
        gradients.append(given.grad)
    assert torch.allclose(*gradients, atol=1e-6)
