"""How well the tokenizer gives images back, and what its levels tell of themselves.

B batch, C channels, H W pixels.
"""

from typing import Any

import torch
from torch import Tensor

from pipelines.metrics.metric import Metric, Rows, title
from pipelines.metrics.quality import TokenizerQuality
from pipelines.metrics.subject import Seen, Subject

# Sides from which on images have these figures: the window, and the window at the coarsest of five scales.
SSIM_SIDE, MS_SSIM_SIDE = 11, 176
# Figures of levels that are shares.
SHARES = ("usage", "active")


class Reconstruction(Metric):
    """MSE and L1 of values in [-1, 1], PSNR, SSIM and MS-SSIM over the val split; losses and use of codes per level.

    `psnr` is that of the MSE over the split, 10 log10(4 / MSE); `psnr_of_images` the mean of each image's own, which
    papers take and which is never less. SSIM (Wang et al. 2004, Gaussian window of 11x11) and MS-SSIM (Wang et al.
    2003, five scales) are means over images; None where images are too small for them.
    """

    name = "tokenizer"
    needs = ("val.reconstructions",)
    more_is_better = ("psnr", "psnr_of_images", "ssim", "ms_ssim")
    less_is_better = ("mse", "l1")

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        assert subject.tokenizer
        self.model, self.split = subject.tokenizer, subject.splits["val"]
        self.parts: dict[int, TokenizerQuality] = {}
        self.of_images = Rows(self.split.count, 3)  # PSNR, SSIM, MS-SSIM

    def update(self, seen: Seen) -> None:
        quality = self.parts.setdefault(seen.part, TokenizerQuality(self.model))
        quality.add(seen.images, seen.output, torch.ones(len(seen.rows), device=seen.images.device))
        self.of_images.put(seen.rows, similarities(seen.reconstructions.float(), seen.images))

    def compute(self) -> dict[str, Any]:
        whole = TokenizerQuality(self.model)
        nothing = torch.zeros(1, self.model.channels, self.model.image_size, self.model.image_size)
        nothing = nothing.to(self.subject.device)
        whole.add(nothing, self.model(nothing), torch.zeros(1, device=self.subject.device))  # names all that is summed
        sizes = [one.numel() for one in whole.sums()]
        rows = Rows(self.split.num_parts, sum(sizes))
        for part, quality in self.parts.items():
            rows.put([part], torch.cat([one.flatten() for one in quality.sums()])[None])
        for into, found in zip(whole.sums(), rows.all().sum(0).split(sizes), strict=True):
            into.copy_(found.view(into.shape))
        figures = whole.compute()
        psnr, ssim, ms_ssim = self.of_images.all().mean(0).tolist()
        of_images = {
            "psnr_of_images": psnr,
            "ssim": ssim if self.model.image_size >= SSIM_SIDE else None,
            "ms_ssim": ms_ssim if self.model.image_size >= MS_SSIM_SIDE else None,
        }
        errors = {name: figures.pop(name) for name in ("mse", "psnr")}
        return {"images": self.split.count, **errors, **of_images, **figures}

    @classmethod
    def table(cls, figures: dict[str, Any]) -> list[str]:
        similar = f"no structural similarity below {SSIM_SIDE} pixels"
        if figures["ssim"] is not None:
            multiscale = figures["ms_ssim"]
            similar = f"SSIM {figures['ssim']:.4f}   MS-SSIM "
            similar += f"- below {MS_SSIM_SIDE} pixels" if multiscale is None else f"{multiscale:.4f}"
        lines = [
            title("tokenizer", figures),
            f"  MSE {figures['mse']:.5f} of values in [-1, 1]   PSNR {figures['psnr']:.2f} dB of the MSE, "
            f"{figures['psnr_of_images']:.2f} mean",
            f"  mean over images: {similar}",
        ]
        names = [name.removeprefix("level0_") for name in figures if name.startswith("level0_")]
        lines.append("  level" + "".join(f" {name:>12}" for name in names))
        for level in range(sum(name.endswith(f"_{names[-1]}") for name in figures)):
            values = [(name, figures.get(f"level{level}_{name}")) for name in names]  # losses: of the first grid alone
            told = [
                "-" if value is None else f"{value:.1%}" if name in SHARES else f"{value:.5g}" for name, value in values
            ]
            lines.append(f"  {level:>5} " + " ".join(f"{one:>12}" for one in told))
        return lines


def similarities(outputs: Tensor, images: Tensor) -> Tensor:
    """Return PSNR in dB, SSIM and MS-SSIM of each image, float64 (B, 3); 0 where the image is too small.

    Args:
        outputs: float32 (B, C, H, W).
        images: the same in [-1, 1].
    """
    from torchmetrics.functional.image import (  # seconds to import
        multiscale_structural_similarity_index_measure as ms_ssim,
    )
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    mse = (outputs - images).double().square().flatten(1).mean(1)
    found = torch.zeros(len(images), 3, dtype=torch.float64, device=images.device)
    found[:, 0] = 10 * (4 / mse.clamp(min=1e-12)).log10()
    if images.shape[-1] >= SSIM_SIDE:
        found[:, 1] = ssim(outputs, images, data_range=2.0, reduction="none")  # type: ignore[assignment]
    if images.shape[-1] >= MS_SSIM_SIDE:
        found[:, 2] = ms_ssim(outputs, images, data_range=2.0, reduction="none")
    return found
