import math

import pytest
import torch

from pipelines.metrics.rates import BINS, binned, calibration
from pipelines.metrics.subject import Judged


def judged(confidence: list[float], right: list[bool]) -> Judged:
    return Judged(torch.zeros(1), torch.tensor(confidence).view(1, 1, -1), torch.tensor(right).view(1, 1, -1))


def test_calibration_error_is_how_far_bins_are_off_weighted_by_their_positions() -> None:
    """Of those near 0.95 one of two is right, of 0.2 none, of 0.5 all."""
    level = judged([0.95, 0.94, 0.2, 0.2, 0.5, 0.5], [True, False, False, False, True, True])
    found = calibration({"without_class": binned(level)})
    assert found["calibration_error"]["without_class"] == pytest.approx((0.445 + 0.2 + 0.5) / 3)
    assert found["right"]["without_class"] == 0.5
    bins = found["reliability"]["without_class"]
    assert len(bins) == BINS
    assert bins[14] == [2, pytest.approx(0.945), 0.5] and bins[3] == [2, pytest.approx(0.2), 0]
    assert sum(count for count, _, _ in bins) == 6


def test_codes_drawn_from_their_own_probabilities_are_calibrated() -> None:
    probabilities = torch.softmax(3 * torch.randn(20000, 4), 1)
    codes = torch.multinomial(probabilities, 1)[:, 0]
    confidence, guess = probabilities.max(1)
    level = Judged(torch.zeros(1), confidence.view(1, 1, -1), (guess == codes).view(1, 1, -1))
    assert calibration({"": binned(level)})["calibration_error"][""] < 0.02
    assert (
        calibration({"": binned(level._replace(confidence=confidence.sqrt().view(1, 1, -1)))})["calibration_error"][""]
        > 0.05
    )


def test_a_certain_code_lies_in_the_last_bin_and_a_density_in_none() -> None:
    assert binned(judged([1.0], [True]))[BINS - 1].tolist() == [1, 1, 1]
    assert not binned(Judged(torch.zeros(1))).any()
    assert math.isclose(float(binned(judged([0.0], [False]))[0, 0]), 1)
