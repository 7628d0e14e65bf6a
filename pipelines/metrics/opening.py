"""What there is of a run, opened for `evaluate`: models, splits, and the reference that samples are held against."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pipelines.compute.devices import ComputeConfig, inference_device
from pipelines.data.batches import epoch_permutation
from pipelines.data.codes import Codes
from pipelines.data.images import ImageShards
from pipelines.data.samples import Samples
from pipelines.errors import StageError
from pipelines.metrics.distances import Moments
from pipelines.metrics.features import Features, load_features
from pipelines.metrics.subject import Split, Subject
from pipelines.storage.fingerprint import (
    check_belong_together,
    manifest_digest,
    prior_fingerprint,
    tokenizer_fingerprint,
)
from pipelines.storage.manifest import read_manifest
from prior import HierarchicalPrior
from tokenizer import HierarchicalVQVAE


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What samples and reconstructions are held against, and in which features; shapes nothing but `metrics.json`.

    Attributes:
        features: the space in which images are compared: pixels, imagenet-lite, inception or inception:FILE, dinov2 or
            dinov2:FOLDER, FILE.pt of TorchScript or TIMM_NAME:FILE.safetensors.
        reference: an ADM batch, FILE.npz, that samples are held against; empty for the training images.
        train_images: training images that are looked at, at most; chosen by seed where there are more.
        importance_samples: draws per image for importance-weighted bounds of what is drawn from q(z | x), each through
            tokenizer and prior; 0 for none. Nothing of codes that are not drawn.
        skip: metrics to leave out, by their names in `metrics.json`: classification trains two small classifiers.
    """

    features: str = "pixels"
    reference: str = ""
    train_images: int = 50_000
    importance_samples: int = field(default=100, metadata={"introduced": 100})
    skip: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.features:
            raise ValueError("evaluate.features must name a feature space; pixels is the plainest")
        if self.train_images < 1:
            raise ValueError(f"evaluate.train_images must be at least 1, got {self.train_images}")
        if self.importance_samples < 0:
            raise ValueError(f"evaluate.importance_samples must not be negative, got {self.importance_samples}")


class Models(NamedTuple):
    """Models in eval mode, as far as they are there."""

    tokenizer: HierarchicalVQVAE | None
    prior: HierarchicalPrior | None


class Folders(NamedTuple):
    """What a run has besides models.

    Attributes:
        images: if there are some; only with a tokenizer.
        codes: read only for a prior, and made from these images by this tokenizer, where they are there.
        unpacked: local folder for the unpacked codes.
        samples: if there are some of these models; only with both.
    """

    images: Path | None
    codes: Path
    unpacked: Path
    samples: Path | None


def open_subject(config: EvaluateConfig, seed: int, compute: ComputeConfig, models: Models, there: Folders) -> Subject:
    """Open what there is of a run.

    Raises:
        StageError: it does not belong together, there is no such feature space, or the reference is none.
    """
    device = inference_device(compute)
    tokenizer, prior = models
    if prior:
        check_belong_together(prior, read_manifest(there.codes, "codes", "encode")["tokenizer"])
    splits = {name: _split(name, config, seed, compute, models, there) for name in ("val", "train")}
    val = splits["val"]
    if not val.count:
        raise StageError(f"{there.images or there.codes} holds nothing of the val split; set images.val_fraction")
    size, channels = _size(val, there)
    if there.samples and tokenizer:
        drawn = Samples(there.samples, tokenizer.levels, compute.cache)
        manifest = read_manifest(there.samples, "samples", "sample")
        about: dict[str, Any] = {"fingerprints": manifest["fingerprints"], "settings": manifest["settings"]}
        about["samples"] = manifest_digest(manifest)
        splits["samples"] = Split("samples", np.arange(len(drawn)), drawn, drawn, about)
    features, moments = None, None
    if any(split.images for split in splits.values()):
        features = load_features(config.features, size, channels).to(device)
    if config.reference and features:
        reference, moments = open_reference(Path(config.reference), features, size, channels)
        splits["real"] = reference
    elif splits["train"].images:
        splits["real"] = splits["train"]
    tokenizer, prior = tokenizer and tokenizer.to(device), prior and prior.to(device)
    dims = channels * size**2
    marks = {"tokenizer": tokenizer_fingerprint(tokenizer)} if tokenizer else {}
    marks |= {f"prior{number}": prior_fingerprint(level) for number, level in enumerate(prior.levels if prior else ())}
    draws, cache = config.importance_samples, compute.cache
    return Subject(splits, tokenizer, prior, marks, features, moments, dims, seed, device, cache, {}, draws)


def _split(
    name: str, config: EvaluateConfig, seed: int, compute: ComputeConfig, models: Models, there: Folders
) -> Split:
    images = ImageShards(there.images, name, compute.cache) if there.images else None
    codes = Codes(there.codes, name, there.unpacked, compute.cache) if models.prior else None
    views, about = 1, {}
    if codes:
        manifest = read_manifest(there.codes, "codes", "encode")
        views = len(manifest.get("views", [0])) if name == "train" else 1
        about = {"images": manifest["made_from"], "preprocessing": manifest.get("preprocessing")}
    if images and there.images:
        packed = read_manifest(there.images, "images", "pack")
        about = {"images": manifest_digest(packed), "preprocessing": packed["preprocessing"]}
        tokenizer = models.tokenizer
        if tokenizer and (images.size, images.channels) != (tokenizer.image_size, tokenizer.channels):
            raise StageError(f"the tokenizer does not read images of {there.images}: other size or channels")
        if codes and len(codes) != views * len(images):
            raise StageError(f"{there.images} holds {len(images)} images but {len(codes)} codes of them are there")
    about |= {"split": name}
    count = len(images) if images else len(codes or ()) // views
    rows = np.arange(count) if name == "val" else epoch_permutation(seed, 0, (count,))[: config.train_images]
    return Split(name, rows, images, codes, about | ({"chosen_with_seed": seed} if len(rows) < count else {}), views)


def _size(val: Split, there: Folders) -> tuple[int, int]:
    """Return side and channels of the images."""
    if val.images:
        return val.images.size, val.images.channels
    manifest = read_manifest(there.codes, "codes", "encode")
    return manifest["image_size"], manifest["channels"]


class ReferenceImages:
    """Images of an ADM batch, by index.

    Args:
        pixels: uint8 (N, H, W, C).
    """

    def __init__(self, pixels: np.ndarray) -> None:
        self.array = pixels

    def key(self, index: int) -> str:
        """Return its number."""
        return str(index)

    def pixels(self, index: int) -> np.ndarray:
        """Return uint8 (C, H, W)."""
        return np.ascontiguousarray(self.array[index].transpose(2, 0, 1))


def open_reference(path: Path, features: Features, size: int, channels: int) -> tuple[Split, Moments | None]:
    """Open an ADM batch: uint8 images (N, H, W, C) in `arr_0`, Inception's moments in `mu` and `sigma`, or both.

    The moments count with Inception's features, as in ADM's own evaluator. Where a file has nothing else, only FID can
    be had of it.

    Args:
        path: of the npz file.
        features: the space that images are compared in.
        size: of the run's images, in pixels a side.
        channels: of the run's images.

    Raises:
        StageError: it is no such file, or its images are of another size.
    """
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            with np.load(file, allow_pickle=False) as held:
                found: dict[str, Any] = {name: held[name] for name in ("arr_0", "mu", "sigma") if name in held}
    except Exception as error:  # numpy and zipfile raise many kinds
        raise StageError(
            f"evaluate.reference must be an ADM batch, FILE.npz; {path} cannot be read: {error}"
        ) from error
    images, moments = found.get("arr_0"), None
    if images is not None and (images.dtype != np.uint8 or images.shape[1:] != (size, size, channels)):
        raise StageError(
            f"evaluate.reference must hold uint8 images of {(size, size, channels)}, as the run's are; "
            f"{path} holds {images.dtype} of {images.shape[1:]}; take or make the batch that is like them"
        )
    if {"mu", "sigma"} <= found.keys() and features.name.startswith("inception"):
        mean, covariance = (torch.from_numpy(found[name]).double() for name in ("mu", "sigma"))
        if (mean.shape, covariance.shape) != ((features.num_features,), (features.num_features,) * 2):
            raise StageError(f"mu and sigma of {path} must be of {features.num_features} features")
        moments = Moments(mean, covariance, 0)
    if images is None and moments is None:
        raise StageError(
            f"{path} must hold images as arr_0, or mu and sigma of Inception's features and evaluate.features be "
            f"inception; it holds {', '.join(found) or 'neither'}, and evaluate.features is {features.name}"
        )
    about = {"reference": path.name, "sha256": sha256, "moments_of_the_file": moments is not None}
    count = 0 if images is None else len(images)
    held_images = None if images is None else ReferenceImages(images)
    return Split("real", np.arange(count), held_images, None, about), moments
