"""Image sources: where pictures and their classes come from, each as splits that can be read by index."""

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from PIL import Image

from pipelines.cache import Cache
from pipelines.errors import ConfigError, StageError
from pipelines.places import is_local, matches, place, read_bytes, retried
from pipelines.shards import index_shard, read_member

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
# Class indices from here on are taken for damage.
MAX_CLASSES = 10**6
# What people call the split that is not trained on, best first.
VALIDATION_NAMES = ("val", "validation", "valid", "test")


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


class Source(NamedTuple):
    """Splits by name ("train", perhaps "val"), the class names, and a digest of what is listed."""

    splits: Mapping[str, Split]
    class_names: list[str]
    identity: str


def open_source(
    source: str, cache: Cache, classes: bool = True, image_column: str | None = None, label_column: str | None = None
) -> Source:
    """Open a source by its name.

    Args:
        source: "digits", "folder:PATH", "parquet:GLOB", "hf:REPO[:SPLIT]" or "shards:URLS"; paths may be URLs.
        cache: for remote shards.
        classes: False leaves the classes out.
        image_column: column of parquet and hf sources; found by its type if not given.
        label_column: likewise; without one there are no classes.

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
        from pipelines.hub_source import open_dataset  # its library takes seconds to import

        found = open_dataset(kind, rest, cache, classes, image_column, label_column)
    elif kind == "shards" and rest:
        found = _shards(rest, cache)
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


def safe_key(text: str) -> str:
    """Return a shard key: no dots, which would end it, and nothing that tar or a shell would stumble over."""
    return "".join(c if c.isalnum() or c in "_-/" else "_" for c in text)


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


def _digits() -> Source:
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn carries (Alpaydin and Kaynak 1998)."""
    return Source({"train": _Digits()}, [str(digit) for digit in range(10)], "digits")


class _Files:
    def __init__(self, root: Path, paths: list[str], labels: np.ndarray | None) -> None:
        self.root, self.paths, self.labels = root, paths, labels

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, index: int) -> str:
        return safe_key(self.paths[index].rpartition(".")[0])

    def read(self, index: int) -> Raw:
        return Raw(self.key(index), read_bytes(self.root / self.paths[index]), label_at(self.labels, index))


def _folder(name: str, classes: bool) -> Source:
    """A folder of images: the first-level folders are the classes, or first train and val and then the classes."""
    root = place(name)
    if is_local(root) and not root.is_dir():
        raise StageError(f"folder:{root} must be a folder that exists")
    found, folders = (_local_tree if is_local(root) else _remote_tree)(root)
    subfolders = {folder.split("/")[0] for folder in folders}
    validation = next((name for name in VALIDATION_NAMES if name in subfolders), None)
    prefixes = {"train": ""}
    if "train" in subfolders and validation:
        prefixes = {"train": "train/", "val": f"{validation}/"}
    elif subfolders == {"train"}:
        prefixes = {"train": "train/"}
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
    for split, paths in listed.items():
        labels = None
        if classes and names:
            number = {name: index for index, name in enumerate(names)}
            labels = np.array([number[path.split("/")[0]] for path in paths], dtype=np.int64)
        splits[split] = _Files(root / prefixes[split] if prefixes[split] else root, paths, labels)
    sha = hashlib.sha256()
    for split, paths in listed.items():
        for path in paths:
            sha.update(os.fsencode(f"{split}/{path}\n"))
    return Source(splits, names if classes else [], sha.hexdigest())


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


def _is_picture(name: str) -> bool:
    return Path(name).suffix.lower() in EXTENSIONS and not name.startswith(".")


def _local_tree(root: Path) -> tuple[list[str], set[str]]:
    """The pictures below a folder, and the folders; links are followed, hidden folders are not."""
    found, below = [], set()
    for place_, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = Path(place_).relative_to(root)
        below |= {(here / name).as_posix() + "/" for name in folders}
        found += [(here / name).as_posix() for name in names if _is_picture(name)]
    return found, below


def _remote_tree(root: Path) -> tuple[list[str], set[str]]:
    """The same of a store, which knows no empty folders."""
    remote = cast(Any, root)
    base = remote.path.rstrip("/") + "/"
    paths = [name.removeprefix(base) for name in retried(lambda: remote.fs.find(remote.path), f"list {root}")]
    found = [path for path in paths if _is_picture(path.rpartition("/")[2]) and "/." not in f"/{path}"]
    return found, {path.rpartition("/")[0] + "/" for path in found if "/" in path}


def split_of(filename: str) -> str:
    """Return the split that a parquet file's name begins with, as the hub names them; "train" if none."""
    stem = filename.lower()
    return next((name for name in (*VALIDATION_NAMES, "train") if stem.startswith(name)), "train")


class _Members:
    def __init__(self, found: list[tuple[Path, Any, str]], labels: np.ndarray | None, cache: Cache) -> None:
        self.found, self.labels, self.cache = found, labels, cache
        self.local: dict[Path, Path] = {}

    def __len__(self) -> int:
        return len(self.found)

    def key(self, index: int) -> str:
        return safe_key(self.found[index][1].key)

    def read(self, index: int) -> Raw:
        path, sample, extension = self.found[index]
        local = self.local.get(path)
        if local is None or not local.exists():  # the cache may have made room
            local = self.local[path] = on_disk(path, self.cache)
        with local.open("rb") as file:
            data = read_member(file, sample.members[extension])
        return Raw(self.key(index), data, label_at(self.labels, index))


def on_disk(path: Path, cache: Cache) -> Path:
    """Return a local file with the content of one that may be remote."""
    return cache.files(path.parent, [path.name]) / path.name


def _shards(urls: str, cache: Cache) -> Source:
    """Somebody else's webdataset, local or remote, by brace expansion and wildcards; class from `.cls`."""
    from webdataset.shardlists import expand_urls

    paths = []
    for url in expand_urls(urls):
        if not (named := matches(url)):
            raise StageError(f"shards:{urls} must name tars that exist; there is no {url}")
        paths += named
    found: dict[str, list] = {}
    classes: dict[str, list[int | None]] = {}
    for path in paths:
        split = "val" if split_of(path.name) in VALIDATION_NAMES else "train"
        local = on_disk(path, cache)
        with local.open("rb") as file:
            for sample in index_shard(local):
                extension = next((e for e in sample.members if f".{e.lower()}" in EXTENSIONS), None)
                if extension is None:
                    continue
                found.setdefault(split, []).append((path, sample, extension))
                member = sample.members.get("cls")
                text = read_member(file, member)[:32].strip() if member else b""
                label = int(text) if text.isdigit() else None
                if label is not None and label >= MAX_CLASSES:
                    raise StageError(
                        f"sample {sample.key} of {path} has class {label}; classes must lie below {MAX_CLASSES}"
                    )
                classes.setdefault(split, []).append(label)
    numbers = [number for labels in classes.values() for number in labels]
    labelled = bool(numbers) and all(number is not None for number in numbers)
    if not labelled and any(number is not None for number in numbers):
        raise StageError(f"shards:{urls}: some samples have a .cls and some not; set images.classes: false")
    class_names = (
        [str(n) for n in range(max((n for n in numbers if n is not None), default=-1) + 1)] if labelled else []
    )
    splits = {
        split: _Members(members, np.array(classes[split], dtype=np.int64) if labelled else None, cache)
        for split, members in found.items()
    }
    if "train" not in splits and splits:
        splits = {"train": splits["val"]}
    identity = hashlib.sha256("\n".join(f"{path} {path.stat().st_size}" for path in paths).encode()).hexdigest()
    return Source(splits, class_names, identity)


def label_at(labels: np.ndarray | None, index: int) -> int | None:
    """Return the class of an image, None when there are no classes."""
    return None if labels is None else int(labels[index])
