"""What a folder of images was begun with, and what that means for going on with it."""

import logging
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pipelines.compute.devices import this_worker
from pipelines.errors import UserError
from pipelines.sources.open import check_name, check_source_outside, open_source
from pipelines.stages.pack import ImagesConfig, plan_shards, shard_jobs
from pipelines.storage.cache import Cache
from pipelines.storage.folders import differences, is_complete, plain_data
from pipelines.storage.manifest import read_manifest, receipts_of
from pipelines.storage.paths import is_local, place, read_bytes
from pipelines.storage.receipts import remove_shards
from pipelines.storage.yaml import read_yaml

logger = logging.getLogger(__name__)


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
        if is_complete(folder) or (kept and not differences(kept, plain_data({"seed": seed, "images": before}))):
            return before
    return config


def settle_source(source: str, folder: Path) -> None:
    """Make sure, before anything is touched, that a folder that is to be packed to has to do with one source alone.

    Shards of an unfinished folder that were made from another source are removed: a source is known by the names of
    its files, which another may have too, and then receipts fit.

    Raises:
        ConfigError: there is no such kind of source, or it lies in the folder.
    """
    check_name(source)
    check_source_outside(source, folder)
    if _settings_in(folder).get("images", {}).get("source", source) != source and this_worker().rank == 0:
        remove_shards(folder)


def _settings_in(folder: Path) -> dict[str, Any]:
    """What a folder was begun with; nothing where that cannot be read, which is judged elsewhere."""
    with suppress(OSError, ValueError):
        kept = read_yaml(read_bytes(folder / "config.yaml"))
        if isinstance(kept, dict) and isinstance(kept.get("images"), dict):
            return kept
    return {}


def warn_of_changed_source(config: ImagesConfig, seed: int, cache: Cache, folder: Path) -> None:
    """Warn where a local folder of images lists others now than a complete folder was packed from.

    Only names are compared, and a folder that is gone says nothing: it may be gone on purpose. Other kinds of sources
    take too long to list for a stage that has nothing to do.
    """
    kind, _, rest = config.source.partition(":")
    if kind != "folder" or not is_local(root := place(rest)) or not root.is_dir():
        return
    try:
        source = open_source(config.source, cache, config.classes)
        jobs = shard_jobs(source, plan_shards(source, config, seed), config, folder)
        now = {job.path.name: job.provenance["settings"] for job in jobs}
    except (UserError, OSError):  # nothing that could be packed now
        now = {}
    manifest = read_manifest(folder, "images", "pack")
    receipts: list[Any] = [one for split in manifest["splits"] for one in receipts_of(manifest, split)]
    packed = {one["shard"]: one.get("settings") for one in receipts}
    if now != packed:
        logger.warning(
            "pack: %s does not list what %s was packed from; the images stay as they are, --redo pack makes them again",
            config.source,
            folder,
        )
