"""Shards and their receipts: webdataset tars that are either whole under their name or not there.

A shard is written to a temporary name and renamed when whole; its receipt follows. What a receipt names is ours, to be
written again or removed; all else in a folder is somebody else's.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pipelines.compute.devices import this_worker
from pipelines.errors import StageError
from pipelines.storage.cache import Cache
from pipelines.storage.fingerprint import digest
from pipelines.storage.paths import exists, is_local, read_bytes, whole, write_text

# Of receipts; those of before it was written are of format 1.
FORMAT = 1
# No sample of ours comes near; a member that claims more is not read.
MAX_MEMBER_BYTES = 2**28
# What a sample may hold beside its image, carried byte for byte; and what stands for one where only others have it:
# Hugging Face's reader of webdatasets refuses samples of unequal members.
CARRIED = {"txt": b"", "json": b"{}"}
# What shards may be called: nothing that leads out of their folder.
SHARD_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}\.tar")
# And the files of a shard that has several.
FILE_NAME = re.compile(r"([A-Za-z0-9_-]{1,100}/){0,2}[A-Za-z0-9_-]{1,100}(\.[a-z]{1,20}){1,3}")


class Member(NamedTuple):
    """Where a file of a sample lies in its tar."""

    offset: int
    size: int


class SampleIndex(NamedTuple):
    """One sample of a shard: its key, and its members by extension ("png", "cls", "level0.npy")."""

    key: str
    members: dict[str, Member]


def index_shard(path: Path) -> list[SampleIndex]:
    """List the samples of a tar in order, without reading their contents.

    Webdataset's rule: files that follow one another and share the name up to the first dot are one sample.

    Raises:
        StageError: not a whole tar, or a member is too large to be believed.
    """
    samples: list[SampleIndex] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if not info.isfile():
                    continue
                if not 0 <= info.size <= MAX_MEMBER_BYTES:
                    raise StageError(f"{info.name} of {path} claims {info.size} bytes; members hold {MAX_MEMBER_BYTES}")
                folder, _, name = info.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if not samples or samples[-1].key != key:
                    samples.append(SampleIndex(key, {}))
                samples[-1].members[extension] = Member(info.offset_data, info.size)
            end = tar.offset
    except StageError:
        raise
    except Exception as error:  # tarfile raises many kinds on headers that lie
        raise StageError(f"{path} is not a whole tar ({error}); make or copy it again") from error
    with path.open("rb") as file:
        file.seek(end)
        if any(file.read(512)) or file.tell() != end + 512:  # a whole tar ends in blocks of zeros
            raise StageError(f"{path} is truncated at {path.stat().st_size} bytes; copy or make it again")
    return samples


def read_member(file: BinaryIO, member: Member) -> bytes:
    """Read one member of an open tar."""
    file.seek(member.offset)
    return file.read(member.size)


def array_bytes(array: np.ndarray) -> bytes:
    """Return an array in the npy format."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def code_dtype(codebook_size: int) -> np.dtype:
    """Return the smallest unsigned dtype that holds K - 1."""
    return np.min_scalar_type(codebook_size - 1)


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]], provenance: dict[str, Any]) -> dict:
    """Write a shard and its receipt.

    Args:
        path: final name; it appears only when the shard is whole.
        samples: (key, contents by extension); read once.
        provenance: what the shard was made from and with; judged by `receipt_fits`. Filled while samples are read,
            it may hold what only they tell (skipped images).

    Returns:
        The receipt.
    """
    with whole(path) as temporary:
        count = write_tar(temporary, samples)
        with temporary.open("rb") as written:
            sha256 = hashlib.file_digest(written, "sha256").hexdigest()
        size = temporary.stat().st_size
        # An old receipt must not vouch for the new shard. This one vouches for nothing: it says whose the shard is.
        write_text(receipt_path(path), json.dumps({"format": FORMAT, "shard": path.name}) + "\n")
    receipt = {"format": FORMAT, "shard": path.name, "sha256": sha256, "bytes": size, "samples": count, **provenance}
    write_json(receipt_path(path), receipt)
    return receipt


def write_tar(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> int:
    """Write (key, contents by extension) as a tar whose bytes tell nothing of when and where; return how many."""
    import webdataset  # takes seconds, and reading needs none of it

    count = 0
    with (
        path.open("wb") as file,
        webdataset.TarWriter(file, encoder=False, user="", group="", mode=0o644, mtime=0, format="PAX_FORMAT") as tar,
    ):
        for key, contents in samples:
            tar.write({"__key__": key, **contents})
            count += 1
    return count


def write_files(job: "ShardJob", write: Callable[[], tuple[Sequence[str], dict[str, Any]]]) -> dict:
    """Write a shard of several files and its receipt, which vouches for all of them.

    Args:
        job: names the files that there may be.
        write: writes them, each whole; returns the names of those that there are, and what else the receipt shall say.

    Returns:
        The receipt.
    """
    folder, before = job.path.parent, _named_by(job.path).get("files", {})
    # As in `write_shard`: until all are written, the receipt says no more than whose they are.
    unvouched: dict[str, dict] = {name: {} for name in [*before, *job.files]}
    write_json(receipt_path(job.path), {"format": FORMAT, "shard": job.path.name, "files": unvouched})
    names, told = write()
    for name in before:
        if name not in names:
            _remove(folder / name)
    files = {name: _vouched(folder / name) for name in names}
    size = sum(file["bytes"] for file in files.values())
    receipt = {"format": FORMAT, "shard": job.path.name, "files": files, "sha256": digest(files), "bytes": size}
    receipt |= {**told, **job.provenance}
    write_json(receipt_path(job.path), receipt)
    return receipt


def _vouched(path: Path) -> dict[str, Any]:
    with path.open("rb") as written:
        sha256 = hashlib.file_digest(written, "sha256").hexdigest()
    return {"sha256": sha256, "bytes": path.stat().st_size}


def receipt_path(shard: Path) -> Path:
    """Return the path of a shard's receipt: NAME.json beside NAME.tar, or among files of that name."""
    return shard.with_suffix(".json")


def receipt_fits(shard: Path, provenance: dict[str, Any], cache: Cache) -> bool:
    """Whether the shard is there, is what its receipt says, and is made from and with what provenance says."""
    receipt = read_receipt(shard)
    return (
        receipt is not None
        and _made_with(receipt, provenance)
        and all(cache.holds(path, told) for path, told in _files(shard, receipt).items())
    )


def _made_with(receipt: dict, provenance: dict[str, Any]) -> bool:
    return all(receipt.get(key) == value for key, value in provenance.items())


def read_receipt(shard: Path) -> dict | None:
    """Return a shard's receipt, or None if there is none that can be read and vouches for it."""
    receipt = _named_by(shard)
    if "sha256" not in receipt:
        return None
    if receipt.get("format", FORMAT) != FORMAT:
        raise StageError(f"{receipt_path(shard)} is of format {receipt['format']}, not {FORMAT}; update smalti")
    return receipt


def _named_by(shard: Path) -> dict:
    """The receipt beside a shard if it names it, be it only that it will be written; else nothing."""
    try:
        receipt = json.loads(read_bytes(receipt_path(shard)))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(receipt, dict) or receipt.get("shard") != shard.name:
        return {}
    several = receipt.get("files", {})
    believed = isinstance(several, dict) and all(
        FILE_NAME.fullmatch(name) and isinstance(told, dict) for name, told in several.items()
    )
    return receipt if believed else {}


def _files(shard: Path, receipt: dict) -> dict[Path, dict]:
    """The files that a receipt names, each with what it says of it: the shard itself, or several."""
    if not receipt or "files" not in receipt:
        return {shard: receipt} if receipt else {}
    return {shard.parent / name: told for name, told in receipt["files"].items()}


def _remove(path: Path) -> None:
    """Remove a file of ours and, for datatrove, the link beside it."""
    path.unlink(missing_ok=True)
    if path.suffix == ".bin" and _is_link(link := path.with_suffix(".ds")):
        link.unlink()


def _is_link(path: Path) -> bool:
    """Whether this is NAME.ds, which is in no receipt because it is nothing but NAME.bin."""
    ours = is_local(path) and path.suffix == ".ds" and path.is_symlink()
    return ours and os.readlink(path) == path.with_suffix(".bin").name


def remove_shards(folder: Path, keep: Collection[str] = ()) -> None:
    """Remove a folder's shards, but for those to keep, and their receipts; what no receipt names stays."""
    for receipt in list(folder.glob("*.json")):
        for shard in (receipt.with_suffix(".tar"), receipt.with_suffix("")):
            if shard.name not in keep and (named := _named_by(shard)):
                for path in _files(shard, named):
                    _remove(path)
                receipt.unlink(missing_ok=True)  # comes last: without it the shard would be nobody's


class ShardJob(NamedTuple):
    """A shard to be written.

    Attributes:
        path: of it; of one of several files, their common name.
        samples: how many it will hold.
        provenance: what it is made from and with.
        files: names of the several files that it may have, relative to the folder.
    """

    path: Path
    samples: int
    provenance: dict[str, Any]
    files: Sequence[str] = ()


def outstanding(jobs: Sequence[ShardJob], cache: Cache) -> list[int]:
    """Return which jobs have no shard that fits; the others stay as they are."""
    return [number for number, job in enumerate(jobs) if not receipt_fits(job.path, job.provenance, cache)]


class Share(NamedTuple):
    """The jobs that a worker has to do, and, of all that were outstanding when it began, the receipts there were."""

    todo: list[int]
    before: Mapping[int, dict | None]


def check_free(job: ShardJob) -> None:
    """Raise StageError where somebody else's file lies where a shard or its receipt would be written."""
    ours = _files(job.path, _named_by(job.path))
    receipt = receipt_path(job.path)
    paths = [job.path.parent / name for name in job.files] or [job.path]
    taken = next((path for path in paths if path not in ours and not _is_link(path) and exists(path)), None)
    if not ours and exists(receipt):
        taken = taken or receipt
    if taken:
        raise StageError(f"{taken} must be free for a shard, but smalti did not write what lies there; move it away")


def this_workers(jobs: Sequence[ShardJob], folder: Path, cache: Cache, completing: str = "manifest.json") -> Share:
    """Return this worker's share. A folder where something is to be done is not complete any more.

    Which worker a shard belongs to depends on its place alone: others may be at work already.

    Args:
        jobs: all shards of the stage.
        folder: of the stage.
        cache: for the shards.
        completing: the file that makes the folder complete.

    Raises:
        StageError: as of `check_free`.
    """
    missing = outstanding(jobs, cache)
    for number in missing:
        check_free(jobs[number])
    before = {number: read_receipt(jobs[number].path) for number in missing}
    if missing:
        (folder / completing).unlink(missing_ok=True)
    return Share([number for number in this_worker().share(list(range(len(jobs)))) if number in before], before)


def all_done(jobs: Sequence[ShardJob], share: Share, cache: Cache) -> bool:
    """Whether every shard is done, this worker's share and the others'.

    Raises:
        StageError: another worker has meanwhile written a shard that does not fit here, and so will all of its own.
    """
    left = outstanding(jobs, cache)
    for number in left:
        path, _, provenance, _ = jobs[number]
        receipt = read_receipt(path)
        if receipt and receipt != share.before.get(number) and not _made_with(receipt, provenance):
            raise StageError(
                f"{path} was written by another process, made otherwise than this one makes shards; all must have the "
                "same settings, models, kind of device and, on CPUs, compute.threads: set it"
            )
    return not left


def write_json(path: Path, contents: Any) -> None:
    """Write JSON so that the file is either the old or the new one."""
    write_text(path, json.dumps(contents, indent=1, sort_keys=True) + "\n")
