"""Nearest code on a GPU, as one kernel: the scores live in registers and are never written.

N vectors, K codebook_size, D code_dim. Imported only when there is a GPU and triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64
CODES = 64
# Components multiplied at a time: the fewest that tl.dot takes, so that short vectors waste little.
DEPTH = 16


def nearest_code_triton(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Return what `nearest_code` returns, in true float32.

    Args:
        vectors: float32, (N, D).
        codebook: float32, (K, D).
    """
    centre = codebook.mean(0)  # see `nearest_code`; vectors are taken from it in the kernel, a tile at a time
    vectors, codebook = vectors.contiguous(), (codebook - centre).contiguous()
    bias = -0.5 * codebook.square().sum(1)  # (K,)
    codes = torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device)
    if len(vectors):
        with torch.cuda.device_of(vectors):
            _nearest_code[(triton.cdiv(len(vectors), ROWS),)](
                vectors, centre, codebook, bias, codes, *vectors.shape, len(codebook), ROWS, CODES, DEPTH
            )
    return codes


@triton.jit
def _nearest_code(
    vectors: tl.tensor,
    centre: tl.tensor,
    codebook: tl.tensor,
    bias: tl.tensor,
    codes: tl.tensor,
    N: tl.tensor,
    D: tl.tensor,
    K: tl.tensor,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """Find the nearest codes of ROWS vectors, CODES codes, centred already, and DEPTH components at a time.

    Rows past N are not stored, codes past K score -inf, components past D are zero.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # 64 bits: N * D may pass 2**31
    best = tl.full((ROWS,), -float("inf"), tl.float32)
    nearest = tl.zeros((ROWS,), tl.int32)
    for first in range(0, K, CODES):
        code = first + tl.arange(0, CODES)
        scores = tl.zeros((ROWS, CODES), tl.float32)
        for start in range(0, D, DEPTH):
            component = start + tl.arange(0, DEPTH)
            x = tl.load(
                vectors + row[:, None] * D + component[None, :],
                mask=(row[:, None] < N) & (component[None, :] < D),
                other=0.0,
            )
            x -= tl.load(centre + component, mask=component < D, other=0.0)[None, :]
            c = tl.load(
                codebook + code[None, :] * D + component[:, None],
                mask=(code[None, :] < K) & (component[:, None] < D),
                other=0.0,
            )
            scores = tl.dot(x, c, scores, input_precision="ieee")
        scores += tl.load(bias + code, mask=code < K, other=-float("inf"))[None, :]
        value = tl.max(scores, 1)
        better = value > best
        nearest = tl.where(better, first + tl.argmax(scores, 1), nearest)
        best = tl.where(better, value, best)
    tl.store(codes + row, nearest.to(tl.int64), mask=row < N)
