"""What an image source is: pictures and their classes, as splits that are read by index."""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from pipelines.errors import StageError
from pipelines.progress import counted
from pipelines.sources.listing import shortly
from pipelines.storage.cache import Cache


class Raw(NamedTuple):
    """One picture as the source has it: its key, the bytes of an image file, and its class index or None."""

    key: str
    data: bytes
    label: int | None


class Split(Protocol):
    """Part of a source. labels is int64 (N,), or None when there are no classes."""

    labels: np.ndarray | None

    def __len__(self) -> int: ...
    def key(self, index: int) -> str: ...
    def read(self, index: int) -> Raw: ...
    def beside(self, index: int, kept: Collection[str]) -> dict[str, bytes]: ...


class Source(NamedTuple):
    """What a source holds, as it was understood.

    Attributes:
        splits: by name, "train" and perhaps "val".
        class_names: empty where there are no classes.
        identity: a digest of what is listed.
        origins: split -> what it is called in the source, where that has a name for it.
        left_out: what else holds images there.
        beside: extension ("txt", "json") of what lies beside images and can be carried -> what tells beside which ones,
            where the identity does not.
        dropped: what else lies beside them.
    """

    splits: Mapping[str, Split]
    class_names: list[str]
    identity: str
    origins: Mapping[str, str] = {}
    left_out: tuple[str, ...] = ()
    beside: Mapping[str, str] = {}
    dropped: tuple[str, ...] = ()


def described(name: str, source: Source) -> str:
    """Say in one line how a source was understood: its splits, their origins and counts, and the classes."""
    counts = [
        f"{split} {counted(len(images), 'image')}" + (f" ({source.origins[split]})" if split in source.origins else "")
        for split, images in source.splits.items()
    ]
    held_out = "" if "val" in source.splits else ", of which some are set aside for val"
    number = len(source.class_names)
    classes = f"{number:,} class{'es' * (number > 1)}: {shortly(source.class_names)}" if number else "no classes"
    left_out = f"; left out: {shortly(source.left_out)}" if source.left_out else ""
    return f"{name}: {' and '.join(counts)}{held_out}; {classes}{left_out}"


def described_beside(source: Source, kept: Collection[str]) -> str:
    """Say in one line what of that which lies beside the images comes along, and what does not; empty if none does."""
    dropped = [*(extension for extension in source.beside if extension not in kept), *source.dropped]
    said = [f"{what} {shortly(names)}" for what, names in (("kept", kept), ("dropped", dropped)) if names]
    return f"beside the images: {'; '.join(said)}" if said else ""


def check_unique(keys: Iterable[str], name: str) -> None:
    """Raise StageError for a key that comes twice in a split of the source of a name."""
    seen: set[bytes] = set()
    for key in keys:
        short = hashlib.blake2b(key.encode(), digest_size=16).digest()  # a set of these stays small
        if short in seen:
            raise StageError(
                f"keys must be unique, but {key} comes twice in {name}; rename one of the files "
                "(names are compared without their extension, dots as underscores)"
            )
        seen.add(short)


def on_disk(path: Path, cache: Cache) -> Path:
    """Return a local file with the content of one that may be remote."""
    return cache.files(path.parent, [path.name]) / path.name


def label_at(labels: np.ndarray | None, index: int) -> int | None:
    """Return the class of an image, None when there are no classes."""
    return None if labels is None else int(labels[index])
