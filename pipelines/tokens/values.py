"""What records are made of and read from, as arrays: codes, classes and ids of whatever kind, checked.

B batch, h w code grid, K codebook_size.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from pipelines.errors import StageError
from pipelines.tokens.template import Level


def checked_codes(codes: Sequence[Any], levels: Sequence[Level]) -> list[np.ndarray]:
    """Return the grids (B, h, w) of some levels, in the dtype that they have.

    Args:
        codes: of all levels of the tokenizer, or of those alone.
        levels: which, coarse to fine.

    Raises:
        StageError: one is missing, of another shape, no integer or out of range.
    """
    if len(codes) > levels[-1].level:
        codes = [codes[level.level] for level in levels]
    if len(codes) != len(levels):
        raise StageError(f"codes must have {len(levels)} levels, got {len(codes)}")
    grids = [_array(grid) for grid in codes]
    for (number, (h, w), size), grid in zip(levels, grids, strict=True):
        if grid.dtype.kind not in "iu" or grid.shape != (len(grids[0]), h, w):
            raise StageError(
                f"codes of level {number} must be integers of ({len(grids[0])}, {h}, {w}), "
                f"got {grid.dtype} of {grid.shape}"
            )
        if grid.size and not 0 <= grid.min() <= grid.max() < size:
            raise StageError(
                f"codes of level {number} must lie in [0, {size}), got {grid.min()} to {grid.max()}; "
                "were they made by another tokenizer?"
            )
    return grids


def checked_classes(classes: Any, count: int, num_classes: int) -> np.ndarray:
    """Return classes (B,); zeros where records have none.

    Raises:
        StageError: they are not so many indices of classes.
    """
    if not num_classes:
        return np.zeros(count, np.int64)
    labels = _array(classes)
    integers = labels.shape == (count,) and (labels.dtype.kind in "iu" or not count)
    if not integers or not np.all((labels >= 0) & (labels < num_classes)):
        raise StageError(
            f"template has <class>: classes must be {count} indices below {num_classes}, got {classes!s:.60}"
        )
    return labels


def checked_ids(ids: Any) -> np.ndarray:
    """Return ids as int64, in which no arithmetic wraps.

    Raises:
        StageError: they are no integers.
    """
    array = _array(ids)
    if array.size and array.dtype.kind not in "iu":
        raise StageError(f"ids must be integers, got {array.dtype}")
    return array.astype(np.int64)


def _array(values: Any) -> np.ndarray:
    try:
        return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    except ValueError as error:
        raise StageError(
            f"records, codes and classes must be arrays, got lists of several lengths: {values!s:.60}"
        ) from error
