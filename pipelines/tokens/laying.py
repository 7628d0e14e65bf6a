"""A code shard as records: which of its samples become one, in which order, and what goes with them.

S samples of a shard, V views of an image, h w code grid.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.data.codes import code_sample
from pipelines.errors import StageError
from pipelines.storage.fingerprint import digest
from pipelines.storage.manifest import CodesManifest
from pipelines.storage.shards import index_shard, read_member
from pipelines.tokens.layout import TokenLayout
from pipelines.tokens.records import Records

VIEWS = ("distinct", "first", "all")
# Files beside the codes that go along with them.
BESIDE = ("cls", "txt", "json")


class CodeShard(NamedTuple):
    """What a code shard holds: keys, codes (S, h, w) of each exported level, classes (S,), other files by extension."""

    keys: list[str]
    codes: list[np.ndarray]
    classes: np.ndarray
    members: list[dict[str, bytes]]


def read_codes(path: Path, shard: Path, manifest: CodesManifest, layout: TokenLayout) -> CodeShard:
    """Read a code shard.

    Args:
        path: local file of the shard.
        shard: its name in messages.
        manifest: of the codes.
        layout: says which levels, and which file holds the caption.

    Raises:
        StageError: a sample is not what the manifest says; names it.
    """
    samples = index_shard(path)
    numbers = [level.level for level in layout.levels]
    grids = [[np.empty(0)] * len(samples) for _ in numbers]
    classes = np.zeros(len(samples), np.int64)
    members, wanted = [], {*BESIDE, layout.stated.text_column}
    with path.open("rb") as file:
        for row, sample in enumerate(samples):
            codes, classes[row] = code_sample(file, sample, manifest, shard)
            for found, number in zip(grids, numbers, strict=True):
                found[row] = codes[number]
            members.append({name: read_member(file, one) for name, one in sample.members.items() if name in wanted})
    return CodeShard([sample.key for sample in samples], [np.stack(found) for found in grids], classes, members)


def chosen(codes: Sequence[np.ndarray], num_views: int, which: str) -> np.ndarray:
    """Return which samples become records, int64.

    Args:
        codes: (S, h, w) of each level, the views of an image one after the other.
        num_views: V.
        which: "first" view, "all", or "distinct": the first of those of an image whose codes are equal.
    """
    count = len(codes[0])
    if which == "first":
        return np.arange(0, count, num_views)
    new = np.ones((count // num_views, num_views), bool)
    if which == "distinct":
        flat = np.concatenate([grid.reshape(*new.shape, -1) for grid in codes], axis=2)
        for view in range(1, num_views):
            new[:, view] = ~(flat[:, :view] == flat[:, view : view + 1]).all(2).any(1)
    return np.flatnonzero(new)


def shuffled(rows: np.ndarray, seed: int, name: str) -> np.ndarray:
    """Return rows in an order that seed and shard name tell."""
    return np.random.default_rng((seed, 4, int(digest([name])[:8], 16))).permutation(rows)


def lay(
    shard: CodeShard, rows: np.ndarray, num_views: int, manifest: CodesManifest, layout: TokenLayout, name: Path
) -> Records:
    """Return the records of some samples.

    Args:
        shard: of codes.
        rows: which samples, in the order of the records.
        num_views: V.
        manifest: of the codes.
        layout: what a record is.
        name: of the shard in messages.

    Raises:
        StageError: keys do not say which view a sample is.
    """
    sources = [_source(key, row % num_views, num_views, name) for row, key in enumerate(shard.keys)]
    members = [shard.members[row] for row in rows]
    captions = [one.get(layout.stated.text_column) for one in members]
    kept = any(caption is not None for caption in captions) or "<text>" in layout.words
    texts = [(caption or b"").decode(errors="replace") for caption in captions] if kept else None
    laid = layout.lay([grid[rows] for grid in shard.codes], shard.classes[rows], texts)
    return Records(
        ids=laid.ids,
        lengths=laid.lengths,
        prompts=laid.prompts,
        keys=[shard.keys[row] for row in rows],
        source_keys=[sources[row] for row in rows],
        views=(rows % num_views).tolist(),
        classes=shard.classes[rows].tolist() if manifest["class_names"] else None,
        captions=texts,
        members=[{name: data for name, data in one.items() if name in BESIDE} for one in members],
    )


def _source(key: str, view: int, num_views: int, name: Path) -> str:
    """Return the key of the image that a sample is of: without "-V" where there are several views."""
    if num_views == 1:
        return key
    source, _, told = key.rpartition("-")
    if told != str(view):
        raise StageError(
            f"sample {key} of {name} must be view {view} of {num_views}, its key ending in -{view}; "
            "run `smalti encode` again"
        )
    return source
