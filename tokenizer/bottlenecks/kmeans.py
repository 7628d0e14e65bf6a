"""k-means: where codebooks start.

N latents, D code_dim, K codebook_size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.nearest import nearest_code


def kmeans(latents: Tensor, num_centres: int, iterations: int, normalize: bool, seed: int) -> Tensor:
    """Return centres of latents, float32 (K, D), by Lloyd's iterations.

    Args:
        latents: float32 (N, D).
        num_centres: K.
        iterations: 0 leaves the first centres, which are latents.
        normalize: l2-normalise centres.
        seed: draws the first centres.
    """
    centres = latents[_spread(len(latents), num_centres, seed).to(latents.device)]
    for _ in range(iterations):
        counts, sums = counts_and_sums(latents, nearest_code(latents, centres), num_centres)
        means = sums / counts.clamp(min=1)[:, None]
        centres = torch.where(counts[:, None] > 0, means, centres)
        if normalize:
            centres = F.normalize(centres, dim=1)
    return centres


def counts_and_sums(latents: Tensor, codes: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Return the float32 counts (K,) and sums (K, D) of the latents (N, D) of each code.

    Counted in integers, which float32 would stop doing at 2**24, and by index_add: on a GPU bincount reads the
    largest code back, at every step.
    """
    counts = codes.new_zeros(codebook_size).index_add_(0, codes, torch.ones_like(codes))
    sums = latents.new_zeros(codebook_size, latents.shape[1]).index_add_(0, codes, latents)
    return counts.float(), sums


def _spread(num_latents: int, num_centres: int, seed: int) -> Tensor:
    """Draw centres among latents: all different while there are enough, then again from the start."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_latents, generator=generator)[torch.arange(num_centres) % num_latents]
