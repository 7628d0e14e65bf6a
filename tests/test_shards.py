import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import StageError
from pipelines.stages.shard_job import ShardJob, all_done, this_workers
from pipelines.storage.cache import Cache
from pipelines.storage.receipts import read_receipt, receipt_fits, receipt_path, write_shard
from pipelines.storage.shards import array_bytes, code_dtype, index_shard, read_member

PROVENANCE = {"made_from": None, "fingerprints": {}, "settings": "abc"}
SAMPLES = [(f"{n:03d}", {"level0.npy": array_bytes(np.full((2, 2), n, np.uint8)), "cls": b"1"}) for n in range(5)]


def test_a_shard_reads_back_through_plain_webdataset(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", SAMPLES, PROVENANCE)
    found = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in found] == [key for key, _ in SAMPLES]
    assert [np.load(io.BytesIO(sample["level0.npy"]))[0, 0] for sample in found] == list(range(5))
    assert all(sample["cls"] == b"1" for sample in found)


@given(
    st.dictionaries(
        st.text("abz/_-", min_size=1, max_size=130).filter(
            lambda k: not k.startswith("/") and "//" not in k and k[-1] != "/"
        ),
        st.dictionaries(st.sampled_from(["png", "cls", "level0.npy"]), st.binary(max_size=600), min_size=1),
        max_size=6,
    )
)
def test_what_is_written_is_read_back_by_index(contents: dict[str, dict[str, bytes]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        write_shard(path, contents.items(), PROVENANCE)
        with path.open("rb") as file:
            found = {
                sample.key: {name: read_member(file, member) for name, member in sample.members.items()}
                for sample in index_shard(path)
            }
    assert found == contents


def test_entries_carry_nothing_of_the_machine_and_bytes_repeat(tmp_path: Path) -> None:
    receipts = [write_shard(tmp_path / name, SAMPLES, PROVENANCE) for name in ("a.tar", "b.tar")]
    assert receipts[0]["sha256"] == receipts[1]["sha256"]
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert {(i.mtime, i.uid, i.gid, i.mode, i.uname, i.gname) for i in tar} == {(0, 0, 0, 0o644, "", "")}


def test_a_shard_counts_only_if_its_receipt_fits(tmp_path: Path, cache: Cache) -> None:
    path = tmp_path / "a.tar"
    assert not receipt_fits(path, PROVENANCE, cache)
    write_shard(path, SAMPLES, PROVENANCE)
    assert receipt_fits(path, PROVENANCE, cache)
    assert not receipt_fits(path, PROVENANCE | {"settings": "other"}, cache)
    assert not receipt_fits(path, PROVENANCE | {"fingerprints": {"tokenizer": "x"}}, cache)
    whole = path.read_bytes()
    path.write_bytes(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    assert not receipt_fits(path, PROVENANCE, cache)
    path.write_bytes(whole[:-512])
    assert not receipt_fits(path, PROVENANCE, cache)
    write_shard(path, SAMPLES, PROVENANCE)
    receipt_path(path).write_text("{half")
    assert not receipt_fits(path, PROVENANCE, cache)


def test_a_receipt_stands_while_the_same_bytes_and_no_others_are_written_again(tmp_path: Path, cache: Cache) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, SAMPLES, PROVENANCE)
    for samples, stands in ((SAMPLES, True), (SAMPLES[:2], False)):
        with pytest.raises(TypeError):  # after the shard is there, before its own receipt is
            write_shard(path, samples, {"settings": object()})
        assert (read_receipt(path) is not None) == receipt_fits(path, PROVENANCE, cache) == stands


def test_an_interrupted_shard_leaves_nothing_behind(tmp_path: Path) -> None:
    def broken():
        yield SAMPLES[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "a.tar", broken(), PROVENANCE)
    assert not list(tmp_path.iterdir())


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, SAMPLES, PROVENANCE)
    whole = path.read_bytes()
    for size in (700, 1200, 5000):
        path.write_bytes(whole[:size])
        with pytest.raises(StageError, match=r"a\.tar is (not a whole tar|truncated)"):
            index_shard(path)


@pytest.mark.parametrize(
    ("size", "dtype"), [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_codes_take_the_smallest_unsigned_type(size: int, dtype: str) -> None:
    assert code_dtype(size) == np.dtype(dtype)


def test_an_old_receipt_never_vouches_for_a_new_shard(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the shard and its receipt: the new shard has the old one's size, but no receipt at all."""
    path = tmp_path / "a.tar"
    write_shard(path, SAMPLES, PROVENANCE)

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.storage.receipts.write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        write_shard(path, SAMPLES[::-1], PROVENANCE | {"settings": "new"})
    assert not receipt_fits(path, PROVENANCE, cache)


def test_a_shard_that_lost_its_receipt_to_a_kill_is_made_again_and_a_foreign_file_is_refused(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [ShardJob(tmp_path / name, len(SAMPLES), PROVENANCE) for name in ("a.tar", "b.tar")]

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.storage.receipts.write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        write_shard(jobs[0].path, SAMPLES, PROVENANCE)
    assert this_workers(jobs, tmp_path, cache).todo == [0, 1]
    for name in ("b.tar", "b.json"):
        (tmp_path / "manifest.json").write_text("{}")
        (tmp_path / name).write_text("mine")
        with pytest.raises(StageError, match=rf"{name[0]}\{name[1:]} must be free for a shard, but .* move it away"):
            this_workers(jobs, tmp_path, cache)
        assert (tmp_path / name).read_text() == "mine"
        assert (tmp_path / "manifest.json").exists()
        (tmp_path / name).unlink()


def test_a_worker_whose_shards_another_does_not_accept_says_so(tmp_path: Path, cache: Cache) -> None:
    """The one that ends last sees it; a shard that lay there before may still be the other's to write."""
    jobs = [ShardJob(tmp_path / name, len(SAMPLES), PROVENANCE) for name in ("a.tar", "b.tar")]
    write_shard(jobs[1].path, SAMPLES, PROVENANCE | {"settings": "of before"})
    share = this_workers(jobs, tmp_path, cache)
    write_shard(jobs[0].path, SAMPLES, PROVENANCE)
    assert not all_done(jobs, share, cache)
    write_shard(jobs[1].path, SAMPLES, PROVENANCE | {"settings": "other threads"})
    with pytest.raises(StageError, match=r"b\.tar was written by another process, made otherwise .* compute\.threads"):
        all_done(jobs, share, cache)
    write_shard(jobs[1].path, SAMPLES, PROVENANCE)
    assert all_done(jobs, share, cache)
