import pytest
import torch
import torch.nn.functional as F

from tokenizer import Codebook


def test_the_quantized_value_is_the_code_vector_and_its_gradient_that_of_the_latent() -> None:
    codebook = Codebook(16, 4)
    latents = torch.randn(2, 4, 3, 5, requires_grad=True)
    output = codebook(latents)
    assert torch.equal(output.seen, codebook.lookup(output.stored))
    (gradient,) = torch.autograd.grad(output.seen.pow(3).sum(), latents)
    assert torch.allclose(gradient, 3 * output.seen.detach() ** 2)


def test_commitment_is_the_mean_squared_distance_and_moves_only_the_latents() -> None:
    codebook = Codebook(16, 4)
    latents = torch.randn(2, 4, 3, 5, requires_grad=True)
    output = codebook(latents)
    assert torch.allclose(output.losses["commitment"].mean(), F.mse_loss(latents, codebook.lookup(output.stored)))
    output.losses["commitment"].mean().backward()
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0
    assert not codebook.vectors.requires_grad
    assert not list(codebook.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_looking_up_changes_no_buffer(training: bool) -> None:
    codebook = Codebook(16, 4).train(training)
    before = codebook.vectors.clone()
    codebook(torch.randn(2, 4, 3, 5))
    assert torch.equal(codebook.vectors, before)


def test_codes_are_looked_up_in_float32_under_autocast() -> None:
    codebook = Codebook(2048, 2)
    codebook.vectors.copy_(torch.stack([torch.arange(2048.0), torch.zeros(2048)], 1))
    latents = torch.tensor([1001.0, 0.0]).view(1, 2, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        output = codebook(latents)
    assert output.stored[0].item() == 1001
    assert output.seen.dtype == torch.float32


def test_normalized_latents_find_the_code_at_the_smallest_angle() -> None:
    codebook = Codebook(32, 4, normalize=True)
    latents = 7 * torch.randn(3, 4, 2, 2)
    angles = F.cosine_similarity(latents[:, None], codebook.vectors[None, :, :, None, None], dim=2)
    assert torch.equal(codebook(latents).stored[0], angles.argmax(1))


def test_normalized_codes_stay_of_unit_length_when_weights_are_averaged() -> None:
    codebook = Codebook(32, 4, normalize=True)
    codebook.vectors.mul_(torch.rand(32, 1) + 0.5)
    assert torch.allclose(codebook.lookup([torch.arange(32).view(1, 4, 8)]).norm(dim=1), torch.ones(1, 4, 8))
    latents = torch.randn(3, 4, 2, 2)
    angles = F.cosine_similarity(latents[:, None], codebook.vectors[None, :, :, None, None], dim=2)
    assert torch.equal(codebook(latents).stored[0], angles.argmax(1))


def test_wrong_channels_and_codes_out_of_range_are_refused() -> None:
    codebook = Codebook(16, 4)
    with pytest.raises(ValueError, match="must have code_dim 4 channels, got 5"):
        codebook(torch.randn(1, 5, 2, 2))
    with pytest.raises(ValueError, match=r"codes must lie in \[0, 16\), got 0 to 16"):
        codebook.lookup([torch.tensor([[[0, 16]]])])
