"""Files from strangers: a hostile example of each kind, and mutated ones; none runs code, none gets far."""

import contextlib
import io
import json
import os
import pickle
import resource
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from pipelines.config import load_config
from pipelines.data.codes import Codes
from pipelines.data.images import ImageShards
from pipelines.data.pictures import BadImageError, fit, pixels_of
from pipelines.errors import ConfigError, StageError
from pipelines.storage.cache import Cache
from pipelines.storage.manifest import read_manifest
from pipelines.storage.paths import write_json
from pipelines.storage.receipts import read_receipt
from pipelines.storage.shards import MAX_MEMBER_BYTES, index_shard
from pipelines.training.checkpoints import WholeCheckpoints
from prior import LevelPrior
from tests.jobs import Job
from tests.test_pictures import data_of, noise
from tokenizer import HierarchicalVQVAE

Smalti = Callable[..., tuple[int, str]]
few = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
mutations = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("cut"), st.floats(0, 1), st.just(b"")),
        st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=600)),
        st.tuples(st.just("drop"), st.floats(0, 1), st.binary(min_size=1, max_size=600)),
    ),
    min_size=1,
    max_size=3,
)


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mknod, (str(self.path),)


def mutated(data: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for kind, share, piece in changes:
        place = int(share * len(data))
        if kind == "set":
            data = data[:place] + piece + data[place + len(piece) :]
        elif kind == "cut":
            data = data[:place]
        elif kind == "insert":
            data = data[:place] + piece + data[place:]
        else:
            data = data[:place] + data[place + len(piece) :]
    return data


def relist(folder: Path) -> None:
    """Make receipts and manifest vouch for the shards as they are now, as a forger would."""
    import hashlib

    manifest = json.loads((folder / "manifest.json").read_text())
    for receipts in manifest["splits"].values():
        for receipt in receipts:
            data = (folder / receipt["shard"]).read_bytes()
            receipt |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            write_json(folder / receipt["shard"].replace(".tar", ".json"), receipt)
    write_json(folder / "manifest.json", manifest)


@pytest.fixture
def copied(tiny_run: Path, tmp_path: Path) -> Path:
    """The tiny run in a folder of its own."""
    shutil.copytree(tiny_run.parent / "run", tmp_path / "run")
    return tmp_path / "run"


def test_pickled_members_are_never_opened(copied: Path, tmp_path: Path, cache: Cache, smalti: Smalti) -> None:
    shard, payload = copied / "images" / "val-000000.tar", pickle.dumps(Payload(tmp_path / "ran"))
    with tarfile.open(shard) as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    with tarfile.open(shard, "w") as tar:
        for name, data in members:
            for extension, content in (("", data), (".pyd", payload), (".pickle", payload), (".pkl", payload)):
                info = tarfile.TarInfo(f"{name.split('.')[0]}{extension}" if extension else name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    relist(copied / "images")
    shards = ImageShards(copied / "images", "val", cache)
    assert [shards.pixels(index).shape for index in range(len(shards))] == [(1, 16, 16)] * len(shards)
    assert not (tmp_path / "ran").exists()


def test_members_that_lead_elsewhere_lead_nowhere(
    tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti
) -> None:
    """Keys are data: nothing is ever unpacked to a path."""
    data = data_of(Image.fromarray(noise(16, 16, 1)))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("../../up", "/abs", "x/../../y"):
            for extension, content in (("png", data), ("cls", b"1")):
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    images = {"source": f"shards:{tmp_path}/a.tar", "val_fraction": 0.4}
    assert smalti("pack", write_config(tmp_path / "out", {"images": images}))[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "out"]
    keys = [s.key for s in index_shard(next((tmp_path / "out" / "run" / "images").glob("train-*.tar")))]
    assert not [key for key in keys if "." in key]


def test_a_member_that_claims_too_much_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "a.tar").open("wb") as file:
        info = tarfile.TarInfo("a.png")
        info.size = MAX_MEMBER_BYTES + 1
        file.write(info.tobuf())
        file.seek(MAX_MEMBER_BYTES + 4096)
        file.write(bytes(1024))  # a sparse file: it takes no room on disk either
    with pytest.raises(StageError, match=r"a\.png of .*a\.tar claims"):
        index_shard(tmp_path / "a.tar")


def test_a_picture_of_another_size_is_refused_by_its_header() -> None:
    data = data_of(Image.new("1", (9000, 9000)))
    with pytest.raises(BadImageError, match="must be 16x16 pixels, is 9000x9000"):
        pixels_of(data[: len(data) // 2], 16, 1)  # its pixels cannot even be read


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run_dir: !!python/object/apply:os.system ['touch ran']", "it is not YAML"),
        ("run_dir: &a x\nseed: *a", "aliases"),
        ("a: &a [x]\nb: &b [*a, *a, *a]", "aliases"),
        (
            "run_dir: x\ntokenizer: {class_path: os.system, init_args: {}}",
            "class_path is not allowed",
        ),
        ("run_dir: x\nimages: {source: 'pipe:touch ran'}", None),
        ("[" * 5000, "it is not YAML"),
        ("run_dir: " + "x" * 2**20, "settings have at most"),
        ("run_dir: pipe:touch ran", None),
        ("run_dir: x\nimages: {source: null}", "images.source must have a value"),
        ("run_dir: !!bool x", "it is not YAML"),
        ("run_dir: x\ncompute: {devices: '--5'}", "compute.devices must be auto"),
        ("run_dir: x\ncompute: {cache_gb: .inf}", "cache_gb above 0"),
    ],
)
def test_a_config_is_plain_data(
    text: str, message: str | None, tmp_path: Path, smalti: Smalti, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(text)
    code, said = smalti("pack", "bad.yaml")
    assert code == 2
    assert message is None or message in said
    assert not Path("ran").exists()


@pytest.mark.parametrize("kind", ["tokenizer", "prior/level0"])
@pytest.mark.parametrize("damage", ["nan", "pickle", "lacking", "huge", "deep", "float8"])
def test_a_model_that_lies_is_refused_by_name(kind: str, damage: str, copied: Path, tmp_path: Path) -> None:
    folder = copied / kind
    tensors = load_file(folder / "model.safetensors")
    name = next(iter(tensors))
    config = json.loads((folder / "config.json").read_text())
    if damage == "nan":
        tensors[name] = tensors[name] * float("nan")
    if damage == "lacking":
        del tensors[name]
    size, blocks = (config, "residual_blocks") if kind == "tokenizer" else (config["size"], "depth")
    if damage == "huge":
        size["width"] = 65536
    if damage == "deep":
        size[blocks] = 10**9
    if damage == "float8":
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    if damage == "pickle":
        (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    (folder / "config.json").write_text(json.dumps(config))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=f"{folder}"):
        (HierarchicalVQVAE if kind == "tokenizer" else LevelPrior).from_pretrained(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
@pytest.mark.parametrize("content", [None, {}, {"state_dict": {}}, {"state_dict": None}, b"junk", b""])
def test_a_checkpoint_that_is_none_is_named(
    name: str, content: object, tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti
) -> None:
    run = tiny_run.parent / "run"
    config = write_config(tmp_path, {"images": {"from": str(run / "images")}})
    shutil.copytree(run / "tokenizer", tmp_path / "run" / "tokenizer")
    (tmp_path / "run" / "tokenizer" / "model.safetensors").unlink()
    path = tmp_path / "run" / "tokenizer" / "checkpoints" / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    code, text = smalti("train-tokenizer", config)
    assert code == 1
    assert f"{name} " in text


def test_settings_of_a_stage_that_are_none_are_named(
    copied: Path, write_config: Callable[..., Path], smalti: Smalti
) -> None:
    for text in ("---\n---", "a: &a [x]\nb: [*a, *a]", "x: !!bool y"):
        (copied / "images" / "config.yaml").write_text(text)
        code, said = smalti("pack", write_config(copied.parent))
        assert code == 1
        assert "config.yaml is not what smalti wrote there" in said
        assert "--redo pack" in said


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    torch.save({"state_dict": Payload(tmp_path / "ran")}, tmp_path / "last.ckpt")
    with pytest.raises(StageError, match=r"last\.ckpt is no checkpoint that can be read"):
        WholeCheckpoints().load_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "ran").exists()


@few
@given(changes=mutations)
def test_mutated_shards_are_read_or_refused(changes: list, copied: Path, cache: Cache, tmp_path: Path) -> None:
    for kind, shard in (("images", "val-000000.tar"), ("codes", "val-000000.tar")):
        whole = (copied / kind / shard).read_bytes()
        (copied / kind / shard).write_bytes(mutated(whole, changes))
        relist(copied / kind)
        try:
            if kind == "codes":
                Codes(copied / kind, "val", tmp_path / "unpacked", cache)
            else:
                shards = ImageShards(copied / kind, "val", cache)
                for index in range(len(shards)):
                    shards.pixels(index)
        except StageError:
            pass
        finally:
            (copied / kind / shard).write_bytes(whole)


@few
@given(changes=mutations)
def test_mutated_manifests_and_receipts_are_read_or_refused(changes: list, copied: Path, tmp_path: Path) -> None:
    for name in ("manifest.json", "train-000000.json"):
        path = copied / "codes" / name
        whole = path.read_bytes()
        path.write_bytes(mutated(whole, changes))
        try:
            read_receipt(path.with_suffix(".tar"))
            read_manifest(copied / "codes", "codes", "encode")
        except StageError:
            pass
        finally:
            path.write_bytes(whole)


@few
@given(changes=mutations)
def test_mutated_configs_are_read_or_refused(changes: list, tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(mutated(tiny_run.read_bytes(), changes))
    with contextlib.suppress(ConfigError):
        load_config(tmp_path / "c.yaml")


@few
@given(changes=mutations)
def test_mutated_models_are_loaded_or_refused(changes: list, copied: Path) -> None:
    for folder, kind in ((copied / "tokenizer", HierarchicalVQVAE), (copied / "prior" / "level1", LevelPrior)):
        for name in ("model.safetensors", "config.json"):
            whole = (folder / name).read_bytes()
            (folder / name).write_bytes(mutated(whole, changes))
            try:
                kind.from_pretrained(folder)
            except ValueError:
                pass
            finally:
                (folder / name).write_bytes(whole)


@few
@given(changes=mutations, kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]))
def test_mutated_images_are_read_or_refused(changes: list, kind: str) -> None:
    data = mutated(data_of(Image.fromarray(noise(16, 16)), kind), changes)
    for read in (lambda: pixels_of(data, 16, 3), lambda: fit(data, 8, 3, True, "png")):
        with contextlib.suppress(BadImageError):
            read()


def test_a_full_disk_is_told_of_and_work_goes_on_once_there_is_room(
    tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti
) -> None:
    config = write_config(tmp_path, {"images": {"shard_size": 700}})
    full = Job("pipelines.cli", "pack", config, folder=tmp_path, file_limit=400_000)  # the val shard fits, no other
    assert full.wait() == 1
    assert "cannot write" in full.errors
    assert "File too large; mend that and give the same command again" in full.errors
    assert "Traceback" not in full.errors
    images = tmp_path / "run" / "images"
    assert not [path for path in images.iterdir() if path.suffix == ".tmp"]
    assert all(read_receipt(path) for path in images.glob("*.tar"))
    assert smalti("pack", config)[0] == 0
    full = Job("pipelines.cli", "train-tokenizer", config, folder=tmp_path, file_limit=20_000)  # no checkpoint fits
    assert full.wait() == 1
    assert "cannot write" in full.errors
    assert "Traceback" not in full.errors
    assert not list((tmp_path / "run" / "tokenizer").rglob("*.ckpt*"))
    assert smalti("train-tokenizer", config)[0] == 0


def test_the_same_command_twice_at_once_does_no_harm(
    tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti
) -> None:
    run = tiny_run.parent / "run"
    changes = {"images": {"from": str(run / "images")}, "tokenizer": {"from": str(run / "tokenizer")}}
    config = write_config(tmp_path, changes)
    jobs = [Job("pipelines.cli", "encode", config, folder=tmp_path) for _ in range(2)]
    assert [job.wait() for job in jobs] == [0, 0]
    assert smalti("encode", config)[0] == 0
    for path in (run / "codes").iterdir():
        if path.name != "config.yaml":
            assert (tmp_path / "run" / "codes" / path.name).read_bytes() == path.read_bytes(), path.name
    assert not np.any([path.suffix == ".tmp" for path in (tmp_path / "run" / "codes").iterdir()])
