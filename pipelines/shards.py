"""Shards and their receipts: webdataset tars that are either whole under their name or not there.

A shard is written to a temporary name and renamed when whole; its receipt follows.
"""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pipelines.cache import Cache
from pipelines.compute import this_worker
from pipelines.errors import StageError
from pipelines.places import read_bytes, whole, write_text

# Of receipts; those of before it was written are of format 1.
FORMAT = 1
# No sample of ours comes near; a member that claims more is not read.
MAX_MEMBER_BYTES = 2**28
# What shards may be called: nothing that leads out of their folder.
SHARD_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}\.tar")


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
        receipt_path(path).unlink(missing_ok=True)  # an old receipt must not vouch for the new shard
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


def receipt_path(shard: Path) -> Path:
    """Return the path of a shard's receipt: NAME.json beside NAME.tar."""
    return shard.with_suffix(".json")


def receipt_fits(shard: Path, provenance: dict[str, Any], cache: Cache) -> bool:
    """Whether the shard is there, is what its receipt says, and is made from and with what provenance says."""
    receipt = read_receipt(shard)
    fits = receipt is not None and all(receipt.get(key) == value for key, value in provenance.items())
    return fits and cache.holds(shard, receipt)  # type: ignore[arg-type]  # a dict if it fits


def read_receipt(shard: Path) -> dict | None:
    """Return a shard's receipt, or None if there is none that can be read."""
    try:
        receipt = json.loads(read_bytes(receipt_path(shard)))
    except (OSError, ValueError, RecursionError):
        return None
    whole_receipt = isinstance(receipt, dict) and receipt.get("shard") == shard.name and "sha256" in receipt
    if whole_receipt and receipt.get("format", FORMAT) != FORMAT:
        raise StageError(f"{receipt_path(shard)} is of format {receipt['format']}, not {FORMAT}; update smalti")
    return receipt if whole_receipt else None


class ShardJob(NamedTuple):
    """A shard to be written: its path, how many samples it will hold, and what it is made from and with."""

    path: Path
    samples: int
    provenance: dict[str, Any]


def outstanding(jobs: Sequence[ShardJob], cache: Cache) -> list[int]:
    """Return which jobs have no shard that fits; the others stay as they are."""
    return [number for number, job in enumerate(jobs) if not receipt_fits(job.path, job.provenance, cache)]


def this_workers(jobs: Sequence[ShardJob], folder: Path, cache: Cache) -> list[int]:
    """Return the jobs that this worker has to do. A folder where something is to be done is not complete any more.

    Which worker a shard belongs to depends on its place alone: others may be at work already.
    """
    missing = set(outstanding(jobs, cache))
    if missing:
        (folder / "manifest.json").unlink(missing_ok=True)
    return [number for number in this_worker().share(list(range(len(jobs)))) if number in missing]


def write_json(path: Path, contents: Any) -> None:
    """Write JSON so that the file is either the old or the new one."""
    write_text(path, json.dumps(contents, indent=1, sort_keys=True) + "\n")
