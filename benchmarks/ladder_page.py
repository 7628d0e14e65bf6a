"""The ladder's page and picture: a row per rung, and what came of the claims of the literature."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.ladder_judge import Worth


class Rung(NamedTuple):
    """What is told and shown of a rung.

    Attributes:
        name: of its config.
        title: what it is.
        prior: what its latents are drawn from.
        numbers: that stand for an image, codes or reals.
        psnr: of val reconstructions, in dB.
        bits: rate per image under the prior.
        distortion: in bits per dimension, as the three that follow.
        information: I(x, z), or between which bounds it lies.
        marginal: KL(q_agg || p), or between which bounds it lies.
        bound: of -log2 p(x).
        worth: of its samples.
        seconds: of its stages.
        measures: what claims are about, by name.
        samples: uint8 (N, H, W).
        originals: val images, uint8 (M, H, W).
        reconstructions: of these.
        way: from one val image to another, uint8 (n, H, W).
    """

    name: str
    title: str
    prior: str
    numbers: int
    psnr: float
    bits: float | None
    distortion: float | None
    information: float | tuple[float, float] | None
    marginal: float | tuple[float, float] | None
    bound: float | None
    worth: Worth
    seconds: float
    measures: dict[str, float]
    samples: np.ndarray
    originals: np.ndarray
    reconstructions: np.ndarray
    way: np.ndarray


# Share of samples too near to a training image that is no copying: what chance and a small val split make of it.
MOST_NEAR = 0.1


class Claim(NamedTuple):
    """A claim, whether it held here, and the figures that say so."""

    claim: str
    held: bool
    figures: str


PAGE = """\
# The ladder

Every latent model from the autoencoder to VQ-VAE-2 on the demo's digits: {train} training images of 16x16 pixels, the
same encoder and decoder (VQ-VAE-2 has a second level), 750 steps of stage one, 1,000 of stage two where it learns by
steps. `make ladder` makes this page, from the configs in `configs/ladder`; one seed each, so differences of a few per
cent are noise. {machine}.

{table}

- **numbers** stand for an image, codes or reals; **bits** is what they take under the prior (the rate).
- **bound** of -log2 p(x) in bits per dimension = **distortion** + **I(x, z)** + **KL** of the aggregated posterior from
  the prior, of the {val} val images ([figures.md](figures.md) says how; of codes the last two are bounds). Of so few
  images no I above log2 {val}, {most:.3f} bits per dimension, can be seen; what is more of it stands under KL, and
  differences of KL between priors of one VAE are exact. Numbers without noise have no bound; that of `cvae` is of
  p(x | class).
- Of 500 samples at temperature 1: **recognised**, taken for the class that was asked for, where prior or decoder is
  told classes (one Gaussian cannot use them: a tenth is chance); **as real**, told from all other digits as surely as
  95% of real val digits are, for which no class is needed; **KID** x 1000 beside the training images, in the features
  of a small classifier of real digits; **too near**, nearer to a training image than 95% of val images are to theirs.
- **seconds** of training, encoding and sampling; rungs that share a tokenizer count it once.

![rungs](ladder.png)

A row per rung: the first {samples} samples; val images beside their reconstructions; the way from one val image to
another.

## What came of the claims

{claims}
"""


def write_page(rungs: Sequence[Rung], train: int, val: int, where: Mapping[str, str | int], path: Path) -> None:
    """Write the page of all rungs.

    Args:
        rungs: in their order.
        train: number of training images.
        val: of val images.
        where: what it was measured on.
        path: of the page.
    """
    head = "| rung | prior | numbers | bits | PSNR, dB | distortion | I(x, z) | KL | bound | recognised | as real | KID"
    rows = [f"{head} | too near | seconds |", "|---|---|" + "---:|" * 12]
    rows += [f"| {' | '.join(cells(rung))} |" for rung in rungs]
    lines = [f"- {'Held' if one.held else '**Did not hold**'}: {one.claim}. {one.figures}" for one in claims(rungs)]
    machine = f"Measured on {where['cores']} cores of {where['cpu']}, torch {where['torch']}"
    page = PAGE.format(
        machine=machine,
        table="\n".join(rows),
        train=f"{train:,}",
        val=val,
        most=math.log2(val) / rungs[0].samples[0].size,
        samples=len(rungs[0].samples),
        claims="\n".join(lines),
    )
    path.write_text(page)


def cells(rung: Rung) -> list[str]:
    """Return the row of a rung."""
    worth = rung.worth
    return [
        f"`{rung.name}`: {rung.title}",
        rung.prior,
        str(rung.numbers),
        "–" if rung.bits is None else f"{rung.bits:.0f}",
        f"{rung.psnr:.1f}",
        *(shown(one) for one in (rung.distortion, rung.information, rung.marginal, rung.bound)),
        "–" if worth.recognised is None else f"{worth.recognised:.1%}",
        f"{worth.as_real:.1%}",
        f"{1000 * worth.kid:.0f} ± {1000 * worth.kid_error:.0f}",
        f"{worth.too_near:.1%}",
        f"{rung.seconds:.0f}",
    ]


def shown(value: float | tuple[float, float] | None) -> str:
    """Return a figure in bits per dimension, or between which two it lies."""
    if value is None:
        return "–"
    return f"{value[0]:.2f} to {value[1]:.2f}" if isinstance(value, tuple) else f"{value:.2f}"


def claims(rungs: Sequence[Rung]) -> list[Claim]:
    """Return what came of each claim."""
    by = {rung.name: rung for rung in rungs}
    plain, vae, flow = by["autoencoder"], by["vae"], by["vae-flow"]
    restored = {name: rung.measures["restored"] for name, rung in by.items()}
    betas = [by[name] for name in ("vae-beta-0.1", "vae", "vae-beta-4")]
    best = min((rung for rung in rungs if rung.worth.too_near < MOST_NEAR), key=lambda rung: rung.worth.kid)
    drawn = {name: rung.worth.as_real for name, rung in by.items()}
    kids = {name: 1000 * rung.worth.kid for name, rung in by.items()}
    marginals = [float(one.marginal or 0.0) for one in (vae, flow, by["vae-mixture"])]  # type: ignore[arg-type]
    others = "uniform", "vqvae"
    return [
        Claim(
            "samples of an autoencoder from a fitted Gaussian are junk",
            drawn["autoencoder"] < 0.5 < drawn["vqvae"],
            f"{drawn['autoencoder']:.1%} are as sure as real ones, KID {kids['autoencoder']:.0f}, beside "
            f"{drawn['vae']:.1%} and {kids['vae']:.0f} of the VAE under N(0, I).",
        ),
        Claim(
            "beta trades sharpness for structure",
            betas[0].psnr > betas[1].psnr > betas[2].psnr and betas[0].worth.kid > betas[2].worth.kid,
            "At beta 0.1, 1 and 4 PSNR is "
            + ", ".join(f"{one.psnr:.1f}" for one in betas)
            + " dB, as real "
            + ", ".join(f"{one.worth.as_real:.1%}" for one in betas)
            + ", KID "
            + ", ".join(f"{1000 * one.worth.kid:.0f}" for one in betas)
            + ".",
        ),
        Claim(
            "a flow prior lowers the marginal KL and lifts samples",
            marginals[1] < 0.8 * marginals[0] and flow.worth.kid < vae.worth.kid,
            f"KL {marginals[0]:.3f} to {marginals[1]:.3f} bits per dimension, of which some is I(x, z) that so few "
            f"images cannot show; as real {drawn['vae']:.1%} to {drawn['vae-flow']:.1%}, KID {kids['vae']:.0f} to "
            f"{kids['vae-flow']:.0f}. Under 32 Gaussians KL is {marginals[2]:.3f} and KID {kids['vae-mixture']:.0f}.",
        ),
        Claim(
            "VQ under a uniform prior is junk and under an autoregressive one is best",
            drawn["uniform"] < 0.1 and best.name in ("vqvae", "vqvae2", "residual", "fsq"),
            f"{' and '.join(f'{drawn[one]:.1%}' for one in others)} are as sure as real ones, KID "
            f"{' and '.join(f'{kids[one]:.0f}' for one in others)}. Of the rungs that do not copy, less than "
            f"{MOST_NEAR:.0%} too near, `{best.name}` has the least KID, {1000 * best.worth.kid:.0f}.",
        ),
        Claim(
            "the sparse code is sparse",
            by["sparse"].measures["sparseness"] > plain.measures["sparseness"] + 0.1,
            f"Hoyer's sparseness is {by['sparse'].measures['sparseness']:.2f}, of the plain autoencoder "
            f"{plain.measures['sparseness']:.2f}.",
        ),
        Claim(
            "the contractive code changes less under small shifts",
            by["contractive"].measures["moved"] < plain.measures["moved"],
            f"A shift by a pixel changes it by {by['contractive'].measures['moved']:.2f} of what another image does, "
            f"the plain autoencoder's by {plain.measures['moved']:.2f}.",
        ),
        Claim(
            "the denoiser denoises",
            restored["denoising"] > restored["autoencoder"] + 1,
            f"Of val images with noise of 0.5 it gives the clean ones at {restored['denoising']:.1f} dB, "
            f"the plain autoencoder at {restored['autoencoder']:.1f} dB, VQ-VAE at {restored['vqvae']:.1f} dB.",
        ),
    ]


# Of the picture: pixels that one of an image becomes, and between groups; of the names.
SCALE, GAP, NAMES = 2, 12, 150


def draw_picture(rungs: Sequence[Rung], path: Path) -> None:
    """Draw a row per rung: samples, val images beside their reconstructions, and the way from one to another."""
    rows = [row_of(rung) for rung in rungs]
    side = rungs[0].samples.shape[1] * SCALE
    width = NAMES + max(sum(len(group) * side + GAP for group in row) for row in rows)
    picture = Image.new("L", (width, len(rows) * (side + 4)), 255)
    draw = ImageDraw.Draw(picture)
    for number, (rung, row) in enumerate(zip(rungs, rows, strict=True)):
        top, left = number * (side + 4), NAMES
        draw.text((4, top + side // 2 - 6), rung.name, fill=0)
        for group in row:
            for image in group:
                picture.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (left, top))
                left += side
            left += GAP
    picture.save(path, "PNG", optimize=True)


def row_of(rung: Rung) -> list[np.ndarray]:
    """Return the groups of images of a row."""
    pairs = np.stack([rung.originals, rung.reconstructions], 1).reshape(-1, *rung.originals.shape[1:])
    return [rung.samples, pairs, rung.way]
