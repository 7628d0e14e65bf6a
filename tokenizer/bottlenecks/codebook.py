"""A codebook: latents in, nearest code vectors out.

B batch, D code_dim, K codebook_size, h w code grid.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizer.bottlenecks.bottleneck import Bottled, per_image
from tokenizer.bottlenecks.usage import CodeUsage
from tokenizer.checks import Float32Module, check_codes, code_grids, float_tensor
from tokenizer.nearest import nearest_code

# A latent shorter than this has no direction to speak of.
LEAST_NORM = 1e-6


class Codebook(Float32Module):
    """A (K, D) table of code vectors, looked up by nearest neighbour, always in float32.

    A `Bottleneck` that stores one grid of codes. Its table never moves by itself: a learner moves it, or gradients.

    Args:
        codebook_size: K, number of code vectors.
        code_dim: D, their length.
        normalize: l2-normalise latents and codes, so that the nearest code is the one at the smallest angle
            (Yu et al. 2022, section 3.2).
        learned: whether code vectors are a parameter, moved by the loss "codebook"; else they are a buffer.
        gradient: how it goes back to latents, "straight" or "rotation"; see `passed_back`.
    """

    vectors: Tensor
    noise_channels = 0

    def __init__(
        self,
        codebook_size: int,
        code_dim: int,
        normalize: bool = False,
        learned: bool = False,
        gradient: str = "straight",
    ) -> None:
        super().__init__()
        self.normalize, self.learned, self.gradient = normalize, learned, gradient
        self.features = self.channels = code_dim
        self.sizes = (codebook_size,)
        vectors = torch.randn(codebook_size, code_dim)
        vectors = F.normalize(vectors, dim=1) if normalize else vectors
        if learned:
            self.vectors = nn.Parameter(vectors)
        else:
            self.register_buffer("vectors", vectors)

    @property
    def table(self) -> Tensor:
        """The code vectors (K, D); of unit length when normalised, which averaging weights would undo."""
        return F.normalize(self.vectors, dim=1) if self.normalize else self.vectors

    def forward(self, latents: Tensor, noise: Tensor | None = None) -> Bottled:
        """Replace each latent vector by its nearest code.

        Pure: no buffer changes, in training as in eval. The loss "commitment" is the mean squared distance of latents
        to their codes and moves the encoder alone; "codebook", of a learned table, is the same and moves the table.

        Args:
            latents: float of any precision, (B, D, h, w).
            noise: none is used.

        Raises:
            ValueError: they are no floats, or have another number of channels.

        Source: van den Oord et al. 2017, section 3.2, equation 3.
        """
        latents = float_tensor("latents", latents, ("B", "D", "h", "w"))
        if latents.shape[1] != self.vectors.shape[1]:
            raise ValueError(
                f"latents must have code_dim {self.vectors.shape[1]} channels, got {latents.shape[1]}; "
                "project them before the codebook"
            )
        b, _, h, w = latents.shape
        # Half precision would merge neighbouring codes, so autocast ends here.
        with torch.autocast(latents.device.type, enabled=False):
            flat = rearrange(latents, "b d h w -> (b h w) d")
            if self.normalize:
                flat = F.normalize(flat, dim=1)
            table = self.table
            codes = nearest_code(flat.detach(), table)
            nearest = table[codes]
            losses = {"commitment": (flat - nearest.detach()).square()}
            if self.learned:
                losses["codebook"] = (flat.detach() - nearest).square()
            seen = passed_back(flat, nearest.detach(), self.gradient, 1)
        return Bottled(
            seen=rearrange(seen, "(b h w) d -> b d h w", b=b, h=h, w=w),
            stored=(codes.view(b, h, w),),
            losses={name: per_image(loss.view(b, h * w, self.features)) for name, loss in losses.items()},
            observed=flat.detach(),
        )

    def lookup(self, stored: Sequence[Tensor | np.ndarray]) -> Tensor:
        """Return the code vectors of a grid of codes.

        Args:
            stored: that grid: (B, h, w) in [0, K), of any integer type, a tensor or an array.

        Returns:
            float32, (B, D, h, w).

        Raises:
            ValueError: they are no integers, have another shape, or one is out of range.
        """
        (codes,) = stored
        codes = code_grids("codes", codes, self.vectors.device)
        check_codes(codes, len(self.vectors))
        return rearrange(self.table[codes], "b h w d -> b d h w")

    def blank(self) -> Tensor:
        """Return the mean code vector (D,)."""
        return self.table.mean(0)

    def figures(self) -> CodeUsage:
        """Return perplexity and usage, which have seen nothing yet."""
        return CodeUsage(self.sizes, self.vectors.device)


def passed_back(latents: Tensor, nearest: Tensor, gradient: str, dim: int) -> Tensor:
    """Return the nearest codes exactly, with a gradient that goes to latents instead.

    "straight" copies it. "rotation" takes it back through the rotation and the scaling that carry each latent to its
    code, both held constant, so that latents keep their angle to it.

    Args:
        latents: e.
        nearest: q, the code of each, of the same shape and without gradients.
        gradient: "straight" or "rotation".
        dim: that of the D numbers of a vector.

    Source: van den Oord et al. 2017, section 3.2; Fifty et al. 2024, section 4.2.
    """
    carried = latents
    if gradient == "rotation":
        fixed = latents.detach()
        e, q = F.normalize(fixed, dim=dim), F.normalize(nearest, dim=dim)
        r = F.normalize(e + q, dim=dim)
        scale = nearest.norm(dim=dim, keepdim=True) / fixed.norm(dim=dim, keepdim=True).clamp(min=LEAST_NORM)
        turned = latents - 2 * (latents * r).sum(dim, keepdim=True) * r + 2 * (latents * e).sum(dim, keepdim=True) * q
        carried = scale * turned
    return nearest + (carried - carried.detach())  # the value is exactly the code, as x - x is 0
