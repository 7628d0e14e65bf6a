import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.compute.devices import ComputeConfig
from pipelines.compute.signals import PARENT, Interrupted
from pipelines.config import Config
from pipelines.redo import NOTE, Redo
from pipelines.run import Run
from pipelines.stages.pack import ImagesConfig

Smalti = Callable[..., tuple[int, str]]
Begin = Callable[..., Redo]


@pytest.fixture
def redo(tmp_path: Path) -> Begin:
    """--redo train-prior of one run with some settings; as given again each time."""
    (tmp_path / "run").mkdir()

    def begin(command: str = "run", level: int | None = None, **changes: Any) -> Redo:
        config = Config(run_dir=str(tmp_path), **changes)
        return Redo(tmp_path / "run", ["train-prior"], config, command, level)

    return begin


def due(redo: Redo, *folders: str) -> list[bool]:
    return [redo.due("train-prior", redo.root / folder) for folder in folders]


def test_a_folder_is_emptied_once_for_one_command(redo: Begin) -> None:
    first = redo()
    assert due(first, "prior/level0", "prior/level1") == [True, True]
    assert not first.due("encode", first.root / "codes")
    first.empty("train-prior", first.root / "prior" / "level0")
    assert due(redo(compute=ComputeConfig(devices=2)), "prior/level0", "prior/level1") == [
        False,
        True,
    ]  # elsewhere, say
    first.empty("train-prior", first.root / "prior" / "level1")
    assert due(redo(), "prior/level0", "prior/level1") == [False, False]
    redo().done()
    assert due(redo(), "prior/level0", "prior/level1") == [True, True]


def test_a_command_that_says_no_more_than_before_is_known_by_the_same_note(redo: Begin, tmp_path: Path) -> None:
    config = Config(run_dir="x")
    note = Redo(tmp_path, ["pack"], config).note.name
    assert note == ".redo-de3472a6ba04fcf5"
    assert note != Redo(tmp_path, ["pack"], Config(run_dir="x", images=ImagesConfig(keep=["txt"]))).note.name


def test_another_command_begins_by_itself(redo: Begin) -> None:
    first = redo("train-prior", 0)
    first.empty("train-prior", first.root / "prior" / "level0")
    others = [redo(), redo("train-prior", 1), redo("train-prior", 0, seed=1)]
    assert [due(one, "prior/level0") for one in others] == [[True]] * 3
    others[1].empty("train-prior", first.root / "prior" / "level1")
    assert due(first, "prior/level0") == [False]  # levels may train at the same time
    others[2].empty("train-prior", first.root / "prior" / "level0")
    assert due(first, "prior/level0") == [True]


def test_what_another_command_completes_is_no_matter_of_the_first_any_more(redo: Begin) -> None:
    first, plain = redo(), redo(seed=1)
    first.empty("train-prior", first.root / "prior" / "level0")
    plain.settled(first.root / "prior" / "level1")
    assert due(first, "prior/level0") == [False]
    plain.settled(first.root / "prior" / "level0")
    assert due(first, "prior/level0") == [True]


def test_stages_that_a_run_starts_as_commands_share_its_note(redo: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    run = redo()
    monkeypatch.setenv(NOTE, run.note.name)
    child = redo("train-prior")
    child.empty("train-prior", run.root / "prior" / "level0")
    child.done()
    assert due(run, "prior/level0") == [False]


def test_a_process_that_the_command_has_started_ends_neither_its_stage_nor_its_note(
    redo: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = redo("train-prior")
    folder = first.root / "prior" / "level0"
    first.empty("train-prior", folder)
    monkeypatch.setenv(PARENT, str(os.getppid()))
    run = Run(Config(run_dir=str(first.root)))
    monkeypatch.setenv(PARENT, str(os.getpid()))  # as training does
    assert run._close("train-prior", folder)  # the first process has yet to export the model
    (folder / "model.safetensors").write_text("")
    assert run._close("train-prior", folder)
    assert due(first, "prior/level0") == [False]
    assert Run(Config(run_dir=str(first.root)))._close("train-prior", folder)
    assert due(first, "prior/level0") == [True]


def test_a_command_with_redo_goes_on_where_it_was_stopped_and_begins_again_once_it_was_done(
    copy_of: Callable[..., Path], smalti: Smalti, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.training.checkpoints import KeepLast

    arguments = ("run", copy_of(), "--redo", "train-prior")
    finer = arguments[1].parent / "run" / "prior" / "level1" / "model.safetensors"
    honest, taken, stops = KeepLast.on_train_batch_end, [], [(1, 4)]

    def watched(self: KeepLast, trainer: Any, module: Any, *rest: object) -> None:
        honest(self, trainer, module, *rest)
        taken.append((module.level, trainer.global_step))
        assert module.level or not finer.exists()  # a second process of the job would take it for complete
        if stops and taken[-1] == stops[0]:
            stops.pop()
            raise Interrupted(15, "saved at step 3")

    monkeypatch.setattr(KeepLast, "on_train_batch_end", watched)
    level0, level1 = ([(level, step) for step in range(1, 7)] for level in (0, 1))
    code, said = smalti(*arguments)
    assert (code, taken) == (1, level0 + level1[:4])
    assert "saved at step 3; the same command goes on from there" in said
    for steps in (level1[3:], level0 + level1):
        taken.clear()
        assert smalti(*arguments)[0] == 0
        assert taken == steps


def test_a_run_that_is_stopped_at_its_very_end_does_not_begin_again(
    copy_of: Callable[..., Path], smalti: Smalti, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copy_of()
    shards = list(config.parent.rglob("samples/*.tar"))

    def stopped(run: Run) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "evaluate", stopped)
        code, said = smalti("run", config, "--redo", "sample")
    assert code == 1 and "the same command goes on from what is done" in said
    made = [path.stat().st_mtime_ns for path in shards]
    assert smalti("run", config, "--redo", "sample")[0] == 0
    assert [path.stat().st_mtime_ns for path in shards] == made
    assert smalti("run", config, "--redo", "sample")[0] == 0
    assert not set(made) & {path.stat().st_mtime_ns for path in shards}
    assert not list(config.parent.rglob(".redo-*"))
