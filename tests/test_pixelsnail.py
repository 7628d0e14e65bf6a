import pytest
import torch

from prior.pixelsnail import CausalConv2d, PixelSNAIL
from tests.priors import SIZES, randomize
from tests.test_transformer import decoded


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


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (3, 2)])
def test_the_decoder_gives_the_logits_of_the_full_forward(grid: tuple[int, int]) -> None:
    network = PixelSNAIL(7, SIZES["pixelsnail"], 0.0)  # type: ignore[arg-type]
    randomize(network)
    codes, condition = torch.randint(7, (3, *grid)), torch.randn(3, 8, *grid)
    with torch.no_grad():
        full = network(codes, condition).flatten(1, 2)
        assert torch.allclose(decoded(network.decoder(condition), codes), full, atol=1e-4)
