"""Hugging Face data sets as image sources: parquet files, and repositories of the hub."""

import hashlib
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq

from pipelines.errors import ConfigError, StageError
from pipelines.sources.listing import files_of, span
from pipelines.sources.source import Raw, Source, label_at, on_disk
from pipelines.sources.splits import chosen_splits, split_mark, split_of
from pipelines.storage.cache import Cache
from pipelines.storage.paths import is_local


class _Rows:
    def __init__(
        self, dataset: Any, captions: Any, image_column: str, labels: np.ndarray | None, local_paths: bool
    ) -> None:
        self.dataset, self.captions, self.image_column = dataset, captions, image_column
        self.labels, self.local_paths = labels, local_paths

    def __len__(self) -> int:
        return len(self.dataset)

    def key(self, index: int) -> str:
        return f"{index:08d}"

    def read(self, index: int) -> Raw:
        value = self.dataset[int(index)][self.image_column]
        data = value if isinstance(value, bytes) else value.get("bytes") if isinstance(value, dict) else None
        # The library unpacks image folders of the hub to files; a parquet file must not name files of this machine.
        if data is None and self.local_paths and isinstance(value, dict) and value.get("path"):
            data = Path(value["path"]).read_bytes()
        return Raw(self.key(index), data or b"", label_at(self.labels, index))

    def beside(self, index: int, kept: Collection[str]) -> dict[str, bytes]:
        if self.captions is None or "txt" not in kept:
            return {}
        (caption,) = self.captions[int(index)].values()
        return {} if caption is None else {"txt": caption.encode()}


def open_dataset(
    kind: str,
    name: str,
    cache: Cache,
    classes: bool,
    image_column: str | None,
    label_column: str | None,
    caption_column: str | None,
) -> Source:
    """Open parquet files or a hub repository; the arguments are those of `open_source`.

    Raises:
        StageError: it cannot be loaded, or has no images or no usable labels in its columns.
    """
    datasets.disable_progress_bars()
    marks: list[str] = []  # what changes with the content of the files
    files: dict[str, list[Path]] = {}
    try:
        if kind == "parquet":
            for path in files_of(name):
                local = on_disk(path, cache)
                files.setdefault(split_of(path.name), []).append(local)
                if not is_local(path):
                    marks.append(local.parent.name + split_mark(path.name))
            if not files:
                raise StageError(f"parquet:{name} matches no file")
            data_files = {split: [str(path) for path in paths] for split, paths in files.items()}
            loaded = dict(datasets.load_dataset("parquet", data_files=data_files))
        else:
            repository, _, split = name.partition(":")
            found = datasets.load_dataset(repository, split=split or None)
            loaded = {split: found} if split else dict(found)
    except (ConfigError, StageError):
        raise
    except Exception as error:  # the library raises many kinds for what is missing or malformed
        reason = _without_rows(files) or " ".join(str(error).split())[:300]
        raise StageError(f"{kind}:{name} cannot be loaded: {reason}") from error
    origins = chosen_splits(f"{kind}:{name}", loaded)
    chosen = {split: loaded[called] for split, called in origins.items()}
    left_out = [called for called in loaded if called not in origins.values()]
    if kind == "parquet":
        left_out = [path.name for called in left_out for path in files[called]]
        origins = {split: span(files[called]) for split, called in origins.items()}
    features = chosen["train"].features
    image_column = image_column or _image_column(features)
    if image_column not in features:
        raise StageError(
            f"{kind}:{name} must have an image column, but has {sorted(features)}; set images.image_column"
        )
    label_column = label_column or next((c for c, f in features.items() if isinstance(f, datasets.ClassLabel)), None)
    label_column = label_column or next((c for c in ("label", "labels", "class") if c in features), None)
    label_column = label_column if classes else None
    if label_column is not None and label_column not in features:
        raise StageError(f"images.label_column {label_column} is not among the columns {sorted(features)}")
    if caption_column is not None:
        _check_captions(caption_column, features)
    names: list[str] = []
    splits = {}
    columns = {split: _column(data, label_column) for split, data in chosen.items()} if label_column else {}
    if label_column:
        names, columns = _classes(columns, features[label_column], f"images.label_column {label_column}")
    for split, data in chosen.items():
        if isinstance(features[image_column], datasets.Image):
            data = data.cast_column(image_column, datasets.Image(decode=False))
        captions = data.select_columns([caption_column]) if caption_column else None
        images = data.select_columns([image_column])
        splits[split] = _Rows(images, captions, image_column, columns.get(split), kind == "hf")
    marks = marks or [data._fingerprint for data in chosen.values()]
    identity = hashlib.sha256(" ".join(marks).encode()).hexdigest()
    beside = {"txt": ""} if caption_column else {}
    dropped = [column for column in features if column not in (image_column, label_column, caption_column)]
    return Source(splits, names, identity, origins, tuple(left_out), beside, tuple(dropped))


def _without_rows(files: dict[str, list[Path]]) -> str:
    """Say which file has no rows, of which the library says nothing that helps; empty if none is known."""
    for path in (path for paths in files.values() for path in paths):
        with suppress(Exception):  # what cannot be read is told of by the library
            if not pq.read_metadata(path).num_rows:
                return f"{path} has no rows; leave it out"
    return ""


def _check_captions(column: str, features: Any) -> None:
    if column not in features:
        raise StageError(f"images.caption_column {column} is not among the columns {sorted(features)}")
    if getattr(features[column], "dtype", None) not in ("string", "large_string"):
        raise StageError(f"images.caption_column {column} must hold text, but holds {features[column]}; choose another")


def _classes(columns: dict[str, np.ndarray], feature: Any, title: str) -> tuple[list[str], dict[str, np.ndarray]]:
    """Return class names and, for each split, class indices (N,)."""

    mend = "choose another column, or set images.classes: false"
    found = [value for column in columns.values() for value in column.tolist()]
    if not all(isinstance(value, int | str | bool) for value in found):
        raise StageError(f"{title} must hold a whole number or a name for every image; {mend}")
    if isinstance(feature, datasets.ClassLabel) and feature.names:
        if found and min(found) < 0:
            raise StageError(f"{title} leaves images unlabelled ({min(found)}); {mend}")
        return list(feature.names), {split: column.astype(np.int64) for split, column in columns.items()}
    values = sorted(set(found), key=lambda value: (str(type(value)), value))
    number = {value: index for index, value in enumerate(values)}
    indices = {split: np.array([number[v] for v in column.tolist()]) for split, column in columns.items()}
    return [str(value) for value in values], indices


def _image_column(features: Any) -> str:

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    return images[0] if images else next((name for name in ("image", "img", "jpg", "png") if name in features), "image")


def _column(data: Any, name: str) -> np.ndarray:
    return np.array(data[name][:], dtype=object)
