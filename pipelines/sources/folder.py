"""Source folder: a folder of images, whose folders are splits and classes."""

import hashlib
import os
from collections.abc import Collection
from pathlib import Path

import numpy as np

from pipelines.errors import StageError
from pipelines.sources.listing import beside_pictures, pictures_below, safe_key
from pipelines.sources.source import Raw, Source, label_at
from pipelines.sources.splits import chosen_splits, split_named
from pipelines.storage.fingerprint import digest
from pipelines.storage.paths import is_local, place, read_bytes


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


def open_folder(name: str, classes: bool) -> Source:
    """A folder of images: the first-level folders are the classes, or first the splits and then the classes."""
    root = place(name)
    if is_local(root) and not root.is_dir():
        raise StageError(f"folder:{root} must be a folder that exists")
    found, folders, others = pictures_below(root)
    prefixes = _split_folders(root, {folder.split("/")[0] for folder in folders})
    if not any(prefixes.values()):
        _check_splits_come_first(root, folders)
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


def _check_splits_come_first(root: Path, folders: set[str]) -> None:
    """Raise StageError where what is held out lies below the first level, beside what is to be trained on."""
    below: dict[str, set[str | None]] = {}
    for first, second in (folder.split("/")[:2] for folder in folders):
        below.setdefault(first, set()).add(split_named(second))
    for first, splits in sorted(below.items()):
        if "train" in splits and splits & {"val", "test"}:
            raise StageError(
                f"folder:{root} must hold its splits first, but {first}/ has folders named after them; "
                f"name folder:{root}/{first}, or put the classes below the splits"
            )


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
