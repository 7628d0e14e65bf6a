"""Stage evaluate: how well the tokenizer reconstructs, and how well the priors predict, on the val split.

B batch, C channels, H W pixels, K codebook_size.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchmetrics.functional.image import structural_similarity_index_measure

from pipelines.codes import Codes
from pipelines.compute import ComputeConfig, inference_device
from pipelines.data import ImageShards, ValidationImages, to_unit_range
from pipelines.errors import StageError
from pipelines.manifest import read_manifest
from pipelines.order import ValidationBatches
from pipelines.progress import progress_bar
from pipelines.quality import TokenizerQuality, entropy
from pipelines.sample import check_belong_together
from prior import HierarchicalPrior
from tokenizer import HierarchicalVQVAE

# Images at once; nothing but rounding depends on it.
BATCH_SIZE = 64
SSIM_WINDOW = 11


@torch.no_grad()
def evaluate_tokenizer(tokenizer: HierarchicalVQVAE, images: Path, compute: ComputeConfig) -> dict[str, Any]:
    """Return MSE, PSNR, SSIM, and each level's perplexity and usage over the val split, in true float32.

    SSIM is that of Wang et al. 2004 with its 11x11 Gaussian window, the mean over images; None for smaller ones.
    """
    device = inference_device(compute)
    tokenizer = tokenizer.to(device)
    shards = ImageShards(images, "val", compute.cache)
    if (shards.size, shards.channels) != (tokenizer.image_size, tokenizer.channels):
        raise StageError(f"the tokenizer does not read images of {images}: other size or channels")
    quality = TokenizerQuality(tokenizer)
    similarity = 0.0
    batches = ValidationBatches(len(shards), BATCH_SIZE)
    loader: DataLoader = DataLoader(ValidationImages(shards), batch_sampler=batches)  # type: ignore[arg-type]
    with progress_bar(len(shards), "evaluate tokenizer", "images") as bar:
        for pixels, mask in loader:
            images_ = to_unit_range(pixels.to(device))
            output = tokenizer(images_)
            quality.add(images_, output, mask.to(device))
            kept = mask.bool()
            if shards.size >= SSIM_WINDOW:
                scores = structural_similarity_index_measure(
                    output.reconstruction[kept], images_[kept], data_range=2.0, reduction="none"
                )
                similarity += float(scores.double().sum())  # type: ignore[union-attr]
            bar.update(int(mask.sum()))
    figures = quality.figures()
    ssim = similarity / len(shards) if shards.size >= SSIM_WINDOW else None
    return {"mse": figures.pop("mse"), "psnr": figures.pop("psnr"), "ssim": ssim, **figures}


@torch.no_grad()
def evaluate_prior(
    prior: HierarchicalPrior, codes: Path, unpacked: Path, compute: ComputeConfig
) -> dict[str, dict[str, float]]:
    """Return, for each level, exact nats and bits per code beside what knowing nothing or the histogram gives.

    `uniform` is log K, `histogram` the entropy of the split's own code histogram: no prior without context can do
    better on it.
    """
    device = inference_device(compute)
    prior = prior.to(device)
    manifest = read_manifest(codes, "codes", "encode")
    check_belong_together(prior, manifest["tokenizer"])
    val = Codes(codes, "val", unpacked, compute.cache)
    levels = len(prior.levels)
    nats = torch.zeros(levels, dtype=torch.float64)
    counts = [torch.zeros(size, dtype=torch.float64) for size in val.codebook_sizes]
    with progress_bar(len(val), "evaluate prior", "images") as bar:
        for indices in ValidationBatches(len(val), BATCH_SIZE):
            kept = [index for index in indices if index >= 0]
            grids, classes = val.batch(kept)
            grids, classes = [grid.to(device) for grid in grids], classes.to(device)
            for number, level in enumerate(prior.levels):
                nats[number] += level.nll(grids[number], grids[:number], classes).sum().cpu()
                counts[number] += torch.bincount(grids[number].flatten().cpu(), minlength=len(counts[number]))
            bar.update(len(kept))
    figures = {}
    for number, (h, w) in enumerate(val.grids):
        per_code = float(nats[number]) / (len(val) * h * w)
        figures[f"level{number}"] = {
            "nats_per_code": per_code,
            "bits_per_code": per_code / math.log(2),
            "uniform_bits": math.log2(val.codebook_sizes[number]),
            "histogram_nats": entropy(counts[number]),
            "histogram_bits": entropy(counts[number]) / math.log(2),
        }
    pixels = manifest["channels"] * manifest["image_size"] ** 2
    figures["total"] = {"bits_per_dim": float(nats.sum()) / (len(val) * math.log(2) * pixels)}
    return figures


def table(figures: dict[str, Any]) -> str:
    """Return the figures as a table for the terminal."""
    lines = []
    if "tokenizer" in figures:
        one = figures["tokenizer"]
        ssim = "" if one["ssim"] is None else f"   SSIM {one['ssim']:.4f}"
        lines.append(f"tokenizer (val)   MSE {one['mse']:.5f}   PSNR {one['psnr']:.2f} dB{ssim}")
        lines.append(f"{'level':>8} {'perplexity':>12} {'usage':>8} {'commitment':>12}")
        for level in range(sum(name.endswith("_usage") for name in one)):
            values = [one[f"level{level}_{name}"] for name in ("perplexity", "usage", "commitment")]
            lines.append(f"{level:>8} {values[0]:>12.1f} {values[1]:>8.1%} {values[2]:>12.5f}")
    if "prior" in figures:
        lines.append("prior (val)")
        lines.append(
            f"{'level':>8} {'nats/code':>10} {'bits/code':>10} {'log2 K':>8} {'histogram bits':>15} {'under it':>9}"
        )
        for name, one in figures["prior"].items():
            if name == "total":
                continue
            under = 1 - one["bits_per_code"] / max(one["histogram_bits"], 1e-12)
            lines.append(
                f"{name.removeprefix('level'):>8} {one['nats_per_code']:>10.4f} {one['bits_per_code']:>10.4f} "
                f"{one['uniform_bits']:>8.2f} {one['histogram_bits']:>15.4f} {under:>9.1%}"
            )
        lines.append(f"   total {figures['prior']['total']['bits_per_dim']:.4f} bits per image dimension")
    return "\n".join(lines)
