"""The classifier of a run's classes, in its folder: made once of its training images, for `sample.reject` to choose by.

C channels, H W pixels.
"""

import json
import logging
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.compute.devices import ComputeConfig, inference_device
from pipelines.data.batches import epoch_permutation
from pipelines.data.images import ImageShards
from pipelines.errors import StageError
from pipelines.metrics.classifier import SIDE, STEPS, Classifier, train_classifier
from pipelines.metrics.copies import shrunk
from pipelines.progress import counted, progress_bar
from pipelines.storage.fingerprint import fingerprint, manifest_digest
from pipelines.storage.manifest import read_manifest
from pipelines.storage.paths import exists, make_folder, read_bytes, whole, write_json
from pipelines.storage.shards import read_member

logger = logging.getLogger(__name__)

# Training images that it learns from at most, chosen by seed.
TRAIN_IMAGES = 50_000
# Beside its weights; the weights come last and make it whole.
CONFIG, WEIGHTS = "config.json", "model.safetensors"


class StoredClassifier(NamedTuple):
    """A classifier in eval mode, and its fingerprint."""

    model: Classifier
    fingerprint: str


def classifier_of(folder: Path, images: Path, seed: int, compute: ComputeConfig) -> StoredClassifier:
    """Return the classifier of a run, trained and stored first where there is none.

    Args:
        folder: of the classifier.
        images: folder whose train split it is of.
        seed: of its training.
        compute: where it is trained.

    Raises:
        StageError: the images have no classes, the stored one is of other images, or its files are not whole.
    """
    manifest = read_manifest(images, "images", "pack")
    if not manifest["class_names"]:
        raise StageError(f"sample.reject chooses by class, but {images} has no classes; set it to 1")
    of = {"channels": manifest["channels"], "class_names": manifest["class_names"], "images": manifest_digest(manifest)}
    if not exists(folder / WEIGHTS):
        logger.info("sample: %s: a classifier is trained for sample.reject, %s", folder, counted(STEPS, "step"))
        pixels, labels = labelled_images(ImageShards(images, "train", compute.cache), seed)
        device = inference_device(compute)
        model = train_classifier(pixels.to(device), labels.to(device), len(manifest["class_names"]), seed).cpu()
        if not exists(folder / WEIGHTS):  # another process of the job may have been faster
            _store(model, of | {"format": 1, "kind": "classifier", "seed": seed, "steps": STEPS}, folder)
    stored = load_classifier(folder)
    told = json.loads(read_bytes(folder / CONFIG))
    if any(told.get(key) != value for key, value in of.items()):
        raise StageError(
            f"{folder} must be of the run's images, but was trained on others than {images} holds; "
            "remove it, and `smalti sample` trains another"
        )
    return stored


def load_classifier(folder: Path) -> StoredClassifier:
    """Load a stored classifier.

    Raises:
        StageError: its files are not what was stored.
    """
    try:
        told = json.loads(read_bytes(folder / CONFIG))
        model = Classifier(told["channels"], len(told["class_names"]))
        with tempfile.TemporaryDirectory() as local:  # the folder may lie in a store
            (Path(local) / WEIGHTS).write_bytes(read_bytes(folder / WEIGHTS))
            model.load_state_dict(load_file(Path(local) / WEIGHTS))
    except Exception as error:  # safetensors, json and torch raise their own kinds
        raise StageError(
            f"{folder} holds no whole classifier ({error}); remove it, and sample makes another"
        ) from error
    return StoredClassifier(model.eval(), fingerprint(model.state_dict(), {"class_names": told["class_names"]}))


def labelled_images(shards: ImageShards, seed: int) -> tuple[Tensor, Tensor]:
    """Return training images, uint8 (N, C, H, W) of at most 32 pixels a side, and their classes, int64 (N,)."""
    rows = np.sort(epoch_permutation(seed, 0, (len(shards),))[:TRAIN_IMAGES])  # in the order in which they lie
    pixels, labels = [], []
    with progress_bar(len(rows), "read for the classifier", "images") as bar:
        for index in rows.tolist():
            path, sample = shards.sample(index)
            with path.open("rb") as file:
                labels.append(int(read_member(file, sample.members["cls"])))
            pixels.append(shrunk(torch.from_numpy(np.array(shards.pixels(index)))[None], SIDE))
            bar.update()
    return torch.cat(pixels), torch.tensor(labels)


def _store(model: Classifier, told: dict, folder: Path) -> None:
    make_folder(folder)
    write_json(folder / CONFIG, told)
    with tempfile.TemporaryDirectory() as local, whole(folder / WEIGHTS) as temporary:
        tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(tensors, Path(local) / WEIGHTS)
        temporary.write_bytes((Path(local) / WEIGHTS).read_bytes())
