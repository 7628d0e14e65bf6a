"""`smalti verify` names the first lie of a run; the stage that wrote a shard makes just that one again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.finished import what_came_of
from pipelines.progress import counted
from tests.test_hostile import relist

Smalti = Callable[..., tuple[int, str]]


@pytest.fixture
def config(tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path]) -> Path:
    """A copy of the tiny run."""
    path = write_config(tmp_path)
    shutil.copytree(tiny_run.parent / "run", tmp_path / "run")
    return path


def test_a_folder_without_a_run_does_not_pass_for_one(
    tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti
) -> None:
    code, text = smalti("verify", write_config(tmp_path))
    assert code == 1
    assert "holds nothing finished to verify; is it the right run_dir?" in text


def change(path: Path, place: int = 700) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:place] + bytes([data[place] ^ 255]) + data[place:][1:])


def test_a_run_that_tells_no_lies_is_said_to_hold(
    config: Path, smalti: Smalti, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert smalti("verify", config)[0] == 0
    for what in ("images holds", "tokenizer holds", "codes holds", "prior holds", "samples holds"):
        assert what in caplog.text


@pytest.mark.parametrize(
    ("stage", "shard"),
    [("pack", "images/train-000001.tar"), ("encode", "codes/val-000000.tar"), ("sample", "samples/000001.tar")],
)
@pytest.mark.parametrize("lie", ["changed", "cut", "lost", "swapped"])
def test_a_shard_that_lies_is_named_and_made_again_alone(
    stage: str, shard: str, lie: str, config: Path, smalti: Smalti
) -> None:
    path = config.parent / "run" / shard
    others = [other for other in path.parent.glob("*.tar") if other != path]
    good, before = path.read_bytes(), {other: other.stat().st_mtime_ns for other in others}
    if lie == "changed":
        change(path)
    elif lie == "cut":
        path.write_bytes(good[:-100])
    elif lie == "lost":
        path.unlink()
    else:
        path.write_bytes(others[0].read_bytes())
    code, text = smalti("verify", config)
    assert code == 1
    assert f"{shard} " in text
    assert f"run `smalti {stage}` again" in text
    assert smalti(stage, config)[0] == 0
    assert path.read_bytes() == good
    assert {other: other.stat().st_mtime_ns for other in others} == before
    assert smalti("verify", config)[0] == 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("receipt", r"the receipt of .*train-000000\.tar is not that of the manifest"),
        ("manifest", "was made from other images than the run's"),
        ("levels", "names other levels than the tokenizer has"),
        ("class", "must have a class below 1"),
        ("fewer", "holds 179 samples but its manifest tells of 178"),
        ("models", r"was drawn by other models than the run's \(prior0\), or those are damaged; restore them"),
        ("prior", "the prior learned codes of tokenizer"),
    ],
)
def test_what_does_not_belong_together_is_named(damage: str, message: str, config: Path, smalti: Smalti) -> None:
    run = config.parent / "run"
    path = run / ("samples" if damage == "models" else "codes") / "manifest.json"
    manifest = json.loads(path.read_text())
    if damage == "receipt":
        manifest["splits"]["train"][0]["settings"] = "0"
    elif damage == "manifest":
        manifest["made_from"] = "0" * 64
    elif damage == "levels":
        manifest["levels"][0]["codebook_size"] = 8
    elif damage == "class":
        manifest["class_names"] = ["only"]
    elif damage == "fewer":
        manifest["splits"]["val"][0]["samples"] = 178
    elif damage == "models":
        manifest["fingerprints"]["prior0"] = "0" * 64
    if damage == "prior":
        for settings in run.glob("prior/level*/config.json"):
            settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer": "0" * 64}))
    else:
        path.write_text(json.dumps(manifest))
    if damage == "fewer":
        relist(path.parent)
    code, text = smalti("verify", config)
    assert code == 1
    import re

    assert re.search(message, text), text


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("images/manifest.json", "images is begun, not finished; run `smalti pack`"),
        ("images", "images is missing, though other parts need it; run `smalti pack`"),
        ("tokenizer", "tokenizer is missing, though other parts need it; run `smalti train-tokenizer`"),
        ("tokenizer/model.safetensors", "tokenizer is begun, not finished"),
        ("codes/manifest.json", "codes is begun, not finished; run `smalti encode`"),
        ("prior/level0", "level0 is missing, though other parts need it; run `smalti train-prior`"),
        ("prior/level1", "level1 is missing, though other parts need it; run `smalti train-prior`"),
        ("prior", "level0 is missing, though other parts need it; run `smalti train-prior`"),
        ("samples/manifest.json", "samples is begun, not finished; run `smalti sample`"),
    ],
)
def test_what_is_begun_and_not_finished_or_missing_behind_later_parts_is_named(
    lost: str, message: str, config: Path, smalti: Smalti
) -> None:
    path = config.parent / "run" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    code, text = smalti("verify", config)
    assert code == 1
    assert message in text


@pytest.mark.parametrize("kept", [["images"], ["images", "tokenizer"], ["images", "tokenizer", "codes"]])
def test_what_is_not_begun_yet_is_not_missed(kept: list[str], config: Path, smalti: Smalti) -> None:
    for path in (config.parent / "run").iterdir():
        if path.is_dir() and path.name not in kept:
            shutil.rmtree(path)
    code, text = smalti("verify", config)
    assert code == 0, text


def test_numbers_agree_with_what_they_count(config: Path) -> None:
    assert [counted(number, "shard") for number in (0, 1, 1200)] == ["0 shards", "1 shard", "1,200 shards"]
    assert what_came_of(config.parent / "run" / "samples") == "7 samples in 2 shards"


def test_a_damaged_tokenizer_is_not_taken_for_a_new_one(config: Path, smalti: Smalti) -> None:
    change(config.parent / "run" / "tokenizer" / "model.safetensors", -9)
    code, text = smalti("verify", config)
    assert code == 1
    assert "another one or damaged; restore that, or run `smalti encode` with this tokenizer" in text
