"""`sample.reject`: of several candidates the one that a classifier of the training images finds likeliest."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipelines.compute.devices import ComputeConfig
from pipelines.config import load_config
from pipelines.data.images import ImageShards
from pipelines.errors import StageError
from pipelines.finished import Finished
from pipelines.metrics.classifier import Classifier, judged
from pipelines.metrics.stored_classifier import classifier_of, labelled_images, load_classifier
from pipelines.report.gather import Gathered
from pipelines.stages.sample import SampleConfig, drawn_batches
from pipelines.stages.verify import verify_samples
from pipelines.storage.cache import Cache
from pipelines.storage.fingerprint import model_fingerprints
from tests.test_sample import draw, models

Smalti = Callable[..., tuple[int, str]]


@pytest.fixture
def judge() -> Classifier:
    torch.manual_seed(3)
    return Classifier(3, 2).eval()


def drawn(count: int = 6, batch_size: int = 6, judge: Classifier | None = None, reject: int = 1) -> list[torch.Tensor]:
    """Images and codes, fine level last, all samples after one another."""
    torch.manual_seed(0)
    tokenizer, prior = models()
    config = SampleConfig(count=count, batch_size=batch_size, reject=reject)
    with torch.no_grad():
        batches = list(drawn_batches(config, 5, [0, 1], tokenizer, prior, {}, 0, count, judge))
    return [
        torch.cat(parts)[:count] for parts in zip(*([batch.images, *batch.codes] for batch in batches), strict=True)
    ]


def test_the_likeliest_of_its_class_is_kept_and_the_first_is_what_is_drawn_without(judge: Classifier) -> None:
    def scores(found: list[torch.Tensor]) -> torch.Tensor:
        pixels = ((found[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return judged(judge, pixels)[range(6), [0, 1] * 3]

    one, *others = (drawn(judge=judge, reject=count) for count in (1, 2, 5))
    assert all(map(torch.equal, one, drawn()))  # one candidate: as ever
    steps = [scores(found) for found in (one, *others)]
    assert (steps[1] >= steps[0]).all() and (steps[2] >= steps[1]).all()
    assert (steps[1] > steps[0]).any() and (steps[1] == steps[0]).any()
    same = steps[1] == steps[0]
    assert all(torch.equal(mine[same], first[same]) for mine, first in zip(others[0], one, strict=True))
    torch.manual_seed(0)
    second = models()[1].sample(
        [0, 1] * 3, 5, indices=[2**40 + index for index in range(6)]
    )  # no other sample's stream
    assert all(torch.equal(mine[~same], other[~same]) for mine, other in zip(others[0][1:], second, strict=True))


def test_what_is_kept_does_not_depend_on_batches(judge: Classifier) -> None:
    for whole, parts in zip(drawn(judge=judge, reject=3), drawn(judge=judge, reject=3, batch_size=2), strict=True):
        torch.testing.assert_close(whole, parts)


def test_what_cannot_be_rejected_by_is_refused(tmp_path: Path, judge: Classifier) -> None:
    with pytest.raises(StageError, match="needs the classifier of a run"):
        draw(tmp_path, models(), reject=2)
    with pytest.raises(StageError, match="chooses by class, but the prior was trained without"):
        draw(tmp_path, models(class_names=[]), reject=2)
    with pytest.raises(ValueError, match=r"sample\.reject must lie in \[1, 1048576\], got 0"):
        SampleConfig(reject=0)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".tar", ".png")}


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("pipelines.metrics.classifier", "pipelines.metrics.stored_classifier"):
        monkeypatch.setattr(f"{place}.STEPS", 3)


@pytest.mark.usefixtures("few_steps")
def test_a_run_trains_its_classifier_once_and_samples_name_it(
    copy_of: Callable[..., Path], smalti: Smalti, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copy_of({"sample": {"reject": 3, "folder": "chosen"}})
    run = config.parent / "run"
    assert smalti("sample", config)[0] == 0
    manifest = json.loads((run / "chosen" / "manifest.json").read_text())
    assert set(manifest["fingerprints"]) == {"tokenizer", "prior0", "prior1", "classifier"}
    assert manifest["settings"]["reject"] == 3 and "reject" not in (run / "samples" / "manifest.json").read_text()
    before = files(run / "chosen")
    assert before.keys() == files(run / "samples").keys() and before != files(run / "samples")
    (run / "chosen" / "000000.tar").unlink()
    monkeypatch.setattr("pipelines.metrics.stored_classifier.train_classifier", None)  # the stored one serves
    assert smalti("sample", config)[0] == 0 and files(run / "chosen") == before
    assert "skipped" in smalti("sample", config)[1]
    finished, cache = Finished(load_config(config)), load_config(config).compute.cache
    tokenizer, marks = finished.tokenizer(), model_fingerprints(finished.tokenizer(), finished.prior())
    assert Gathered("", load_config(config)).samples_fit
    verify_samples(run / "chosen", tokenizer, finished.marks(manifest, marks), cache)
    shutil.rmtree(run / "classifier")
    with pytest.raises(StageError, match=r"was drawn by other models than the run's \(classifier\)"):
        verify_samples(run / "chosen", tokenizer, finished.marks(manifest, marks), cache)


@pytest.mark.usefixtures("few_steps")
def test_a_stored_classifier_is_that_of_its_images_or_refused(tiny_run: Path, tmp_path: Path, cache: Cache) -> None:
    images = shutil.copytree(tiny_run.parent / "run" / "images", tmp_path / "images")
    few = json.loads((images / "manifest.json").read_text())
    few["splits"]["train"] = few["splits"]["train"][-1:]
    (images / "manifest.json").write_text(json.dumps(few))
    compute = ComputeConfig(accelerator="cpu", threads=1, cache_dir=str(tmp_path / "cache"))
    one, other = (classifier_of(tmp_path / name, images, 0, compute) for name in ("one", "other"))
    assert one.fingerprint == other.fingerprint == load_classifier(tmp_path / "one").fingerprint
    assert classifier_of(tmp_path / "third", images, 1, compute).fingerprint != one.fingerprint
    pixels, labels = labelled_images(ImageShards(images, "train", cache), 0)
    assert pixels.shape == (few["splits"]["train"][0]["samples"], 1, 16, 16) and len(labels.unique()) == 10
    told = json.loads((tmp_path / "one" / "config.json").read_text())
    (tmp_path / "one" / "config.json").write_text(json.dumps(told | {"images": "other"}))
    with pytest.raises(StageError, match=r"must be of the run's images, but was trained on others than .*; remove it"):
        classifier_of(tmp_path / "one", images, 0, compute)
    (tmp_path / "one" / "model.safetensors").write_bytes(b"")
    with pytest.raises(StageError, match=r"holds no whole classifier"):
        classifier_of(tmp_path / "one", images, 0, compute)
    (images / "manifest.json").write_text(json.dumps(few | {"class_names": []}))
    with pytest.raises(StageError, match=r"chooses by class, but .* has no classes"):
        classifier_of(tmp_path / "two", images, 0, compute)


def test_published_models_and_images_without_classes_are_refused(
    tiny_run: Path, smalti: Smalti, tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    code, text = smalti("sample", tiny_run.parent / "run", f"--run_dir={tmp_path}/drawn", "--sample.reject=2")
    assert code == 1 and "sample.reject needs the classifier of a run, which published models lack" in text
    code, text = smalti("sample", write_config(tmp_path, {"images": {"classes": False}, "sample": {"reject": 2}}))
    assert code == 2 and "sample.classes, guidance and reject need classes; images.classes is false" in text
