"""Shards: webdataset tars that any reader of those can use, read here by index."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pipelines.errors import StageError

# No sample of ours comes near; a member that claims more is not read.
MAX_MEMBER_BYTES = 2**28
# What a sample may hold beside its image, carried byte for byte; and what stands for one where only others have it:
# Hugging Face's reader of webdatasets refuses samples of unequal members.
CARRIED = {"txt": b"", "json": b"{}"}
# What mean and log-variance of a level's q(z | x) are called, after its name.
POSTERIOR = "posterior.npy"


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


def check_count(shard: Path, found: int, told: int, stage: str) -> None:
    """Raise StageError unless a shard holds as many samples as its manifest tells of; the stage can make it again."""
    if found != told:
        raise StageError(f"{shard} holds {found} samples but its manifest tells of {told}; run `smalti {stage}` again")


def read_member(file: BinaryIO, member: Member) -> bytes:
    """Read one member of an open tar."""
    file.seek(member.offset)
    return file.read(member.size)


def read_class(file: BinaryIO, sample: SampleIndex, num_classes: int, shard: Path, stage: str) -> int:
    """Return the class index of a sample, 0 where there are no classes.

    Args:
        file: the open shard.
        sample: which one.
        num_classes: of the split; 0 for none.
        shard: its name in messages.
        stage: that makes such shards.

    Raises:
        StageError: the class does not exist, or there is none and must be.
    """
    text = read_member(file, sample.members["cls"])[:32] if "cls" in sample.members else b""
    if not num_classes and not text:
        return 0
    if not text.isdigit() or int(text) >= num_classes:
        raise StageError(
            f"sample {sample.key} of {shard} must have a class below {num_classes}, has {text!r}; "
            f"run `smalti {stage}` again"
        )
    return int(text)


def array_bytes(array: np.ndarray) -> bytes:
    """Return an array in the npy format."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def code_dtype(codebook_size: int | None) -> np.dtype:
    """Return the smallest unsigned dtype that holds K - 1; float32 for continuous levels."""
    return np.dtype(np.float32) if codebook_size is None else np.min_scalar_type(codebook_size - 1)


def level_shape(level: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape of a level's array in a sample, from a manifest: (h, w), or (d, h, w) of a continuous level."""
    h, w = level["grid"]
    return (h, w) if level["codebook_size"] else (level["channels"], h, w)


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
