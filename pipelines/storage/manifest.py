"""Manifests: what a folder of shards holds, and what it was made from. It comes last and makes a stage complete."""

import json
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipelines.errors import StageError
from pipelines.storage.cache import Cache
from pipelines.storage.paths import read_bytes, write_json
from pipelines.storage.receipts import SHARD_NAME, read_receipt, remove_shards

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
# Beyond these nothing is believed; they keep a manifest from claiming memory.
MAX_SIDE, MAX_CODES, MAX_LEVELS, MAX_COUNT = 2**16, 2**31, 16, 2**48


def write_manifest(folder: Path, splits: dict[str, list[str]], contents: dict[str, Any]) -> dict:
    """Merge the receipts of a folder's shards into `manifest.json`; it makes the stage complete.

    Shards of ours that are not named, left by other settings, are removed first.
    """
    remove_shards(folder, keep={name for names in splits.values() for name in names})
    receipts = {split: [read_receipt(folder / name) for name in names] for split, names in splits.items()}
    manifest = {"format": FORMAT_VERSION, **contents, "splits": receipts}
    write_json(folder / "manifest.json", manifest)
    return manifest


def read_manifest(folder: Path, kind: str, stage: str) -> dict:
    """Read a stage folder's manifest. It may come from somebody else, so all that is used of it is checked.

    Args:
        folder: of images, codes or samples.
        kind: which of them it must be.
        stage: the command that makes it.

    Raises:
        StageError: none there, or not one of this kind and format, or something in it cannot be.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(read_bytes(path))
    except FileNotFoundError as error:
        raise StageError(f"{folder} holds no finished {kind}; run `smalti {stage}` first") from error
    except (OSError, ValueError, RecursionError) as error:
        raise StageError(f"{path} cannot be read ({error}); run `smalti {stage}` again") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != kind or manifest.get("format") != FORMAT_VERSION:
        raise StageError(
            f"{path} must be a manifest of {kind} in format {FORMAT_VERSION}; is {folder} the right folder?"
        )
    wrong = next(_wrong_entries(manifest, kind), None)
    if wrong:
        raise StageError(f"{path} cannot be right: {wrong}; run `smalti {stage}` again or copy the folder again")
    return manifest


def level_entries(levels: Sequence[tuple[tuple[int, int], int | None, int]]) -> list[dict[str, Any]]:
    """Return what manifests of codes say of levels, (h, w), K and channels: channels where K is None."""
    return [
        {"grid": list(grid), "codebook_size": size} | ({} if size else {"channels": channels})
        for grid, size, channels in levels
    ]


def receipts_of(manifest: dict, split: str) -> list[dict]:
    """Return the receipts of a split's shards, in order; none where there is no such split."""
    return manifest["splits"].get(split, [])


def all_receipts(manifest: dict) -> list[tuple[str, dict]]:
    """Return (split, receipt) of all shards, in order."""
    return [(split, receipt) for split in manifest["splits"] for receipt in receipts_of(manifest, split)]


def shards_hold(manifest: dict, folder: Path, cache: Cache) -> bool:
    """Whether all shards of a manifest are what it says; one that is not is made again by the stage."""
    receipts = [receipt for _, receipt in all_receipts(manifest)]
    wrong = next((receipt for receipt in receipts if not cache.holds(folder / receipt["shard"], receipt)), None)
    if wrong:
        logger.warning("%s is missing or damaged", folder / wrong["shard"])
    return wrong is None


def _wrong_entries(manifest: dict, kind: str) -> Any:
    """Yield a sentence about each entry that cannot be."""
    rules: dict[str, Callable[[Any], bool]] = {
        "image_size": lambda v: _count(v, 1, MAX_SIDE),
        "channels": lambda v: _count(v, 1, 4),
        "class_names": lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v),
        "splits": lambda v: isinstance(v, dict) and all(isinstance(part, list) for part in v.values()),
    }
    if kind == "codes":
        rules |= {"tokenizer": _sha256, "levels": _levels, "made_from": _sha256}
    if kind == "images":
        rules |= {"preprocessing": lambda v: isinstance(v, dict)}
    if kind == "samples":
        rules |= {"fingerprints": lambda v: isinstance(v, dict) and all(map(_sha256, v.values()))}
    for name, right in rules.items():
        if not right(manifest.get(name)):
            yield f"{name} is {_shown(manifest.get(name))}"
            return
    seen: set[str] = set()
    for split, receipts in manifest["splits"].items():
        for number, receipt in enumerate(receipts):
            place = f"entry {number} of split {_shown(split)}"
            if not isinstance(receipt, dict):
                yield f"{place} is {_shown(receipt)}"
                return
            for name, right in _RECEIPT.items():
                if not right(receipt.get(name)):
                    yield f"{name} in {place} is {_shown(receipt.get(name))}"
                    return
            if receipt["samples"] * 512 > receipt["bytes"]:  # the least that a tar spends on a file
                yield f"{place} has {receipt['samples']} samples in {receipt['bytes']} bytes"
                return
            if receipt["shard"] in seen:
                yield f"{receipt['shard']} is listed twice"
            seen.add(receipt["shard"])


def _count(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _levels(value: Any) -> bool:
    with suppress(TypeError, KeyError, ValueError):
        return 1 <= len(value) <= MAX_LEVELS and all(
            isinstance(level["grid"], list)
            and [_count(side, 1, MAX_SIDE) for side in level["grid"]] == [True, True]
            and (
                _count(level["channels"], 1, MAX_SIDE)
                if level["codebook_size"] is None
                else _count(level["codebook_size"], 2, MAX_CODES)
            )
            for level in value
        )
    return False


def _shown(value: Any) -> str:
    return repr(value)[:80]


_RECEIPT: dict[str, Callable[[Any], bool]] = {
    "shard": lambda v: isinstance(v, str) and SHARD_NAME.fullmatch(v) is not None,
    "sha256": _sha256,
    "bytes": lambda v: _count(v, 0, MAX_COUNT),
    "samples": lambda v: _count(v, 0, MAX_COUNT),
}
