import errno
from pathlib import Path

import pytest

from pipelines import stage
from pipelines.errors import StageError
from pipelines.stage import differences, is_complete, only_process, open_stage, publish_model
from tokenizer import HierarchicalVQVAE, TokenizerConfig


def test_a_stage_keeps_its_settings_and_refuses_others(tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    open_stage(folder, "encode", {"seed": 0, "encode": {"from_": "", "views": ["image"]}}, redo=False)
    assert "from: ''" in (folder / "config.yaml").read_text()
    open_stage(folder, "encode", {"seed": 0, "encode": {"from_": "", "views": ["image"]}}, redo=False)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(StageError, match=r"other settings \(encode\.views: \['image'\] -> \['flip'\]\).*--redo encode"):
        open_stage(folder, "encode", {"seed": 0, "encode": {"from_": "", "views": ["flip"]}}, redo=False)
    (folder / "old.tar").write_text("")
    open_stage(folder, "encode", {"seed": 1}, redo=True)
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_settings_of_an_unfinished_stage_can_be_mended_unless_there_are_checkpoints(tmp_path: Path) -> None:
    open_stage(tmp_path, "pack", {"source": "folder:/mispelt"}, redo=False)
    open_stage(tmp_path, "pack", {"source": "digits"}, redo=False)
    assert "digits" in (tmp_path / "config.yaml").read_text()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(StageError, match="--redo train-prior"):
        open_stage(tmp_path, "train-prior", {"source": "other"}, redo=False)


def test_differences_name_the_key() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == ["a.c: 2 -> 3", "d: None -> 4"]


def test_a_model_is_published_with_its_tensors_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = HierarchicalVQVAE(TokenizerConfig(strides=[4], width=8, codebook_size=8, code_dim=4), 8, 1)
    honest = stage.whole

    def no_room(path: Path) -> object:
        if path.name == "model.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        return honest(path)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "whole", no_room)
        with pytest.raises(OSError, match="No space"):
            publish_model(model, tmp_path)
    assert (tmp_path / "config.json").exists()
    assert not is_complete(tmp_path)
    publish_model(model, tmp_path)
    assert is_complete(tmp_path)


def test_a_second_process_is_told_that_one_is_at_work(tmp_path: Path) -> None:
    with only_process(tmp_path / "stage"):
        with (
            pytest.raises(StageError, match=r"another process is at work in .*stage; wait"),
            only_process(tmp_path / "stage"),
        ):
            pass
        with only_process(tmp_path / "other"):
            pass
    with only_process(tmp_path / "stage"):
        pass
