"""Command verify: whether what lies in a run folder is what its manifests, receipts and models say."""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipelines.data.codes import code_sample
from pipelines.data.images import checked_pixels
from pipelines.errors import StageError
from pipelines.progress import counted, progress_bar
from pipelines.storage.cache import Cache
from pipelines.storage.fingerprint import (
    check_belong_together,
    manifest_digest,
    tokenizer_fingerprint,
)
from pipelines.storage.manifest import (
    CodesManifest,
    ImagesManifest,
    Manifest,
    SamplesManifest,
    all_receipts,
    level_entries,
    read_manifest,
)
from pipelines.storage.paths import retried
from pipelines.storage.receipts import read_receipt
from pipelines.storage.shards import SampleIndex, check_count, index_shard
from pipelines.tokens.layout import TokenLayout
from pipelines.tokens.shards import ALL
from prior import HierarchicalPrior
from tokenizer import HierarchicalVQVAE

logger = logging.getLogger(__name__)


class Found(NamedTuple):
    """A sample of a checked shard: the open local file, where it lies in it, and the shard's own place."""

    file: BinaryIO
    sample: SampleIndex
    shard: Path


def verify_images(folder: Path, cache: Cache) -> ImagesManifest:
    """Check every image shard and every picture in it, and that keys are unique; return the manifest.

    Args:
        folder: of images.
        cache: for remote shards.

    Raises:
        StageError: the first thing that is not what it should be, named; as of the two functions that follow.
    """
    manifest = read_manifest(folder, "images", "pack")
    seen: set[str] = set()
    for split, found in _samples(manifest, folder, cache, "pack"):
        name = f"{split}/{found.sample.key}"
        if name in seen:
            raise StageError(
                f"key {found.sample.key} comes twice in split {split} of {folder}; run `smalti pack` again"
            )
        seen.add(name)
        checked_pixels(found.file, found.sample, found.shard, manifest["image_size"], manifest["channels"])
    return manifest


def verify_codes(
    folder: Path, images: ImagesManifest | None, tokenizer: HierarchicalVQVAE | None, cache: Cache
) -> CodesManifest:
    """Check every code shard and every grid in it, and what they were made from and with; return the manifest.

    Args:
        folder: of codes.
        images: manifest of the images, where they are there.
        tokenizer: where it is there.
        cache: for remote shards.
    """
    manifest = read_manifest(folder, "codes", "encode")
    if tokenizer is not None:
        mark = tokenizer_fingerprint(tokenizer)
        if manifest["tokenizer"] != mark:
            raise StageError(
                f"{folder} was written with tokenizer {manifest['tokenizer'][:12]} but the run's is {mark[:12]}, "
                "another one or damaged; restore that, or run `smalti encode` with this tokenizer"
            )
        if manifest["levels"] != level_entries(tokenizer.levels):
            raise StageError(f"{folder}/manifest.json names other levels than the tokenizer has; run `smalti encode`")
    sources: dict[str, str] = {}
    if images is not None:
        if manifest["made_from"] != manifest_digest(images):
            raise StageError(f"{folder} was made from other images than the run's; run `smalti encode` again")
        sources = {receipt["shard"]: receipt["sha256"] for _, receipt in all_receipts(images)}
    for _, receipt in all_receipts(manifest):
        if sources and receipt.get("made_from") != sources.get(receipt["shard"]):
            raise StageError(
                f"{folder / receipt['shard']} was made from another image shard than the run's; "
                "run `smalti encode` again"
            )
    for _, found in _samples(manifest, folder, cache, "encode"):
        code_sample(found.file, found.sample, manifest, found.shard)
    return manifest


def verify_priors(prior: HierarchicalPrior, codes: CodesManifest) -> None:
    """Check that priors and codes belong together.

    Args:
        prior: all levels.
        codes: manifest of the codes.
    """
    check_belong_together(prior, codes["tokenizer"])
    config = prior.levels[-1].config
    told = any(level.config.knows_classes for level in prior.levels)
    if level_entries(config.levels) != codes["levels"] or prior.class_names != (codes["class_names"] if told else []):
        raise StageError("the priors know other levels or classes than the codes have; run `smalti train-prior` again")


def verify_samples(
    folder: Path, tokenizer: HierarchicalVQVAE, marks: Mapping[str, str], cache: Cache
) -> SamplesManifest:
    """Check every sample shard, its codes and its pictures, and which models drew them; return the manifest.

    Args:
        folder: of samples.
        tokenizer: of the run.
        marks: fingerprints of the run's models, by their names in the manifest.
        cache: for remote shards.
    """
    manifest = read_manifest(folder, "samples", "sample")
    told = manifest["fingerprints"]
    if other := ", ".join(sorted(name for name in told | dict(marks) if told.get(name) != marks.get(name))):
        raise StageError(
            f"{folder} was drawn by other models than the run's ({other}), or those are damaged; "
            "restore them, or run `smalti sample` again"
        )
    described = manifest | {"levels": level_entries(tokenizer.levels)}
    for _, found in _samples(manifest, folder, cache, "sample"):
        code_sample(found.file, found.sample, described, found.shard)
        checked_pixels(found.file, found.sample, found.shard, tokenizer.image_size, tokenizer.channels)
    return manifest


def verify_tokens(folder: Path, codes: CodesManifest) -> int:
    """Check every file of exported tokens, and what they were made from; return how many records there are.

    Args:
        folder: of tokens.
        codes: manifest of the codes.
    """
    layout, again = TokenLayout.load(folder), "run `smalti export` again"
    if layout.stated.codes != manifest_digest(codes):
        raise StageError(f"{folder} was made from other codes than the run's; {again}")
    shards = [shard for found in layout.shards.values() for shard in found]
    for name, sums in [*((shard["shard"], shard["sha256"]) for shard in shards), (ALL, None)]:
        files = (read_receipt(folder / name) or {}).get("files", {})
        told = {file: of_file.get("sha256") for file, of_file in files.items()}
        if not told or sums not in (None, told):
            raise StageError(f"the receipt of {folder / name} is not that of layout.json; {again}")
        for file, sha256 in told.items():
            found = _sha256(folder / file)
            if found != sha256:
                what = f"has sha256 {found[:12]}, not {sha256[:12]}" if found else "is missing"
                only = "the files that go with all shards" if name == ALL else "just that shard"
                raise StageError(f"{folder / file} {what}; {again}, which makes {only} anew")
    return sum(shard["records"] for shard in shards)


def told(folder: Path | str, what: str) -> None:
    """Log that a part of the run holds what it says."""
    logger.info("verify: %s holds what it says (%s)", folder, what)


def size_of(manifest: Manifest) -> str:
    """Return how many shards and samples a manifest tells of."""
    samples = [receipt["samples"] for _, receipt in all_receipts(manifest)]
    return f"{counted(len(samples), 'shard')}, {counted(sum(samples), 'sample')}"


def _samples(manifest: Manifest, folder: Path, cache: Cache, stage: str) -> Iterator[tuple[str, Found]]:
    """Yield every sample with its split, once its shard is known to be what manifest and receipt say.

    Shards are read anew: what was found of them before does not count here.
    """
    receipts = all_receipts(manifest)
    total = sum(receipt["samples"] for _, receipt in receipts)
    with progress_bar(total, f"verify {folder.name}", "samples") as bar:
        for split, receipt in receipts:
            shard = folder / receipt["shard"]
            if read_receipt(shard) != receipt:
                raise StageError(f"the receipt of {shard} is not that of the manifest; run `smalti {stage}` again")
            found = _sha256(shard)
            if found != receipt["sha256"]:
                what = f"has sha256 {found[:12]}, not {receipt['sha256'][:12]}" if found else "is missing"
                raise StageError(f"{shard} {what}; run `smalti {stage}` again, which makes just that shard anew")
            local = cache.shard(shard, receipt)
            samples = index_shard(local)
            check_count(shard, len(samples), receipt["samples"], stage)
            with local.open("rb") as file:
                for sample in samples:
                    yield split, Found(file, sample, shard)
            bar.update(len(samples))


def _sha256(path: Path) -> str | None:
    def read() -> str:
        sha = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                sha.update(chunk)
        return sha.hexdigest()

    try:
        return retried(read, f"read {path}")
    except FileNotFoundError:
        return None
