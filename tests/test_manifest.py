import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import StageError
from pipelines.storage.manifest import read_manifest, write_manifest
from pipelines.storage.receipts import write_shard

CODES: dict[str, Any] = {
    "kind": "codes",
    "levels": [{"grid": [2, 2], "codebook_size": 16}],
    "class_names": ["a"],
    "image_size": 8,
    "channels": 1,
    "tokenizer": "0" * 64,
    "made_from": "0" * 64,
}
SAMPLES = [(f"{n:03d}", {"level0.npy": b"x", "cls": b"1"}) for n in range(5)]
PROVENANCE = {"made_from": None, "fingerprints": {}, "settings": "abc"}


def test_the_manifest_merges_receipts_and_removes_strays(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar", "stray.tar"):
        write_shard(tmp_path / name, SAMPLES, PROVENANCE)
    write_manifest(tmp_path, {"train": ["a.tar"], "val": ["b.tar"]}, CODES)
    manifest = read_manifest(tmp_path, "codes", "encode")
    assert [r["shard"] for r in manifest["splits"]["train"]] == ["a.tar"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.tar", "b.json", "b.tar", "manifest.json"]


def test_what_no_receipt_names_is_left_alone(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", SAMPLES, PROVENANCE)
    foreign = {"extra.tar": "", "b.tar": "", "b.json": '{"shard": "a.tar", "sha256": ""}', "c.tar": "", "c.json": "{"}
    for name, text in foreign.items():
        (tmp_path / name).write_text(text)
    write_manifest(tmp_path, {"train": ["a.tar"]}, CODES)
    assert {name: (tmp_path / name).read_text() for name in foreign} == foreign


def test_a_manifest_of_another_kind_or_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"holds no finished codes; run `smalti encode` first"):
        read_manifest(tmp_path, "codes", "encode")
    write_manifest(tmp_path, {}, CODES | {"kind": "images"})
    with pytest.raises(StageError, match="must be a manifest of codes"):
        read_manifest(tmp_path, "codes", "encode")
    (tmp_path / "manifest.json").write_text(json.dumps({"kind": "codes", "format": 99}))
    with pytest.raises(StageError, match="in format 1"):
        read_manifest(tmp_path, "codes", "encode")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(StageError, match="cannot be read"):
        read_manifest(tmp_path, "codes", "encode")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": []}, r"levels is \[\]"),
        ({"levels": [{"grid": [2], "codebook_size": 16}]}, "levels is"),
        ({"levels": [{"grid": [2, 10**9], "codebook_size": 16}]}, "levels is"),
        ({"levels": [{"grid": [2, 2], "codebook_size": True}]}, "levels is"),
        ({"image_size": -1}, "image_size is -1"),
        ({"channels": "3"}, "channels is '3'"),
        ({"class_names": [1]}, r"class_names is \[1\]"),
        ({"tokenizer": "../x"}, "tokenizer is"),
        ({"levels": [{"grid": [2, 2], "codebook_size": None}]}, "levels is"),
        ({"views": 3}, "views is 3"),
        ({"splits": []}, r"splits is \[\]"),
        ({"splits": {"train": {}}}, "splits is"),
        ({"splits": {"train": [None]}}, "entry 0 of split 'train' is None"),
    ],
)
def test_an_entry_that_cannot_be_is_named(change: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "splits": {}, **CODES, **change}))
    with pytest.raises(StageError, match=f"manifest.json cannot be right: {message}"):
        read_manifest(tmp_path, "codes", "encode")


@pytest.mark.parametrize(
    "change",
    [
        {"shard": "../../a.tar"},
        {"shard": "/etc/passwd"},
        {"shard": "pipe:touch x.tar"},
        {"sha256": "0"},
        {"bytes": -1},
        {"samples": 1.5},
        {"samples": 10**30},
    ],
)
def test_a_receipt_that_leads_elsewhere_or_cannot_be_is_named(change: dict, tmp_path: Path) -> None:
    receipt = {"shard": "a.tar", "sha256": "0" * 64, "bytes": 1024, "samples": 1} | change
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, **CODES, "splits": {"train": [receipt]}}))
    with pytest.raises(StageError, match=f"{next(iter(change))} in entry 0 of split 'train' is"):
        read_manifest(tmp_path, "codes", "encode")


def test_a_shard_is_listed_once(tmp_path: Path) -> None:
    receipt = {"shard": "a.tar", "sha256": "0" * 64, "bytes": 1024, "samples": 1}
    splits = {"train": [receipt], "val": [receipt]}
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, **CODES, "splits": splits}))
    with pytest.raises(StageError, match=r"a\.tar is listed twice"):
        read_manifest(tmp_path, "codes", "encode")


def test_a_manifest_too_deep_to_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[" * 100000)
    with pytest.raises(StageError, match="cannot be read"):
        read_manifest(tmp_path, "codes", "encode")


def test_samples_say_how_they_were_drawn(tmp_path: Path) -> None:
    samples = {"kind": "samples", "image_size": 8, "channels": 1, "class_names": [], "fingerprints": {}}
    write_manifest(tmp_path, {}, samples)
    with pytest.raises(StageError, match="settings is None"):
        read_manifest(tmp_path, "samples", "sample")
    write_manifest(tmp_path, {}, samples | {"settings": {}})
    read_manifest(tmp_path, "samples", "sample")
