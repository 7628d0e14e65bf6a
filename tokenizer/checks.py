"""What callers give, judged where it comes in: kind, shape and range, each refusal one sentence.

Only the functions that look at values read them back from the device; training calls none of those.

B batch, C channels, H W pixels, h w code grid, K codebook_size.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

# How far rounding and half precision may carry a pixel out of [-1, 1].
PIXEL_TOLERANCE = 0.01


class Float32Module(nn.Module):
    """A module that stays in float32, whatever moves it.

    In half precision neighbouring codes merge. Products are taken in it under `torch.autocast`, which knows what to
    leave in float32.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Called by `to`, `half`, `double` and all others that change every tensor.

        Raises:
            ValueError: they would not be float32 any more.
        """
        if (dtype := fn(torch.zeros(1)).dtype) != torch.float32:
            raise ValueError(
                f"a {type(self).__name__} computes in float32 and cannot be made {dtype}; "
                "for half precision leave it as it is and call it under torch.autocast"
            )
        return super()._apply(fn, recurse)


def float_tensor(name: str, values: Any, shape: Sequence[int | str]) -> Tensor:
    """Return a float tensor of any precision as float32.

    Args:
        name: of the values, for the message.
        values: what was given.
        shape: numbers it must have, letters for any number.

    Raises:
        ValueError: it is no tensor of floats, or has another shape.
    """
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise ValueError(f"{name} must be a tensor of floats, got {_kind(values)}")
    if values.ndim != len(shape) or any(n != m for n, m in zip(values.shape, shape, strict=True) if isinstance(m, int)):
        raise ValueError(f"{name} must be ({', '.join(map(str, shape))}), got {tuple(values.shape)}")
    return values.float()


def check_pixels(images: Tensor) -> None:
    """Raise ValueError for images that leave [-1, 1]; one reading back, none while a caller is compiled."""
    if torch.compiler.is_compiling() or not images.numel():
        return
    low, high = torch.stack(images.detach().aminmax()).tolist()
    if not -1 - PIXEL_TOLERANCE <= low <= high <= 1 + PIXEL_TOLERANCE:  # false of NaN too
        raise ValueError(f"images must lie in [-1, 1], got {low:.4g} to {high:.4g}; scale or clamp them")


def code_grids(name: str, codes: Any, device: torch.device, grid: tuple[int, int] | None = None) -> Tensor:
    """Return codes of any integer type, tensor or array, as int64 (B, h, w) on a device.

    Args:
        name: of the codes, for the message.
        codes: what was given.
        device: where they go.
        grid: (h, w) that they must have.

    Raises:
        ValueError: they are no integers, or have another shape.
    """
    found = codes.dtype if isinstance(codes, Tensor | np.ndarray) else None
    if isinstance(codes, np.ndarray) and codes.dtype.kind in "iu":
        codes = torch.from_numpy(codes.astype(np.int64))  # a copy: torch warns of arrays that it may not write to
    if not isinstance(codes, Tensor) or codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise ValueError(f"{name} must be integers in a tensor or an array, got {found or _kind(codes)}")
    if codes.ndim != 3 or (grid and tuple(codes.shape[1:]) != grid):
        h, w = grid or ("h", "w")
        raise ValueError(f"{name} must be (B, {h}, {w}), got {tuple(codes.shape)}")
    return codes.to(device, torch.int64)


def check_codes(codes: Tensor, codebook_size: int) -> None:
    """Raise ValueError for codes outside [0, K); one reading back."""
    low, high = torch.stack(codes.aminmax()).tolist() if codes.numel() else (0, 0)
    if not 0 <= low <= high < codebook_size:
        raise ValueError(
            f"codes must lie in [0, {codebook_size}), got {low} to {high}; were they made by another tokenizer?"
        )


def check_finite(name: str, values: Tensor) -> None:
    """Raise ValueError for numbers that are NaN or infinite; one reading back."""
    if bool((~torch.isfinite(values)).any()):
        raise ValueError(f"{name} must be finite, and some are NaN or infinite")


def noise_grids(noise: Sequence[Tensor | None] | None, shapes: Sequence[tuple[int, ...]]) -> list[Tensor | None]:
    """Return noise as float32, one for each level or None.

    Args:
        noise: what was given; None for none.
        shapes: that of each level.

    Raises:
        ValueError: there is not one for each level, or it is no tensor of floats of its shape.
    """
    noise = [None] * len(shapes) if noise is None else noise
    if len(noise) != len(shapes):
        raise ValueError(f"noise must be one for each of {len(shapes)} levels, got {len(noise)}")
    return [
        None if one is None else float_tensor(f"noise of level {level}", one, shape)
        for level, (one, shape) in enumerate(zip(noise, shapes, strict=True))
    ]


def check_vectors(vectors: Tensor, codebook: Tensor) -> None:
    """Raise ValueError unless vectors (N, D) and a codebook (K, D) of at least one code are float32."""
    kinds = [(tensor.dtype, tensor.ndim) for tensor in (vectors, codebook)]
    if kinds != [(torch.float32, 2)] * 2 or vectors.shape[1] != codebook.shape[1] or not codebook.numel():
        shapes = [f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (vectors, codebook)]
        raise ValueError(f"vectors and codebook must be float32 (N, D) and (K, D), got {shapes[0]} and {shapes[1]}")


def _kind(values: Any) -> str:
    return str(values.dtype) if isinstance(values, Tensor) else type(values).__name__
