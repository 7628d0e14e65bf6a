"""Pixels to codes and back."""

from tokenizer.bottlenecks.codebook import Codebook, Quantized
from tokenizer.bottlenecks.ema import CodebookConfig, CodebookEMA
from tokenizer.hierarchy import Autoencoded, HierarchicalVQVAE, TokenizerConfig
from tokenizer.loss import TokenizerLoss
from tokenizer.nearest import nearest_code

__all__ = [
    "Autoencoded",
    "Codebook",
    "CodebookConfig",
    "CodebookEMA",
    "HierarchicalVQVAE",
    "Quantized",
    "TokenizerConfig",
    "TokenizerLoss",
    "nearest_code",
]
