"""Image sources: where pictures and their classes come from, each as splits that can be read by index."""

import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from pipelines.errors import ConfigError, StageError
from pipelines.shards import index_shard, read_member

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
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
    source: str, classes: bool = True, image_column: str | None = None, label_column: str | None = None
) -> Source:
    """Open a source by its name.

    Args:
        source: "digits", "folder:PATH", "parquet:GLOB", "hf:REPO[:SPLIT]" or "shards:URLS".
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
        found = _folder(Path(rest).expanduser(), classes)
    elif kind in ("parquet", "hf") and rest:
        from pipelines.hub_source import open_dataset  # its library takes seconds to import

        found = open_dataset(kind, rest, classes, image_column, label_column)
    elif kind == "shards" and rest:
        found = _shards(rest)
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
        return Raw(self.key(index), (self.root / self.paths[index]).read_bytes(), label_at(self.labels, index))


def _folder(root: Path, classes: bool) -> Source:
    """A folder of images: the first-level folders are the classes, or first train and val and then the classes."""
    if not root.is_dir():
        raise StageError(f"folder:{root} must be a folder that exists")
    subfolders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    validation = next((name for name in VALIDATION_NAMES if name in subfolders), None)
    roots = {"train": root}
    if "train" in subfolders and validation:
        roots = {"train": root / "train", "val": root / validation}
    elif subfolders == ["train"]:
        roots = {"train": root / "train"}
    listed: dict[str, list[str]] = {}
    for split, folder in roots.items():
        listed[split] = sorted(_pictures_below(folder))
    names = sorted({path.split("/")[0] for paths in listed.values() for path in paths if "/" in path})
    if classes and names:
        for split, paths in listed.items():
            loose = next((path for path in paths if "/" not in path), None)
            if loose:
                raise StageError(
                    f"{roots[split]}/{loose} lies beside class folders; move it into one, or set images.classes: false"
                )
            held = {path.split("/")[0] for path in paths}
            there = {p.name for p in roots[split].iterdir() if p.is_dir() and not p.name.startswith(".")}
            empty = sorted((there | set(names)) - held)
            if empty and paths:
                raise StageError(
                    f"class folder {roots[split] / empty[0]} holds no images; add some, remove the folder, "
                    "or set images.classes: false"
                )
    splits = {}
    for split, paths in listed.items():
        labels = None
        if classes and names:
            number = {name: index for index, name in enumerate(names)}
            labels = np.array([number[path.split("/")[0]] for path in paths], dtype=np.int64)
        splits[split] = _Files(roots[split], paths, labels)
    sha = hashlib.sha256()
    for split, paths in listed.items():
        for path in paths:
            sha.update(os.fsencode(f"{split}/{path}\n"))
    return Source(splits, names if classes else [], sha.hexdigest())


def _pictures_below(folder: Path) -> Iterator[str]:
    """Yield the paths, below a folder, of what looks like a picture; links are followed, hidden folders are not."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if Path(name).suffix.lower() in EXTENSIONS and not name.startswith("."):
                yield (Path(place) / name).relative_to(folder).as_posix()


def split_of(filename: str) -> str:
    """Return the split that a parquet file's name begins with, as the hub names them; "train" if none."""
    stem = filename.lower()
    return next((name for name in (*VALIDATION_NAMES, "train") if stem.startswith(name)), "train")


class _Members:
    def __init__(self, found: list[tuple[Path, Any, str]], labels: np.ndarray | None) -> None:
        self.found, self.labels = found, labels

    def __len__(self) -> int:
        return len(self.found)

    def key(self, index: int) -> str:
        return safe_key(self.found[index][1].key)

    def read(self, index: int) -> Raw:
        path, sample, extension = self.found[index]
        with path.open("rb") as file:
            data = read_member(file, sample.members[extension])
        return Raw(self.key(index), data, label_at(self.labels, index))


def _shards(urls: str) -> Source:
    """Somebody else's webdataset: local tars by brace expansion; class from `.cls`."""
    import glob

    from webdataset.shardlists import expand_urls

    names = [
        name
        for url in map(os.path.expanduser, expand_urls(urls))
        for name in (sorted(glob.glob(url)) if "*" in url else [url])
    ]
    for name in names:
        scheme, colon, _ = name.partition(":")
        if colon and scheme != "file":
            raise ConfigError(f"shards: URLs must be paths of local tars, got the scheme {scheme}: in {name}")
    paths = [Path(name.removeprefix("file://").removeprefix("file:")) for name in names]
    missing = next((path for path in paths if not path.is_file()), None)
    if missing or not paths:
        raise StageError(f"shards:{urls} must name tars that exist; there is no {missing or 'match'}")
    found: dict[str, list] = {}
    classes: dict[str, list[int | None]] = {}
    for path in paths:
        split = "val" if split_of(path.name) in VALIDATION_NAMES else "train"
        with path.open("rb") as file:
            for sample in index_shard(path):
                extension = next((e for e in sample.members if f".{e.lower()}" in EXTENSIONS), None)
                if extension is None:
                    continue
                found.setdefault(split, []).append((path, sample, extension))
                member = sample.members.get("cls")
                text = read_member(file, member)[:32].strip() if member else b""
                classes.setdefault(split, []).append(int(text) if text.isdigit() else None)
    numbers = [number for labels in classes.values() for number in labels]
    labelled = bool(numbers) and all(number is not None for number in numbers)
    if not labelled and any(number is not None for number in numbers):
        raise StageError(f"shards:{urls}: some samples have a .cls and some not; set images.classes: false")
    class_names = (
        [str(n) for n in range(max((n for n in numbers if n is not None), default=-1) + 1)] if labelled else []
    )
    splits = {
        split: _Members(members, np.array(classes[split], dtype=np.int64) if labelled else None)
        for split, members in found.items()
    }
    if "train" not in splits and splits:
        splits = {"train": splits["val"]}
    identity = hashlib.sha256("\n".join(f"{path} {path.stat().st_size}" for path in paths).encode()).hexdigest()
    return Source(splits, class_names, identity)


def label_at(labels: np.ndarray | None, index: int) -> int | None:
    """Return the class of an image, None when there are no classes."""
    return None if labels is None else int(labels[index])
