"""Linear layers for decoders: weights laid out once for products with few rows, one for each sample of a batch.

B batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# oneDNN lays weights out for so many rows; that for 16 is as fast for 1 and for 64.
EXPECTED_ROWS = 16


class PackedLinear:
    """`F.linear` of fixed weights.

    On a CPU, oneDNN's own layout is two to three times as fast for a few rows as what `F.linear` calls there. The two
    operators are those of torch.compile's frozen linear layers; torch has no public name for them.

    Args:
        weight: (out, in).
        bias: (out,), or None.
        dtype: of weight, bias and products.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight = weight.detach().to(dtype, copy=True).contiguous()
        self.bias = None if bias is None else bias.detach().to(dtype, copy=True)
        self.dtype, self.bytes = dtype, self.weight.numel() * self.weight.element_size()
        self.inputs = self.weight.shape[1]
        self.packed = packs(self.weight)
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, EXPECTED_ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        """(B, in) of any float type to (B, out) of the layer's."""
        x = x.to(self.dtype)
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


def packs(weight: Tensor) -> bool:
    """Whether oneDNN is there and multiplies such weights."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    half = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return half or weight.dtype == torch.float32
