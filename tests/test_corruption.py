"""Images that are spoilt at random: how, and by whom they are seen."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.config import load_config
from pipelines.data.corruption import corrupted
from pipelines.data.images import AugmentConfig, ImageShards, to_unit_range
from pipelines.data.noise import BatchNoise
from pipelines.run import Run
from pipelines.storage.cache import Cache
from tokenizer import HierarchicalVQVAE

KINDS = ("noise", "mask", "salt")


def spoilt(images: Tensor, kind: str, strength: float = 0.3, step: int = 0, first: int = 0, patch: int = 4) -> Tensor:
    places = range(first, first + len(images))
    augment = AugmentConfig(corrupt=kind, corrupt_strength=strength, corrupt_patch=patch)  # type: ignore[arg-type]
    return corrupted(images, augment, BatchNoise(1, step, places, torch.device("cpu")))


@pytest.mark.parametrize("kind", KINDS)
def test_what_spoils_an_image_belongs_to_its_place_and_step(kind: str) -> None:
    images = torch.rand(6, 3, 10, 10) * 2 - 1
    together = spoilt(images, kind)
    assert torch.equal(together, torch.cat([spoilt(images[:4], kind), spoilt(images[4:], kind, first=4)]))
    assert not torch.equal(together, spoilt(images, kind, step=1))
    assert torch.equal(spoilt(images, kind, strength=0.0), images)
    assert torch.equal(spoilt(images, "none"), images)


def test_noise_is_as_strong_as_asked_and_hidden_pixels_and_patches_are_as_many() -> None:
    images = torch.full((200, 3, 10, 10), 0.5)
    noise = spoilt(images, "noise", 0.2) - images
    assert float(noise.mean()) == pytest.approx(0, abs=0.01) and float(noise.std()) == pytest.approx(0.2, rel=0.02)
    salted = spoilt(images, "salt", 0.4)
    for value, share in ((1.0, 0.2), (-1.0, 0.2), (0.5, 0.6)):
        assert float((salted == value).float().mean()) == pytest.approx(share, abs=0.02)
    masked = spoilt(images, "mask", 0.4)
    assert float((masked == 0).float().mean()) == pytest.approx(0.4, abs=0.04)
    assert ((masked == 0) | (masked == 0.5)).all()
    for one in (salted, masked):
        assert torch.equal(one[:, :1].expand_as(one), one)  # all channels alike
    corner = masked[:, 0, :4, :4].flatten(1)  # the last patches are cut off by the edge
    assert torch.equal(corner[:, :1].expand_as(corner), corner)


def test_shares_beyond_all_and_patches_of_nothing_are_refused() -> None:
    assert AugmentConfig(corrupt="noise", corrupt_strength=2.0).corrupt_strength == 2
    with pytest.raises(ValueError, match=r"corrupt_strength must lie in \[0, 1.0\], got 2"):
        AugmentConfig(corrupt="mask", corrupt_strength=2.0)
    with pytest.raises(ValueError, match="corrupt_patch must be at least 1, got 0"):
        AugmentConfig(corrupt_patch=0)


def test_a_denoiser_restores_what_is_corrupted_better_than_one_that_never_saw_it(
    tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path], cache: Cache
) -> None:
    images = tiny_run.parent / "run" / "images"
    val = ImageShards(images, "val", cache)
    clean = to_unit_range(torch.from_numpy(np.stack([val.pixels(index) for index in range(len(val))])))
    salted, found, figures = spoilt(clean, "salt", 0.4), {}, {}
    for kind in ("salt", "none"):
        changes = {
            "images": {"from": str(images)},
            "tokenizer": {
                "bottleneck": "identity",
                "model": {"codebook_size": 16, "strides": [4, 2]},
                "augment": {"corrupt": kind, "corrupt_strength": 0.4},
                "training": {"steps": 100, "val_every": 100, "learning_rate": 3e-3},
            },
            "prior": {"network": "auto"},
        }
        run = write_config(tmp_path / kind, changes).parent / "run"
        Run(load_config(run.parent / "config.yaml")).stage("train-tokenizer")
        with torch.no_grad():
            restored = HierarchicalVQVAE.from_pretrained(run / "tokenizer")(salted).reconstruction
        found[kind] = float((restored - clean).square().mean())
        figures[kind] = json.loads((run / "tokenizer" / "metrics.json").read_text())
    assert found["salt"] < 0.7 * found["none"]
    assert figures["salt"]["val_mse_corrupted"] == pytest.approx(found["salt"], rel=0.1)  # of another noise
    assert figures["salt"]["val_mse"] < figures["salt"]["val_mse_corrupted"]
    assert "val_mse_corrupted" not in figures["none"]
