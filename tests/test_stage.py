from pathlib import Path

import pytest

from pipelines.errors import StageError
from pipelines.stage import differences, is_complete, open_stage, publish_model


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


def test_a_model_is_published_whole(tmp_path: Path) -> None:
    staging = tmp_path / "export"
    staging.mkdir()
    for name in ("model.safetensors", "config.json"):
        (staging / name).write_text(name)
    assert not is_complete(tmp_path)
    publish_model(staging, tmp_path)
    assert is_complete(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
