"""Nearest code: which code vector lies closest to each latent vector.

N vectors, K codebook_size, D code_dim.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from tokenizer.checks import check_vectors

# A tile is the scores of this many codes for so many rows that the next pass finds them, and the centred rows, in the
# processor's cache (16 MiB of float32). No (N, K) matrix and no second (N, D) one is ever held.
CODES_PER_TILE = 2048
FLOATS_PER_TILE = 2**22
# A maximum of blocks is several times faster than an argmax, which is then taken over few numbers only.
CODES_PER_BLOCK = 64


@torch.library.custom_op("smalti::nearest_code", mutates_args=())
def nearest_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Return the index of the code vector nearest to each vector, in the Euclidean distance.

    argmin |x - c|^2 is argmax x.c - |c|^2 / 2, because |x|^2 is the same for every code: one matrix product and a
    row maximum, tile by tile. Both are taken from the mean code first: an offset that all share is as large in x.c
    as in |c|^2 / 2, and their difference would lose its digits. An operator of its own, so that a compiled model calls
    it instead of unrolling its loop.

    Args:
        vectors: float32, (N, D).
        codebook: float32, (K, D), on the same device.

    Returns:
        int64, (N,), in [0, K). Codes at equal distance may be told apart by rounding; a vector that is not finite
        gets any code. Nothing is read back from the device.

    Raises:
        ValueError: shapes or types are others.

    Source: van den Oord et al. 2017, equation 1.
    """
    check_vectors(vectors, codebook)
    if vectors.is_cuda and find_spec("triton"):
        # Comes with torch where torch runs on CUDA under Linux, and there alone.
        from tokenizer.nearest_triton import nearest_code_triton

        return nearest_code_triton(vectors, codebook)
    codes = torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device)
    best = torch.full_like(vectors[:, 0], -torch.inf)
    centre, depth = codebook.mean(0), codebook.shape[1]
    width = min(CODES_PER_TILE, len(codebook) + -len(codebook) % CODES_PER_BLOCK)
    rows = min(len(vectors), max(1, FLOATS_PER_TILE // (width + depth)))
    # One allocation for all tiles: fresh pages cost as much as the product.
    scores, centred = vectors.new_empty(rows * width), vectors.new_empty(rows, depth)
    for first in range(0, len(codebook), CODES_PER_TILE):
        tile = _whole_blocks(codebook[first : first + CODES_PER_TILE] - centre)
        bias = -0.5 * tile.square().sum(1)
        parts = zip(vectors.split(rows), best.split(rows), codes.split(rows), strict=True) if rows else ()
        for some, best_so_far, codes_so_far in parts:
            product = scores[: len(some) * len(tile)].view(len(some), len(tile))
            some = torch.sub(some, centre, out=centred[: len(some)])
            value, index = _row_maximum(torch.addmm(bias, some, tile.T, out=product))
            codes_so_far.copy_(torch.where(value > best_so_far, index + first, codes_so_far))
            torch.maximum(best_so_far, value, out=best_so_far)
    return codes.clamp_(max=len(codebook) - 1)


@nearest_code.register_fake
def _(vectors: Tensor, codebook: Tensor) -> Tensor:
    return vectors.new_empty(vectors.shape[0], dtype=torch.int64)


def _whole_blocks(tile: Tensor) -> Tensor:
    """Repeat the last code until the tile is a whole number of blocks; a repeat that wins is clamped to the last."""
    missing = -len(tile) % CODES_PER_BLOCK
    return torch.cat([tile, tile[-1:].expand(missing, -1)]) if missing else tile


def _row_maximum(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maximum of each row and its index: of all blocks first, then within the winning block.

    Args:
        scores: float32, (N, K), K a multiple of CODES_PER_BLOCK.
    """
    blocks = scores.unflatten(1, (-1, CODES_PER_BLOCK))  # (N, K / block, block)
    value, block = blocks.amax(2).max(1)
    winners = blocks[torch.arange(len(blocks), device=blocks.device), block]  # (N, block)
    return value, winners.argmax(1) + block * CODES_PER_BLOCK
