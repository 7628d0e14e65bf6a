"""A position's logits depend on the codes before it in raster order, and on nothing at or after it."""

import pytest
import torch
from torch import nn

from prior.pixelsnail import CausalAttention, CausalConv2d, GatedResidualBlock
from tests.priors import NETWORKS, assert_causal, draw_codes, randomize, tiny_level

GRID = (4, 5)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("coarser", [False, True])
def test_a_changed_code_moves_no_earlier_logits_and_moves_later_ones(network: str, coarser: bool) -> None:
    grids, sizes = ([(2, 2), GRID], [4, 6]) if coarser else ([GRID], [6])
    level = tiny_level(network, grids, sizes)
    codes, classes = draw_codes(grids, sizes), torch.tensor([0, 2])
    assert_causal(lambda last: level.logits(last, codes[:-1], classes), codes[-1], sizes[-1])


@pytest.mark.parametrize("attention", [False, True])
def test_pixelsnail_is_causal_with_and_without_attention(attention: bool) -> None:
    level = tiny_level("pixelsnail", [GRID], [6], attention=attention)
    assert_causal(lambda codes: level.logits(codes, [], None), draw_codes([GRID], [6])[0], 6, next_sees=attention)


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
def test_pixelsnail_is_causal_at_any_kernel(kernel_size: int) -> None:
    level = tiny_level("pixelsnail", [GRID], [6], kernel_size=kernel_size, attention=False)
    assert_causal(lambda codes: level.logits(codes, [], None), draw_codes([GRID], [6])[0], 6, next_sees=False)


class _Layer(nn.Module):
    """One layer type on features (B, 8, h, w); the other inputs fixed."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layer = {
            "strict convolution": lambda: CausalConv2d(8, 8, 5, strict=True),
            "convolution": lambda: CausalConv2d(8, 8, 5),
            "gated block": lambda: GatedResidualBlock(8, 3, 0.0),
            "attention": lambda: CausalAttention(8, 8, 2, 0.0),
        }[kind]()
        self.other = torch.randn(2, 8, *GRID)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "gated block":
            return self.layer(x, self.other)
        if self.kind == "attention":
            return self.layer(x, self.other, self.other)
        return self.layer(x)


@pytest.mark.parametrize("kind", ["strict convolution", "convolution", "gated block", "attention"])
@torch.no_grad()
def test_every_layer_type_is_causal(kind: str) -> None:
    layer = randomize(_Layer(kind))
    x = torch.randn(2, 8, *GRID)
    before = layer(x).flatten(2)
    for position in range(20):
        changed = x.clone()
        changed.view(2, 8, -1)[:, :, position] += 1
        moved = (layer(changed).flatten(2) - before).abs().amax((0, 1))
        first = position + 1 if kind.startswith("strict") else position
        assert not moved[:first].any()
        if first < 20 and first % GRID[1]:  # a convolution wraps round no row
            assert moved[first] > 1e-6
