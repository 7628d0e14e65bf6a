"""Tokenizers that are given the class of an image: whatever makes codes or images with one hands it on."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import Generator
from pipelines.data.codes import Codes
from pipelines.data.images import ImageShards, to_unit_range
from pipelines.data.noise import noise_for, stored_noise
from pipelines.data.samples import Samples
from pipelines.explore.score import score
from pipelines.explore.vary import vary
from pipelines.stages.encode import compiled_encoder
from pipelines.storage.cache import Cache
from pipelines.storage.fingerprint import tokenizer_fingerprint
from pipelines.tokens.layout import TokenLayout
from tests.layouts import SMALL, draw, layout
from tokenizer import HierarchicalVQVAE, TokenizerConfig
from tokenizer.bottlenecks.fsq import FSQConfig
from tokenizer.bottlenecks.gaussian import GaussianConfig

Smalti = Callable[..., tuple[int, str]]


def conditional(num_classes: int = 3, **settings: object) -> HierarchicalVQVAE:
    sizes = {"codebook_size": 9, "code_dim": 2, "width": 8, "residual_width": 4, "residual_blocks": 1}
    config = TokenizerConfig(**{"strides": [8, 4], "conditional": True} | sizes | settings)  # type: ignore[arg-type]
    return HierarchicalVQVAE(config, 16, 1, GaussianConfig(), num_classes).eval()


def test_class_and_no_class_count_in_encoder_and_decoder_and_each_image_has_its_own() -> None:
    model, images = conditional(), (torch.rand(1, 1, 16, 16) * 2 - 1).expand(4, -1, -1, -1)
    for given in ([0, 1, 2, -1], np.array([0, 1, 2, -1], np.int16), torch.tensor([0, 1, 2, -1])):
        stored = model.encode(images, classes=given)
        assert all(len({tuple(one.flatten().tolist()) for one in level}) == 4 for level in stored)
    assert torch.equal(model.encode(images)[1][0], stored[1][3])
    same = [level[:1].expand(4, -1, -1, -1) for level in stored]
    decoded = model.decode(same, [0, 1, 2, -1])
    assert len({tuple(one.flatten().tolist()) for one in decoded}) == 4
    assert torch.allclose(model.decode(same)[0], decoded[3])
    output = model(images, classes=[2, 2, 0, -1])
    assert torch.allclose(
        model.decode([level.stored[0] for level in output.levels], [2, 2, 0, -1]), output.reconstruction
    )
    assert torch.allclose(output.reconstruction[0], output.reconstruction[1])
    assert model.decode(same[:1], [0, 1, 2, -1]).shape == images.shape


def test_a_tokenizer_without_classes_does_not_look_at_them_and_is_named_as_before() -> None:
    model, images = conditional(conditional=False), torch.rand(2, 1, 16, 16)
    assert model.num_classes == 0 and not {"num_classes", "conditional"} & set(model.settings)
    assert torch.equal(model.encode(images)[0], model.encode(images, classes=[7, 8])[0])


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([0, 3], r"classes must lie in \[-1, 3\), -1 for none, got 3"),
        ([0], r"classes must be 2 integers, one per image, got torch.int64 \(1,\)"),
        ([0.0, 1.0], "classes must be 2 integers, one per image, got torch.float32"),
    ],
)
def test_classes_that_cannot_be_are_refused(classes: list, message: str) -> None:
    model, images = conditional(), torch.rand(2, 1, 16, 16)
    with pytest.raises(ValueError, match=message):
        model.encode(images, classes=classes)
    with pytest.raises(ValueError, match=message):
        model.decode(model.encode(images), classes)


def test_the_number_of_classes_is_part_of_the_model(tmp_path: Path) -> None:
    model = conditional()
    model.save_pretrained(tmp_path)
    loaded = HierarchicalVQVAE.from_pretrained(tmp_path)
    assert loaded.num_classes == 3 and tokenizer_fingerprint(loaded) == tokenizer_fingerprint(model)
    assert "each of one of 3 classes, become" in (tmp_path / "README.md").read_text()
    images = torch.rand(2, 1, 16, 16)
    assert torch.equal(loaded.encode(images, classes=[0, 2])[1], model.encode(images, classes=[0, 2])[1])
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"num_classes": 4}))
    with pytest.raises(ValueError, match=r"lacks, adds or reshapes 1 tensors, first classes.vectors.weight"):
        HierarchicalVQVAE.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="conditional needs images with classes"):
        conditional(0)


def test_a_filled_up_batch_of_an_encoder_has_the_classes_of_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    model, images, classes = conditional(), torch.rand(3, 1, 16, 16), torch.tensor([2, -1, 0])
    found = compiled_encoder(model.encode, 5)(images, None, classes)
    assert all(
        torch.allclose(a[:3], b, atol=1e-6) for a, b in zip(found, model.encode(images, None, classes), strict=True)
    )


def test_tokens_with_a_class_are_decoded_with_it() -> None:
    config = TokenizerConfig(
        **{"strides": [8, 4], "width": 8, "residual_width": 4, "residual_blocks": 1, "conditional": True}  # type: ignore[arg-type]
    )
    model = HierarchicalVQVAE(config, 16, 1, FSQConfig(levels=[3, 3]), len(SMALL["class_names"])).eval()
    levels = [{"grid": list(grid), "codebook_size": size} for grid, size, _ in model.levels]
    codes = SMALL | {"levels": levels, "tokenizer": tokenizer_fingerprint(model), "image_size": 16}
    grids, classes = draw(codes, 3)
    given = [torch.from_numpy(grid.astype(np.int64)) for grid in grids]
    without = layout(codes, template="<bos> <codes>")
    made: TokenLayout = layout(codes)
    assert without.classes(without.encode(grids)) is None
    assert torch.equal(without.images(without.encode(grids), model), model.decode(given))
    ids = made.encode(grids, classes)
    found = made.classes(ids)
    assert found is not None and found.tolist() == list(classes)
    assert torch.equal(made.images(ids, model), model.decode(given, classes))
    assert not torch.equal(made.images(ids, model), model.decode(given))


def test_variants_and_scores_are_of_the_class_that_is_given() -> None:
    model, pixels = conditional(), torch.randint(0, 256, (1, 1, 16, 16), dtype=torch.uint8)
    for label in (0, 2):
        found = vary(model, None, to_unit_range(pixels), 2, label=label)
        assert torch.equal(model.decode(found.stored, [label] * 2), found.images)
        scores = score(model, None, pixels, torch.ones(1), torch.tensor([label]))
        noise = stored_noise(model, range(1))
        assert torch.equal(scores.images, model(to_unit_range(pixels), noise, [label]).reconstruction)


@pytest.mark.parametrize("kind", ["ema", "gaussian"])
def test_every_stage_hands_classes_on(
    kind: str, tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti, cache: Cache
) -> None:
    few = {"training": {"steps": 2, "val_every": 2}}
    changes = {
        "images": {"from": str(tiny_run.parent / "run" / "images")},
        "tokenizer": {"bottleneck": kind, "model": {"conditional": True}, **few},
        "prior": {"network": "auto", **few},
        "sample": {"classes": [7, 3], "count": 7},
        "encode": {"views": ["image", "flip"]},
    }
    config = write_config(tmp_path, changes)
    code, said = smalti("run", config)
    assert code == 0 and "could not be made" not in said, said
    run = tmp_path / "run"
    model = HierarchicalVQVAE.from_pretrained(run / "tokenizer")
    assert model.num_classes == 10
    # Codes are those of each image with its class.
    val, stored = ImageShards(tiny_run.parent / "run" / "images", "val", cache), Codes(run / "codes", "val", run, cache)
    found, labels = stored.batch(list(range(8)))
    assert labels.tolist() == [val.read(index).label for index in range(8)]
    if kind == "ema":
        images = to_unit_range(torch.from_numpy(np.stack([val.pixels(index) for index in range(8)])))
        again = model.encode(images.contiguous(memory_format=torch.channels_last), classes=labels)
        assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    # Samples are decoded by theirs.
    samples = Samples(run / "samples", model.levels, cache)
    drawn, classes = samples.batch(range(7))
    assert classes.tolist() == [7, 3, 7, 3, 7, 3, 7]
    pixels = torch.from_numpy(np.stack([samples.pixels(index) for index in range(7)]))
    assert ((model.decode(drawn, classes) + 1) * 127.5 - pixels).abs().max() <= 0.51
    assert ((model.decode(drawn) + 1) * 127.5 - pixels).abs().max() > 0.51
    generated = Generator.from_pretrained(run).sample([7, 3], seed=0, count=7, batch_size=4)
    assert ((generated.images + 1) * 127.5 - pixels).abs().max() <= 0.51
    # Figures of evaluate are of classes too, and bound p(x | class).
    figures = json.loads((run / "metrics.json").read_text())
    assert set(figures["bound"]["bits_per_dim"]) == {"given_class"}
    whole, labels = list(range(len(val))), torch.tensor([val.read(index).label for index in range(len(val))])
    images = to_unit_range(torch.from_numpy(np.stack([val.pixels(index) for index in whole])))
    with torch.no_grad():
        noise = noise_for(model, [(0, level) for level in range(2)], whole)
        errors = [(model(images, noise, one).reconstruction - images).square().mean() for one in (labels, None)]
    assert figures["tokenizer"]["mse"] == pytest.approx(float(errors[0]), rel=1e-5)
    assert figures["tokenizer"]["mse"] != pytest.approx(float(errors[1]), rel=1e-5)
    code, said = smalti("explore", "score", config, "--out", tmp_path / "out")
    assert code == 0 and "mean bound of -log p(x | class) " in said, said
    with (tmp_path / "out" / "score.csv").open(newline="") as file:
        scores = list(csv.DictReader(file))
    for name, figure in (("distortion", "distortion_bits_per_dim"), ("bound", "bits_per_dim")):
        mean = sum(float(row[f"{name}_nats"]) for row in scores) / len(scores) / 256 / math.log(2)
        found = figures["bound"][figure]
        # Under N(0, I) the rate of the finer level is of another draw of the coarser.
        assert mean == pytest.approx(found["given_class"] if name == "bound" else found, rel=1e-4), name
    code, said = smalti("verify", config)
    assert code == 0, said


def test_images_without_classes_make_no_conditional_tokenizer(
    tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti
) -> None:
    changes = {"images": {"classes": False}, "tokenizer": {"model": {"conditional": True}}}
    config = write_config(tmp_path, changes)
    assert smalti("pack", config)[0] == 0
    for command in ("run", "train-tokenizer"):
        code, said = smalti(command, config)
        assert code == 2 and "tokenizer.model.conditional needs classes, and these images have none" in said
