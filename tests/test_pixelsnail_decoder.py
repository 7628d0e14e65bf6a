import pytest
import torch

from prior.decoder import RecomputingDecoder
from prior.pixelsnail_decoder import PixelSNAILDecoder
from tests.priors import decoded, draw_codes, tiny_level


def assert_exact(grids: list[tuple[int, int]], batch: int, **changes: object) -> None:
    sizes = [5, 7][-len(grids) :]
    level = tiny_level("pixelsnail", grids, sizes, scale=0.2, **changes)
    codes, classes = draw_codes(grids, sizes, batch), torch.arange(batch) % 4
    with torch.no_grad():
        full = level.logits(codes[-1], codes[:-1], classes).flatten(1, 2)
        condition = level.conditioning(codes[:-1], classes, batch)
    plain = decoded(RecomputingDecoder(level.network, condition), codes[-1])
    steps = decoded(level.decoder(codes[:-1], classes, batch), codes[-1])
    assert torch.allclose(plain, full, atol=1e-5)
    assert torch.allclose(steps, full, atol=1e-4)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("kernel_size", range(1, 8))
def test_each_position_has_the_logits_of_the_full_forward_at_any_kernel(kernel_size: int, attention: bool) -> None:
    assert_exact([(6, 5)], 3, kernel_size=kernel_size, attention=attention)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (4, 1), (3, 2), (2, 7), (9, 2)])
def test_each_position_has_the_logits_of_the_full_forward_on_any_grid(grid: tuple[int, int], batch: int) -> None:
    assert_exact([grid], batch)


@pytest.mark.parametrize("attention", [False, True])
def test_each_position_has_the_logits_of_the_full_forward_below_another_level(attention: bool) -> None:
    assert_exact([(2, 3), (4, 6)], 2, attention=attention)


def test_kept_rows_do_not_grow_with_the_grid() -> None:
    level = tiny_level("pixelsnail", [(12, 3)], [7])
    decoder = level.decoder([], None, 1)
    assert isinstance(decoder, PixelSNAILDecoder)
    assert decoder.start.rows.shape[0] == 3  # a kernel of 5 sees its own row and two above


def test_under_autocast_the_logits_are_those_of_the_full_forward_up_to_its_rounding() -> None:
    level = tiny_level("pixelsnail", [(3, 4)], [7], scale=0.2)
    codes = draw_codes([(3, 4)], [7])
    with torch.no_grad():
        exact = level.logits(codes[0], [], None).flatten(1, 2)
        with torch.autocast("cpu", torch.bfloat16):
            half = level.logits(codes[0], [], None).flatten(1, 2).float()
            decoder = level.decoder([], None, 2)
            steps = decoded(decoder, codes[0]).float()
    assert isinstance(decoder, PixelSNAILDecoder)
    assert decoder.start.rows.dtype == torch.bfloat16
    rounding = float((half - exact).abs().max())
    assert rounding > 0
    assert float((steps - exact).abs().max()) < 3 * rounding
