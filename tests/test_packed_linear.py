import pytest
import torch
import torch.nn.functional as F

from prior import packed_linear
from prior.packed_linear import PackedLinear

TYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [1, 2, 16, 65])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_is_the_linear_layer(rows: int, bias: bool, dtype: torch.dtype) -> None:
    weight, offset = torch.randn(40, 24), torch.randn(40) if bias else None
    x = torch.randn(24, rows).t()  # not contiguous
    exact = F.linear(x, weight, offset)
    output = PackedLinear(weight, offset, dtype)(x)
    assert output.dtype == dtype
    tolerance = {torch.bfloat16: 0.1}.get(dtype, 1e-5)
    assert torch.allclose(output, exact.to(dtype), rtol=tolerance, atol=tolerance)


def test_batches_of_batches_keep_their_shape() -> None:
    weight, x = torch.randn(5, 3), torch.randn(2, 4, 3)
    assert torch.allclose(PackedLinear(weight, None, torch.float32)(x), x @ weight.t(), atol=1e-6)


def test_weights_are_packed_where_onednn_is_and_kept_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(5, 3), torch.randn(2, 3)
    there = PackedLinear(weight, None, torch.float32)
    assert there.packed == torch.backends.mkldnn.is_available()
    monkeypatch.setattr(packed_linear, "packs", lambda weight: False)
    plain = PackedLinear(weight, None, torch.float32)
    assert not plain.packed and torch.allclose(plain(x), there(x), atol=1e-6)


def test_weights_that_change_later_do_not_change_the_layer() -> None:
    weight, bias = torch.ones(5, 3), torch.ones(5)
    layer = PackedLinear(weight, bias, torch.float32)
    weight.zero_()
    bias.zero_()
    assert torch.equal(layer(torch.ones(1, 3)), torch.full((1, 5), 4.0))
