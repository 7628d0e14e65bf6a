"""Stage export: each code shard becomes a token shard of the same name, in the formats that other trainers read."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pipelines.compute.devices import ComputeConfig, this_worker
from pipelines.errors import ConfigError, StageError
from pipelines.progress import counted, progress_bar
from pipelines.stages.shard_job import ShardJob, all_done, check_free, outstanding, this_workers
from pipelines.storage.cache import Cache
from pipelines.storage.fingerprint import digest
from pipelines.storage.folders import check_set_name, check_settings_stay
from pipelines.storage.manifest import CodesManifest, Receipt, all_receipts, read_manifest
from pipelines.storage.paths import read_bytes
from pipelines.storage.receipts import read_receipt, receipt_fits, remove_shards, write_files
from pipelines.storage.shards import index_shard
from pipelines.tokens.laying import VIEWS, chosen, lay, read_codes, shuffled
from pipelines.tokens.layout import TokenLayout
from pipelines.tokens.records import MAX_CHUNK_BYTES, MAX_LIST
from pipelines.tokens.scan import ORDERS
from pipelines.tokens.shards import ALL, FORMATS, files_of_all, files_of_shard, write_files_of_all, write_files_of_shard
from pipelines.tokens.template import RecordConfig

logger = logging.getLogger(__name__)

# Workers that a reader usually has; with fewer shards some of them have nothing to do.
USUAL_WORKERS = 8


@dataclass(frozen=True, kw_only=True)
class ExportConfig(RecordConfig):
    """What is exported, and for which trainers.

    Attributes:
        folder: of the tokens, in the run folder; several exports lie side by side.
        format: one or more of bin, parquet, litdata, mds and webdataset.
        views: of an image that become records: "distinct" (the first of those whose codes are equal), "first", "all".
        shuffle: mix the records of each shard, in an order drawn from the seed.
        single: join the shards of each split into train.bin and val.bin, for nanoGPT.
        order: of codes: "levels", "nested" (each coarse cell, then its finer cells) or a .npy file with a permutation.
        levels: "all", or the numbers of those that are exported.
        template: what a record holds, words with blanks between them: <codes>, and of <bos> <eos> <boi> <eoi> <class>
            <size> <text> <level> <eol> what is wanted.
        vocab: which ids the tokens have.
        text: how captions become tokens.
        dtype: of token files: "auto" is uint16 while the vocabulary fits, else uint32.
        max_tokens: captions are cut so that no record has more; 0 cuts none.
    """

    folder: str = "tokens"
    format: list[str] = field(default_factory=lambda: ["bin", "parquet"])
    views: str = "distinct"
    shuffle: bool = True
    single: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_set_name(self.folder, "export.folder", "tokens")
        if not self.format or len({*self.format} & {*FORMATS}) < len(self.format):
            raise ValueError(f"export.format must name some of {', '.join(FORMATS)}, each once, got {self.format}")
        if self.views not in VIEWS:
            raise ValueError(f"export.views must be one of {', '.join(VIEWS)}, got {self.views}")
        if self.single and "bin" not in self.format:
            raise ValueError(f"export.single joins bin shards, but export.format is {self.format}; add bin to it")


class Plan(NamedTuple):
    """What there is to do.

    Attributes:
        config: of the export.
        seed: of the shuffling.
        codes: their folder.
        manifest: of the codes.
        layout: what a record is.
        folder: of the tokens.
        sources: (split, receipt) of each code shard; those without samples have no token shard, which Megatron could
            not map.
        jobs: the token shard of each.
    """

    config: ExportConfig
    seed: int
    codes: Path
    manifest: CodesManifest
    layout: TokenLayout
    folder: Path
    sources: list[tuple[str, Receipt]]
    jobs: list[ShardJob]

    def receipts(self) -> dict[str, list[dict]]:
        """Return the receipts of each split's token shards, all of which must be there."""
        found: dict[str, list[dict]] = {split: [] for split in self.manifest["splits"]}
        for (split, _), job in zip(self.sources, self.jobs, strict=True):
            receipt = read_receipt(job.path)
            if receipt is None:
                raise StageError(f"the receipt of {job.path} is gone; give the same command again")
            found[split].append(receipt)
        return found


def files_read(config: ExportConfig) -> dict[str, str]:
    """Return the files that settings name, by the settings' names."""
    order = "" if config.order in ORDERS else config.order
    return {
        "export.order": order,
        "export.vocab.ids": config.vocab.ids,
        "export.text.tokenizer": config.text.tokenizer,
    }


def plan_export(config: ExportConfig, seed: int, compute: ComputeConfig, codes: Path, folder: Path) -> Plan:
    """Plan an export, and refuse now what would be refused later.

    Raises:
        ConfigError: the settings cannot be together, or not with these codes.
        StageError: there are no codes.
    """
    manifest = read_manifest(codes, "codes", "encode")
    layout = TokenLayout.from_codes(manifest, config)
    sources = [(split, receipt) for split, receipt in all_receipts(manifest) if receipt["samples"]]
    if not sources:
        raise StageError(f"{codes} holds no codes; run `smalti encode` again")
    plan = Plan(config, seed, codes, manifest, layout, folder, sources, [])
    _check(plan, compute.cache)
    # What shapes every shard; the digest of all codes does not.
    record = {name: value for name, value in layout.describe().items() if name != "codes"}
    kinds = sorted(files_of_shard(config.format, "SPLIT", "NAME"))
    settings = digest([seed, record, kinds, config.views, config.shuffle, manifest.get("views")])
    made_with = {"fingerprints": {"tokenizer": manifest["tokenizer"]}, "settings": settings}
    for split, receipt in sources:
        name, provenance = receipt["shard"].removesuffix(".tar"), {"made_from": receipt["sha256"], **made_with}
        files = files_of_shard(config.format, split, name)
        plan.jobs.append(ShardJob(folder / name, receipt["samples"], provenance, files))
    return plan


def export(config: ExportConfig, seed: int, compute: ComputeConfig, codes: Path, folder: Path) -> None:
    """Write token shards, receipts, and layout.json last; shards whose receipt fits stay.

    Raises:
        ConfigError: the settings cannot be together, or not with these codes.
        StageError: a code shard is not what its manifest says, or somebody else's file is in the way.
    """
    plan, cache = plan_export(config, seed, compute, codes, folder), compute.cache
    check_free(_job_of_all(plan, {}))
    share = this_workers(plan.jobs, folder, cache, "layout.json")
    total = sum(plan.jobs[number].samples for number in share.todo)
    with progress_bar(total, "export", "codes", disable=this_worker().rank > 0) as bar:
        for number in share.todo:
            _write_shard(plan, number, cache)
            bar.update(plan.jobs[number].samples)
    if all_done(plan.jobs, share, cache):
        check_settings_stay(folder, "export", {"seed": seed, "export": config})
        _finish(plan, cache)


def is_exported(plan: Plan, cache: Cache) -> bool:
    """Whether a complete folder holds what is planned, every file as its receipt says."""
    if outstanding(plan.jobs, cache):
        return False
    receipts = plan.receipts()
    wanted = {**plan.layout.describe(), "shards": _listed(receipts)}
    try:
        kept = json.loads(read_bytes(plan.folder / "layout.json"))
    except (OSError, ValueError, RecursionError):
        return False
    return kept == json.loads(json.dumps(wanted)) and not outstanding([_job_of_all(plan, receipts)], cache)


def num_views(manifest: CodesManifest, split: str) -> int:
    """Return V, how many code samples there are of each image of a split."""
    return len(manifest.get("views", ["image"])) if split == "train" else 1


def _write_shard(plan: Plan, number: int, cache: Cache) -> None:
    job, (split, receipt), config = plan.jobs[number], plan.sources[number], plan.config
    shard, name, views = plan.codes / receipt["shard"], job.path.name, num_views(plan.manifest, split)
    read = read_codes(cache.shard(shard, receipt), shard, plan.manifest, plan.layout)
    if len(read.keys) != receipt["samples"] or len(read.keys) % views:
        raise StageError(
            f"{shard} must hold {receipt['samples']} samples, {views} of each image, has {len(read.keys)}; "
            "run `smalti encode` again"
        )
    rows = chosen(read.codes, views, config.views)
    rows = shuffled(rows, plan.seed, name) if config.shuffle else rows
    records = lay(read, rows, views, plan.manifest, plan.layout, shard)
    write_files(
        job.path,
        job.files,
        job.provenance,
        lambda: write_files_of_shard(plan.folder, config.format, split, name, records, plan.layout),
    )


def _job_of_all(plan: Plan, receipts: dict[str, list[dict]]) -> ShardJob:
    """What goes with all shards is vouched for like one of them."""
    config, splits = plan.config, list(dict.fromkeys(split for split, _ in plan.sources))
    files = files_of_all(config.format, splits, config.single, plan.layout)
    made_from = digest([receipt["sha256"] for told in receipts.values() for receipt in told])
    return ShardJob(plan.folder / ALL, 0, {"made_from": made_from, "settings": digest(files)}, files)


def _finish(plan: Plan, cache: Cache) -> None:
    """Write what goes with all shards, layout.json last; shards of other codes are removed first."""
    config, layout, receipts = plan.config, plan.layout, plan.receipts()
    job = _job_of_all(plan, receipts)
    remove_shards(plan.folder, keep={ALL, *(job.path.name for job in plan.jobs)})
    if not receipt_fits(job.path, job.provenance, cache):
        write_files(
            job.path,
            job.files,
            job.provenance,
            lambda: (write_files_of_all(plan.folder, config.format, receipts, config.single, layout), {}),
        )
    layout.save(plan.folder, _listed(receipts))
    _warn(receipts.get("train", []), plan.manifest["class_names"])


def _listed(receipts: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Return what layout.json says of shards."""
    return {
        split: [
            {
                "shard": receipt["shard"],
                "records": receipt["samples"],
                "tokens": receipt["tokens"],
                "sha256": {name: file["sha256"] for name, file in receipt["files"].items()},
            }
            for receipt in told
        ]
        for split, told in receipts.items()
    }


def _check(plan: Plan, cache: Cache) -> None:
    """Refuse what no record, no file or no reader could be."""
    config, layout = plan.config, plan.layout
    layout.vocabulary.names()
    if config.single and layout.dtype.itemsize > 2:
        raise ConfigError(
            f"export.single is for nanoGPT, which reads uint16, but ids are {layout.dtype}; turn it off or export less"
        )
    if "litdata" in config.format and not (layout.length or config.max_tokens):
        raise ConfigError("litdata reads blocks of one length, but captions differ; set export.max_tokens")
    for split, receipt in plan.sources:
        if receipt["shard"].removesuffix(".tar") in (ALL, "layout", "tokenizer", *plan.manifest["splits"]):
            raise StageError(f"{receipt['shard']} is called like another file of exported tokens; rename that shard")
        _check_size(plan, receipt, 1 if config.views == "all" else num_views(plan.manifest, split))
    if "<text>" in layout.words:
        column, (_, first) = layout.stated.text_column, plan.sources[0]
        if not any(column in one.members for one in index_shard(cache.shard(plan.codes / first["shard"], first))):
            raise ConfigError(
                f"export.template has <text>, but {plan.codes / first['shard']} holds no captions ({column}); "
                "set export.text.column to the files that do, or leave <text> out"
            )


def _check_size(plan: Plan, receipt: Receipt, most_equal: int) -> None:
    """Refuse a shard that a format cannot hold, however many of an image's views are equal."""
    tokens = receipt["samples"] // most_equal * len(plan.layout.slots.low)
    size = {
        "parquet": tokens,
        "litdata": tokens * plan.layout.dtype.itemsize,
        "mds": tokens * plan.layout.dtype.itemsize,
    }
    for name, most in (("parquet", MAX_LIST), ("litdata", MAX_CHUNK_BYTES), ("mds", MAX_CHUNK_BYTES)):
        if name in plan.config.format and size[name] >= most:
            raise ConfigError(
                f"{receipt['shard']} makes {tokens} tokens, more than a file of {name} can hold; "
                "pack smaller shards (images.shard_size), or leave this format out"
            )


def _warn(train: list[dict], class_names: list[str]) -> None:
    """Tell of what is no error here but may be one in training."""
    of_one = sum(receipt["classes"] == 1 < receipt["samples"] for receipt in train)
    if of_one and len(class_names) > 1:
        logger.warning(
            "export: %d of %d train shards hold one class alone, and trainers read windows in order; "
            "pack images in a mixed order (images.shuffle)",
            *(of_one, len(train)),
        )
    if 0 < len(train) < USUAL_WORKERS:
        logger.warning(
            "export: there %s, and readers with more workers leave some idle; pack smaller shards (images.shard_size)",
            f"{'is' if len(train) == 1 else 'are'} {counted(len(train), 'train shard')}",
        )
    records, images, repeated = (sum(receipt[name] for receipt in train) for name in ("samples", "images", "repeated"))
    if records > images:
        logger.warning(
            "export: %d train records show %d images; whoever holds out some of them must hold out whole images "
            "(source_key), or take the val split",
            *(records, images),
        )
    if repeated:
        logger.warning("export: %d of %d train records repeat another of their shard", repeated, records)
