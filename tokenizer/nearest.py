"""Nearest code: which code vector lies closest to each latent vector.

N vectors, K codebook_size, D code_dim.
"""

import torch
from torch import Tensor

# Scores are computed this many at a time (16 MiB of float32), so that no (N, K) matrix is ever held.
SCORES_PER_CHUNK = 2**22


def nearest_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Return the index of the code vector nearest to each vector, in the Euclidean distance.

    argmin |x - c|^2 is argmax x.c - |c|^2 / 2, because |x|^2 is the same for every code: one matrix product and a
    row maximum. Chunks of rows bound the memory.

    Args:
        vectors: float32, (N, D).
        codebook: float32, (K, D).

    Returns:
        int64, (N,), in [0, K). Codes at equal distance may be told apart by rounding.

    Source: van den Oord et al. 2017, equation 1.
    """
    bias = -0.5 * codebook.square().sum(1)  # (K,)
    rows = max(1, SCORES_PER_CHUNK // len(codebook))
    chunks = [torch.addmm(bias, chunk, codebook.T).argmax(1) for chunk in vectors.split(rows)]
    return torch.cat(chunks) if chunks else vectors.new_empty(0, dtype=torch.int64)
