"""Shards, receipts and manifests: webdataset tars that are either whole under their name or not there.

A shard is written to a temporary name and renamed when whole; its receipt follows; the manifest comes last.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pipelines.errors import StageError

FORMAT_VERSION = 1


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
        StageError: not a whole tar.
    """
    samples: list[SampleIndex] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if not info.isfile():
                    continue
                folder, _, name = info.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if not samples or samples[-1].key != key:
                    samples.append(SampleIndex(key, {}))
                samples[-1].members[extension] = Member(info.offset_data, info.size)
            end = tar.offset
    except (tarfile.TarError, OSError, EOFError) as error:
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
    import webdataset  # takes seconds, and reading needs none of it

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with temporary.open("wb") as file:
            with webdataset.TarWriter(
                file, encoder=False, user="", group="", mode=0o644, mtime=0, format="PAX_FORMAT"
            ) as tar:
                for key, contents in samples:
                    tar.write({"__key__": key, **contents})
                    count += 1
            file.flush()
            os.fsync(file.fileno())
        with temporary.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size = temporary.stat().st_size
        receipt_path(path).unlink(missing_ok=True)  # an old receipt must not vouch for the new shard
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    receipt = {"shard": path.name, "sha256": sha256, "bytes": size, "samples": count, **provenance}
    write_json(receipt_path(path), receipt)
    return receipt


def receipt_path(shard: Path) -> Path:
    """Return the path of a shard's receipt: NAME.json beside NAME.tar."""
    return shard.with_suffix(".json")


def receipt_fits(shard: Path, provenance: dict[str, Any]) -> bool:
    """Whether the shard is there, whole by size, and made from and with what provenance says."""
    receipt = read_receipt(shard)
    if receipt is None or not shard.exists() or shard.stat().st_size != receipt.get("bytes"):
        return False
    return all(receipt.get(key) == value for key, value in provenance.items())


def read_receipt(shard: Path) -> dict | None:
    """Return a shard's receipt, or None if there is none that can be read."""
    try:
        receipt = json.loads(receipt_path(shard).read_text())
    except (OSError, ValueError):
        return None
    return receipt if isinstance(receipt, dict) and receipt.get("shard") == shard.name else None


def write_manifest(folder: Path, splits: dict[str, list[str]], contents: dict[str, Any]) -> dict:
    """Merge the receipts of a folder's shards into `manifest.json`; it makes the stage complete.

    Shards that are not named, left by other settings, are removed first.
    """
    named = {name for names in splits.values() for name in names}
    for path in folder.glob("*.tar"):
        if path.name not in named:
            receipt_path(path).unlink(missing_ok=True)
            path.unlink()
    receipts = {split: [read_receipt(folder / name) for name in names] for split, names in splits.items()}
    manifest = {"format": FORMAT_VERSION, **contents, "splits": receipts}
    write_json(folder / "manifest.json", manifest)
    return manifest


def read_manifest(folder: Path, kind: str, stage: str) -> dict:
    """Read a stage folder's manifest.

    Args:
        folder: of images, codes or samples.
        kind: which of them it must be.
        stage: the command that makes it.

    Raises:
        StageError: none there, or not one of this kind and format.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise StageError(f"{folder} holds no finished {kind}; run `smalti {stage}` first") from error
    except (OSError, ValueError) as error:
        raise StageError(f"{path} cannot be read ({error}); run `smalti {stage}` again") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != kind or manifest.get("format") != FORMAT_VERSION:
        raise StageError(
            f"{path} must be a manifest of {kind} in format {FORMAT_VERSION}; is {folder} the right folder?"
        )
    return manifest


def shard_names(manifest: dict, split: str) -> list[tuple[str, int]]:
    """Return (name, samples) of each shard of a split."""
    return [(receipt["shard"], receipt["samples"]) for receipt in manifest["splits"].get(split, [])]


def write_json(path: Path, contents: Any) -> None:
    """Write JSON so that the file is either the old or the new one."""
    write_text(path, json.dumps(contents, indent=1, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text so that the file is either the old or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
