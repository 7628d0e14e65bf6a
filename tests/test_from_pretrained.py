"""Tokenizers and priors, which know nothing of one another, refuse the same files and the same folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prior import HierarchicalPrior
from tests.priors import tiny_prior
from tests.test_hierarchy import tiny
from tokenizer import HierarchicalVQVAE

Damage = Callable[[Path], Any]


def prior(levels: int = 2) -> HierarchicalPrior:
    return tiny_prior("transformer", [(2, 2), (4, 4)][:levels], [16, 16][:levels])


MADE: dict[str, Callable[[], Any]] = {"tokenizer": lambda: tiny([8, 4]), "prior": prior}
LOADED: dict[str, Any] = {"tokenizer": HierarchicalVQVAE.from_pretrained, "prior": HierarchicalPrior.from_pretrained}
kinds = pytest.mark.parametrize("kind", MADE)


def files_of(kind: str, folder: Path) -> Path:
    """Where the files of one model of a saved one lie."""
    return folder if kind == "tokenizer" else folder / "level1"


def settings(changes: Callable[[dict], Any]) -> Damage:
    """A change to config.json."""

    def damage(files: Path) -> None:
        found = json.loads((files / "config.json").read_text())
        (files / "config.json").write_text(json.dumps(changes(found)))

    return damage


def tensors(changes: Callable[[dict, str], Any]) -> Damage:
    """A change to the tensors, of which the name of the first is given."""

    def damage(files: Path) -> None:
        found = load_file(files / "model.safetensors")
        changes(found, sorted(found)[0])
        save_file(found, files / "model.safetensors")

    return damage


REFUSED: dict[str, tuple[Damage, str]] = {
    "no config": (lambda files: (files / "config.json").unlink(), "holds no readable"),
    "no tensors": (lambda files: (files / "model.safetensors").unlink(), "holds no readable"),
    "no json": (lambda files: (files / "config.json").write_text("{"), "holds no readable"),
    "no text": (lambda files: (files / "config.json").write_bytes(b"\xff\xfe\x00"), "holds no readable"),
    "nested too deep": (lambda files: (files / "config.json").write_text("[" * 10**5), "holds no readable"),
    "no settings": (settings(lambda found: list(found)), "config.json must hold exactly the settings"),
    "of the future": (settings(lambda found: found | {"format": 2, "more": 1}), "is of format 2, not 1; update smalti"),
    "one setting too many": (settings(lambda found: found | {"more": 1}), "config.json must hold exactly the settings"),
    "one setting too few": (
        settings(lambda found: {name: value for name, value in found.items() if name not in ("image_size", "level")}),
        "config.json must hold exactly the settings",
    ),
    "settings of another kind": (
        settings(lambda found: dict.fromkeys(found, "many") | {"format": 1}),
        "config.json holds settings that cannot be",
    ),
    "no tensors at all": (lambda files: (files / "model.safetensors").write_bytes(b"no tensors"), "holds no readable"),
    "tensors cut short": (
        lambda files: (files / "model.safetensors").write_bytes((files / "model.safetensors").read_bytes()[:-4]),
        "holds no readable",
    ),
    "a tensor missing": (tensors(lambda found, name: found.pop(name)), "lacks, adds or reshapes 1 tensors"),
    "a tensor too many": (tensors(lambda found, name: found.update(more=torch.zeros(1))), "lacks, adds or reshapes 1"),
    "another shape": (
        tensors(lambda found, name: found.update({name: found[name][:1, ..., None]})),
        "reshapes 1 tensors",
    ),
    "not a number": (
        tensors(lambda found, name: found[name].flatten()[:1].fill_(torch.nan)),
        "must hold finite numbers",
    ),
    "infinite": (tensors(lambda found, name: found[name].fill_(torch.inf)), "must hold finite numbers"),
    "whole numbers": (
        tensors(lambda found, name: found.update({name: found[name].long()})),
        "must hold finite numbers",
    ),
}


@kinds
@pytest.mark.parametrize("what", REFUSED)
def test_files_that_are_not_those_of_a_model_are_refused(kind: str, what: str, tmp_path: Path) -> None:
    MADE[kind]().save_pretrained(tmp_path)
    LOADED[kind](tmp_path)
    damage, message = REFUSED[what]
    damage(files_of(kind, tmp_path))
    with pytest.raises(ValueError, match=message):
        LOADED[kind](tmp_path)


@kinds
def test_a_model_of_the_other_kind_and_no_folder_are_refused(kind: str, tmp_path: Path) -> None:
    (other,) = MADE.keys() - {kind}
    MADE[other]().save_pretrained(tmp_path if kind == "tokenizer" else tmp_path / "level0")
    with pytest.raises(ValueError, match=r"config\.json must hold exactly the settings"):
        LOADED[kind](tmp_path / "level0" if kind == "tokenizer" else tmp_path)
    with pytest.raises(ValueError, match=f"no {kind} at .*: there is no such folder"):
        LOADED[kind](tmp_path / "nowhere" / "at" / "all")


@kinds
def test_sizes_are_not_believed_before_memory_is_taken(kind: str, tmp_path: Path) -> None:
    MADE[kind]().save_pretrained(tmp_path)
    large = {"width": 2**16} if kind == "tokenizer" else {"size": {"width": 2**16, "depth": 100, "heads": 8}}

    def grown(found: dict) -> dict:
        return found | {n: {**found[n], **value} if isinstance(value, dict) else value for n, value in large.items()}

    settings(grown)(files_of(kind, tmp_path))
    with pytest.raises(ValueError, match="lacks, adds or reshapes"):
        LOADED[kind](tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@kinds
def test_what_was_saved_before_is_replaced_and_leaves_nothing_stale(kind: str, tmp_path: Path) -> None:
    smaller = {"tokenizer": lambda: tiny([4]), "prior": lambda: prior(1)}[kind]()
    MADE[kind]().save_pretrained(tmp_path / "one")
    smaller.save_pretrained(tmp_path / "one")
    smaller.save_pretrained(tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    LOADED[kind](tmp_path / "one")


@kinds
@pytest.mark.parametrize("what", ["a stage's folder", "the other kind", "notes"])
def test_nothing_is_saved_over_other_work(kind: str, what: str, tmp_path: Path) -> None:
    """A folder of a run holds the settings, checkpoints and figures of its stage beside the same two files."""
    (other,) = MADE.keys() - {kind}
    MADE[other if what == "the other kind" else kind]().save_pretrained(tmp_path)
    if what == "the other kind" and kind == "prior":
        (tmp_path / "README.md").unlink()
    elif what != "the other kind":
        (files_of(kind, tmp_path) / ("config.yaml" if what == "a stage's folder" else "notes.txt")).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(
        ValueError, match=f"must be empty or hold a saved {kind} and nothing else, but holds .*; choose"
    ):
        MADE[kind]().save_pretrained(tmp_path)
    assert contents(tmp_path) == before
