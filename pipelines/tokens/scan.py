"""The order in which a record holds the codes of an image.

h w code grid, T codes of all levels together, numbered level by level, each in raster order.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import prod

import numpy as np

from pipelines.errors import ConfigError
from pipelines.storage.paths import place

ORDERS = ("levels", "nested")


def scan(order: str, grids: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return which code comes at each place: int64 (T,), a permutation.

    Args:
        order: "levels", one level after the other in raster order; "nested", each coarse cell and then its finer
            cells; or a .npy file with a permutation.
        grids: (h, w) of each level, coarse to fine.

    Raises:
        ConfigError: finer grids do not divide into coarser ones, or the file holds no permutation.
    """
    if order == "levels":
        return np.arange(sum(map(prod, grids)))
    return _nested(grids) if order == "nested" else _from_file(order, sum(map(prod, grids)))


def _nested(grids: Sequence[tuple[int, int]]) -> np.ndarray:
    """Sort the codes by the path of cells that leads to them: a cell's own path is the beginning of its children's."""
    for (h, w), (finer_h, finer_w) in pairwise(grids):
        if finer_h % h or finer_w % w:
            raise ConfigError(
                f"order nested needs grids that divide those of finer levels, but {h}x{w} does not divide "
                f"{finer_h}x{finer_w}; use order levels"
            )
    starts = accumulate(map(prod, grids), initial=0)
    paths = np.full((sum(map(prod, grids)), len(grids)), -1)
    for level, ((h, w), start) in enumerate(zip(grids, starts, strict=False)):
        row, column = np.divmod(np.arange(h * w), w)
        for coarser, (coarse_h, coarse_w) in enumerate(grids[: level + 1]):
            paths[start : start + h * w, coarser] = row * coarse_h // h * coarse_w + column * coarse_w // w
    return np.lexsort(paths.T[::-1])


def _from_file(path: str, count: int) -> np.ndarray:
    try:
        with place(path).open("rb") as file:
            found = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"order must be {', '.join(ORDERS)} or a .npy file; {path}: {error}") from error
    return permutation(found, count)


def permutation(found: object, count: int) -> np.ndarray:
    """Return an array if it is a permutation of so many codes, as int64.

    Raises:
        ConfigError: it is none.
    """
    array = np.asarray(found)
    if array.dtype.kind not in "iu" or array.shape != (count,) or not np.array_equal(np.sort(array), np.arange(count)):
        raise ConfigError(
            f"order must be a permutation of the {count} codes, 0 to {count - 1} each once; "
            f"got {array.dtype} of shape {array.shape}"
        )
    return array.astype(np.int64)
