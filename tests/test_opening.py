"""The reference that samples are held against, and features of real images in the cache."""

from copy import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.errors import StageError
from pipelines.metrics.features import Features, load_features
from pipelines.metrics.gathered import SplitFeatures
from pipelines.metrics.opening import ReferenceImages, open_reference
from pipelines.metrics.subject import Split, Subject, batches
from pipelines.storage.cache import Cache

PIXELS = np.random.default_rng(0).integers(0, 256, (70, 4, 4, 1), dtype=np.uint8)


@pytest.fixture(scope="module")
def space() -> Features:
    return load_features("pixels", 4, 1)


def as_inception(space: Features) -> Features:
    named = copy(space)
    named.name = "inception"
    return named


def subject_with(split: Split, space: Features, cache: Cache) -> Subject:
    splits = {"real": split}
    return Subject(splits, None, None, {}, space, None, 16, 0, torch.device("cpu"), cache, {})


def test_an_adm_batch_is_read_as_images(tmp_path: Path, space: Features, cache: Cache) -> None:
    np.savez(tmp_path / "batch.npz", arr_0=PIXELS)
    split, moments = open_reference(tmp_path / "batch.npz", space, 4, 1)
    assert moments is None and split.count == 70
    (first, second) = batches(subject_with(split, space, cache), split)
    assert np.array_equal(np.concatenate([first.pixels, second.pixels]), PIXELS.transpose(0, 3, 1, 2))
    assert first.keys[:2] == ["0", "1"]


def test_moments_count_where_images_are_compared_by_inception(tmp_path: Path, space: Features, cache: Cache) -> None:
    mean, covariance = np.arange(space.num_features) * 1.0, np.eye(space.num_features)
    np.savez(tmp_path / "moments.npz", mu=mean, sigma=covariance)
    split, moments = open_reference(tmp_path / "moments.npz", as_inception(space), 4, 1)
    subject = subject_with(split, space, cache)._replace(moments=moments)
    assert subject.there() == {"real.moments"}  # only FID can be had
    assert np.array_equal(subject.real_moments().mean, mean)
    with pytest.raises(StageError, match=r"must hold images as arr_0, or mu and sigma .* evaluate.features is pixels"):
        open_reference(tmp_path / "moments.npz", space, 4, 1)


def test_a_reference_that_is_none_is_told(tmp_path: Path, space: Features) -> None:
    (tmp_path / "text.npz").write_text("no batch")
    with pytest.raises(StageError, match=r"evaluate.reference must be an ADM batch, FILE.npz; .*text.npz"):
        open_reference(tmp_path / "text.npz", space, 4, 1)
    np.savez(tmp_path / "cut.npz", arr_0=np.zeros((2, 4, 4, 1), np.uint8))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:150])
    np.save(tmp_path / "array.npy", np.zeros((2, 4, 4, 1), np.uint8))
    for name in ("cut.npz", "array.npy"):
        with pytest.raises(StageError, match=f"{name} cannot be read"):
            open_reference(tmp_path / name, space, 4, 1)
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(StageError, match=r"must hold uint8 images of \(4, 4, 1\), .*uint8 of \(8, 8, 3\)"):
        open_reference(tmp_path / "large.npz", space, 4, 1)


def test_features_of_real_images_are_computed_once(
    space: Features, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gathered(about: dict) -> torch.Tensor:
        split = Split("real", np.arange(70), ReferenceImages(PIXELS), None, about)
        subject = subject_with(split, space, cache)
        features = SplitFeatures(subject, split, reconstructed=False)
        for seen in batches(subject, split):
            features.update(seen)
        return features.compute()

    found = gathered({"sha256": "a"})
    whole = space(torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).copy()) / 127.5 - 1)
    assert torch.equal(found, whole)
    monkeypatch.setattr(Features, "forward", lambda self, images: 1 / 0)
    assert torch.equal(gathered({"sha256": "a"}), found)
    with pytest.raises(ZeroDivisionError):
        gathered({"sha256": "b"})
