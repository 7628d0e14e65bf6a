"""Receipts: what vouches for a shard, and says that it is ours.

A shard is written to a temporary name and renamed when whole; its receipt follows. What a receipt names is ours, to be
written again or removed; all else in a folder is somebody else's.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.errors import StageError
from pipelines.storage.cache import Cache
from pipelines.storage.fingerprint import digest
from pipelines.storage.paths import exists, is_local, read_bytes, whole, write_json, write_text
from pipelines.storage.shards import write_tar

# Of receipts; those of before it was written are of format 1.
FORMAT = 1
# What shards may be called: nothing that leads out of their folder.
SHARD_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}\.tar")
# And the files of a shard that has several.
FILE_NAME = re.compile(r"([A-Za-z0-9_-]{1,100}/){0,2}[A-Za-z0-9_-]{1,100}(\.[a-z]{1,20}){1,3}")


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
        # An old receipt must not vouch for other bytes; of the same ones what it says stays true, and another process
        # may count on it. In its place comes one that vouches for nothing: it says whose the shard is.
        if _named_by(path).get("sha256") != sha256:
            write_text(receipt_path(path), json.dumps({"format": FORMAT, "shard": path.name}) + "\n")
    receipt = {"format": FORMAT, "shard": path.name, "sha256": sha256, "bytes": size, "samples": count, **provenance}
    write_json(receipt_path(path), receipt)
    return receipt


def write_files(
    path: Path,
    files: Sequence[str],
    provenance: dict[str, Any],
    write: Callable[[], tuple[Sequence[str], dict[str, Any]]],
) -> dict:
    """Write a shard of several files and its receipt, which vouches for all of them.

    Args:
        path: the files' common name.
        files: names of those that there may be, relative to the folder.
        provenance: see `write_shard`.
        write: writes them, each whole; returns the names of those that there are, and what else the receipt shall say.

    Returns:
        The receipt.
    """
    folder, before = path.parent, _named_by(path).get("files", {})
    # As in `write_shard`: until all are written, the receipt says no more than whose they are.
    unvouched: dict[str, dict] = {name: {} for name in [*before, *files]}
    write_json(receipt_path(path), {"format": FORMAT, "shard": path.name, "files": unvouched})
    names, told = write()
    for name in before:
        if name not in names:
            _remove(folder / name)
    vouched = {name: _vouched(folder / name) for name in names}
    size = sum(file["bytes"] for file in vouched.values())
    receipt = {"format": FORMAT, "shard": path.name, "files": vouched, "sha256": digest(vouched), "bytes": size}
    receipt |= {**told, **provenance}
    write_json(receipt_path(path), receipt)
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
        and made_with(receipt, provenance)
        and all(cache.holds(path, told) for path, told in _files(shard, receipt).items())
    )


def made_with(receipt: Mapping[str, Any], provenance: dict[str, Any]) -> bool:
    """Whether a receipt says what provenance says."""
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
    if path.name.endswith(".ds.index") and _is_link(link := path.with_suffix("")):
        link.unlink()


def _is_link(path: Path) -> bool:
    """Whether this is NAME.ds, which is in no receipt because it is nothing but NAME.bin."""
    ours = is_local(path) and path.is_symlink()
    return ours and os.path.basename(os.readlink(path)) == path.with_suffix(".bin").name


def remove_shards(folder: Path, keep: Collection[str] = ()) -> None:
    """Remove a folder's shards, but for those to keep, and their receipts; what no receipt names stays."""
    for receipt in list(folder.glob("*.json")):
        for shard in (receipt.with_suffix(".tar"), receipt.with_suffix("")):
            if shard.name not in keep and (named := _named_by(shard)):
                for path in _files(shard, named):
                    _remove(path)
                receipt.unlink(missing_ok=True)  # comes last: without it the shard would be nobody's


def taken_by_others(shard: Path, files: Sequence[str]) -> Path | None:
    """Return what lies where a shard, its files or its receipt would be written and is not ours, if there is any."""
    ours = _files(shard, _named_by(shard))
    paths = [shard.parent / name for name in files] or [shard]
    links = [path.with_suffix("") for path in paths if path.name.endswith(".ds.index")]
    others = [path for path in paths if path not in ours] + [link for link in links if not _is_link(link)]
    taken = next((path for path in others if exists(path)), None)
    if not taken and not ours and exists(receipt_path(shard)):
        return receipt_path(shard)
    return taken
