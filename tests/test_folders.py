import errno
from pathlib import Path

import pytest

from pipelines.errors import ConfigError, StageError
from pipelines.storage import folders as stage
from pipelines.storage.folders import (
    FILES,
    check_outside,
    differences,
    empty_stage,
    is_complete,
    only_process,
    open_stage,
    publish_model,
)
from pipelines.storage.receipts import write_shard
from tokenizer import HierarchicalVQVAE, TokenizerConfig


def test_a_stage_keeps_its_settings_and_refuses_others(tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    open_stage(folder, "encode", {"seed": 0, "encode": {"from_": "", "views": ["image"]}})
    assert "from: ''" in (folder / "config.yaml").read_text()
    open_stage(folder, "encode", {"seed": 0, "encode": {"from_": "", "views": ["image"]}})
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(StageError, match=r"other settings \(encode\.views: \['image'\] -> \['flip'\]\).*--redo encode"):
        open_stage(folder, "encode", {"seed": 0, "encode": {"from_": "", "views": ["flip"]}})
    write_shard(folder / "old.tar", [], {})
    empty_stage(folder, "encode")
    open_stage(folder, "encode", {"seed": 1})
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("remote", [False, True])
def test_a_stage_that_is_made_again_removes_what_it_wrote_and_nothing_else(
    name: str, remote: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from upath import UPath

    folder = UPath("memory://bucket") / tmp_path.name / "stage" if remote else tmp_path / "stage"
    foreign = ["extra.tar", "a.png", "notes.json", "hot/manifest.json", "hot/000000.tar", "checkpoints/mine.ckpt"]
    ours = [pattern.replace("*", "x") for pattern in FILES[name]]
    for one in [*foreign, *ours]:
        if not remote:
            (folder / one).parent.mkdir(parents=True, exist_ok=True)
        (folder / one).write_text("{}")
    write_shard(folder / "000000.tar", [("a", {"cls": b"1"})], {})
    (folder / "000001.json").write_text('{"shard": "000001.tar"}')  # stopped before the shard came
    with caplog.at_level("INFO"):
        empty_stage(folder, name)
    assert sorted(one for one in foreign if (folder / one).exists()) == sorted(foreign)
    assert not [one for one in [*ours, "000000.tar", "000000.json", "000001.json"] if (folder / one).exists()]
    assert "a.png, checkpoints, extra.tar, hot, notes.json stays in" in caplog.text


def test_what_a_stage_reads_must_lie_outside_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "codes" / "old").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "run" / "codes")
    for name in ("run/codes", "run/codes/old", "./run/images/../codes", "link", "link/old", f"file:{tmp_path}/link"):
        with pytest.raises(ConfigError, match=r"images\.from must lie outside run/codes, which encode writes to, got"):
            check_outside(Path("run/codes"), "encode", {"images.from": name})
    check_outside(
        Path("run/codes"), "encode", {"images.from": "run/images", "tokenizer.from": "me/run", "codes.from": ""}
    )


def test_settings_of_an_unfinished_stage_can_be_mended_unless_there_are_checkpoints(tmp_path: Path) -> None:
    open_stage(tmp_path, "pack", {"source": "folder:/mispelt"})
    open_stage(tmp_path, "pack", {"source": "digits"})
    assert "digits" in (tmp_path / "config.yaml").read_text()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(StageError, match="--redo train-prior"):
        open_stage(tmp_path, "train-prior", {"source": "other"})


def test_differences_name_the_key() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == ["a.c: 2 -> 3", "d: None -> 4"]
    old, new = {"kind": "b", "b": {"beta": 2}}, {"c": {"gamma": 1}}
    unsaid = {"kind": "a", "b": {"beta": 1}}
    assert differences(old, new, unsaid=unsaid) == ["kind: b -> a", "b.beta: 2 -> 1", "c: new"]
    assert differences({"kind": "a"}, {}, unsaid=unsaid) == []


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
