"""Where a model lies that is called by name, in a folder or in a repository of the hub; and where one may be saved."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from huggingface_hub import snapshot_download

from tokenizer.bottlenecks.bottleneck import StoredGrid

# What a tokenizer is saved as.
FILES, CARD = {"config.json", "model.safetensors"}, "README.md"


def check_replaceable(folder: Path) -> None:
    """Raise ValueError unless a folder is absent or empty, or holds a tokenizer saved there and nothing else."""
    found = {path.name for path in folder.glob("[!.]*")}
    saved: object = None
    with suppress(OSError, ValueError, RecursionError):
        saved = json.loads((folder / "config.json").read_text())
    if found and not (FILES <= found <= FILES | {CARD} and isinstance(saved, dict) and "strides" in saved):
        raise ValueError(
            f"{folder} must be empty or hold a saved tokenizer and nothing else, but holds {', '.join(sorted(found))}; "
            "choose another folder"
        )


def can_be_repository(name: str | Path) -> bool:
    """Whether a name that is no folder here is that of a repository, "user/model", and not a misspelt path."""
    parts = str(name).split("/")
    # "runs/digitz" is a misspelt path, not a repository, when there is a folder "runs".
    return len(parts) == 2 and all(parts) and not parts[0].startswith((".", "~")) and not Path(parts[0]).exists()


def model_folder(name: str | Path, kind: str, files: Sequence[str], revision: str | None = None) -> Path:
    """Return a model's folder, fetched from the hub if it is there.

    Args:
        name: a folder; what cannot be a folder here is a hub id.
        kind: of model, for the message.
        files: names or patterns of what is fetched.
        revision: branch, tag or commit on the hub.

    Raises:
        ValueError: there is no such folder, and the name is no hub id.
        OSError: it cannot be had from the hub; names it.
    """
    folder = Path(name).expanduser()
    if folder.exists():
        return folder
    if not can_be_repository(name):
        raise ValueError(f"no {kind} at {name}: there is no such folder; train one, or name a hub repository")
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=list(files)))
    except OSError as error:
        raise OSError(f"no {kind} at {name}: there is no such folder, and the hub gives none: {error}") from error


def tag(called: str) -> str:
    """Return the hub's tag of what a tokenizer is called: one for all vector quantisers."""
    return "vq-vae" if called.startswith("VQ-VAE") else called.lower().replace(" ", "-")


def card(called: str, image_size: int, channels: int, levels: Sequence[StoredGrid], num_classes: int) -> str:
    """Return the card that a tokenizer is saved with: what it is called, reads and gives, and how to load it."""
    told = ", ".join(
        f"{h}x{w} " + (f"codes of {size}" if size else f"vectors of {dim}") for (h, w), size, dim in levels
    )
    name = f"conditional {called}" if num_classes else called
    depth = "1 channel" if channels == 1 else f"{channels} channels"
    beside, classes = (f", each of one of {num_classes} classes,", ", classes=classes") if num_classes else ("", "")
    return (
        f"---\nlibrary_name: smalti\ntags: [image-tokenizer, {tag(called)}]\n---\n\n# A smalti tokenizer\n\n"
        f"{name[0].upper()}{name[1:]}. Images of {image_size}x{image_size} pixels and {depth} in [-1, 1]{beside} "
        f"become, coarse to fine: {told}.\n\n```python\nfrom tokenizer import HierarchicalVQVAE\n\n"
        "tok = HierarchicalVQVAE.from_pretrained(FOLDER_OR_REPOSITORY)\n"
        f"codes = tok.encode(images{classes})\nimages = tok.decode(codes{classes})\n```\n"
    )
