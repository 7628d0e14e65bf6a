"""Source shards: somebody else's webdataset."""

import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.errors import StageError
from pipelines.progress import counted
from pipelines.sources.listing import EXTENSIONS, files_of, safe_key, span
from pipelines.sources.source import Raw, Source, label_at, on_disk
from pipelines.sources.splits import chosen_splits, split_mark, split_of
from pipelines.storage.cache import Cache
from pipelines.storage.shards import CARRIED, SampleIndex, index_shard, read_member

# Class indices from here on are taken for damage.
MAX_CLASSES = 10**6


class _Members:
    def __init__(self, found: list[tuple[Path, Any, str]], labels: np.ndarray | None, cache: Cache) -> None:
        self.found, self.labels, self.cache = found, labels, cache
        self.local: dict[Path, Path] = {}

    def __len__(self) -> int:
        return len(self.found)

    def key(self, index: int) -> str:
        return safe_key(self.found[index][1].key)

    def read(self, index: int) -> Raw:
        extension = self.found[index][2]
        return Raw(self.key(index), self.beside(index, [extension])[extension], label_at(self.labels, index))

    def beside(self, index: int, kept: Collection[str]) -> dict[str, bytes]:
        path, sample, _ = self.found[index]
        local = self.local.get(path)
        if local is None or not local.exists():  # the cache may have made room
            local = self.local[path] = on_disk(path, self.cache)
        with local.open("rb") as file:
            return {name: read_member(file, sample.members[name]) for name in kept if name in sample.members}


def open_shards(urls: str, cache: Cache, classes: bool) -> Source:
    """Somebody else's webdataset, local or remote, by brace expansion and wildcards; class from `.cls`."""
    from webdataset.shardlists import expand_urls

    paths = []
    for url in expand_urls(urls):
        if not (named := files_of(url)):
            raise StageError(f"shards:{urls} must name tars that exist; there is no {url}")
        paths += named
    chosen = chosen_splits(f"shards:{urls}", dict.fromkeys(split_of(path.name) for path in paths))
    used = {split: [path for path in paths if split_of(path.name) == name] for split, name in chosen.items()}
    found = {
        split: [sample for path in some for sample in _samples(path, cache, classes)] for split, some in used.items()
    }
    imageless = [sample.key for samples in found.values() for _, sample, extension, _ in samples if not extension]
    found = {split: [sample for sample in samples if sample[2]] for split, samples in found.items()}
    for split, samples in found.items():
        _check_keys(split, samples)
    numbers = {split: [label for *_, label in samples] for split, samples in found.items()}
    every = [label for labels in numbers.values() for label in labels]
    known = [label for label in every if label is not None]
    if 0 < len(known) < len(every):
        raise StageError(f"shards:{urls}: some samples have a .cls and some not; set images.classes: false")
    splits = {
        split: _Members(
            [sample[:3] for sample in samples], np.array(numbers[split], np.int64) if known else None, cache
        )
        for split, samples in found.items()
    }
    members = {
        name
        for samples in found.values()
        for _, sample, extension, _ in samples
        for name in sample.members
        if name not in (extension, "cls")
    }
    listed = [path for path in paths if split_of(path.name) in chosen.values()]
    identity = "\n".join(f"{path} {path.stat().st_size}{split_mark(path.name)}" for path in listed)
    return Source(
        splits,
        [str(number) for number in range(max(known, default=-1) + 1)],
        hashlib.sha256(identity.encode()).hexdigest(),
        {split: span(some) for split, some in used.items()},
        tuple(path.name for path in paths if split_of(path.name) not in chosen.values()),
        {name: "" for name in CARRIED if name in members},
        (*_counted(imageless), *sorted(members - set(CARRIED))),
    )


def _samples(path: Path, cache: Cache, classes: bool) -> Iterator[tuple[Path, SampleIndex, str, int | None]]:
    """The samples of a tar, each with its image's extension, "" where it holds none, and its class, if it has one."""
    local = on_disk(path, cache)
    with local.open("rb") as file:
        for sample in _joined(index_shard(local), path):
            extension = next((e for e in sample.members if f".{e.lower()}" in EXTENSIONS), "")
            label = None
            if classes and extension and (member := sample.members.get("cls")):
                label = _class(read_member(file, member), f"sample {sample.key} of {path}")
            yield path, sample, extension, label


def _joined(samples: list[SampleIndex], path: Path) -> list[SampleIndex]:
    """Join the members of a key that others lie between, as in `tar cf x.tar *.jpg *.txt`."""
    joined: dict[str, SampleIndex] = {}
    for sample in samples:
        members = joined.setdefault(sample.key, SampleIndex(sample.key, {})).members
        if twice := sorted({*members} & {*sample.members}):
            raise StageError(f"files must have names of their own, but {sample.key}.{twice[0]} comes twice in {path}")
        members |= sample.members
    return list(joined.values())


def _check_keys(split: str, samples: list[tuple[Path, SampleIndex, str, int | None]]) -> None:
    """Raise StageError for a key that two tars of a split have."""
    met: dict[str, Path] = {}
    for path, sample, *_ in samples:
        before = met.setdefault(safe_key(sample.key), path)
        if before != path:
            raise StageError(
                f"keys must be unique in a split, but {sample.key} of {split} lies in {before} and in {path}; "
                "leave one of the tars out, or rename its members"
            )


def _class(data: bytes, name: str) -> int:
    text = data[:32].strip()
    if not text.isdigit():
        raise StageError(
            f"{name} has the class {text.decode(errors='replace')!r} in its .cls, which must be a whole number; "
            "mend it, or set images.classes: false"
        )
    if int(text) >= MAX_CLASSES:
        raise StageError(f"{name} has class {int(text)}; classes must lie below {MAX_CLASSES}")
    return int(text)


def _counted(imageless: list[str]) -> list[str]:
    return [f"{counted(len(imageless), 'sample')} of no image ({imageless[0]})"] if imageless else []
