"""The files of a tokenizer: `config.json` and `model.safetensors`, written whole and read strictly."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenizer.bottlenecks import KINDS, kind_of
from tokenizer.bottlenecks.bottleneck import Settings
from tokenizer.config import TokenizerConfig

# Of config.json. A field that came later has metadata={"introduced": value}: what it is where a file lacks it.
FORMAT = 1
# What weights may be stored as.
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# What settings that lie about a tokenizer can raise on the way to one.
SETTINGS_ERRORS = (AttributeError, KeyError, TypeError, ValueError, RuntimeError, OverflowError)


def write_files(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"format": FORMAT, **settings}, indent=2) + "\n")


def read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the settings of a folder's tokenizer, all that there are today, and its tensors.

    Raises:
        ValueError: files cannot be read, are of another format, or lack or add a setting.
    """
    try:
        settings = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder} holds no readable tokenizer ({error}); train or copy it again") from error
    if isinstance(settings, dict) and settings.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{folder}/config.json is of format {settings['format']}, not {FORMAT}; update smalti")
    later = {f.name: f.metadata["introduced"] for f in fields(TokenizerConfig) if "introduced" in f.metadata}
    later |= {"num_classes": 0, "bottleneck": {"kind": "ema"}, "format": FORMAT}
    known = {"image_size", "channels", *later, *(field.name for field in fields(TokenizerConfig))}
    if not isinstance(settings, dict) or set(later | settings) != known:
        named = sorted(known - {"format", "bottleneck"})
        raise ValueError(f"{folder}/config.json must hold exactly the settings {named}")
    return {name: value for name, value in (later | settings).items() if name != "format"}, tensors


def told(bottleneck: Settings) -> dict[str, Any]:
    """Return what config.json says of a family; nothing of EMA codebooks, the only one when files began."""
    kind = kind_of(bottleneck)
    if kind == "ema":
        return {}
    return {"bottleneck": {"kind": kind, **{name: getattr(bottleneck, name) for name in bottleneck.of_model}}}


def family(settings: dict[str, Any]) -> Settings:
    """Return the settings of a family from those of config.json.

    Raises:
        ValueError: some are missing or too much.
        KeyError: there is no such family.
    """
    kind = KINDS[settings["kind"]]
    if set(settings) != {"kind", *kind.of_model}:
        raise ValueError(f"bottleneck must hold kind and {list(kind.of_model)}, got {sorted(settings)}")
    return kind(**{name: settings[name] for name in kind.of_model})


def check_tensors(folder: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless a folder's tensors are those expected, by name and shape, and hold finite numbers."""
    shapes, wanted = ({name: one.shape for name, one in some.items()} for some in (tensors, expected))
    wrong = [name for name in wanted | shapes if shapes.get(name) != wanted.get(name)]
    if wrong:
        raise ValueError(
            f"{folder}/model.safetensors lacks, adds or reshapes {len(wrong)} tensors, first {wrong[0]}; "
            "it is not the file of this config.json"
        )
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS or not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{folder}/model.safetensors must hold finite numbers, but {name} does not; copy or train it again"
            )
