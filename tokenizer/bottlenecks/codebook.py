"""The codebook: latents in, nearest code vectors out. It never moves by itself; `CodebookEMA` moves it.

B batch, D code_dim, K codebook_size, h w code grid.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tokenizer.checks import Float32Module, check_codes, code_grids, float_tensor
from tokenizer.nearest import nearest_code


class Quantized(NamedTuple):
    """What one codebook makes of a batch of latents.

    Attributes:
        quantized: (B, D, h, w) code vectors; their gradient goes straight through to the latents.
        codes: int64 (B, h, w) in [0, K).
        commitment: scalar, mean squared distance of latents to their codes, unweighted; moves the encoder only.
        latents: float32 (B*h*w, D), detached, in the order of the flattened codes: what the EMA learns from.
    """

    quantized: Tensor
    codes: Tensor
    commitment: Tensor
    latents: Tensor


class Codebook(Float32Module):
    """A (K, D) table of code vectors, looked up by nearest neighbour, always in float32.

    Args:
        codebook_size: K, number of code vectors.
        code_dim: D, their length.
        normalize: l2-normalise latents and codes, so that the nearest code is the one at the smallest angle
            (Yu et al. 2022, section 3.2).
    """

    vectors: Tensor

    def __init__(self, codebook_size: int, code_dim: int, normalize: bool = False) -> None:
        super().__init__()
        self.normalize = normalize
        vectors = torch.randn(codebook_size, code_dim)
        self.register_buffer("vectors", F.normalize(vectors, dim=1) if normalize else vectors)

    @property
    def table(self) -> Tensor:
        """The code vectors (K, D); of unit length when normalised, which averaging weights would undo."""
        return F.normalize(self.vectors, dim=1) if self.normalize else self.vectors

    def forward(self, latents: Tensor) -> Quantized:
        """Replace each latent vector by its nearest code.

        Pure: no buffer changes, in training as in eval.

        Args:
            latents: float of any precision, (B, D, h, w).

        Raises:
            ValueError: they are no floats, or have another number of channels.

        Source: van den Oord et al. 2017, section 3.2.
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
            commitment = F.mse_loss(flat, nearest)
            # The value is exactly the code vector (x - x is 0), the gradient is that of the latent.
            straight_through = nearest + (flat - flat.detach())
        return Quantized(
            quantized=rearrange(straight_through, "(b h w) d -> b d h w", b=b, h=h, w=w),
            codes=codes.view(b, h, w),
            commitment=commitment,
            latents=flat.detach(),
        )

    def lookup(self, codes: Tensor | np.ndarray) -> Tensor:
        """Return the code vectors of a grid of codes.

        Args:
            codes: (B, h, w) in [0, K), of any integer type, a tensor or an array.

        Returns:
            float32, (B, D, h, w).

        Raises:
            ValueError: they are no integers, have another shape, or one is out of range.
        """
        codes = code_grids("codes", codes, self.vectors.device)
        check_codes(codes, len(self.vectors))
        return rearrange(self.table[codes], "b h w d -> b d h w")
