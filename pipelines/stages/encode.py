"""Stage encode: each image shard becomes a code shard of the same name.

B batch, C channels, H W pixels, h w code grid.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from pipelines.compute.devices import ComputeConfig, inference_device, num_loaders, on_gpu, this_worker
from pipelines.data.images import sample_pixels, shift_pixels, to_unit_range
from pipelines.data.noise import stored_noise, stored_place
from pipelines.errors import StageError
from pipelines.progress import progress_bar
from pipelines.stages.shard_job import ShardJob, all_done, this_workers
from pipelines.storage.fingerprint import digest, manifest_digest, tokenizer_fingerprint
from pipelines.storage.folders import check_settings_stay
from pipelines.storage.manifest import all_receipts, level_entries, read_manifest, receipts_of, write_manifest
from pipelines.storage.receipts import write_shard
from pipelines.storage.shards import CARRIED, POSTERIOR, array_bytes, code_dtype, index_shard, read_member
from tokenizer import HierarchicalVQVAE

VIEWS = ("image", "flip", "crop", "crop-flip")
# A job of fewer pixels (a million images of 64, or 65 thousand of 256) is done before compiling has paid.
COMPILED_PIXELS = 2**32


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """How images become codes.

    Attributes:
        views: what of each training image is encoded, in this order: "image" as it is, "flip" mirrored, "crop" moved
            at random, "crop-flip" both; a view may come several times. Validation images are encoded as they are.
        crop_shift: pixels that a crop moves by at most, the edge repeated.
        batch_size: images encoded at once.
        precision: "float32" (TF32 off) or "bfloat16", in which codes depend on the shape of the batch.
        compile: torch.compile the encoder; "auto" does on a GPU, for a job that is large enough.
        posterior: write mean and log-variance of q(z | x) of levels that hold draws of it, float32 (2d, h, w) as
            `KEY.levelN.posterior.npy`, beside the draw: for `prior.mixture.at: images`.
    """

    views: list[str] = field(default_factory=lambda: ["image"])
    crop_shift: int = 4
    batch_size: int = 64
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool | Literal["auto"] = "auto"
    posterior: bool = field(default=False, metadata={"introduced": False})

    def __post_init__(self) -> None:
        if not self.views or any(view not in VIEWS for view in self.views):
            raise ValueError(f"encode.views must name one or more of {', '.join(VIEWS)}, got {self.views}")
        if self.batch_size < 1 or self.crop_shift < 0:
            raise ValueError("encode.batch_size must be at least 1 and encode.crop_shift not negative")


def check_encode(config: EncodeConfig, tokenizer: HierarchicalVQVAE, images: Path) -> None:
    """Raise StageError where a tokenizer is not for these images, or has no q(z | x) to store."""
    manifest = read_manifest(images, "images", "pack")
    found = (manifest["image_size"], manifest["channels"])
    if found != (tokenizer.image_size, tokenizer.channels):
        raise StageError(
            f"the tokenizer reads images of {tokenizer.image_size} pixels and {tokenizer.channels} channels "
            f"but {images} was packed with {found[0]} and {found[1]}; "
            "set images.size and images.channels to the tokenizer's"
        )
    if tokenizer.num_classes and len(manifest["class_names"]) not in (0, tokenizer.num_classes):
        raise StageError(
            f"the tokenizer was trained with {tokenizer.num_classes} classes but {images} has "
            f"{len(manifest['class_names'])}; take the images' own, or pack them with images.classes false"
        )
    if config.posterior and not tokenizer.bottleneck.rate:
        raise StageError("encode.posterior is of levels that hold draws of numbers; set it to false")


def encode(
    config: EncodeConfig, seed: int, compute: ComputeConfig, tokenizer: HierarchicalVQVAE, images: Path, folder: Path
) -> None:
    """Write code shards, receipts and the manifest; shards whose receipt fits stay.

    Raises:
        StageError: the tokenizer is for other images, or an image shard is not what its manifest says.
    """
    manifest = read_manifest(images, "images", "pack")
    check_encode(config, tokenizer, images)
    mark = tokenizer_fingerprint(tokenizer)
    views = {split: config.views if split == "train" else ["image"] for split in manifest["splits"]}
    count = sum(receipt["samples"] * len(views[split]) for split, receipt in all_receipts(manifest))
    compiled = compiles(config, compute, count * tokenizer.image_size**2)
    settings = settings_digest(config, seed)
    jobs, sources = [], []
    for split, receipt in all_receipts(manifest):
        provenance = {"made_from": receipt["sha256"], "fingerprints": {"tokenizer": mark}, "settings": settings}
        jobs.append(ShardJob(folder / receipt["shard"], receipt["samples"] * len(views[split]), provenance))
        sources.append((split, receipt))
    cache = compute.cache
    share = this_workers(jobs, folder, cache)
    device = inference_device(compute, precise=config.precision == "float32")
    model = tokenizer.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    encoder = with_posterior(model) if config.posterior else model.encode
    if compiled:
        encoder = compiled_encoder(encoder, config.batch_size)
    total = sum(jobs[number].samples for number in share.todo)
    with progress_bar(total, "encode", "images", disable=this_worker().rank > 0) as bar:
        for number in share.todo:
            split, receipt = sources[number]
            shard = cache.shard(images / receipt["shard"], receipt)
            samples = _encoded(shard, model, encoder, split, views[split], config, seed, compute, bar.update)
            write_shard(jobs[number].path, samples, jobs[number].provenance)
    if all_done(jobs, share, cache):
        check_settings_stay(folder, "encode", {"seed": seed, "encode": config})
        contents = {
            "kind": "codes",
            "tokenizer": mark,
            "levels": level_entries(model.levels),
            "class_names": manifest["class_names"],
            "image_size": manifest["image_size"],
            "channels": manifest["channels"],
            "preprocessing": manifest["preprocessing"],
            "views": config.views,
            "precision": config.precision,
            "made_from": manifest_digest(manifest),
            **({"posterior": True} if config.posterior else {}),
        }
        if tokenizer.num_classes:
            contents["conditional"] = True
        names = {split: [receipt["shard"] for receipt in receipts_of(manifest, split)] for split in manifest["splits"]}
        write_manifest(folder, names, contents)


def settings_digest(config: EncodeConfig, seed: int) -> str:
    """Return the digest of what was asked, not of what came of it here: a job may go on elsewhere."""
    asked = [seed, config.views, config.crop_shift, config.batch_size, config.precision, config.compile]
    return digest([*asked, "posterior"] if config.posterior else asked)


def compiles(config: EncodeConfig, compute: ComputeConfig, pixels: int) -> bool:
    """Whether a job of so many pixels is encoded by a compiled encoder."""
    if config.compile == "auto":
        return on_gpu(compute) and pixels >= COMPILED_PIXELS
    return bool(config.compile)


def with_posterior(model: HierarchicalVQVAE) -> Callable[..., list[Tensor]]:
    """Return an encoder that gives, after what is stored of all levels, mean and log-variance of each, (B, 2d, h, w).

    Levels hold draws of numbers.
    """

    @torch.no_grad()
    def encode(images: Tensor, noise: list[Tensor] | None = None, classes: Tensor | None = None) -> list[Tensor]:
        levels = model(images, noise, classes).levels
        return [level.stored[0] for level in levels] + [level.posterior for level in levels]

    return encode


def compiled_encoder(encoder: Callable[..., list[Tensor]], batch_size: int) -> Callable[..., list[Tensor]]:
    """Return an encoder, compiled for one size of batch; smaller ones are filled up, and their filling encoded too.

    A size of its own would be compiled for, in other last bits, by the processes alone that meet it.
    """
    encode = torch.compile(encoder, dynamic=False)

    def filled(batch: Tensor) -> Tensor:
        return F.pad(batch, (0, 0, 0, 0, 0, 0, 0, batch_size - len(batch)))

    def padded(images: Tensor, noise: list[Tensor] | None = None, classes: Tensor | None = None) -> list[Tensor]:
        whole = filled(images).contiguous(memory_format=torch.channels_last)
        more: dict[str, Any] = {} if noise is None else {"noise": [filled(one) for one in noise]}
        if classes is not None:
            more["classes"] = F.pad(classes, (0, batch_size - len(classes)))
        return encode(whole, **more)

    return padded


class _Views:
    """The views of one shard's images, one after the other."""

    def __init__(self, path: Path, views: list[str], crop_shift: int, seed: int, size: int, channels: int) -> None:
        self.path, self.views, self.crop_shift, self.seed = path, views, crop_shift, seed
        self.size, self.channels = size, channels
        self.index = index_shard(path)

    def __len__(self) -> int:
        return len(self.index) * len(self.views)

    def __getitem__(self, number: int) -> tuple[str, dict[str, bytes], np.ndarray]:
        place, view_number = divmod(number, len(self.views))
        sample, view = self.index[place], self.views[view_number]
        pixels = sample_pixels(self.path, sample, self.size, self.channels)
        if "crop" in view:
            generator = np.random.default_rng((self.seed, 3, int(digest([sample.key, view_number])[:8], 16)))
            down, right = generator.integers(-self.crop_shift, self.crop_shift + 1, size=2)
            pixels = shift_pixels(pixels, int(down), int(right))
        if "flip" in view:
            pixels = pixels[:, :, ::-1]
        with self.path.open("rb") as file:
            beside = {
                name: read_member(file, member)
                for name, member in sample.members.items()
                if name == "cls" or name in CARRIED
            }
        key = sample.key if len(self.views) == 1 else f"{sample.key}-{view_number}"
        return key, beside, np.ascontiguousarray(pixels)


def _encoded(
    path: Path,
    model: HierarchicalVQVAE,
    encoder: Callable[..., list[Tensor]],
    split: str,
    views: list[str],
    config: EncodeConfig,
    seed: int,
    compute: ComputeConfig,
    tick: Any,
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the code samples of one image shard."""
    device = next(model.parameters()).device
    dtypes = [code_dtype(size) for size in model.codebook_sizes]
    data = _Views(path, views, config.crop_shift, seed, model.image_size, model.channels)
    # Small shards are decoded sooner than processes start.
    workers = min(8, num_loaders(compute)) if len(data) * model.image_size**2 > 2**26 else 0
    loader = DataLoader(data, config.batch_size, num_workers=workers, collate_fn=list)  # type: ignore[arg-type,var-annotated]
    half = config.precision == "bfloat16"
    for batch in loader:
        images = to_unit_range(torch.from_numpy(np.stack([pixels for _, _, pixels in batch])).to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            noise = stored_noise(model, (stored_place(seed, split, key) for key, _, _ in batch))
            codes = encoder(images.contiguous(memory_format=torch.channels_last), noise, _classes(model, batch))
        arrays = [code.cpu().numpy().astype(dtype) for code, dtype in zip(codes, dtypes, strict=False)]
        posteriors = [one.float().cpu().numpy() for one in codes[len(dtypes) :]]
        for row, (key, beside, _) in enumerate(batch):
            grids = {f"level{level}.npy": array_bytes(array[row]) for level, array in enumerate(arrays)}
            grids |= {f"level{level}.{POSTERIOR}": array_bytes(one[row]) for level, one in enumerate(posteriors)}
            yield key, grids | beside
        tick(len(batch))


def _classes(model: HierarchicalVQVAE, batch: list[tuple[str, dict[str, bytes], np.ndarray]]) -> Tensor | None:
    """Return the class of each image, -1 for none; None where the tokenizer looks at none."""
    if not model.num_classes:
        return None
    return torch.tensor(
        [int(beside.get("cls", b"-1")) for _, beside, _ in batch], device=next(model.parameters()).device
    )
