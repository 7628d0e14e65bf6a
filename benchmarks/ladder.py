"""The ladder from the autoencoder to VQ-VAE-2: every rung on the digits, with equal networks, steps and data.

    python -m benchmarks.ladder

Rungs are the configs of configs/ladder, each a run of its own in runs/ladder: what is done is not done again, so that a
ladder that was stopped goes on. In the end docs/ladder.md has a row for each, and what came of the literature's claims,
and docs/ladder.png samples, reconstructions and interpolations.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ladder_judge import Judge
from benchmarks.ladder_page import Rung, draw_picture, write_page
from benchmarks.measure import machine
from pipelines.cli import set_up_console
from pipelines.config import load_config
from pipelines.data.images import ImageShards, image_batch, to_uint8
from pipelines.data.noise import normals
from pipelines.data.samples import Samples
from pipelines.explore.interpolate import interpolate
from pipelines.explore.opened import Opened
from pipelines.run import Run
from pipelines.storage.record import recorded_seconds

ROOT = Path(__file__).parent.parent
# By the names of their configs: what the rung is, and its prior.
RUNGS = {
    "autoencoder": ("autoencoder", "one fitted Gaussian"),
    "denoising": ("denoising autoencoder", "one fitted Gaussian"),
    "sparse": ("sparse autoencoder", "one fitted Gaussian"),
    "contractive": ("contractive autoencoder", "one fitted Gaussian"),
    "vae-beta-0.1": ("VAE, beta 0.1", "N(0, I)"),
    "vae": ("VAE", "N(0, I)"),
    "vae-beta-4": ("beta-VAE, beta 4", "N(0, I)"),
    "cvae": ("conditional VAE", "N(0, I)"),
    "vae-mixture": ("the same VAE", "32 Gaussians"),
    "vae-aggregated": ("the same VAE", "aggregated posterior"),
    "vae-flow": ("the same VAE", "flow"),
    "dvae": ("discrete VAE", "Transformer"),
    "uniform": ("VQ-VAE", "uniform"),
    "vqvae": ("VQ-VAE", "Transformer"),
    "fsq": ("finite scalars", "Transformer"),
    "residual": ("residual quantiser, depth 2", "Transformers"),
    "vqvae2": ("VQ-VAE-2", "Transformers"),
}
STAGES = ("train-tokenizer", "encode", "train-prior", "sample")
# Of noise on images that a denoiser is to restore; and pixels that an image is moved by.
NOISE, SHIFT = 0.5, 1
# Val images whose reconstructions are shown, between which is interpolated; of samples so many are.
SHOWN, ENDS, DRAWN = 4, (0, 1), 10


def main() -> None:
    """Do what is not done yet, judge all rungs, and write page and picture."""
    set_up_console()
    runs = {name: done(name) for name in RUNGS}
    opened = runs["autoencoder"]
    judge = judge_of(opened)
    rungs = [measured(name, run, judge) for name, run in runs.items()]
    draw_picture(rungs, ROOT / "docs" / "ladder.png")
    write_page(rungs, len(judge.train), len(opened.val), machine(), ROOT / "docs" / "ladder.md")


def done(name: str) -> Opened:
    """Do all stages of a rung that are not done; return its models and images."""
    config = load_config(ROOT / "configs" / "ladder" / f"{'vqvae' if name == 'uniform' else name}.yaml")
    if not (Path(config.run_dir) / "metrics.json").exists():  # which evaluate, the last stage, writes
        Run(config).all()
    return Opened(config)


def judge_of(opened: Opened) -> Judge:
    """Return who judges all rungs, made from the images that all of them share."""
    train, val = (image_batch([split.read(row) for row in range(len(split))]) for split in splits(opened))
    return Judge(train.pixels, train.classes, val.pixels)


def splits(opened: Opened) -> tuple[ImageShards, ImageShards]:
    """Return the training and the val images."""
    return opened.split("train"), opened.val


@torch.no_grad()
def measured(name: str, opened: Opened, judge: Judge) -> Rung:
    """Return a rung with its figures and what is shown of it."""
    torch.manual_seed(0)
    root, tokenizer = opened.finished.root, opened.tokenizer
    figures = json.loads((root / "metrics.json").read_text())
    drawn, asked = uniform_samples(opened) if name == "uniform" else samples(opened)
    shown = opened.images(range(SHOWN))
    first, last = (tokenizer.encode(opened.images([row])) for row in ENDS)
    way = interpolate(tokenizer, opened.prior, first, last, steps=8)
    return Rung(
        name,
        *RUNGS[name],
        numbers=sum(math.prod(level.grid) * level.channels for level in tokenizer.levels),
        psnr=figures["tokenizer"]["psnr"],
        **parts(figures, opened.val.channels * opened.val.size**2, name == "uniform"),
        worth=judge(drawn, asked),
        seconds=recorded_seconds(root, STAGES) or 0.0,
        measures=measures(opened),
        samples=drawn[:DRAWN, 0].numpy(),
        originals=to_uint8(shown)[:, 0],
        reconstructions=to_uint8(tokenizer(shown).reconstruction)[:, 0],
        way=to_uint8(way.images)[:, 0],
    )


def samples(opened: Opened) -> tuple[Tensor, Tensor | None]:
    """Return the samples of a run, uint8 (N, C, H, W), and the classes (N,) that were asked for."""
    levels = [tuple(level) for level in opened.tokenizer.levels]
    found = Samples(opened.finished.root / "samples", levels, opened.cache)
    batch = image_batch([found.read(row) for row in range(len(found))])
    return batch.pixels, batch.classes if found.class_names else None


def uniform_samples(opened: Opened) -> tuple[Tensor, None]:
    """Return as many images of codes each of which is as likely as any other."""
    count = len(samples(opened)[0])
    codes = [torch.randint(level.codebook_size or 1, (count, *level.grid)) for level in opened.tokenizer.levels]
    return torch.from_numpy(to_uint8(opened.tokenizer.decode(codes))), None


def parts(figures: dict[str, Any], dims: int, uniform: bool) -> dict[str, Any]:
    """Return the bound on log p(x) and its parts in bits per dimension, None where there are none.

    Args:
        figures: of metrics.json.
        dims: values of an image.
        uniform: take the uniform prior's.
    """
    found = figures.get("surgery")
    if not found:
        return dict.fromkeys(("bits", "distortion", "information", "marginal", "bound"))
    under = found["under_uniform"] if uniform else found
    # A tokenizer that is told the class bounds p(x | class) alone.
    given = min(found["bits_per_dim"], key=lambda condition: condition != "without_class")

    def of(place: dict[str, Any], name: str) -> float | tuple[float, float]:
        if f"{name}_bits_per_dim" in place:
            return float(place[f"{name}_bits_per_dim"][given])
        least, most = (place[f"{name}_at_{which}_bits_per_dim"][given] for which in ("least", "most"))
        return float(least), float(most)

    return {
        "bits": under["rate_bits_per_dim"][given] * dims,
        "distortion": found["distortion_bits_per_dim"],
        "information": of(found, "mutual_information"),
        "marginal": of(under, "marginal_kl"),
        "bound": under["bits_per_dim"][given],
    }


def measures(opened: Opened) -> dict[str, float]:
    """Return what claims are about, of val images: figures of the latents and of what is made of spoilt images.

    sparseness: Hoyer's measure of an image's numbers, 0 where all are alike and 1 where one is not 0. moved: what a
    shift by a pixel does to the numbers, mean square, over what another image does. restored: PSNR in dB of images
    with noise, against the clean ones.
    """
    tokenizer, images = opened.tokenizer, opened.images(range(len(opened.val)))
    seen = torch.cat([one.seen.flatten(1) for one in tokenizer(images).levels], 1)
    shifted = torch.cat([one.seen.flatten(1) for one in tokenizer(images.roll(SHIFT, 3)).levels], 1)
    spoilt = images + NOISE * normals(1, 0, range(len(images)), images.shape[1:])
    error = (tokenizer(spoilt).reconstruction - images).square().mean()
    root = math.sqrt(seen.shape[1])
    hoyer = (root - seen.abs().sum(1) / seen.norm(dim=1)) / (root - 1)
    return {
        "sparseness": float(hoyer.mean()),
        "moved": float((seen - shifted).square().mean() / (2 * seen.var(0).mean())),
        "restored": float(10 * torch.log10(4 / error)),
    }


if __name__ == "__main__":
    main()
