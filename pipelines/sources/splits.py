"""Splits by their usual names: of folders, of files, of data sets that name theirs; or drawn where there are none."""

import hashlib
import re
from collections.abc import Iterable

import numpy as np

from pipelines.errors import StageError

# What people call the splits; of val and test, val is taken.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation", "dev"),
    "test": ("test", "testing"),
}
_SPLITS = {name: split for split, names in SPLIT_NAMES.items() for name in names}
# What a split's name may be followed by, as in "training_set", "TestImages" or "test_batch".
_FILLERS = re.compile("(set|data|images|split|batch)+$")


def _words(name: str) -> list[str]:
    """The words of a file's or folder's name, in small letters and without what says nothing of a split."""
    words = re.findall(r"[A-Z]?[a-z]+|[^\W\d_]+", name)
    return [word for word in (_FILLERS.sub("", word.lower()) for word in words) if word]


def split_named(name: str) -> str | None:
    """Return which split ("train", "val", "test") a folder is named after, as `Test`, `valid` or `train2017` are."""
    words = _words(name)
    return _SPLITS.get(words[0]) if len(words) == 1 else None


def split_of(filename: str) -> str:
    """Return the first split that is a word of a file's name, as in `birds-test-0.tar`; "train" if none is."""
    return next((_SPLITS[word] for word in _words(filename) if word in _SPLITS), "train")


def split_mark(filename: str) -> str:
    """Return what a file's split adds to an identity: nothing where format 1, which looked at beginnings, agrees."""
    name = filename.lower()
    before = next((split for split in ("val", "test") if name.startswith(split)), "train")
    split = split_of(filename)
    return "" if split == before else f" {split}"


def chosen_splits(source: str, names: Iterable[str]) -> dict[str, str]:
    """Choose by name what serves as "train" and as "val"; where nothing is called train, what there is serves as that.

    Args:
        source: its name in messages.
        names: of what it holds: folders, or splits.

    Raises:
        StageError: two are named after the same split.
    """
    found: dict[str | None, list[str]] = {}
    for name in names:
        found.setdefault(split_named(name), []).append(name)
    held_out = found.get("val") or found.get("test")
    train = found.get("train") or found.get(None) or held_out or []
    chosen = {"train": train, "val": held_out} if held_out and held_out is not train else {"train": train}
    for split, called in chosen.items():
        if len(called) > 1 and called is not found.get(None):
            raise StageError(
                f"{source} must have one {split} split, but has {called[0]} and {called[1]}; leave one of them"
            )
    return {split: called[0] for split, called in chosen.items() if called}


def stratified_fraction(labels: np.ndarray | None, count: int, fraction: float, seed: int) -> np.ndarray:
    """Draw a fraction of each class, at least one image of each that has two: sorted int64 indices."""
    generator = np.random.default_rng((seed, 1))
    labels = np.zeros(count, dtype=np.int64) if labels is None else labels
    drawn = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        wanted = max(round(fraction * len(members)), 1 if len(members) > 1 else 0)
        drawn.append(generator.permutation(members)[:wanted])
    chosen = np.concatenate(drawn)
    if not len(chosen) and count > 1:  # classes of one image each: none can be spared for all, so some are drawn
        chosen = generator.permutation(count)[: max(1, round(fraction * count))]
    return np.sort(chosen)


def check_unique(keys: Iterable[str], source: str) -> None:
    """Raise StageError if a key of a split comes twice in a source of this name."""
    seen: set[bytes] = set()
    for key in keys:
        short = hashlib.blake2b(key.encode(), digest_size=16).digest()  # a set of these stays small
        if short in seen:
            raise StageError(
                f"keys must be unique, but {key} comes twice in {source}; rename one of the files "
                "(names are compared without their extension, dots as underscores)"
            )
        seen.add(short)
