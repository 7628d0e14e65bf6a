"""The Jacobian of an encoder: exact, estimated, and as a loss of training."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from pipelines.data.noise import BatchNoise
from pipelines.training.contraction import contraction, contraction_of
from tokenizer import HierarchicalVQVAE, TokenizerConfig
from tokenizer.bottlenecks.contractive import ContractiveConfig
from tokenizer.networks import ResidualBlock

Smalti = Callable[..., tuple[int, str]]


def encoder(strides: list[int] | None = None) -> HierarchicalVQVAE:
    sizes = {"code_dim": 2, "width": 8, "residual_width": 4, "residual_blocks": 1}
    return HierarchicalVQVAE(TokenizerConfig(strides=strides or [8, 4], **sizes), 8, 1, ContractiveConfig())  # type: ignore[arg-type]


def beside(number: int, step: int = 0, first: int = 0) -> BatchNoise:
    return BatchNoise(0, step, range(first, first + number), torch.device("cpu"))


def of(model: HierarchicalVQVAE, images: Tensor, probes: int, noise: BatchNoise | None = None) -> list[Tensor]:
    found = contraction_of(model, images, probes, noise or beside(len(images)))
    return [level["contraction"] for level in found]


def test_taken_number_by_number_it_is_the_norm_of_the_whole_jacobian() -> None:
    model, images = encoder(), torch.rand(3, 1, 8, 8) * 2 - 1
    for level, found in enumerate(of(model, images, 8)):  # 2 numbers, and 8
        for image, one in zip(images, found, strict=True):

            def numbers(pixels: Tensor, level: int = level) -> Tensor:
                return model(pixels[None]).levels[level].seen.flatten()

            jacobian = torch.autograd.functional.jacobian(numbers, image)
            assert torch.allclose(one, jacobian.square().sum(), rtol=1e-4)


def test_the_mean_of_many_estimates_is_what_is_exact() -> None:
    model, images = encoder(), torch.rand(2, 1, 8, 8) * 2 - 1
    exact = of(model, images, 8)[1]
    estimates = torch.stack([of(model, images, 2, beside(2, step))[1] for step in range(400)])
    error = estimates.std(0) / 400**0.5
    assert (error > 0).all() and ((estimates.mean(0) - exact).abs() < 4 * error).all()
    assert (error < 0.1 * exact).all()


def test_directions_belong_to_a_place_and_a_step() -> None:
    model, images = encoder(), torch.rand(4, 1, 8, 8) * 2 - 1
    together = of(model, images, 1)[1]
    parts = [of(model, images[:3], 1)[1], of(model, images[3:], 1, beside(1, first=3))[1]]
    assert torch.allclose(together, torch.cat(parts), rtol=1e-5)
    assert not torch.allclose(together, of(model, images, 1, beside(4, step=1))[1], rtol=1e-2)


def loss_and_gradients(model: HierarchicalVQVAE, images: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The mean contraction and its gradients by all weights, one after the other."""
    images = images.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        levels = contraction(model(images).levels, images, 4, beside(len(images)))
        loss = torch.stack([level["contraction"].mean() for level in levels]).sum()
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return loss.detach(), torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for g, w in pairs])


def test_gradients_of_it_are_those_of_small_steps() -> None:
    model, images = encoder(), torch.rand(2, 1, 8, 8) * 2 - 1
    weights = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    _, gradient = loss_and_gradients(model, images, torch.float32)
    along, found = gradient / gradient.norm(), []
    for step in (-1e-4, 1e-4):
        torch.nn.utils.vector_to_parameters(weights + step * along, model.parameters())
        found.append(float(loss_and_gradients(model, images, torch.float32)[0]))
    assert (found[1] - found[0]) / 2e-4 == pytest.approx(float(gradient.norm()), rel=0.05)


@pytest.mark.parametrize("change", ["bfloat16", "channels last", "activations computed anew"])
def test_it_is_the_same_however_the_network_is_computed(change: str) -> None:
    model, images = encoder(), torch.rand(2, 1, 8, 8) * 2 - 1
    loss, gradients = loss_and_gradients(model, images, torch.float32)
    dtype, tolerance = torch.float32, 1e-4
    if change == "bfloat16":
        dtype, tolerance = torch.bfloat16, 0.05
    elif change == "channels last":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    else:
        apply_activation_checkpointing(
            model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda part: isinstance(part, ResidualBlock)
        )
    found, others = loss_and_gradients(model, images, dtype)
    assert torch.allclose(found, loss, rtol=tolerance)
    assert float((others - gradients).norm() / gradients.norm()) < tolerance


def test_what_is_contracted_changes_less_with_the_image() -> None:
    images, found = torch.rand(16, 1, 8, 8) * 2 - 1, []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        model = encoder([8, 4])
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for step in range(40):
            seen = images.clone().requires_grad_()
            output = model(seen)
            losses = contraction(output.levels, seen, 4, beside(16, step))
            loss = (output.reconstruction - images).square().mean()
            loss = loss + weight / 64 * sum(level["contraction"].mean() for level in losses)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found.append([float(level.mean()) for level in of(model, images, 8)])
    assert found[1][0] < found[0][0] / 2 and found[1][1] < found[0][1] / 2


def test_gradients_of_gradients_refuse_a_compiled_model_before_anything_is_done(
    tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti
) -> None:
    config = write_config(tmp_path, {"prior": {"network": "auto"}, "tokenizer": {"training": {"compile": True}}})
    code, said = smalti("run", config, "--tokenizer.bottleneck=contractive")
    assert code == 2 and "compile must be false or auto with bottleneck contractive" in said
    assert not (tmp_path / "run").exists()


def test_an_encoder_that_may_not_be_looked_into_is_refused() -> None:
    with pytest.raises(ValueError, match="probes must be at least 1, got 0"):
        ContractiveConfig(probes=0)
    with pytest.raises(ValueError, match="weight must not be negative, got -1"):
        ContractiveConfig(weight=-1)
