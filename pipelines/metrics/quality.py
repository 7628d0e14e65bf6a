"""How good a tokenizer is: figures over a whole split, from sums in float64.

B batch, C channels, H W pixels, K codebook_size.
"""

import math

import torch
from torch import Tensor

from pipelines.compute.ranks import sum_over_ranks
from tokenizer import Autoencoded, HierarchicalVQVAE


def entropy(counts: Tensor) -> float:
    """Return the entropy in nats of a histogram (K,) of counts."""
    shares = counts.double() / counts.sum().clamp(min=1)
    return float(-(shares * shares.clamp(min=1e-300).log()).sum())


class TokenizerQuality:
    """Adds up errors and code counts, and turns them into figures once all is seen.

    PSNR is that of the mean squared error over the split, for values in [-1, 1]: 10 log10(4 / MSE).

    Args:
        model: whose codebooks are counted.
    """

    def __init__(self, model: HierarchicalVQVAE) -> None:
        self.model = model
        device = next(model.parameters()).device
        self.sums = torch.zeros(3 + model.config.num_levels, dtype=torch.float64, device=device)
        self.counts = [torch.zeros(size, dtype=torch.float64, device=device) for size in model.config.codebook_sizes]

    def add(self, images: Tensor, output: Autoencoded, mask: Tensor) -> None:
        """Add a batch.

        Args:
            images: (B, C, H, W) in [-1, 1].
            output: what the model made of them.
            mask: (B,), 1 for images that count, 0 for filling.
        """
        mask = mask.double()
        errors = (output.reconstruction.float() - images).double().flatten(1)  # (B, C*H*W)
        per_image = [torch.ones_like(mask), errors.square().mean(1), errors.abs().mean(1)]
        for level, quantized in enumerate(output.levels):
            codes = quantized.codes.flatten(1)  # (B, h*w)
            distances = (quantized.latents - self.model.codebooks[level].table[codes.flatten()]).double()
            per_image.append(distances.square().view(len(images), -1).mean(1))
            self.counts[level].index_add_(0, codes.flatten(), mask[:, None].expand_as(codes).flatten())
        self.sums += (torch.stack(per_image) * mask).sum(1)

    def figures(self) -> dict[str, float]:
        """Return mse, l1, psnr, and for each level commitment, perplexity and usage (share of codes in use)."""
        sums = sum_over_ranks(self.sums)
        counts = [sum_over_ranks(count) for count in self.counts]
        mse, l1, *commitments = (sums[1:] / sums[0]).tolist()
        figures = {"mse": mse, "l1": l1, "psnr": 10 * math.log10(4 / max(mse, 1e-12)) if mse == mse else math.nan}
        for level, (commitment, count) in enumerate(zip(commitments, counts, strict=True)):
            figures[f"level{level}_commitment"] = commitment
            figures[f"level{level}_perplexity"] = math.exp(entropy(count))
            figures[f"level{level}_usage"] = float((count > 0).double().mean())
        return figures
