"""Fingerprints: which model, which settings, which bytes."""

import hashlib
import json
from typing import Any

from torch import nn


def digest(settings: Any) -> str:
    """Return the sha256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fingerprint(model: nn.Module, settings: dict) -> str:
    """Return the sha256 over a model's tensors in the order of their names, and its inference settings.

    Args:
        model: a tokenizer or a prior; all tensors of its state dict serve inference.
        settings: what inference needs besides them.
    """
    sha = hashlib.sha256(digest(settings).encode())
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()
