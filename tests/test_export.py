"""Token shards from code shards, by any number of processes, on the codes of format 1: two views, three classes."""

import json
import logging
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import pipelines.stages.export
import pipelines.storage.receipts
from pipelines.compute.devices import ComputeConfig
from pipelines.data.codes import code_sample
from pipelines.errors import ConfigError, StageError
from pipelines.stages.export import ExportConfig, export
from pipelines.storage.manifest import read_manifest
from pipelines.storage.receipts import write_shard
from pipelines.storage.shards import index_shard
from pipelines.tokens.dataset import TokenDataset
from pipelines.tokens.laying import chosen
from pipelines.tokens.layout import TokenLayout
from pipelines.tokens.template import RecordConfig
from pipelines.tokens.vocabulary import TextConfig, VocabConfig
from tests.layouts import CAPTION, text_tokenizer

Smalti = Callable[..., tuple[int, str]]
FORMAT1 = Path(__file__).parent / "data" / "format1"
EVERY = ["bin", "parquet", "litdata", "mds", "webdataset"]
# A command whose process is gone, without a word, when a file is about to have its final name.
KILLED = """
import os, signal, sys
from pipelines.cli import main
_, final, *command = sys.argv
def strike(event, arguments):
    if event == "os.rename" and str(arguments[1]) == final:
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(strike)
main(command)
"""


@pytest.fixture
def codes(tmp_path: Path) -> Path:
    """A copy of the codes of format 1."""
    return Path(shutil.copytree(FORMAT1 / "run" / "codes", tmp_path / "run" / "codes"))


@pytest.fixture
def config(tmp_path: Path, codes: Path) -> Path:
    """A run of these codes."""
    path = tmp_path / "config.yaml"
    path.write_text(
        f"run_dir: {tmp_path}/run\nseed: 3\nencode: {{views: [image, crop]}}\nprior: {{class_dropout: 0.1}}\n"
    )
    return path


def exported(codes: Path, name: str, **settings: object) -> Path:
    """A folder of tokens of codes."""
    folder = codes.parent / name
    folder.mkdir(exist_ok=True)
    export(ExportConfig(**settings), 3, ComputeConfig(), codes, folder)  # type: ignore[arg-type]
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def with_captions(codes: Path) -> Path:
    """The same codes, each sample with the caption of its key."""
    from tests.test_format import read_member

    manifest = json.loads((codes / "manifest.json").read_text())
    for receipts in manifest["splits"].values():
        for receipt in receipts:
            path = codes / receipt["shard"]
            with path.open("rb") as file:
                samples = [
                    (one.key, {name: read_member(file, member) for name, member in one.members.items()})
                    for one in index_shard(path)
                ]
            written = [(key, {**files, "txt": f"a cab {key}".encode()}) for key, files in samples]
            receipt.update(write_shard(path, written, {}))
    (codes / "manifest.json").write_text(json.dumps(manifest))
    return codes


@pytest.mark.parametrize("order", [(0,), (1, 0), (0, 1, 2), (2, 1, 0)])
def test_workers_of_any_number_and_order_write_the_same_bytes(
    order: tuple[int, ...], codes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = files_of(exported(codes, "alone", format=EVERY, single=True))
    monkeypatch.setenv("WORLD_SIZE", str(len(order)))
    for rank in order:
        assert not (codes.parent / "together" / "layout.json").exists()
        monkeypatch.setenv("RANK", str(rank))
        folder = exported(codes, "together", format=EVERY, single=True)
    assert files_of(folder) == alone
    assert {"train.bin", "val.bin", "meta.pkl", "litdata/train/index.json", "mds/val/index.json"} < alone.keys()
    assert {"train-000001.parquet", "val-000000.tar", "tokenizer.json", "layout.json", "all.json"} < alone.keys()


@pytest.mark.parametrize("writes", [1, 4, 6, 7, 8])
def test_killed_and_resumed_equals_uninterrupted(writes: int, codes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = files_of(exported(codes, "uninterrupted", format=EVERY))
    honest, calls = pipelines.storage.receipts.write_json, []

    def killed(path: Path, contents: object) -> None:
        calls.append(path)
        if len(calls) == writes:
            raise KeyboardInterrupt
        honest(path, contents)

    with monkeypatch.context() as patch:
        patch.setattr(pipelines.storage.receipts, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            exported(codes, "killed", format=EVERY)
    assert not (codes.parent / "killed" / "layout.json").exists()
    assert files_of(exported(codes, "killed", format=EVERY)) == wanted


def test_a_process_killed_between_the_files_of_a_shard_is_resumed(config: Path, smalti: Smalti) -> None:
    command, tokens = ["export", str(config), "--export.format=[bin,litdata]"], config.parent / "run" / "tokens"
    assert smalti(*command)[0] == 0
    wanted = files_of(tokens)
    shutil.rmtree(tokens)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tokens / "train-000001.keys"), *command], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = files_of(tokens)
    assert {"train-000000.json", "train-000001.idx"} < left.keys() and "layout.json" not in left
    assert any(name.endswith(".tmp") for name in left) and "train-000001.keys" not in left
    assert smalti(*command)[0] == 0
    assert files_of(tokens) == wanted


def test_a_damaged_file_of_a_shard_is_made_again_and_no_other(codes: Path) -> None:
    folder = exported(codes, "tokens", format=["bin", "litdata"])
    wanted = files_of(folder)
    for name in ("train-000000.keys", "litdata/train/train-000000.bin", "tokenizer.json", "litdata/val/index.json"):
        (folder / name).write_bytes(b"x")
        kept = (folder / "train-000001.bin").stat().st_mtime_ns
        exported(codes, "tokens", format=["bin", "litdata"])
        assert files_of(folder) == wanted
        assert (folder / "train-000001.bin").stat().st_mtime_ns == kept


def test_a_folder_where_something_is_to_be_done_is_not_complete(codes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = exported(codes, "tokens")
    (folder / "val-000000.bin").write_bytes(b"")

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipelines.stages.export, "write_files", killed)
    with pytest.raises(KeyboardInterrupt):
        exported(codes, "tokens")
    assert not (folder / "layout.json").exists()


def test_records_come_back_as_the_codes_of_the_shards(codes: Path) -> None:
    manifest = read_manifest(codes, "codes", "encode")
    wanted = {}
    for name in ("train-000000.tar", "train-000001.tar", "val-000000.tar"):
        with (codes / name).open("rb") as file:
            for sample in index_shard(codes / name):
                wanted[sample.key] = code_sample(file, sample, manifest, codes)
    folder, seen = exported(codes, "tokens", views="all"), []
    for split in ("train", "val"):
        data = TokenDataset(folder, split)
        for number in range(len(data)):
            found = data.layout.decode(data[number][None])
            grids, label = wanted[data.key(number)]
            assert all(np.array_equal(a[0], b) for a, b in zip(found, grids, strict=True))
            assert data[number][1] == data.layout.vocabulary.ids[len(data.layout.vocabulary.specials) + label]
            seen.append(data.key(number))
    assert sorted(seen) == sorted(wanted)
    assert data.layout.stated.tokenizer == manifest["tokenizer"]


def test_views_of_an_image_are_kept_as_asked(codes: Path) -> None:
    grids = [np.array([[[0]], [[1]], [[0]], [[2]], [[2]], [[2]]]), np.array([[[5]], [[5]], [[5]], [[6]], [[7]], [[6]]])]
    assert [chosen(grids, 3, which).tolist() for which in ("all", "first", "distinct")] == [
        [0, 1, 2, 3, 4, 5],
        [0, 3],
        [0, 1, 3, 4],
    ]
    import pyarrow.parquet as pq

    table = pq.read_table(exported(codes, "first", views="first") / "train-000000.parquet").to_pydict()
    assert set(table["view"]) == {0} and len(table["source_key"]) == 20
    assert {f"{source}-0" for source in table["source_key"]} == set(table["__key__"])
    val = pq.read_table(codes.parent / "first" / "val-000000.parquet").to_pydict()
    assert val["__key__"] == val["source_key"] and set(val["view"]) == {0}


def test_order_is_that_of_the_codes_or_drawn_from_the_seed(codes: Path) -> None:
    plain = (exported(codes, "plain", shuffle=False, views="all") / "train-000000.keys").read_text().split()
    mixed = (exported(codes, "mixed", views="all") / "train-000000.keys").read_text().split()
    assert plain == [sample.key for sample in index_shard(codes / "train-000000.tar")]
    assert mixed != plain and sorted(mixed) == sorted(plain)
    export(ExportConfig(views="all"), 4, ComputeConfig(), codes, codes.parent / "mixed")
    assert (codes.parent / "mixed" / "train-000000.keys").read_text().split() != mixed


def test_one_file_a_split_holds_the_shards_one_after_the_other(codes: Path) -> None:
    folder = exported(codes, "tokens", single=True, format=["bin"])
    joined = b"".join((folder / f"train-00000{number}.bin").read_bytes() for number in (0, 1))
    assert (folder / "train.bin").read_bytes() == joined
    assert pickle.loads((folder / "meta.pkl").read_bytes())["vocab_size"] == TokenLayout.load(folder).vocabulary.rows


def test_captions_go_along(codes: Path, tmp_path: Path) -> None:
    text = TextConfig(tokenizer=str(text_tokenizer(tmp_path / "text")))
    settings = {"template": CAPTION, "text": text, "vocab": VocabConfig(base=33), "max_tokens": 40}
    with pytest.raises(ConfigError, match=r"has <text>, but .*train-000000\.tar holds no captions \(txt\)"):
        exported(codes, "tokens", **settings)
    folder = exported(with_captions(codes), "tokens", format=EVERY, **settings)
    data = TokenDataset(folder, "train")
    assert all(data.caption(number) == f"a cab {data.key(number)}" for number in range(len(data)))
    assert all(len(record) <= 40 for record in data)
    assert "text_tokenizer.json" in json.loads((folder / "all.json").read_text())["files"]
    data.layout.decode(list(data))


@pytest.mark.parametrize("name", ["train-000001.idx", "all.json", "tokenizer.json", "litdata/val/index.json"])
def test_somebody_elses_file_is_in_the_way_and_stays(name: str, codes: Path) -> None:
    path = codes.parent / "tokens" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(StageError, match="must be free for a shard, but smalti did not write what lies there"):
        exported(codes, "tokens", format=["bin", "litdata"])
    assert path.read_text() == "mine"
    assert files_of(codes.parent / "tokens") == {name: b"mine"}


def test_a_link_of_somebody_elses_stays(codes: Path) -> None:
    path = codes.parent / "tokens" / "datatrove" / "train" / "train-000000.ds"
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(StageError, match=r"train-000000\.ds must be free for a shard, but smalti did not write"):
        exported(codes, "tokens", format=["bin"])
    assert files_of(codes.parent / "tokens") == {"datatrove/train/train-000000.ds": b"mine"}


def test_readers_of_a_folder_see_one_split(codes: Path) -> None:
    from datatrove.utils.dataset import DatatroveFolderDataset

    folder = exported(codes, "tokens", format=["bin"])
    folder = folder.rename(folder.with_name("moved"))
    for split in ("train", "val"):
        data = TokenDataset(folder, split)
        length = data.layout.describe()["sequence_length"]["datatrove"]
        found = DatatroveFolderDataset(str(folder / "datatrove" / split), length)
        assert [found[n]["input_ids"].tolist() for n in range(len(found))] == [record.tolist() for record in data]


def test_another_setting_is_refused_and_redo_removes_what_was_written_and_nothing_else(
    config: Path, smalti: Smalti
) -> None:
    assert smalti("export", config, "--export.format=[bin,litdata,mds]", "--export.single=true")[0] == 0
    tokens = config.parent / "run" / "tokens"
    mine = ["mine.bin", "train-000000.notes", "litdata/train/mine.bin", "val-000007.bin"]
    for name in mine:
        (tokens / name).write_text("mine")
    code, text = smalti("export", config, "--export.views=first")
    assert code == 1 and "was made with other settings" in text and "--redo export" in text
    assert smalti("export", config, "--redo=export", "--export.format=[parquet]")[0] == 0
    left = {path.relative_to(tokens).as_posix() for path in tokens.rglob("*") if not path.is_dir()}
    made = {f"{name}.{kind}" for name in ("train-000000", "train-000001", "val-000000") for kind in ("parquet", "json")}
    kept = {"layout.json", "tokenizer.json", "added_tokens.txt", "all.json", "config.yaml"}
    assert left == {*mine, *made, *kept}
    code, text = smalti("export", config, "--export.format=[parquet]")
    assert code == 0 and f"export: skipped, {tokens} is complete" in text


def test_files_that_are_not_wanted_any_more_go_with_the_shard(codes: Path) -> None:
    folder = exported(codes, "tokens", format=["bin", "mds"])
    (folder / "layout.json").unlink()
    assert files_of(exported(codes, "tokens", format=["parquet"])) == files_of(exported(codes, "b", format=["parquet"]))
    assert not list(folder.rglob("*.ds"))


def test_tokens_of_other_codes_are_made_anew(codes: Path) -> None:
    folder = exported(codes, "tokens")
    manifest = json.loads((codes / "manifest.json").read_text())
    del manifest["splits"]["train"][1]
    (codes / "manifest.json").write_text(json.dumps(manifest))
    assert files_of(exported(codes, "tokens")) == files_of(exported(codes, "other"))
    assert not list(folder.glob("train-000001.*"))


def test_export_is_no_part_of_run(config: Path, smalti: Smalti) -> None:
    code, text = smalti("run", config, "--redo=export")
    assert code == 2 and "--redo export goes with export, not with run" in text


def test_verify_names_a_file_of_tokens(config: Path, smalti: Smalti) -> None:
    for part in ("images", "tokenizer"):
        shutil.copytree(FORMAT1 / "run" / part, config.parent / "run" / part)
    assert smalti("export", config)[0] == 0
    code, text = smalti("verify", config)
    assert code == 0 and f"{config.parent}/run/tokens holds what it says" in text
    (config.parent / "run" / "tokens" / "val-000000.idx").write_bytes(b"x")
    code, text = smalti("verify", config)
    assert code == 1 and "val-000000.idx has sha256" in text and "which makes just that shard anew" in text
    assert smalti("export", config)[0] == 0
    (config.parent / "run" / "tokens" / "tokenizer.json").write_text("{}")
    code, text = smalti("verify", config)
    assert code == 1 and "tokenizer.json has sha256" in text and "which makes the files that go with all" in text
    assert smalti("export", config)[0] == 0
    (config.parent / "run" / "tokens" / "layout.json").unlink()
    code, text = smalti("verify", config)
    assert code == 1 and "tokens is begun, not finished; run `smalti export`" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": []}, r"export\.format must name some of bin, parquet"),
        ({"format": ["bin", "csv"]}, r"export\.format must name some of"),
        ({"views": "some"}, r"export\.views must be one of distinct, first, all"),
        ({"single": True, "format": ["parquet"]}, r"export\.single joins bin shards"),
        ({"folder": "codes/tokens"}, r"export\.folder must name a folder of its own"),
        ({"single": True, "dtype": "uint32"}, r"export\.single is for nanoGPT, which reads uint16, but ids are uint32"),
        ({"levels": [2]}, r"levels must be some of 0 to 1"),
        ({"vocab": VocabConfig(names="x")}, r"vocab\.names must give each code a name of its own"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(settings: dict, message: str, codes: Path) -> None:
    with pytest.raises(ValueError, match=message):
        exported(codes, "tokens", **settings)
    assert not list((codes.parent / "tokens").glob("*"))


@pytest.mark.parametrize("name", ["samples", "tokens/inner"])
def test_a_folder_of_other_work_is_refused(name: str, config: Path, smalti: Smalti) -> None:
    run = config.parent / "run"
    shutil.copytree(FORMAT1 / "run" / "samples", run / "samples")
    assert smalti("export", config)[0] == 0
    before = files_of(run)
    code, text = smalti("export", config, f"--export.folder={name}", "--sample.folder=x", "--redo=export")
    assert code == 2 and "choose" in text
    code, text = smalti("sample", config, "--sample.folder=tokens", "--export.folder=x", "--redo=sample")
    assert code == 2 or "no finished tokenizer" in text
    assert files_of(run) == before


def test_what_may_go_wrong_in_training_is_said(codes: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        exported(codes, "tokens", views="all")
    assert "1 of 2 train shards hold one class alone" in caplog.text and "(images.shuffle)" in caplog.text
    assert "there are 2 train shards" in caplog.text
    assert "48 train records show 24 images" in caplog.text
    assert "of 48 train records repeat another of their shard" in caplog.text


def test_shards_larger_than_a_format_holds_are_refused(codes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines.stages.export, "MAX_CHUNK_BYTES", 1000)
    with pytest.raises(ConfigError, match=r"train-000000\.tar makes 500 tokens, more than a file of mds can hold"):
        exported(codes, "tokens", format=["mds"])


def test_a_code_shard_without_samples_has_no_token_shard(codes: Path) -> None:
    manifest = json.loads((codes / "manifest.json").read_text())
    manifest["splits"]["train"].append(write_shard(codes / "train-000002.tar", [], {}))
    manifest["splits"]["val"] = []
    (codes / "manifest.json").write_text(json.dumps(manifest))
    folder = exported(codes, "tokens", format=EVERY, single=True)
    assert not list(folder.glob("train-000002.*"))
    assert len(TokenDataset(folder, "train")) == 43 and len(TokenDataset(folder, "val")) == 0


def test_every_setting_of_records_is_one_of_export() -> None:
    documented = ExportConfig.__doc__ or ""
    assert all(f"        {name}: " in documented for name in RecordConfig.__dataclass_fields__)
