"""Samples and reconstructions beside real images, through the whole stage."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.config import load_config
from pipelines.finished import Finished
from pipelines.metrics import METRICS, classification, classifier
from pipelines.metrics.classifier import accuracy, train_classifier
from pipelines.metrics.distances import frechet_distance, kernel_distance, moments, support
from pipelines.metrics.features import load_features
from pipelines.metrics.realism import SampleFID
from pipelines.metrics.subject import Split, Subject
from pipelines.report.side_by_side import made_otherwise
from pipelines.stages.evaluate import evaluate, table


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "STEPS", 2)
    monkeypatch.setattr(classification, "STEPS", 2)


def with_samples(config: Path, rows: slice | None) -> tuple[Subject, dict[str, bool | None]]:
    """The tiny run, and training images in place of its samples."""
    subject, known = Finished(load_config(config)).subject()
    if rows:
        train = subject.splits["train"]
        subject.splits["samples"] = replace(train, name="samples", rows=train.rows[rows])
    return subject, known


def images_of(split: Split, count: int) -> torch.Tensor:
    return torch.stack([torch.from_numpy(split.images.pixels(index).copy()) for index in split.rows[:count]])


def only(*names: str) -> list[str]:
    return [metric.name for metric in METRICS if metric.name not in names]


def test_figures_of_samples_are_those_of_their_features(tiny_run: Path) -> None:
    figures = json.loads((tiny_run.parent / "run" / "metrics.json").read_text())
    subject, _ = with_samples(tiny_run, None)
    space = load_features("pixels", 16, 1)
    real, drawn, val = (
        space(images_of(subject.splits[name], 2000) / 127.5 - 1) for name in ("train", "samples", "val")
    )
    samples = figures["samples"]
    assert (samples["images"], samples["real_images"]) == (7, len(real))
    kid = kernel_distance(real, drawn, 0)
    assert (samples["kid"], samples["kid_error"]) == pytest.approx(kid, rel=1e-5)
    assert {name: samples[name] for name in support(real, drawn)._fields} == support(real, drawn)._asdict()
    assert samples["frechet"]["fid"] == pytest.approx(frechet_distance(moments(real), moments(drawn)), rel=1e-5)
    assert subject.tokenizer
    with torch.no_grad():
        again = space(subject.tokenizer(images_of(subject.splits["val"], 2000) / 127.5 - 1).reconstruction)
    found = figures["reconstructions"]
    assert found["rfid"] == pytest.approx(frechet_distance(moments(val), moments(again)), rel=1e-3)
    assert found["rkid"] == pytest.approx(kernel_distance(val, again, 0, paired=True).value, rel=1e-3)


def test_training_images_passed_off_as_samples_are_caught(tiny_run: Path) -> None:
    honest = json.loads((tiny_run.parent / "run" / "metrics.json").read_text())["copies"]
    assert honest["features"]["equal_share"] == honest["pixels"]["equal_share"] == 0
    subject, known = with_samples(tiny_run, slice(40, 100))
    figures = evaluate(subject, known, only("copies"))
    for what in ("pixels", "codes", "features"):
        found = figures["copies"][what]
        assert found["too_near_share"] == found["equal_share"] == 1 and found["z"] < -5
        assert found["too_near_share_held_out"] < 0.2 or what == "codes"  # a tiny model has few codes
    taken = subject.splits["train"].rows[40:100]
    nearest = figures["copies"]["nearest"]
    assert nearest["training"] == taken[nearest["samples"]].tolist() and not any(nearest["distances"])
    assert "100.0%" in table(figures)


@pytest.mark.usefixtures("few_steps")
def test_real_images_as_samples_score_as_plain_training_bit_for_bit(tiny_run: Path) -> None:
    subject, known = with_samples(tiny_run, slice(0, 70))
    figures = evaluate(subject, known, only("classification"))
    found = figures["classification"]
    train, val = subject.splits["train"], subject.splits["val"]
    labels = {split.name: split.codes.batch(split.rows[:2000].tolist())[1] for split in (train, val)}
    model = train_classifier(images_of(train, 70), labels["train"][:70], 10, 0)
    plain = accuracy(model, images_of(val, 2000), labels["val"])
    for kind in ("samples", "real"):
        assert found[f"trained_on_{kind}"] == plain.overall
        assert list(found[f"of_classes_trained_on_{kind}"].values()) == plain.of_classes
    assert (found["images"], found["real_images"], found["val_images"]) == (70, 70, val.count)
    assert f"trained on 70 samples {plain.overall:.1%}, on 70 real images {plain.overall:.1%}" in table(figures)


def test_few_samples_are_not_judged(tiny_run: Path) -> None:
    subject, known = with_samples(tiny_run, slice(0, 3))
    assert evaluate(subject, known, only("samples", "samples.frechet")) == {}


def test_a_metric_that_is_left_out_has_no_table_where_one_stands_below_it(tiny_run: Path) -> None:
    subject, known = with_samples(tiny_run, slice(0, 70))
    figures = evaluate(subject, known, only("samples.frechet"))
    assert figures["samples"].keys() == {"frechet"}
    assert table(figures).count("\n\n") == 0 and "FID" in table(figures)
    whole = json.loads((tiny_run.parent / "run" / "metrics.json").read_text())
    assert not made_otherwise(figures, {"samples": whole["samples"] | {"frechet": figures["samples"]["frechet"]}})


def test_a_metric_left_out_must_be_one(tiny_run: Path, smalti: Callable[..., tuple[int, str]]) -> None:
    code, text = smalti("evaluate", tiny_run, "--evaluate.skip=[samples, fidd]")
    assert code == 1 and "evaluate.skip must name metrics, got fidd; there are tokenizer, prior" in text


@pytest.mark.parametrize(
    ("samples", "real", "warned"), [(20_000, 1_618, True), (9_999, 50_000, True), (10_000, 0, False)]
)
def test_fid_is_warned_of_where_either_set_is_small(samples: int, real: int, warned: bool) -> None:
    figures = {"images": samples, "fid": 1.0, "made": {"splits": {"real": {"count": real}}}}
    assert ("mostly bias below 10,000 images: read KID" in SampleFID.table(figures)[0]) == warned
