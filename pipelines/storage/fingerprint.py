"""Fingerprints: which model, which settings, which bytes.

They outlive the version that took them. What a format-1 file holds is hashed as it was then, for ever; a setting that
came later, `field(..., metadata={"introduced": value})`, counts only where it is not the value under which it was
introduced, which never changes, whatever becomes of the default.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from pipelines.errors import StageError
from prior import HierarchicalPrior, LevelPrior
from tokenizer import HierarchicalVQVAE
from tokenizer.files import told


def digest(settings: Any) -> str:
    """Return the sha256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hashed(settings: Any) -> Any:
    """Return dataclasses as plain data, without the later settings that have the value of their introduction."""
    if is_dataclass(settings) and not isinstance(settings, type):
        named = {field.name: (getattr(settings, field.name), field.metadata) for field in fields(settings)}
        return {
            name: hashed(value)
            for name, (value, metadata) in named.items()
            if "introduced" not in metadata or hashed(value) != metadata["introduced"]
        }
    if isinstance(settings, Mapping):
        return {name: hashed(value) for name, value in settings.items()}
    return [hashed(value) for value in settings] if isinstance(settings, list | tuple) else settings


def introduced(section: type) -> dict[str, Any]:
    """Return what settings that came later were when they came: what `hashed` leaves out, section by section."""
    found: dict[str, Any] = {}
    for field in fields(section):
        if "introduced" in field.metadata:
            found[field.name] = field.metadata["introduced"]
        elif isinstance(field.default_factory, type) and is_dataclass(field.default_factory):
            found[field.name] = introduced(field.default_factory)
    return found


def fingerprint(tensors: Mapping[str, Tensor], settings: dict) -> str:
    """Return the sha256 over a model's tensors in the order of their names, and its inference settings.

    Args:
        tensors: of a tokenizer or a prior, all that serve inference, by the names that files have.
        settings: what inference needs besides them.
    """
    sha = hashlib.sha256(digest(settings).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def tokenizer_fingerprint(tokenizer: HierarchicalVQVAE) -> str:
    """Return the fingerprint of a tokenizer."""
    images = {"image_size": tokenizer.image_size, "channels": tokenizer.channels}
    images |= {"num_classes": tokenizer.num_classes} if tokenizer.num_classes else {}
    return fingerprint(tokenizer.tensors(), images | hashed(tokenizer.config) | told(tokenizer.bottleneck))


def prior_fingerprint(level: LevelPrior) -> str:
    """Return the fingerprint of one level's prior."""
    return fingerprint(level.state_dict(), hashed(level.config))


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Return what a manifest is named by in that which is made from it: the same for receipts of before `format: 1`."""
    splits = {
        split: [{key: value for key, value in receipt.items() if (key, value) != ("format", 1)} for receipt in receipts]
        for split, receipts in manifest["splits"].items()
    }
    return digest({**manifest, "splits": splits})


def model_fingerprints(tokenizer: HierarchicalVQVAE, prior: HierarchicalPrior) -> dict[str, str]:
    """Return what receipts and manifest of samples name their models by: "tokenizer", "prior0", "prior1", …"""
    levels = {f"prior{number}": prior_fingerprint(level) for number, level in enumerate(prior.levels)}
    return {"tokenizer": tokenizer_fingerprint(tokenizer), **levels}


def check_belong_together(prior: HierarchicalPrior, tokenizer: str) -> None:
    """Raise StageError, naming both, unless the prior learned codes with this fingerprint."""
    learned = prior.levels[0].config.tokenizer
    if learned != tokenizer:
        raise StageError(
            f"the prior learned codes of tokenizer {learned[:12]} but this tokenizer is {tokenizer[:12]}: "
            "its images would be plausible noise; run `smalti encode` and `smalti train-prior` with this tokenizer"
        )
