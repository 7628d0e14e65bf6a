"""Stage pack: an image source becomes image shards of one size."""

import errno
import json
import logging
import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from pipelines.compute.devices import ComputeConfig, num_loaders, this_worker
from pipelines.compute.memory import keep_freed_memory
from pipelines.compute.signals import PARENT, end_with_parent
from pipelines.data.classes import class_index
from pipelines.data.pictures import BadImageError, fit
from pipelines.errors import StageError
from pipelines.progress import counted, progress_bar
from pipelines.sources.open import open_source
from pipelines.sources.source import Raw, Source, Split, described, described_beside
from pipelines.sources.splits import check_unique, stratified_fraction
from pipelines.stages.shard_job import ShardJob, all_done, this_workers
from pipelines.storage.fingerprint import digest
from pipelines.storage.folders import check_settings_stay
from pipelines.storage.manifest import write_manifest
from pipelines.storage.paths import write_text
from pipelines.storage.receipts import read_receipt, write_shard
from pipelines.storage.shards import CARRIED

logger = logging.getLogger(__name__)

# Of errors while a file is read, those that are the file's own: it is a link that leads nowhere, or is not for us.
UNREADABLE = (errno.ENOENT, errno.ELOOP, errno.EACCES)


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Where images come from and how they are packed.

    Attributes:
        from_: an `images` folder of another run; empty packs this run's own.
        source: digits, folder:PATH, parquet:GLOB, hf:REPO[:SPLIT] or shards:URLS.
        size: pixels of either side after scaling the short side and cropping the centre.
        channels: 1 for grey, 3 for RGB.
        classes: False leaves classes out.
        upscale: enlarge images smaller than size, which are skipped as bad otherwise.
        val_fraction: share of each class set aside for validation, where the source has no such split.
        max_bad: highest share of images that may be skipped because they cannot be used.
        shard_size: images a shard.
        format: how resized images are encoded: lossless png or webp, or jpg at quality 95.
        image_column: of parquet and hf sources; found by its type if empty.
        label_column: of parquet and hf sources; found by its type or name if empty.
        caption_column: of parquet and hf sources, what becomes txt; none if empty.
        keep: which of txt and json are carried along with the images that have them beside them; "auto" is both, but
            for a folder that was begun otherwise, which goes on as it was begun.
        shuffle: mix the images of a split over its shards, by the seed; "auto" does with class folders, which are laid
            down class by class otherwise, but for a folder that was begun otherwise.
        leave_out: classes, by name or index, whose images the train split lacks and val keeps: what models make of such
            images, `smalti explore score` tells.
    """

    from_: str = ""
    source: str = "digits"
    size: int = 256
    channels: int = 3
    classes: bool = True
    upscale: bool = False
    val_fraction: float = 0.1
    max_bad: float = 0.001
    shard_size: int = 10000
    format: Literal["png", "jpg", "webp"] = "png"
    image_column: str = ""
    label_column: str = ""
    caption_column: str = field(default="", metadata={"introduced": ""})
    keep: list[str] | Literal["auto"] = field(default="auto", metadata={"introduced": []})
    shuffle: bool | Literal["auto"] = field(default="auto", metadata={"introduced": False})
    leave_out: list[str | int] = field(default_factory=list, metadata={"introduced": []})

    def __post_init__(self) -> None:
        if self.size < 2:
            raise ValueError(f"images.size must be at least 2 pixels, got {self.size}")
        if self.channels not in (1, 3):
            raise ValueError(f"images.channels must be 1 (grey) or 3 (RGB), got {self.channels}")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"images.val_fraction must lie between 0 and 1, got {self.val_fraction}")
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"images.max_bad must lie in [0, 1], got {self.max_bad}")
        if self.shard_size < 1:
            raise ValueError(f"images.shard_size must be at least 1, got {self.shard_size}")
        if self.keep != "auto" and not (isinstance(self.keep, list) and all(name in [*CARRIED] for name in self.keep)):
            raise ValueError(f"images.keep must be auto or a list of {' and '.join(CARRIED)}, got {self.keep}")
        if self.leave_out and not self.classes:
            raise ValueError("images.leave_out names classes and images.classes is false; leave one of them out")


class ShardPlan(NamedTuple):
    """One shard to write: its name, and which images of which split of the source."""

    name: str
    source_split: str
    indices: np.ndarray


def pack(
    config: ImagesConfig,
    seed: int,
    compute: ComputeConfig,
    folder: Path,
    judged: Callable[[list[str]], None] | None = None,
) -> None:
    """Write image shards, receipts and the manifest; shards whose receipt fits stay.

    Args:
        config: the section.
        seed: of the split and the order.
        compute: where.
        folder: of the stage.
        judged: called with the class names before anything is packed, to refuse what they are not enough for.

    Raises:
        StageError: an empty source, duplicate keys, or more bad images than max_bad allows.
    """
    source = open_source(
        config.source,
        compute.cache,
        config.classes,
        config.image_column or None,
        config.label_column or None,
        config.caption_column or None,
    )
    if judged:
        judged(source.class_names)
    if this_worker().rank == 0:
        logger.info("pack: %s", described(config.source, source))
        if said := described_beside(source, kept_members(source, config)):
            logger.info("pack: %s", said)
    plans = plan_shards(source, config, seed)
    for name in ("train", "val"):
        own = [plan for plan in plans if plan.name.startswith(name)]
        keys = (source.splits[plan.source_split].key(int(index)) for plan in own for index in plan.indices)
        check_unique(keys, config.source)
    jobs = shard_jobs(source, plans, config, folder)
    share = this_workers(jobs, folder, compute.cache)
    tasks = [(jobs[number], plans[number], config) for number in share.todo]
    processes = min(num_loaders(compute), len(tasks))
    total = sum(jobs[number].samples for number in share.todo)
    with progress_bar(total, "pack", "images", disable=this_worker().rank > 0) as bar:
        if processes > 1:
            _pack_in_processes(processes, source, tasks, bar.update)
        else:
            for task in tasks:
                _pack_shard(source, *task, bar.update)
    if all_done(jobs, share, compute.cache):
        check_settings_stay(folder, "pack", {"seed": seed, "images": config})
        _finish(folder, plans, source, config)


def kept_members(source: Source, config: ImagesConfig) -> list[str]:
    """Return the extensions of what is carried along with the images."""
    return [name for name in CARRIED if name in source.beside and (config.keep == "auto" or name in config.keep)]


def shard_jobs(source: Source, plans: list[ShardPlan], config: ImagesConfig, folder: Path) -> list[ShardJob]:
    """Return the shards to write; their digests hold all that shapes their bytes, the seed by which images it chose."""
    kept = {name: source.beside[name] for name in kept_members(source, config)}
    later = _later_settings(config) | ({"keep": kept} if kept else {})
    identity = digest([source.identity, _settings(config) | later])

    def provenance(plan: ShardPlan) -> dict[str, Any]:
        chosen = digest([plan.source_split, plan.indices.tolist()])
        return {"made_from": None, "fingerprints": {}, "settings": digest([identity, chosen])}

    return [ShardJob(folder / plan.name, len(plan.indices), provenance(plan)) for plan in plans]


def _settings(config: ImagesConfig) -> dict[str, Any]:
    return {"size": config.size, "channels": config.channels, "upscale": config.upscale, "format": config.format}


def _later_settings(config: ImagesConfig) -> dict[str, Any]:
    """What digests of format 1 did not hold: it counts where it is not the default that it had then."""
    before = {"classes": True, "image_column": "", "label_column": "", "caption_column": ""}
    return {name: getattr(config, name) for name, value in before.items() if getattr(config, name) != value}


def plan_shards(source: Source, config: ImagesConfig, seed: int) -> list[ShardPlan]:
    """Assign every image to a split and a shard, in the order of the source or shuffled."""
    train = np.arange(len(source.splits["train"]))
    if "val" in source.splits:
        chosen = {"train": ("train", train), "val": ("val", np.arange(len(source.splits["val"])))}
    else:
        held_out = stratified_fraction(source.splits["train"].labels, len(train), config.val_fraction, seed)
        chosen = {"train": ("train", np.setdiff1d(train, held_out)), "val": ("train", held_out)}
    if config.leave_out:
        out = [class_index(one, source.class_names, "images.leave_out") for one in config.leave_out]
        name, indices = chosen["train"]
        chosen["train"] = name, indices[~np.isin(np.asarray(source.splits[name].labels)[indices], out)]
    class_folders = config.source.startswith("folder:") and bool(source.class_names)
    shuffled = class_folders if config.shuffle == "auto" else config.shuffle
    plans = []
    for split_number, (split, (source_split, indices)) in enumerate(chosen.items()):
        if not len(indices):
            raise StageError(f"{config.source} has {len(train)} images, too few for a {split} split; add some")
        if shuffled:
            indices = np.random.default_rng((seed, 4, split_number)).permutation(indices)
        for number, start in enumerate(range(0, len(indices), config.shard_size)):
            part = indices[start : start + config.shard_size]
            plans.append(ShardPlan(f"{split}-{number:06d}.tar", source_split, part))
    return plans


Task = tuple[ShardJob, ShardPlan, ImagesConfig]
_source: Source | None = None


def _pack_in_processes(processes: int, source: Source, tasks: list[Task], tick: Callable[[int], Any]) -> None:
    with ProcessPoolExecutor(processes, get_context("spawn"), _start_worker, (source, os.getpid())) as pool:
        try:
            for task, _ in zip(tasks, pool.map(_pack_in_worker, tasks), strict=True):
                tick(task[0].samples)
        except BrokenProcessPool as error:
            raise StageError(
                "a process that packs was killed, by lack of memory perhaps; set compute.num_workers lower"
            ) from error
        except BaseException:  # nobody waits for shards that nobody wants any more
            for process in active_children():
                process.terminate()
            raise


def _start_worker(source: Source, parent: int) -> None:
    global _source
    _source = source
    keep_freed_memory()
    if os.getppid() != parent:  # it is gone already
        os._exit(1)
    os.environ[PARENT] = str(parent)
    end_with_parent()


def _pack_in_worker(task: Task) -> None:
    assert _source is not None
    with suppress(KeyboardInterrupt):  # Ctrl-C reaches every process; the first one tells of it
        _pack_shard(_source, *task, lambda: None)


def _pack_shard(source: Source, job: ShardJob, plan: ShardPlan, config: ImagesConfig, tick: Callable[[], Any]) -> None:
    """Write one shard, calling tick once an image."""
    skipped: list[dict[str, str]] = []
    provenance = job.provenance | {"skipped": skipped}
    kept = {name: CARRIED[name] for name in kept_members(source, config)}
    split, allowed = source.splits[plan.source_split], config.max_bad * sum(map(len, source.splits.values()))

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for index in plan.indices:
            tick()
            try:
                raw, beside = _read(split, int(index), kept)
                fitted = fit(raw.data, config.size, config.channels, config.upscale, config.format)
            except BadImageError as error:
                skipped.append({"key": split.key(int(index)), "reason": str(error)})
                if len(skipped) > allowed:
                    raise _too_many_bad(skipped, config) from None
                continue
            contents = {fitted.extension: fitted.data, **kept, **beside}
            if raw.label is not None:
                contents["cls"] = str(raw.label).encode()
            if not _is_json(contents.get("json", b"{}")):
                provenance.setdefault("not_json", {"count": 0, "first": raw.key})["count"] += 1
            yield raw.key, contents

    write_shard(job.path, samples(), provenance)


def _read(split: Split, index: int, kept: Collection[str]) -> tuple[Raw, dict[str, bytes]]:
    """Return an image and what lies beside it; what cannot be read counts as a bad image."""
    try:
        return split.read(index), split.beside(index, kept) if kept else {}
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
        raise BadImageError(f"cannot be read: {error.strerror}") from error


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def _too_many_bad(skipped: list[dict[str, str]], config: ImagesConfig) -> StageError:
    first = skipped[0]
    return StageError(
        f"{len(skipped)} images cannot be used, more than images.max_bad ({config.max_bad:.2%}) allows; "
        f"the first is {first['key']}: {first['reason']}; mend the source or raise images.max_bad"
    )


def _finish(folder: Path, plans: list[ShardPlan], source: Source, config: ImagesConfig) -> None:
    receipts = [receipt for plan in plans if (receipt := read_receipt(folder / plan.name))]
    skipped = [entry for receipt in receipts for entry in receipt["skipped"]]
    if len(skipped) > config.max_bad * sum(len(plan.indices) for plan in plans):
        raise _too_many_bad(skipped, config)
    splits: dict[str, list[str]] = {"train": [], "val": []}
    for plan in plans:
        splits[plan.name.split("-")[0]].append(plan.name)
    for split, names in splits.items():
        if not sum(receipt["samples"] for receipt in receipts if receipt["shard"] in names):
            raise StageError(f"{config.source}: no image of the {split} split can be used")
    if skipped:
        logger.warning("%d images skipped; %s and the manifest name them", len(skipped), folder / "skipped.txt")
        report = "".join(f"{entry['key']}\t{entry['reason']}\n" for entry in skipped)
        write_text(folder / "skipped.txt", report)
    if not_json := [receipt["not_json"] for receipt in receipts if "not_json" in receipt]:
        logger.warning(
            "%s that should be JSON cannot be read as such, which stops Hugging Face's reader; the first is of %s",
            counted(sum(told["count"] for told in not_json), "json member"),
            not_json[0]["first"],
        )
    contents = {
        "kind": "images",
        "image_size": config.size,
        "channels": config.channels,
        "class_names": source.class_names,
        "preprocessing": {**_settings(config), "resize": "short side, bicubic with antialiasing, centre crop"},
        "made_from": config.source,
        "skipped": len(skipped),
    }
    write_manifest(folder, splits, contents)
