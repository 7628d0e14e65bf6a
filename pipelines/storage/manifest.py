"""Manifests: what a folder of shards holds, and what it was made from. It comes last and makes a stage complete."""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, overload

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic asks for this one before Python 3.12

from pipelines.errors import StageError
from pipelines.storage.cache import Cache
from pipelines.storage.paths import read_bytes, write_json
from pipelines.storage.receipts import SHARD_NAME, read_receipt, remove_shards

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
# Beyond the ends of these nothing is believed; they keep a manifest from claiming memory.
Side = Annotated[int, Field(ge=1, le=2**16)]
Count = Annotated[int, Field(ge=0, le=2**48)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Level(TypedDict):
    """A stored grid: (h, w), and K; where there is no K, how many numbers stand at each position."""

    grid: Annotated[list[Side], Field(min_length=2, max_length=2)]
    codebook_size: Annotated[int, Field(ge=2, le=2**31)] | None
    channels: NotRequired[Side]


def _complete(level: Level) -> Level:
    if level["codebook_size"] is None and "channels" not in level:
        raise ValueError("numbers need channels")
    return level


class Receipt(TypedDict):
    """What vouches for a shard; what it was made from and with stands beside, see `receipts`."""

    shard: Annotated[str, Field(pattern=f"^{SHARD_NAME.pattern}$")]
    sha256: Sha256
    bytes: Count
    samples: Count


class Manifest(TypedDict):
    """What every folder of shards says; other keys may stand beside these."""

    image_size: Side
    channels: Annotated[int, Field(ge=1, le=4)]
    class_names: list[str]
    splits: dict[str, list[Receipt]]


class ImagesManifest(Manifest):
    """Of packed images; `preprocessing` is the settings that shaped them."""

    preprocessing: dict[str, Any]


class CodesManifest(Manifest):
    """Of codes: their tokenizer's fingerprint and stored grids, and the digest of the images they are of.

    `posterior` says whether mean and log-variance of q(z | x) stand beside each, `conditional` whether the tokenizer
    was given the images' classes.
    """

    tokenizer: Sha256
    levels: Annotated[list[Annotated[Level, AfterValidator(_complete)]], Field(min_length=1, max_length=16)]
    made_from: Sha256
    views: NotRequired[list[str]]
    posterior: NotRequired[bool]
    conditional: NotRequired[bool]


class SamplesManifest(Manifest):
    """Of drawn images: the fingerprints of what drew them, and how they were drawn."""

    fingerprints: dict[str, Sha256]
    settings: dict[str, Any]


Kind = Literal["images", "codes", "samples"]
KINDS: dict[Kind, TypeAdapter] = {
    "images": TypeAdapter(ImagesManifest),
    "codes": TypeAdapter(CodesManifest),
    "samples": TypeAdapter(SamplesManifest),
}


def classes_for_prior(codes: CodesManifest, network: str) -> list[str]:
    """Return the classes that a prior of such a network is told of: N(0, I) of those that decode what it draws."""
    return [] if network == "normal" and not codes.get("conditional") else codes["class_names"]


def write_manifest(folder: Path, splits: dict[str, list[str]], contents: dict[str, Any]) -> dict:
    """Merge the receipts of a folder's shards into `manifest.json`; it makes the stage complete.

    Shards of ours that are not named, left by other settings, are removed first.
    """
    remove_shards(folder, keep={name for names in splits.values() for name in names})
    receipts = {split: [read_receipt(folder / name) for name in names] for split, names in splits.items()}
    manifest = {"format": FORMAT_VERSION, **contents, "splits": receipts}
    write_json(folder / "manifest.json", manifest)
    return manifest


@overload
def read_manifest(folder: Path, kind: Literal["images"], stage: str) -> ImagesManifest: ...
@overload
def read_manifest(folder: Path, kind: Literal["codes"], stage: str) -> CodesManifest: ...
@overload
def read_manifest(folder: Path, kind: Literal["samples"], stage: str) -> SamplesManifest: ...
@overload
def read_manifest(folder: Path, kind: Kind, stage: str) -> Manifest: ...
def read_manifest(folder: Path, kind: Kind, stage: str) -> Any:
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


def receipts_of(manifest: Manifest, split: str) -> list[Receipt]:
    """Return the receipts of a split's shards, in order; none where there is no such split."""
    return manifest["splits"].get(split, [])


def all_receipts(manifest: Manifest) -> list[tuple[str, Receipt]]:
    """Return (split, receipt) of all shards, in order."""
    return [(split, receipt) for split in manifest["splits"] for receipt in receipts_of(manifest, split)]


def shards_hold(manifest: Manifest, folder: Path, cache: Cache) -> bool:
    """Whether all shards of a manifest are what it says; one that is not is made again by the stage."""
    receipts = [receipt for _, receipt in all_receipts(manifest)]
    wrong = next((receipt for receipt in receipts if not cache.holds(folder / receipt["shard"], receipt)), None)
    if wrong:
        logger.warning("%s is missing or damaged", folder / wrong["shard"])
    return wrong is None


def _wrong_entries(manifest: Any, kind: Kind) -> Iterator[str]:
    """Yield a sentence about each entry that cannot be."""
    try:
        KINDS[kind].validate_python(manifest, strict=True)
    except ValidationError as error:
        yield _told(manifest, error.errors()[0]["loc"])
        return
    seen: set[str] = set()
    for split, receipts in manifest["splits"].items():
        for number, receipt in enumerate(receipts):
            if receipt["samples"] * 512 > receipt["bytes"]:  # the least that a tar spends on a file
                place = f"entry {number} of split {_shown(split)}"
                yield f"{place} has {receipt['samples']} samples in {receipt['bytes']} bytes"
            if receipt["shard"] in seen:
                yield f"{receipt['shard']} is listed twice"
            seen.add(receipt["shard"])


def _told(manifest: dict, loc: tuple[int | str, ...]) -> str:
    """Return what is wrong at a place of a manifest, as its writer would name it."""
    if loc[0] != "splits" or len(loc) < 3:
        return f"{loc[0]} is {_shown(manifest.get(loc[0]))}"
    split, number, *name = loc[1:]
    receipt = manifest["splits"][split][number]
    place = f"entry {number} of split {_shown(split)}"
    return f"{name[0]} in {place} is {_shown(receipt.get(name[0]))}" if name else f"{place} is {_shown(receipt)}"


def _shown(value: Any) -> str:
    return repr(value)[:80]
