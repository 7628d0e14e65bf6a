"""Laws of residual quantisation, and of how gradients come back to latents."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.bottlenecks.bottleneck import Place, VectorSizes
from tokenizer.bottlenecks.codebook import passed_back
from tokenizer.bottlenecks.ema import EMAConfig
from tokenizer.bottlenecks.residual import Residual, ResidualConfig

SIZES = VectorSizes(codebook_size=8, code_dim=3, normalize=False)


def quantiser(depth: int) -> Residual:
    torch.manual_seed(0)
    return ResidualConfig(depth=depth).build(SIZES)


def started(depth: int, latents: Tensor) -> Residual:
    model = quantiser(depth)
    ResidualConfig(depth=depth).learner(model).start(model, latents, seed=0)
    return model


def test_each_codebook_takes_what_those_before_have_left() -> None:
    model, latents = quantiser(3), torch.randn(2, 3, 2, 2)
    output = model(latents)
    left = latents
    for book, codes in zip(model.books, output.stored, strict=True):
        assert torch.equal(book(left).stored[0], codes)
        left = left - book.lookup([codes])
    assert torch.allclose(output.seen, latents - left, atol=1e-6)


def test_every_further_codebook_brings_the_sum_nearer() -> None:
    torch.manual_seed(1)
    latents = torch.randn(500, 3)
    errors = [
        (started(depth, latents)(latents[:, :, None, None]).seen[:, :, 0, 0] - latents).square().mean().item()
        for depth in (1, 2, 3, 4)
    ]
    assert all(finer < 0.75 * coarser for coarser, finer in pairwise(errors))


def test_statistics_of_parts_add_up_to_those_of_the_whole() -> None:
    model = quantiser(2)
    learner = ResidualConfig().learner(model)
    latents = torch.randn(4, 3, 2, 2)
    whole = learner.statistics(model, model(latents), Place(0, 4, 7))
    parts = [learner.statistics(model, model(latents[n : n + 2]), Place(n, 4, 7)) for n in (0, 2)]
    for one, first, second in zip(whole, *parts, strict=True):
        assert torch.allclose(one, first + second, atol=1e-5)
    assert learner.update(model, whole, step=0)["revived"].shape == (2,)


def test_of_depth_one_it_is_a_codebook() -> None:
    model, latents = quantiser(1), torch.randn(2, 3, 4, 4, requires_grad=True)
    alone, output = model.books[0](latents), model(latents)
    assert torch.equal(alone.seen, output.seen) and torch.equal(alone.stored[0], output.stored[0])
    assert torch.equal(alone.losses["commitment"], output.losses["commitment"])


@pytest.mark.parametrize("gradient", ["straight", "rotation"])
def test_the_decoder_sees_codes_exactly(gradient: str) -> None:
    latents, codes = torch.randn(5, 4), torch.randn(5, 4)
    assert torch.equal(passed_back(latents, codes, gradient, 1), codes)


def test_a_rotated_gradient_is_the_one_of_the_rotation_and_scaling_that_take_latents_to_codes() -> None:
    torch.manual_seed(0)
    latents, codes, weight = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4), torch.randn(6, 4)
    (passed_back(latents, codes, "rotation", 1) * weight).sum().backward()
    assert latents.grad is not None
    for e, q, towards, found in zip(latents.detach(), codes, weight, latents.grad, strict=True):
        one, two = F.normalize(e, dim=0), F.normalize(q, dim=0)
        r = F.normalize(one + two, dim=0)
        rotation = torch.eye(4) - 2 * torch.outer(r, r) + 2 * torch.outer(two, one)
        assert torch.allclose(rotation @ rotation.T, torch.eye(4), atol=1e-5)
        scaled = q.norm() / e.norm() * rotation
        assert torch.allclose(scaled @ e, q, atol=1e-5)
        assert torch.allclose(found, scaled.T @ towards, atol=1e-5)


def test_a_gradient_along_the_code_goes_back_along_the_latent() -> None:
    latents = torch.tensor([[2.0, 0.0]], requires_grad=True)
    code = torch.tensor([[0.0, 1.0]])
    (passed_back(latents, code, "rotation", 1) * code).sum().backward()
    assert torch.allclose(latents.grad, torch.tensor([[0.5, 0.0]]), atol=1e-6)


def test_a_latent_of_no_length_has_a_finite_gradient() -> None:
    latents = torch.zeros(1, 3, requires_grad=True)
    passed_back(latents, torch.ones(1, 3), "rotation", 1).sum().backward()
    assert latents.grad is not None and bool(latents.grad.isfinite().all())


def test_settings_of_every_vector_quantiser_say_how_gradients_come_back() -> None:
    for config in (EMAConfig(gradient="rotation"), ResidualConfig(ema=EMAConfig(gradient="rotation"))):
        assert config.build(SIZES).gradient == "rotation"
