import torch

from prior.pixelsnail import CausalConv2d
from tests.priors import randomize


def test_the_convolution_reaches_as_far_as_its_kernel() -> None:
    layer = randomize(CausalConv2d(1, 1, 5))
    x = torch.zeros(1, 1, 7, 7)
    reached = set()
    for row in range(7):
        for column in range(7):
            changed = x.clone()
            changed[0, 0, row, column] = 1
            if (layer(changed) - layer(x))[0, 0, 4, 3].abs() > 0:
                reached.add((row - 4, column - 3))
    above = {(row, column) for row in (-2, -1) for column in range(-2, 3)}
    assert reached == above | {(0, -2), (0, -1), (0, 0)}
