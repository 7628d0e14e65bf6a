"""What stage one minimises."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.config import load_config
from pipelines.run import Run
from pipelines.training.checkpoints import WholeCheckpoints
from pipelines.training.sections import TokenizerSection
from tokenizer import HierarchicalVQVAE, TokenizerConfig, TokenizerLoss
from tokenizer.bottlenecks.gaussian import GaussianConfig
from tokenizer.loss import FIRST_SCALE

SMALL = TokenizerConfig(strides=[8], code_dim=2, width=8, residual_width=4, residual_blocks=1, sigmoid=True)


@pytest.mark.parametrize(("kind", "expected"), [("mse", 4.0), ("l1", 2.0)])
def test_the_loss_is_reconstruction_and_weighted_mean_commitment(kind: str, expected: float) -> None:
    images = torch.zeros(2, 1, 4, 4)
    losses = [{"commitment": torch.tensor([0.0, 2.0])}, {"commitment": torch.tensor([3.0, 3.0])}]
    assert TokenizerLoss(kind, {"commitment": 0.125})(images + 2, images, losses).item() == expected + 0.25 * 2  # type: ignore[arg-type]


def test_a_gaussian_likelihood_is_that_of_torch_and_its_learned_scale_the_root_of_the_squared_error() -> None:
    images, noise = torch.rand(4, 1, 8, 8) * 2 - 1, 0.3 * torch.randn(4, 1, 8, 8)
    fixed, learned = TokenizerLoss("gaussian", {}, 0.5), TokenizerLoss("gaussian", {})
    expected = -torch.distributions.Normal(images + noise, 0.5).log_prob(images)
    assert torch.allclose(fixed.of_values(images + noise, images), expected, rtol=1e-5)
    assert not fixed.log_scale.requires_grad
    optimizer = torch.optim.Adam(learned.parameters(), 0.01)
    for _ in range(300):
        optimizer.zero_grad()
        learned(images + noise, images, []).backward()
        optimizer.step()
    assert float(learned.log_scale.detach().exp()) == pytest.approx(float(noise.square().mean().sqrt()), rel=1e-2)


def test_a_bernoulli_likelihood_is_that_of_torch_of_values_in_0_to_1() -> None:
    images, logits = torch.randint(0, 2, (2, 1, 4, 4)) * 2.0 - 1, torch.randn(2, 1, 4, 4)
    expected = -torch.distributions.Bernoulli(logits=logits).log_prob((images + 1) / 2)
    assert torch.allclose(TokenizerLoss("bernoulli", {}).of_values(logits, images), expected)


@pytest.mark.parametrize("kind", ["gaussian", "bernoulli"])
def test_beside_a_likelihood_a_beta_of_1_makes_the_negative_elbo(kind: Any) -> None:
    model = HierarchicalVQVAE(SMALL, 8, 1, GaussianConfig(beta=1.0))
    images, noise = torch.rand(3, 1, 8, 8) * 2 - 1, [torch.randn(3, 2, 1, 1)]
    output = model(images, noise)
    loss = TokenizerLoss(kind, model.bottleneck.weights(1, 64), 0.4)
    assert output.logits is not None
    found = loss(output.logits if kind == "bernoulli" else output.reconstruction, images, [output.levels[0].losses])
    shape = torch.distributions.Bernoulli(logits=output.logits)
    if kind == "gaussian":
        nats = -torch.distributions.Normal(output.reconstruction, 0.4).log_prob(images)
    else:  # of values between 0 and 1 the mean over what they may be
        target = (images + 1) / 2
        nats = -(target * shape.log_prob(torch.ones(())) + (1 - target) * shape.log_prob(torch.zeros(())))
    elbo = -nats.flatten(1).sum(1) - output.levels[0].losses["kl"]
    assert float(found.detach() * 64) == pytest.approx(float(-elbo.detach().mean()), rel=1e-5)


def test_a_share_of_a_weight_is_that_share_of_the_loss() -> None:
    images, losses = torch.zeros(2, 1, 4, 4), [{"kl": torch.tensor([2.0, 4.0])}]
    assert TokenizerLoss("mse", {"kl": 0.5})(images, images, losses, {"kl": 0.25}).item() == 0.5 * 0.25 * 3


def test_a_decoder_of_logits_stays_in_range_and_what_it_decodes_is_its_reconstruction(tmp_path: Path) -> None:
    model = HierarchicalVQVAE(SMALL, 8, 1, GaussianConfig())
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(30)
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    for output in (model(images), model.eval()(images)):
        assert output.logits is not None and float(output.logits.detach().abs().max()) > 5
        assert torch.allclose((output.reconstruction + 1) / 2, torch.sigmoid(output.logits), atol=1e-6)
    assert torch.allclose(model.decode(model.encode(images)), output.reconstruction)
    model.save_pretrained(tmp_path)
    assert HierarchicalVQVAE.from_pretrained(tmp_path).config.sigmoid
    assert "sigmoid" not in HierarchicalVQVAE(replace(SMALL, sigmoid=False), 8, 1).settings


def test_a_loss_that_the_decoder_or_the_scale_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bernoulli needs a decoder of logits; set tokenizer\.model\.sigmoid to true"):
        TokenizerSection(loss="bernoulli")
    with pytest.raises(ValueError, match="loss_scale is of the loss gaussian, and the loss is mse"):
        TokenizerSection(loss_scale=0.1)
    with pytest.raises(ValueError, match="loss_scale must not be negative, got -1"):
        TokenizerSection(loss="gaussian", loss_scale=-1)


def test_a_learned_scale_is_kept_in_checkpoints_and_in_no_model(
    tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    changes = {
        "images": {"from": str(tiny_run.parent / "run" / "images")},
        "tokenizer": {"bottleneck": "gaussian", "loss": "gaussian", "gaussian": {"beta": 1.0, "beta_warmup": 3}},
        "prior": {"network": "auto"},
    }
    folder = write_config(tmp_path, changes).parent / "run" / "tokenizer"
    Run(load_config(tmp_path / "config.yaml")).stage("train-tokenizer")
    figures = json.loads((folder / "metrics.json").read_text())
    kept = WholeCheckpoints().load_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]["loss.log_scale"]
    assert figures["val_loss_scale"] == pytest.approx(float(kept.exp()), rel=1e-4) != FIRST_SCALE
    kl = sum(figures[f"val_level{level}_kl"] for level in (0, 1))
    assert figures["val_loss"] == pytest.approx(figures["val_nll"] + kl / 256)  # of the whole beta
    scale = figures["val_loss_scale"]
    nll = figures["val_mse"] / (2 * scale**2) + math.log(scale * math.sqrt(2 * math.pi))
    assert figures["val_nll"] == pytest.approx(nll, rel=1e-5)
    assert not any("scale" in name for name in HierarchicalVQVAE.from_pretrained(folder).tensors())
