"""What is given of a level and only scored: the rest is drawn around it.

B batch, d channels, h w grid, T = h*w.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prior.checks import Codes, checked, integers, numbers


class Known(NamedTuple):
    """Cells of a level that stand as they are given.

    A prior over codes goes through the grid in raster order: what it draws is conditioned on the known cells before it
    and not on those after it. So a prefix is continued by the exact conditional distribution; a hole is filled by what
    its upper and left neighbours make likely, and may not fit those below it.

    Over numbers N(0, I) and mixtures draw the rest from the exact conditional distribution, wherever it lies; a flow
    cannot, and draws it as if nothing were known.

    Attributes:
        values: codes (B, h, w) or numbers (B, d, h, w), as priors take them; looked at where the mask is true.
        mask: bool (B, h, w).
    """

    values: Tensor
    mask: Tensor


def prefix(codes: Codes, grid: tuple[int, int]) -> Known:
    """Return the first codes of a level in raster order as what is known of it.

    Args:
        codes: whole numbers (B, n), n at most T.
        grid: (h, w).

    Raises:
        ValueError: they are more than the grid holds, or no rows of whole numbers.
    """
    given, length = integers("codes", codes, 2), grid[0] * grid[1]
    if given.shape[1] > length:
        raise ValueError(f"a prefix must be of at most {length} codes, got {given.shape[1]}")
    values = given.new_zeros(len(given), length)
    values[:, : given.shape[1]] = given
    mask = (torch.arange(length, device=given.device) < given.shape[1]).expand(len(given), length)
    return Known(values.view(-1, *grid), mask.view(-1, *grid))


def checked_known(
    known: Sequence[Known | None],
    levels: Sequence[tuple[tuple[int, int], int | None, int]],
    device: torch.device,
    batch_size: int,
) -> list[Known | None]:
    """Return what is known of every level, coarse to fine, on a device, zero elsewhere; None for a level of nothing.

    Args:
        known: of the levels; of the finer ones that are left out nothing is.
        levels: (h, w), K and channels of each.
        device: where it goes.
        batch_size: B.

    Raises:
        ValueError: there are too many levels, or a level's values or mask are not what they should be.
    """
    if len(known) > len(levels):
        raise ValueError(f"known must be of at most {len(levels)} levels, coarse to fine, got {len(known)}")
    found: list[Known | None] = [None] * len(levels)
    for number, (one, level) in enumerate(zip(known, levels, strict=False)):
        if one is None:
            continue
        (grid, size, _), name = level, f"known of level {number}"
        if not isinstance(one, Known):
            raise ValueError(f"{name} must be a Known of values and mask, or None, got {type(one).__name__}")
        values = integers(name, one.values, 3) if size else numbers(name, one.values, 4)
        mask = one.mask
        if mask.dtype != torch.bool or tuple(mask.shape) != (batch_size, *grid):
            h, w = grid
            raise ValueError(
                f"mask of level {number} must be bool ({batch_size}, {h}, {w}), got {mask.dtype} {tuple(mask.shape)}"
            )
        if values.shape[-2:] != grid or len(values) != batch_size:
            raise ValueError(f"{name} must hold {batch_size} grids of {grid}, got {tuple(values.shape)}")
        mask = mask.to(values.device)
        values = values * (mask if size else mask[:, None])
        (values,), _ = checked([values], None, [level], 0, device, batch_size)
        found[number] = Known(values, mask.to(device))
    return found
