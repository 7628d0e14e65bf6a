"""Stage sample: priors draw codes, the tokenizer decodes them, sample shards keep both."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.compute.devices import ComputeConfig, inference_device, this_worker
from pipelines.data.classes import class_index
from pipelines.data.images import to_uint8
from pipelines.data.pictures import encode_image, picture_grid, pixels_of, to_picture
from pipelines.errors import StageError
from pipelines.metrics.classifier import Classifier, judged
from pipelines.metrics.stored_classifier import StoredClassifier
from pipelines.progress import progress_bar
from pipelines.stages.shard_job import ShardJob, all_done, this_workers
from pipelines.storage.cache import Cache
from pipelines.storage.fingerprint import check_belong_together, digest, hashed, model_fingerprints
from pipelines.storage.folders import check_set_name, check_settings_stay
from pipelines.storage.manifest import write_manifest
from pipelines.storage.paths import whole
from pipelines.storage.receipts import write_shard
from pipelines.storage.shards import array_bytes, code_dtype, index_shard, read_member
from prior import HierarchicalPrior
from prior.decoder import Decoders
from prior.sampling import check_sampling
from tokenizer import HierarchicalVQVAE

# Images in grid.png: at most ten rows of at most ten.
GRID_SIDE = 10
# Candidate c of sample i draws from stream c * APART + i, so that the first is what is drawn without rejection.
APART, MOST_CANDIDATES = 2**40, 2**20


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What is drawn; temperature, top_k, top_p and guidance are one value for all levels or a list of one per level.

    Attributes:
        folder: of this set of samples, in the run folder; several sets lie side by side.
        count: how many images.
        classes: names (strings) or indices (whole numbers), taken in turn; empty takes all classes in turn
            ("balanced"). A string of digits that names no class counts as an index.
        temperature: divides the logits.
        top_k: keep the k likeliest codes; 0 keeps all.
        top_p: keep the likeliest codes that together reach this probability; 1 keeps all.
        guidance: s of uncond + s (cond - uncond); 1 is the model as it is.
        batch_size: images drawn at once; the last batch is filled up.
        shard_size: images a shard; rounded up to whole batches.
        precision: "float32" (TF32 off) or "bfloat16".
        reject: candidates of each image, of which the one is kept that a classifier of the training images finds
            likeliest of its class (Razavi et al. 2019, section 3.4); 1 draws no more than is kept.
    """

    folder: str = "samples"
    count: int = 100
    classes: list[str | int] = field(default_factory=list)
    temperature: float | list[float] = 1.0
    top_k: int | list[int] = 0
    top_p: float | list[float] = 1.0
    guidance: float | list[float] = 1.0
    batch_size: int = 50
    shard_size: int = 1000
    precision: str = "float32"
    reject: int = field(default=1, metadata={"introduced": 1})

    def __post_init__(self) -> None:
        if self.count < 1 or self.batch_size < 1 or self.shard_size < 1:
            raise ValueError("sample.count, batch_size and shard_size must be at least 1")
        if not 1 <= self.reject <= MOST_CANDIDATES:
            raise ValueError(f"sample.reject must lie in [1, {MOST_CANDIDATES}], got {self.reject}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"sample.precision must be float32 or bfloat16, got {self.precision}")
        check_set_name(self.folder, "sample.folder", "samples")
        for name in ("temperature", "top_k", "top_p", "guidance"):
            values = getattr(self, name)
            for value in values if isinstance(values, list) else [values]:
                neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "guidance": 1.0}
                try:
                    check_sampling(**neutral | {name: value})  # type: ignore[arg-type]
                except ValueError as error:
                    raise ValueError(f"sample.{error}") from None


def sample(
    config: SampleConfig,
    seed: int,
    compute: ComputeConfig,
    tokenizer: HierarchicalVQVAE,
    prior: HierarchicalPrior,
    folder: Path,
    classifier: StoredClassifier | None = None,
) -> None:
    """Write sample shards, receipts, grid.png and the manifest; shards whose receipt fits stay.

    A classifier is needed for `config.reject` above 1, and used for nothing else.

    Raises:
        StageError: tokenizer and priors do not belong together, a class does not exist, a prior cannot be guided, or
            there is nothing to reject by.
    """
    marks = model_fingerprints(tokenizer, prior) | ({"classifier": classifier.fingerprint} if classifier else {})
    check_sample(config, tokenizer, prior, marks["tokenizer"])
    classes = class_indices(config.classes, prior.class_names)
    if (config.reject > 1) != (classifier is not None):
        raise StageError("sample.reject above 1 needs the classifier of a run, and a run's images; set it to 1")
    device = inference_device(compute, precise=config.precision == "float32")
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    how = drawn_with(config, seed, device.type, threads)
    tokenizer, prior = tokenizer.to(device), prior.to(device)
    judge = classifier.model.to(device) if classifier else None
    per_shard = -(-config.shard_size // config.batch_size) * config.batch_size
    starts = range(0, config.count, per_shard)
    jobs, ranges = [], []
    for number, start in enumerate(starts):
        stop = min(start + per_shard, config.count)
        provenance = {"made_from": None, "fingerprints": marks, "settings": digest([how, start, stop])}
        jobs.append(ShardJob(folder / f"{number:06d}.tar", stop - start, provenance))
        ranges.append((start, stop))
    cache = compute.cache
    share = this_workers(jobs, folder, cache)
    decoders: Decoders = {}
    total = sum(jobs[number].samples for number in share.todo)
    with progress_bar(total, "sample", "images", disable=this_worker().rank > 0) as bar:
        for number in share.todo:
            drawn = _drawn(config, seed, classes, tokenizer, prior, judge, decoders, *ranges[number], bar.update)
            write_shard(jobs[number].path, drawn, jobs[number].provenance)
    if all_done(jobs, share, cache):
        check_settings_stay(folder, "sample", {"seed": seed, "sample": config})
        names = [job.path.name for job in jobs]
        _write_grid(folder, names, prior.class_names, tokenizer, cache)
        contents = {
            "kind": "samples",
            "fingerprints": marks,
            "settings": how,
            "count": config.count,
            "class_names": prior.class_names,
            "image_size": tokenizer.image_size,
            "channels": tokenizer.channels,
        }
        write_manifest(folder, {"samples": names}, contents)


def drawn_with(config: SampleConfig, seed: int, device: str, threads: int) -> dict[str, Any]:
    """Return what a sample depends on besides the models and its index."""
    how = {"seed": seed, "device": device, "threads": threads, **hashed(config)}
    del how["folder"], how["count"]
    return how


class Drawn(NamedTuple):
    """Images float (B, C, H, W) in [-1, 1], and their codes int64 (B, h, w) per level, coarse to fine."""

    images: Tensor
    codes: list[Tensor]


def drawn_batches(
    config: SampleConfig,
    seed: int,
    classes: list[int],
    tokenizer: HierarchicalVQVAE,
    prior: HierarchicalPrior,
    decoders: Decoders,
    start: int,
    stop: int,
    classifier: Classifier | None = None,
) -> Iterator[Drawn]:
    """Yield samples start to stop in batches that are whole whatever their number: the last is filled up.

    Which candidate is kept is a function of the sample's index, as its codes are: each has its own stream.

    Args:
        config: how they are drawn.
        seed: of their uniforms.
        classes: indices, taken in turn; empty for none.
        tokenizer: makes images of codes.
        prior: draws codes.
        decoders: see `HierarchicalPrior.sample`.
        start: index of the first sample.
        stop: index after the last one.
        classifier: chooses among `config.reject` candidates.
    """
    device = next(tokenizer.parameters()).device
    settings = (config.temperature, config.top_k, config.top_p, config.guidance)

    def draw(labels: list[int] | None, streams: list[int]) -> Drawn:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            codes = prior.sample(labels, seed, *settings, streams, decoders)
            return Drawn(tokenizer.decode(codes, labels).float(), codes)

    for first in range(start, stop, config.batch_size):
        indices = range(first, first + config.batch_size)
        labels = [classes[index % len(classes)] for index in indices] if classes else None
        streams = [[number * APART + index for index in indices] for number in range(config.reject)]
        candidates = map(partial(draw, labels), streams)  # one after the other: only the best are kept
        yield likeliest(candidates, classifier, labels) if classifier and labels else next(candidates)


def likeliest(candidates: Iterable[Drawn], classifier: Classifier, labels: list[int]) -> Drawn:
    """Return of each image the candidate that a classifier finds likeliest of its class; of equals the first.

    Args:
        candidates: batches of B images.
        classifier: judges the 8-bit pictures that would be written.
        labels: class of each image.
    """
    kept: Drawn | None = None
    rows = torch.arange(len(labels))
    for drawn in candidates:
        pixels = torch.from_numpy(to_uint8(drawn.images)).to(drawn.images.device)
        found = judged(classifier, pixels)[rows, labels]
        if kept is None:
            kept, best = drawn, found
            continue
        better = found > best
        best = torch.where(better, found, best)
        pairs = zip([drawn.images, *drawn.codes], [kept.images, *kept.codes], strict=True)
        images, *codes = (torch.where(better.view(-1, *[1] * (new.ndim - 1)), new, old) for new, old in pairs)
        kept = Drawn(images, codes)
    assert kept
    return kept


def check_sample(config: SampleConfig, tokenizer: HierarchicalVQVAE, prior: HierarchicalPrior, mark: str) -> None:
    """Raise StageError for models that do not belong together, and settings that they cannot be drawn with.

    Args:
        config: the section.
        tokenizer: which decodes.
        prior: which is drawn from.
        mark: the tokenizer's fingerprint.
    """
    check_belong_together(prior, mark)
    class_indices(config.classes, prior.class_names)
    levels = len(prior.levels)
    if levels != len(tokenizer.levels):
        raise StageError(
            f"the tokenizer has {len(tokenizer.levels)} levels but there are priors of {levels}; "
            "run `smalti train-prior` for all of them"
        )
    if config.reject > 1 and not prior.class_names:
        raise StageError("sample.reject chooses by class, but the prior was trained without; leave it at 1")
    for name in ("temperature", "top_k", "top_p", "guidance"):
        values = getattr(config, name)
        if isinstance(values, list) and len(values) != levels:
            raise StageError(f"sample.{name} must be one value or one per level ({levels}), got {values}")
    guidance = config.guidance if isinstance(config.guidance, list) else [config.guidance] * levels
    for level, value in zip(prior.levels, guidance, strict=True):
        if level.config.codebook_sizes[-1] is None and (value != 1 or config.top_k or config.top_p != 1):
            raise StageError(
                "sample.top_k, top_p and guidance are of codes, and these levels hold numbers; leave them out"
            )
        if value != 1 and not prior.class_names:
            raise StageError("sample.guidance needs classes, but the prior was trained without; leave it at 1")
        if value != 1:
            try:
                level.config.check_unconditional()
            except ValueError as error:
                raise StageError(f"sample.guidance cannot be {value}: {error}") from None


def class_indices(wanted: list[str | int], names: list[str]) -> list[int]:
    """Return class indices; all of them when none are wanted. See `class_index`."""
    if wanted and not names:
        raise StageError(f"sample.classes names {wanted} but the prior was trained without classes; leave it empty")
    return [class_index(one, names, "sample.classes") for one in wanted] or list(range(len(names)))


def _drawn(
    config: SampleConfig,
    seed: int,
    classes: list[int],
    tokenizer: HierarchicalVQVAE,
    prior: HierarchicalPrior,
    classifier: Classifier | None,
    decoders: Decoders,
    start: int,
    stop: int,
    tick: Any,
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield samples start to stop as shards hold them."""
    dtypes = [code_dtype(size) for size in tokenizer.codebook_sizes]
    batches = drawn_batches(config, seed, classes, tokenizer, prior, decoders, start, stop, classifier)
    for first, (images, codes) in zip(range(start, stop, config.batch_size), batches, strict=True):
        pixels = to_uint8(images)
        arrays = [code.cpu().numpy().astype(dtype) for code, dtype in zip(codes, dtypes, strict=True)]
        for row, index in enumerate(range(first, min(first + config.batch_size, stop))):
            contents = {"png": encode_image(to_picture(pixels[row]), "png")}
            contents |= {f"level{level}.npy": array_bytes(array[row]) for level, array in enumerate(arrays)}
            if classes:
                contents["cls"] = str(classes[index % len(classes)]).encode()
            yield f"{index:08d}", contents
        tick(min(config.batch_size, stop - first))


def _write_grid(
    folder: Path, names: list[str], class_names: list[str], tokenizer: HierarchicalVQVAE, cache: Cache
) -> None:
    """Write grid.png: a column a class where there are at most ten, else samples in order, each with its class."""
    drawn: list[tuple[int, np.ndarray]] = []
    for name in names:
        if len(drawn) >= GRID_SIDE**2:
            break
        local = cache.files(folder, [name]) / name
        with local.open("rb") as file:
            for entry in index_shard(local)[: GRID_SIDE**2]:
                label = int(read_member(file, entry.members["cls"])) if "cls" in entry.members else -1
                png = read_member(file, entry.members["png"])
                drawn.append((label, pixels_of(png, tokenizer.image_size, tokenizer.channels)))
    labels = sorted({label for label, _ in drawn})
    if labels[0] >= 0 and len(labels) <= GRID_SIDE:
        columns = [[pixels for label, pixels in drawn if label == wanted][:GRID_SIDE] for wanted in labels]
        rows = list(zip_longest(*columns))
        picture = picture_grid(rows, [[class_names[label] for label in labels]])
    else:
        lines = [drawn[i : i + GRID_SIDE] for i in range(0, min(len(drawn), GRID_SIDE**2), GRID_SIDE)]
        titles = [[class_names[label] for label, _ in line] for line in lines] if labels[0] >= 0 else []
        picture = picture_grid([[pixels for _, pixels in line] for line in lines], titles)
    with whole(folder / "grid.png") as temporary:
        picture.save(temporary, "PNG")
