import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokenizer import CodebookConfig, CodebookEMA, HierarchicalVQVAE, TokenizerConfig, TokenizerLoss
from tokenizer.ema import assignment_statistics


def tiny(strides: list[int], channels: int = 3, **changes: object) -> HierarchicalVQVAE:
    sizes = {"codebook_size": 16, "code_dim": 4, "width": 8, "residual_width": 4, "residual_blocks": 1}
    return HierarchicalVQVAE(TokenizerConfig(strides=strides, **sizes | changes), 16, channels)  # type: ignore[arg-type]


STRIDES = [[4], [8, 4], [8, 2], [16, 8, 4]]


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("channels", [1, 3])
def test_decode_of_encode_is_the_reconstruction(strides: list[int], channels: int) -> None:
    model = tiny(strides, channels).eval()
    images = torch.rand(2, channels, 16, 16) * 2 - 1
    codes = model.encode(images)
    assert [tuple(code.shape) for code in codes] == [(2, 16 // s, 16 // s) for s in strides]
    output = model(images)
    assert torch.equal(model.decode(codes), output.reconstruction)
    assert output.reconstruction.shape == images.shape
    assert float(output.reconstruction.detach().abs().max()) <= 1


@pytest.mark.parametrize("training", [True, False])
def test_forward_changes_no_buffer(training: bool) -> None:
    model = tiny([8, 4]).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(torch.rand(2, 3, 16, 16))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_quantisation_runs_coarse_to_fine() -> None:
    """Another coarse codebook changes the finer latents; another fine one leaves the coarse codes alone."""
    model, images = tiny([8, 4]).eval(), torch.rand(2, 3, 16, 16)
    before = model(images).levels
    model.codebooks[1].vectors.mul_(-1)
    assert torch.equal(model(images).levels[0].latents, before[0].latents)
    model.codebooks[0].vectors.mul_(-1)
    assert not torch.equal(model(images).levels[1].latents, before[1].latents)


def test_every_level_and_parameter_shapes_the_loss() -> None:
    model = tiny([16, 8, 4])
    images = torch.rand(4, 3, 16, 16)
    output = model(images)
    TokenizerLoss("mse", 0.25)(output.reconstruction, images, [level.commitment for level in output.levels]).backward()
    unmoved = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not unmoved


def test_the_commitment_gradient_reaches_no_decoder() -> None:
    model = tiny([8, 4])
    sum(level.commitment for level in model(torch.rand(4, 3, 16, 16)).levels).backward()
    assert all(parameter.grad is None for parameter in model.decoder.parameters())
    assert all(parameter.grad is None for parameter in model.upsamplers.parameters())
    assert all(parameter.grad is not None for parameter in model.encoders.parameters())


def test_commitment_weighs_the_same_at_any_batch_size() -> None:
    model = tiny([8, 4]).eval()
    images = torch.rand(1, 3, 16, 16)
    one, four = model(images), model(images.expand(4, -1, -1, -1))
    assert torch.allclose(one.levels[0].commitment, four.levels[0].commitment)


def test_a_tiny_tokenizer_overfits_eight_images_tenfold() -> None:
    model = tiny([8, 4], width=32, residual_width=16, codebook_size=64, code_dim=16)
    emas = [CodebookEMA(book, CodebookConfig(ema_decay=0.9, revival_threshold=0.2)) for book in model.codebooks]
    images = torch.nn.functional.interpolate(torch.rand(8, 3, 4, 4) * 2 - 1, size=16, mode="bilinear")
    loss_of, optimizer = TokenizerLoss("mse", 0.25), torch.optim.Adam(model.parameters(), 3e-3)
    errors = []
    for number in range(250):
        output = model(images)
        loss = loss_of(output.reconstruction, images, [level.commitment for level in output.levels])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for book, ema, level in zip(model.codebooks, emas, output.levels, strict=True):
            if number == 0:
                ema.start(book, level.latents, 0)
            ema.update(
                book, assignment_statistics(level, 64, level.latents[torch.randperm(len(level.latents))[:16]]), 10**6
            )
        errors.append(float((output.reconstruction - images).detach().square().mean()))
    assert errors[-1] < errors[0] / 10


def test_the_top_level_alone_can_be_decoded() -> None:
    model = tiny([8, 4]).eval()
    codes = model.encode(torch.rand(2, 3, 16, 16))
    assert model.decode(codes[:1]).shape == (2, 3, 16, 16)


def test_saving_and_loading_gives_the_same_codes(tmp_path: Path) -> None:
    model, images = tiny([8, 4]).eval(), torch.rand(2, 3, 16, 16)
    model.save_pretrained(tmp_path)
    loaded = HierarchicalVQVAE.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.settings == model.settings
    assert "2x2 codes of 16, 4x4 codes of 16" in (tmp_path / "README.md").read_text()
    assert all(torch.equal(a, b) for a, b in zip(model.encode(images), loaded.encode(images), strict=True))


def test_a_file_that_lacks_the_codebook_is_refused(tmp_path: Path) -> None:
    tiny([8, 4]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["codebooks.1.vectors"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks, adds or reshapes 1 tensors, first codebooks\.1\.vectors"):
        HierarchicalVQVAE.from_pretrained(tmp_path)


def test_a_broken_or_foreign_model_folder_is_refused(tmp_path: Path) -> None:
    tiny([8, 4]).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"surprise": 1}))
    with pytest.raises(ValueError, match="must hold exactly the settings"):
        HierarchicalVQVAE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="holds no readable tokenizer"):
        HierarchicalVQVAE.from_pretrained(tmp_path)


def test_a_misspelt_path_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("runs/digitz", "runs/digits/tokenizer", "./nowhere", "/nowhere/at/all"):
        with pytest.raises(ValueError, match="there is no such folder"):
            HierarchicalVQVAE.from_pretrained(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strides": []}, "at least one level"),
        ({"strides": [6, 3]}, "powers of two from 2 on, got 6"),
        ({"strides": [4, 8]}, "fall from coarse to fine"),
        ({"strides": [8, 4], "codebook_size": [1, 2, 3]}, "one value per level"),
        ({"strides": [8, 4], "codebook_size": 1}, "at least 2 codes"),
        ({"width": 0}, "width must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizerConfig(**changes)


def test_wrong_images_and_codes_are_refused() -> None:
    model = tiny([8, 4])
    with pytest.raises(ValueError, match="8 does not divide 20"):
        HierarchicalVQVAE(model.config, 20, 3)
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 16, 16\), got \(1, 1, 16, 16\)"):
        model.encode(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match=r"level 1 codes must be \(B, 4, 4\), got \(1, 2, 2\)"):
        model.decode([torch.zeros(1, 2, 2, dtype=torch.int64)] * 2)
    with pytest.raises(ValueError, match="1 to 2 levels, got 3"):
        model.decode([torch.zeros(1, 2, 2, dtype=torch.int64)] * 3)
