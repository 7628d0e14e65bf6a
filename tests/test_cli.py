import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Smalti = Callable[..., tuple[int, str]]


def test_help_names_every_stage_and_every_setting(smalti: Smalti) -> None:
    code, text = smalti("--help")
    assert code == 0
    for stage in ("pack", "train-tokenizer", "encode", "train-prior", "sample", "evaluate", "run"):
        assert stage in text
    code, text = smalti("sample", "--help")
    assert code == 0
    for setting in ("--tokenizer.model.strides", "--sample.temperature", "--images.from", "--compute.num_workers"):
        assert setting in text
    assert "divides the logits" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["paint"], "there is no stage 'paint'; the stages are pack"),
        (["pack"], "name a config: smalti pack CONFIG.yaml"),
        (["pack", "nowhere.yaml"], "cannot read the config nowhere.yaml"),
        (["run", "x.yaml", "--redo", "paint"], "--redo must name a stage, got 'paint'"),
        (["pack", "x.yaml", "--redo", "encode"], "--redo encode goes with encode or run, not with pack"),
        (["pack", "x.yaml", "--level", "1"], "--level goes with train-prior, not with pack"),
        (["train-prior", "x.yaml", "--level", "one"], "invalid int value"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: list[str], message: str, smalti: Smalti) -> None:
    code, text = smalti(*arguments)
    assert code == 2
    assert message in text
    assert len(text.strip().splitlines()) == 1


def test_traceback_is_shown_when_asked(smalti: Smalti) -> None:
    code, text = smalti("pack", "nowhere.yaml", "--traceback")
    assert code == 2
    assert "Traceback" in text


def test_a_shipped_config_is_found_by_its_name(smalti: Smalti, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, text = smalti("encode", "digits")
    assert code == 1
    assert "runs/digits/tokenizer holds no finished tokenizer" in text


def test_the_installed_command_answers(tmp_path: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "smalti", "pack", "nowhere.yaml"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.startswith("smalti: error: cannot read the config")


def test_ctrl_c_says_how_to_go_on(smalti: Smalti, monkeypatch: pytest.MonkeyPatch, tiny_run: Path) -> None:
    from pipelines.run import Run

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "stage", interrupted)
    code, text = smalti("pack", tiny_run)
    assert code == 1
    assert "interrupted; the same command goes on" in text
