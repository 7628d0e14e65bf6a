from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import ConfigError
from pipelines.tokens.scan import scan


def test_levels_follow_one_another_in_raster_order() -> None:
    assert scan("levels", [(1, 2), (2, 4)]).tolist() == list(range(10))


def test_nested_puts_finer_cells_behind_the_coarse_one_that_they_refine() -> None:
    # Codes 0 and 1 are the coarse row; 2 to 5 and 6 to 9 the rows of the finer grid.
    assert scan("nested", [(1, 2), (2, 4)]).tolist() == [0, 2, 3, 6, 7, 1, 4, 5, 8, 9]


def test_nested_goes_into_the_depth_first() -> None:
    order = scan("nested", [(1, 1), (1, 2), (2, 2)])
    assert order.tolist() == [0, 1, 3, 5, 2, 4, 6]


def test_nested_needs_grids_that_divide() -> None:
    with pytest.raises(ConfigError, match="2x2 does not divide 3x3"):
        scan("nested", [(2, 2), (3, 3)])


def test_a_file_gives_any_order(tmp_path: Path) -> None:
    np.save(tmp_path / "order.npy", np.array([3, 1, 0, 2], np.uint8))
    assert scan(str(tmp_path / "order.npy"), [(2, 2)]).tolist() == [3, 1, 0, 2]


@pytest.mark.parametrize(
    "array", [np.array([0, 1, 2]), np.array([0, 1, 2, 2]), np.array([1, 2, 3, 4]), np.arange(4.0), np.eye(4)]
)
def test_a_file_without_a_permutation_is_refused(array: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "order.npy", array)
    with pytest.raises(ConfigError, match="order must be a permutation of the 4 codes"):
        scan(str(tmp_path / "order.npy"), [(2, 2)])


def test_an_order_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"order must be levels, nested or a \.npy file; spiral"):
        scan("spiral", [(2, 2)])
    (tmp_path / "order.npy").write_text("0 1 2 3")
    with pytest.raises(ConfigError, match=r"order must be levels, nested or a \.npy file"):
        scan(str(tmp_path / "order.npy"), [(2, 2)])
