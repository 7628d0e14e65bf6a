"""One vector per image, of the few numbers that a classic autoencoder has: from images to samples."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tokenizer import HierarchicalVQVAE

Smalti = Callable[..., tuple[int, str]]


@pytest.mark.parametrize("kind", ["identity", "contractive", "gaussian", "ema"])
def test_one_vector_stands_for_an_image_from_images_to_samples(
    kind: str, tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti
) -> None:
    few = {"training": {"steps": 2, "val_every": 2}}
    model = {"strides": [16], "codebook_size": 16, "code_dim": 2}
    changes = {
        "images": {"from": str(tiny_run.parent / "run" / "images")},
        "tokenizer": {"bottleneck": kind, "model": model, **few},
        "prior": {"network": "auto", **few},
    }
    config = write_config(tmp_path, changes)
    code, said = smalti("run", config)
    assert code == 0 and "could not be made" not in (tmp_path / "run" / "report.html").read_text(), said
    ((grid, size, channels),) = HierarchicalVQVAE.from_pretrained(tmp_path / "run" / "tokenizer").levels
    assert grid == (1, 1) and (size or channels) == (16 if kind == "ema" else 2)
    assert json.loads((tmp_path / "run" / "samples" / "manifest.json").read_text())["count"] == 7
    code, said = smalti("verify", config)
    assert code == 0, said
