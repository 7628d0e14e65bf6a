"""Stage evaluate: how well tokenizer and priors do on the val split, and what both together promise of its pixels.

B batch, C channels, H W pixels, K codebook_size, h w code grid.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.functional.image import structural_similarity_index_measure

from pipelines.compute.devices import ComputeConfig, inference_device
from pipelines.data.batches import ValidationBatches
from pipelines.data.codes import Codes
from pipelines.data.images import ImageShards, ValidationImages, to_unit_range
from pipelines.errors import StageError
from pipelines.metrics.bound import FITTED_IMAGES, bound_figures, distortion_nats, fitted_scales, kl_nats
from pipelines.metrics.quality import TokenizerQuality
from pipelines.progress import progress_bar
from pipelines.storage.fingerprint import check_belong_together
from pipelines.storage.manifest import read_manifest
from prior import HierarchicalPrior
from tokenizer import HierarchicalVQVAE
from tokenizer.bottlenecks.usage import entropy

# Images at once; nothing but rounding depends on it.
BATCH_SIZE = 64
SSIM_WINDOW = 11
# A histogram of less, in bits, leaves nothing to save.
LEAST_BITS = 1e-4
# Figures of levels that are shares.
SHARES = ("usage", "active")
GIVEN = {"given_class": "given the class", "without_class": "without class"}


class PriorJudged(NamedTuple):
    """What priors were found to be.

    Attributes:
        figures: for `metrics.json`.
        nats: -log p(codes) of each image, float64 (N,): "given_class", "without_class" or both.
    """

    figures: dict[str, Any]
    nats: dict[str, Tensor]


def evaluate(
    tokenizer: HierarchicalVQVAE | None,
    images: Path | None,
    prior: HierarchicalPrior | None,
    codes: Path,
    unpacked: Path,
    seed: int,
    compute: ComputeConfig,
) -> dict[str, Any]:
    """Return the figures of what is there: of a tokenizer with images, of priors with codes, and the bound with all.

    Args:
        tokenizer: in eval mode, if there is one.
        images: folder, if there is one.
        prior: in eval mode, if there is one.
        codes: folder; read only for a prior, and made from these images by this tokenizer, where they are there.
        unpacked: local folder for the unpacked codes.
        seed: of the images that the bound's scales are fitted to.
        compute: where.
    """
    figures: dict[str, Any] = {}
    if tokenizer and images:
        figures["tokenizer"] = evaluate_tokenizer(tokenizer, images, compute)
    if prior:
        figures["prior"], nats = evaluate_prior(prior, codes, unpacked, compute)
    # Numbers without noise have no density given the image: what they would take is beyond all bounds.
    continuous = any(size is None for size in tokenizer.codebook_sizes) if tokenizer else False
    bounded = tokenizer and not (continuous and any(not part.noise_channels for part in tokenizer.bottlenecks))
    if tokenizer and images and prior and bounded:
        train, val = (ImageShards(images, split, compute.cache) for split in ("train", "val"))
        scales = fitted_scales(tokenizer, train, seed)
        distortion = distortion_nats(tokenizer, val, Codes(codes, "val", unpacked, compute.cache), scales)
        if continuous:  # N(0, I) is the only prior of numbers
            nats = {"without_class": kl_nats(tokenizer, val, seed)}
        fitted = {"fitted_to_images": min(len(train), FITTED_IMAGES), "scales_grey_levels": scales.tolist()}
        figures["bound"] = fitted | bound_figures(nats, distortion, val.channels * val.size**2)
    return figures


@torch.no_grad()
def evaluate_tokenizer(tokenizer: HierarchicalVQVAE, images: Path, compute: ComputeConfig) -> dict[str, Any]:
    """Return MSE, PSNR, SSIM, and what each level tells of itself over the val split, in true float32.

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
    errors = {"mse": figures.pop("mse"), "psnr": figures.pop("psnr"), "ssim": ssim}
    return {"images": len(shards), **errors, **figures}


@torch.no_grad()
def evaluate_prior(prior: HierarchicalPrior, codes: Path, unpacked: Path, compute: ComputeConfig) -> PriorJudged:
    """Return, for each level, exact nats and bits per code beside what knowing nothing or the histogram gives.

    "given_class" is what the priors make of codes whose class they are told, "without_class" of the same codes when
    they are not; the latter only of priors that have learned it. `uniform_bits` is log2 K, `histogram_nats` the entropy
    of the val split's own codes: nothing that knows neither class nor context can do better on it.
    `rate_bits_per_dim` is what the codes of all levels take per value of an image, and no bound on those values.
    """
    device = inference_device(compute)
    prior = prior.to(device)
    manifest = read_manifest(codes, "codes", "encode")
    check_belong_together(prior, manifest["tokenizer"])
    val = Codes(codes, "val", unpacked, compute.cache)
    nats = {name: torch.zeros(len(prior.levels), len(val), dtype=torch.float64) for name in _conditions(prior)}
    counts = [torch.zeros(size or 0, dtype=torch.float64) for size in val.codebook_sizes]
    with progress_bar(len(val), "evaluate prior", "images") as bar:
        for indices in ValidationBatches(len(val), BATCH_SIZE):
            kept = [index for index in indices if index >= 0]
            grids, classes = val.batch(kept)
            grids, classes = [grid.to(device) for grid in grids], classes.to(device)
            for number, level in enumerate(prior.levels):
                for name, found in nats.items():
                    given = classes if name == "given_class" else None
                    found[number, kept] = level.nll(grids[number], grids[:number], given).cpu()
                if len(counts[number]):
                    counts[number] += torch.bincount(grids[number].flatten().cpu(), minlength=len(counts[number]))
            bar.update(len(kept))
    figures: dict[str, Any] = {"images": len(val)}
    for number, (h, w) in enumerate(val.grids):
        if (size := val.codebook_sizes[number]) is None:  # a density: no bits, and nothing that a histogram could say
            values = prior.levels[number].num_uniforms
            per_value = {name: float(found[number].mean()) / values for name, found in nats.items()}
            figures[f"level{number}"] = {"nats_per_value": per_value}
            continue
        per_code = {name: float(found[number].mean()) / (h * w) for name, found in nats.items()}
        figures[f"level{number}"] = {
            "nats_per_code": per_code,
            "bits_per_code": {name: value / math.log(2) for name, value in per_code.items()},
            "uniform_bits": math.log2(size),
            "histogram_nats": entropy(counts[number]),
            "histogram_bits": entropy(counts[number]) / math.log(2),
        }
    unit = math.log(2) * manifest["channels"] * manifest["image_size"] ** 2
    totals = {name: found.sum(0) for name, found in nats.items()}  # (N,) each
    if all(val.codebook_sizes):
        figures["rate_bits_per_dim"] = {name: float(total.mean()) / unit for name, total in totals.items()}
    return PriorJudged(figures, totals)


def _conditions(prior: HierarchicalPrior) -> list[str]:
    """What codes are predicted from: their class, and none where there are none or training hid some."""
    if any(level.config.codebook_sizes[-1] is None for level in prior.levels):
        return ["without_class"]
    without = not prior.class_names or all(getattr(level.config, "unconditional", True) for level in prior.levels)
    return ["given_class"] * bool(prior.class_names) + ["without_class"] * without


def table(figures: dict[str, Any]) -> str:
    """Return the figures as tables for a terminal of 80 columns."""
    tables = {"tokenizer": _tokenizer_table, "prior": _prior_table, "bound": _bound_table}
    return "\n\n".join("\n".join(lines(figures[part])) for part, lines in tables.items() if part in figures)


def _title(name: str, figures: dict[str, Any]) -> str:
    doubt = "" if figures["held_out"] else ", which may have been trained on"
    return f"{name}: val split of {figures['images']} images{doubt}"


def _tokenizer_table(figures: dict[str, Any]) -> list[str]:
    ssim = "" if figures["ssim"] is None else f"   SSIM {figures['ssim']:.4f}"
    lines = [
        _title("tokenizer", figures),
        f"  MSE {figures['mse']:.5f} of values in [-1, 1]   PSNR {figures['psnr']:.2f} dB{ssim}",
    ]
    names = [name.removeprefix("level0_") for name in figures if name.startswith("level0_")]
    lines.append("  level" + "".join(f" {name:>12}" for name in names))
    for level in range(sum(name.endswith(f"_{names[-1]}") for name in figures)):
        values = [(name, figures.get(f"level{level}_{name}")) for name in names]  # losses are of the first grid alone
        shown = [
            "-" if value is None else f"{value:.1%}" if name in SHARES else f"{value:.5g}" for name, value in values
        ]
        lines.append(f"  {level:>5} " + " ".join(f"{one:>12}" for one in shown))
    return lines


def _prior_table(figures: dict[str, Any]) -> list[str]:
    if "rate_bits_per_dim" not in figures:
        lines = [_title("priors", figures), "  level  nats per value, of a density"]
        for name, level in ((name, level) for name, level in figures.items() if name.startswith("level")):
            lines.append(f"  {name.removeprefix('level'):>5}  {level['nats_per_value']['without_class']:.4f}")
        return lines
    lines = [
        _title("priors", figures),
        f"  level  {'saved: of the bits of the histogram':<39} nats/code  bits/code     saved",
    ]
    for name, level in ((name, level) for name, level in figures.items() if name.startswith("level")):
        lines.append(_row(name.removeprefix("level"), "uniform, log2 K", level["uniform_bits"]))
        lines.append(_row("", "val histogram, no class, no context", level["histogram_bits"]))
        for what, bits in sorted(level["bits_per_code"].items(), reverse=True):
            lines.append(_row("", f"prior {GIVEN[what]}", bits, level["histogram_bits"]))
    rates = ", ".join(f"{bits:.4f} {GIVEN[what]}" for what, bits in figures["rate_bits_per_dim"].items())
    return [*lines, "  rate of the codes of all levels, in bits per image dimension:", f"    {rates}"]


def _row(level: str, what: str, bits: float, histogram_bits: float | None = None) -> str:
    saved = ""
    if histogram_bits is not None:
        saved = f"{1 - bits / histogram_bits:.1%}" if histogram_bits > LEAST_BITS else "-"
    return f"  {level:>5}  {what:<39} {bits * math.log(2):>9.4f} {bits:>10.4f} {saved:>9}".rstrip()


def _bound_table(figures: dict[str, Any]) -> list[str]:
    lines = [
        _title("bound on the pixels", figures),
        "  bits per image dimension at most: rate of the codes + distortion",
    ]
    lines.append(f"  {'-log2 of':<13} {'rate':>9} {'distortion':>11} {'bound':>9}   95% interval over images")
    for what, bits in figures["bits_per_dim"].items():
        rate, interval = figures["rate_bits_per_dim"][what], figures["bits_per_dim_interval95"][what]
        shown = "-" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
        what = {"given_class": "p(x | class)", "without_class": "p(x)"}[what]
        lines.append(f"  {what:<13} {rate:>9.4f} {figures['distortion_bits_per_dim']:>11.4f} {bits:>9.4f}   {shown}")
    return lines
