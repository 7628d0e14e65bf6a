"""What a folder of images was begun with, and what that means for going on with it."""

from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pipelines.stages.pack import ImagesConfig
from pipelines.storage.folders import differences, is_complete, plain
from pipelines.storage.paths import read_bytes
from pipelines.storage.yaml import read_yaml


def as_begun(config: ImagesConfig, seed: int, folder: Path) -> ImagesConfig:
    """Return the settings with those that are "auto" as the folder was begun with, where it goes on or is complete.

    What the folder's `config.yaml` lacks was what it was introduced as.
    """
    kept = _settings_in(folder)
    begun = {
        one.name: kept.get("images", {}).get(one.name, one.metadata["introduced"])
        for one in fields(config)
        if getattr(config, one.name) == "auto"
    }
    with suppress(ValueError):  # a value that nobody wrote; `open_stage` finds that it differs
        before = replace(config, **begun)
        if is_complete(folder) or (kept and not differences(kept, plain({"seed": seed, "images": before}))):
            return before
    return config


def _settings_in(folder: Path) -> dict[str, Any]:
    """What a folder was begun with; nothing where that cannot be read, which is judged elsewhere."""
    with suppress(OSError, ValueError):
        kept = read_yaml(read_bytes(folder / "config.yaml"))
        if isinstance(kept, dict) and isinstance(kept.get("images"), dict):
            return kept
    return {}
