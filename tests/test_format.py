"""What was written stays readable, and its marks stay what they were; `data/format1` is a run of format 1."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.storage.fingerprint import digest, hashed, manifest_digest, prior_fingerprint, tokenizer_fingerprint
from pipelines.storage.manifest import all_receipts, read_manifest
from pipelines.storage.shards import index_shard, read_member
from prior import HierarchicalPrior, LevelPrior
from tokenizer import HierarchicalVQVAE

Smalti = Callable[..., tuple[int, str]]
FORMAT1 = Path(__file__).parent / "data" / "format1"


@pytest.fixture
def old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run of format 1, the current folder its parent."""
    shutil.copytree(FORMAT1, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old" / "run"


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"
    }


def test_a_run_of_format_1_is_whole_to_every_stage(old_run: Path, smalti: Smalti) -> None:
    before = files_of(old_run)
    assert smalti("verify", "config.yaml")[0] == 0
    for stage in ("pack", "train-tokenizer", "encode", "train-prior", "sample"):
        code, said = smalti(stage, "config.yaml")
        assert code == 0 and 0 < said.count("skipped") == said.count("\n"), said
    assert files_of(old_run) == before


def test_the_marks_of_format_1_stay_what_they_were() -> None:
    run = FORMAT1 / "run"
    drawn = read_manifest(run / "samples", "samples", "sample")["fingerprints"]
    assert tokenizer_fingerprint(HierarchicalVQVAE.from_pretrained(run / "tokenizer")) == drawn["tokenizer"]
    for level in (0, 1):
        assert prior_fingerprint(LevelPrior.from_pretrained(run / "prior" / f"level{level}")) == drawn[f"prior{level}"]
    images = read_manifest(run / "images", "images", "pack")
    assert manifest_digest(images) == read_manifest(run / "codes", "codes", "encode")["made_from"]


def test_codes_of_format_1_are_drawn_again_and_decode_to_the_same_images() -> None:
    run = FORMAT1 / "run"
    kept: list[dict[str, bytes]] = []
    for _, receipt in all_receipts(read_manifest(run / "samples", "samples", "sample")):
        shard = run / "samples" / receipt["shard"]
        with shard.open("rb") as file:
            kept += [
                {name: read_member(file, m) for name, m in sample.members.items()} for sample in index_shard(shard)
            ]
    prior = HierarchicalPrior.from_pretrained(run / "prior")
    classes = [int(sample["cls"]) for sample in kept]
    # No uniform lies within 1e-4 of an edge of its distribution, so rounding changes no code.
    codes = prior.sample(classes, seed=3, temperature=0.75, top_p=[1.0, 0.95], guidance=[1.5, 1.0])
    for level, drawn in enumerate(codes):
        assert np.array_equal(drawn, [np.load(io.BytesIO(sample[f"level{level}.npy"])) for sample in kept])
    images = HierarchicalVQVAE.from_pretrained(run / "tokenizer").decode(codes)
    pixels = torch.tensor(np.stack([np.asarray(Image.open(io.BytesIO(sample["png"]))) for sample in kept]))
    assert ((images[:, 0] + 1) * 127.5 - pixels).abs().max() <= 1


@dataclass(frozen=True)
class Grown:
    """A section of format 1 with a setting that came later, and whose default has changed since."""

    old: int = 1
    later: list[int] = field(default_factory=lambda: [4], metadata={"introduced": [3]})


def test_a_later_setting_counts_only_where_it_is_not_what_it_was_introduced_as() -> None:
    assert digest(hashed(Grown(later=[3]))) == digest({"old": 1})
    assert hashed({"section": Grown()}) == {"section": {"old": 1, "later": [4]}}


@pytest.mark.parametrize("name", ["tokenizer/config.json", "prior/level0/config.json", "images/train-000000.json"])
def test_a_later_format_is_refused_by_name(old_run: Path, smalti: Smalti, name: str) -> None:
    path = old_run / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    code, said = smalti("verify", "config.yaml")
    assert code == 1 and name in said and "is of format 2, not 1; update smalti" in said


def test_what_is_written_names_its_format(tiny_run: Path) -> None:
    run = tiny_run.parent / "run"
    for name in ("images/train-000000", "codes/val-000000", "samples/000000", "images/manifest", "codes/manifest"):
        assert json.loads((run / f"{name}.json").read_text())["format"] == 1
    for name in ("tokenizer", "prior/level0", "prior/level1"):
        assert json.loads((run / name / "config.json").read_text())["format"] == 1


def test_receipts_of_before_their_format_was_written_name_the_same_manifest(tiny_run: Path) -> None:
    manifest = read_manifest(tiny_run.parent / "run" / "images", "images", "pack")
    mark = manifest_digest(manifest)
    for _, receipt in all_receipts(manifest):
        assert receipt.pop("format") == 1
    assert manifest_digest(manifest) == mark == digest(manifest)
