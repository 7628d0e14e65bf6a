"""Image sources: where pictures and their classes come from, each as splits that can be read by index."""

import hashlib
import io
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from pipelines.errors import ConfigError, StageError
from pipelines.sources.listing import EXTENSIONS, beside_pictures, files_of, pictures_below, safe_key, shortly, span
from pipelines.sources.splits import chosen_splits, split_mark, split_named, split_of
from pipelines.storage.cache import Cache
from pipelines.storage.fingerprint import digest
from pipelines.storage.paths import is_local, place, read_bytes
from pipelines.storage.shards import CARRIED, SampleIndex, index_shard, read_member

# Class indices from here on are taken for damage.
MAX_CLASSES = 10**6


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


def open_source(
    source: str,
    cache: Cache,
    classes: bool = True,
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
) -> Source:
    """Open a source by its name.

    Args:
        source: "digits", "folder:PATH", "parquet:GLOB", "hf:REPO[:SPLIT]" or "shards:URLS"; paths may be URLs.
        cache: for remote shards.
        classes: False leaves the classes out.
        image_column: column of parquet and hf sources; found by its type if not given.
        label_column: likewise; without one there are no classes.
        caption_column: likewise, never looked for; what lies beside the image as "txt".

    Raises:
        ConfigError: no such kind of source.
        StageError: nothing there.
    """
    kind, _, rest = source.partition(":")
    if source == "digits":
        found = _digits()
    elif kind == "folder" and rest:
        found = _folder(rest, classes)
    elif kind in ("parquet", "hf") and rest:
        from pipelines.sources.hub import open_dataset  # its library takes seconds to import

        found = open_dataset(kind, rest, cache, classes, image_column, label_column, caption_column)
    elif kind == "shards" and rest:
        found = _shards(rest, cache, classes)
    else:
        raise ConfigError(
            f"images.source must be digits, folder:PATH, parquet:GLOB, hf:REPO[:SPLIT] or shards:URLS, got {source!r}"
        )
    if not sum(len(split) for split in found.splits.values()):
        raise StageError(f"{source} holds no images")
    if not classes:
        for split in found.splits.values():
            split.labels = None
        found = found._replace(class_names=[])
    return found


def described(name: str, source: Source) -> str:
    """Say in one line how a source was understood: its splits, their origins and counts, and the classes."""
    counts = [
        f"{split} {len(images):,} image{'s' * (len(images) != 1)}"
        + (f" ({source.origins[split]})" if split in source.origins else "")
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


class _Digits:
    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.pixels = np.round(digits.images * 255 / 16).astype(np.uint8)  # (N, 8, 8)
        self.labels: np.ndarray | None = digits.target.astype(np.int64)

    def __len__(self) -> int:
        return len(self.pixels)

    def key(self, index: int) -> str:
        return f"{index:08d}"

    def read(self, index: int) -> Raw:
        buffer = io.BytesIO()
        Image.fromarray(self.pixels[index]).save(buffer, "PNG")
        return Raw(self.key(index), buffer.getvalue(), label_at(self.labels, index))

    def beside(self, index: int, kept: Collection[str]) -> dict[str, bytes]:
        return {}


def _digits() -> Source:
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn carries (Alpaydin and Kaynak 1998)."""
    return Source({"train": _Digits()}, [str(digit) for digit in range(10)], "digits")


class _Files:
    def __init__(
        self, root: Path, paths: list[str], labels: np.ndarray | None, found_beside: dict[str, list[str]]
    ) -> None:
        self.root, self.paths, self.labels, self.found_beside = root, paths, labels, found_beside

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, index: int) -> str:
        return safe_key(self.paths[index].rpartition(".")[0])

    def read(self, index: int) -> Raw:
        return Raw(self.key(index), read_bytes(self.root / self.paths[index]), label_at(self.labels, index))

    def beside(self, index: int, kept: Collection[str]) -> dict[str, bytes]:
        name = os.path.splitext(self.paths[index])[0]
        extensions = [extension for extension in self.found_beside.get(name, []) if extension in kept]
        return {extension: read_bytes(self.root / f"{name}.{extension}") for extension in extensions}


def _folder(name: str, classes: bool) -> Source:
    """A folder of images: the first-level folders are the classes, or first the splits and then the classes."""
    root = place(name)
    if is_local(root) and not root.is_dir():
        raise StageError(f"folder:{root} must be a folder that exists")
    found, folders, others = pictures_below(root)
    prefixes = _split_folders(root, {folder.split("/")[0] for folder in folders})
    listed = {
        split: sorted(path.removeprefix(prefix) for path in found if path.startswith(prefix))
        for split, prefix in prefixes.items()
    }
    names = sorted({path.split("/")[0] for paths in listed.values() for path in paths if "/" in path})
    if classes and names:
        for split, prefix in prefixes.items():
            below = {folder.removeprefix(prefix).split("/")[0] for folder in folders if folder.startswith(prefix)}
            _check_class_folders(f"{root}/{prefix}", listed[split], (below - {""}) | set(names))
    splits = {}
    beside: dict[str, str] = {}
    loose = [path for path in others if "/" not in path] if all(prefixes.values()) else []
    dropped = beside_pictures([], loose)[1]
    for split, paths in listed.items():
        labels = None
        if classes and names:
            number = {name: index for index, name in enumerate(names)}
            labels = np.array([number[path.split("/")[0]] for path in paths], dtype=np.int64)
        prefix = prefixes[split]
        near, left = beside_pictures(paths, [p.removeprefix(prefix) for p in others if p.startswith(prefix)])
        dropped |= left
        for extension in sorted({extension for extensions in near.values() for extension in extensions}):
            having = [name for name, extensions in near.items() if extension in extensions]
            beside[extension] = digest([beside.get(extension, ""), split, having])
        splits[split] = _Files(root / prefix if prefix else root, paths, labels, near)
    sha = hashlib.sha256()
    for split, paths in listed.items():
        for path in paths:
            sha.update(os.fsencode(f"{split}/{path}\n"))
    other = {path.partition("/") for path in found if not path.startswith(tuple(prefixes.values()))}
    left_out = tuple(sorted({first + slash for first, slash, _ in other}))
    origins = {split: prefix for split, prefix in prefixes.items() if prefix}
    return Source(splits, names if classes else [], sha.hexdigest(), origins, left_out, beside, tuple(sorted(dropped)))


def _split_folders(root: Path, folders: set[str]) -> dict[str, str]:
    """Return split -> what its paths begin with.

    A train folder beside others, none of which is held out, is a class (of vehicles).
    """
    named = {folder: split for folder in folders if (split := split_named(folder))}
    others = folders - set(named)
    if not named or (others and set(named.values()) == {"train"}):
        return {"train": ""}
    if others and "train" not in named.values():
        raise StageError(
            f"folder:{root} holds {min(named)}/, which is named after a split, beside {min(others)}/; "
            "move the training images into a folder named train, or give that class another name"
        )
    return {split: f"{folder}/" for split, folder in chosen_splits(f"folder:{root}", sorted(folders)).items()}


def _check_class_folders(root: str, paths: list[str], folders: set[str]) -> None:
    """Raise StageError for an image beside class folders, or a class folder without images."""
    loose = next((path for path in paths if "/" not in path), None)
    if loose:
        raise StageError(f"{root}{loose} lies beside class folders; move it into one, or set images.classes: false")
    empty = sorted(folders - {path.split("/")[0] for path in paths})
    if empty and paths:
        raise StageError(
            f"class folder {root}{empty[0]} holds no images; add some, remove the folder, or set images.classes: false"
        )


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


def on_disk(path: Path, cache: Cache) -> Path:
    """Return a local file with the content of one that may be remote."""
    return cache.files(path.parent, [path.name]) / path.name


def _shards(urls: str, cache: Cache, classes: bool) -> Source:
    """Somebody else's webdataset, local or remote, by brace expansion and wildcards; class from `.cls`."""
    from webdataset.shardlists import expand_urls

    paths = []
    for url in expand_urls(urls):
        if not (named := files_of(url)):
            raise StageError(f"shards:{urls} must name tars that exist; there is no {url}")
        paths += named
    chosen = chosen_splits(f"shards:{urls}", dict.fromkeys(split_of(path.name) for path in paths))
    used = {split: [path for path in paths if split_of(path.name) == name] for split, name in chosen.items()}
    found = {split: [sample for path in some for sample in _samples(path, cache)] for split, some in used.items()}
    numbers = {split: [label if classes else None for *_, label in samples] for split, samples in found.items()}
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
        tuple(sorted(members - set(CARRIED))),
    )


def _samples(path: Path, cache: Cache) -> Iterator[tuple[Path, SampleIndex, str, int | None]]:
    """The samples of a tar that hold an image: each with the image's extension and its class."""
    local = on_disk(path, cache)
    with local.open("rb") as file:
        for sample in index_shard(local):
            extension = next((e for e in sample.members if f".{e.lower()}" in EXTENSIONS), None)
            if extension is None:
                continue
            member = sample.members.get("cls")
            text = read_member(file, member)[:32].strip() if member else b""
            label = int(text) if text.isdigit() else None
            if label is not None and label >= MAX_CLASSES:
                raise StageError(
                    f"sample {sample.key} of {path} has class {label}; classes must lie below {MAX_CLASSES}"
                )
            yield path, sample, extension, label


def label_at(labels: np.ndarray | None, index: int) -> int | None:
    """Return the class of an image, None when there are no classes."""
    return None if labels is None else int(labels[index])
