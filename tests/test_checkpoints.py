"""Checkpoints: the best and the last of a job, wherever its folder goes."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from pipelines.config import load_config
from pipelines.data import codes
from pipelines.data import images as data
from pipelines.errors import StageError
from pipelines.run import Run
from pipelines.training.checkpoints import KeepBest
from tests.test_training import Killed, dying_at, rows

Job = Callable[[Path, str], Path]


@pytest.fixture
def job(tiny_run: Path, write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Job:
    """Train one stage in a folder and return the stage's; after the first validation the loss is climbed."""
    monkeypatch.setattr("pipelines.training.fit.learning_rate_factor", lambda step, *_: 1.0 if step < 2 else -30.0)
    run = tiny_run.parent / "run"

    def train(folder: Path, stage: str) -> Path:
        training = {"val_every": 2, "checkpoint_every": 1, "log_every": 1, "weight_ema": 0.5, "patience": 9}
        changes: dict = {name: {"from": str(run / name)} for name in ("images", "codes")}
        changes |= {name: {"training": training} for name in ("tokenizer", "prior")}
        config = load_config(write_config(folder, changes))
        Run(config).stage(stage, 0 if stage == "train-prior" else None)
        return folder / "run" / ("tokenizer" if stage == "train-tokenizer" else "prior/level0")

    return train


def monitored(folder: Path) -> list[float]:
    """The figures by which the best checkpoint is picked, of all validations."""
    found = [row.get("val_loss") or row.get("val_nats_per_code") for row in rows(folder / "metrics.csv")]
    return [float(figure) for figure in found if figure]


def killed_job(job: Job, folder: Path, stage: str, draw: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for module in (data, codes):
            patch.setattr(module, "drawn_sample", dying_at(draw))
        with pytest.raises(Killed):
            job(folder, stage)


def strings(tree: Any) -> Iterator[str]:
    """All strings in nested dictionaries and lists, keys included."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from strings(key)
            yield from strings(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from strings(value)
    elif isinstance(tree, str):
        yield tree


@pytest.mark.parametrize("stage", ["train-tokenizer", "train-prior"])
def test_a_run_that_moves_in_mid_training_ends_where_one_that_stays_does(
    stage: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins under a relative path, and its best validation lies before the move."""
    stayed = job(tmp_path / "stayed", stage)
    first, *later = monitored(stayed)
    assert len(later) == 2 and all(figure > 1.05 * first for figure in later)
    monkeypatch.chdir(tmp_path)
    killed_job(job, Path("old place"), stage, 3 * 32)
    os.rename("old place", "new place")
    moved = job(tmp_path / "new place", stage)
    for name in ("model.safetensors", "metrics.json", "metrics.csv"):
        assert (moved / name).read_bytes() == (stayed / name).read_bytes(), name
    for name in ("last.ckpt", "best.ckpt"):
        kept = torch.load(moved / "checkpoints" / name, weights_only=True)
        assert not [text for text in strings(kept) if os.sep in text]


def test_checkpoints_that_modelcheckpoint_wrote_are_gone_on_from(tmp_path: Path) -> None:
    kept = KeepBest(tmp_path / "best.ckpt", "val_loss")
    before = ModelCheckpoint(tmp_path, "best", monitor="val_loss", enable_version_counter=False)
    before.best_model_score = torch.tensor(1.75)
    assert kept.state_key == before.state_key
    (tmp_path / "best.ckpt").touch()
    kept.load_state_dict(before.state_dict())
    assert kept.state_dict() == {"best_model_score": 1.75}


def test_a_best_checkpoint_that_is_gone_is_asked_for_at_once(job: Job, tmp_path: Path) -> None:
    killed_job(job, tmp_path, "train-prior", 3 * 32)
    (tmp_path / "run" / "prior" / "level0" / "checkpoints" / "best.ckpt").unlink()
    with pytest.raises(StageError, match=r"best\.ckpt, the best checkpoint of this training so far, must be there"):
        job(tmp_path, "train-prior")
