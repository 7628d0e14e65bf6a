import math

import pytest
import torch

from pipelines.metrics.histograms import jensen_shannon_bits, total_variation


def test_distances_of_histograms_are_those_of_their_definitions() -> None:
    one, other = torch.tensor([2.0, 6.0, 0.0]), torch.tensor([1.0, 1.0, 2.0])
    p, q = [0.25, 0.75, 0.0], [0.25, 0.25, 0.5]
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    js = sum(a * math.log2(a / c) / 2 for side in (p, q) for a, c in zip(side, m, strict=True) if a)
    assert total_variation(one, other) == pytest.approx(0.5)
    assert jensen_shannon_bits(one, other) == pytest.approx(js)


def test_equal_shares_are_no_distance_apart_and_disjoint_ones_1() -> None:
    one, other = torch.tensor([3.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 5.0, 5.0])
    for distance in (total_variation, jensen_shannon_bits):
        assert distance(one, one * 7) == pytest.approx(0, abs=1e-12)
        assert distance(one, other) == pytest.approx(1)
