"""Whether a val split was held out: which images a tokenizer, and which codes a prior was trained on."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pipelines.errors import StageError
from pipelines.storage.fingerprint import manifest_digest
from pipelines.storage.manifest import read_manifest
from pipelines.storage.paths import read_bytes
from pipelines.storage.yaml import read_yaml

logger = logging.getLogger(__name__)

# What makes images and codes, and what is trained on them.
STAGES = {"images": ("pack", "train-tokenizer"), "codes": ("encode", "train-prior")}


def trained_on(model: Path, kind: str) -> str | None:
    """Return the digest of the manifest that a model was trained on, None where its folder does not tell.

    Args:
        model: its stage folder, or what would be a folder if it were no hub id.
        kind: "images" or "codes".
    """
    try:
        data = read_bytes(model / "config.yaml")
    except OSError:
        return None
    try:
        found = read_yaml(data)["made_from"][kind]
    except (ValueError, TypeError, KeyError):
        return None
    return found if isinstance(found, str) else None


def held_out(models: Sequence[Path], kind: Literal["images", "codes"], data: Path, own: bool) -> bool | None:
    """Whether a val split was held out from training; None, with a warning, where that cannot be known.

    Args:
        models: stage folders of what was trained.
        kind: what on, "images" or "codes".
        data: folder of those that have the split.
        own: whether all are of one run, where only other images or another split explain a difference.

    Raises:
        StageError: a run's own model was trained on others than the run's own data.
    """
    maker, trainer = STAGES[kind]
    found, marks = (
        manifest_digest(read_manifest(data, kind, maker)),
        {model: trained_on(model, kind) for model in models},
    )
    for model, mark in marks.items():
        if own and mark not in (None, found):
            raise StageError(
                f"{model} was trained on {kind} {mark[:12]} but {data} now holds {kind} {found[:12]}, whose val split "
                f"may hold what it was trained on; run `smalti {trainer}` with --redo {trainer}, or put those back"
            )
    doubtful = ", ".join(str(model) for model, mark in marks.items() if mark != found)
    if doubtful:
        logger.warning("the val split of %s is not known to be held out from the training of %s", data, doubtful)
    return None if doubtful else True


def check_codes_of_images(codes: Path, images: Path) -> None:
    """Raise StageError, naming both, unless a folder of codes was made from a folder of images."""
    made_from = read_manifest(codes, "codes", "encode")["made_from"]
    found = manifest_digest(read_manifest(images, "images", "pack"))
    if made_from != found:
        raise StageError(
            f"{codes} was made from images {made_from[:12]} but {images} holds images {found[:12]}; "
            "run `smalti encode` with these images, or name those by images.from"
        )
