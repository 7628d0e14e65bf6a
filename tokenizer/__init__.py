"""Pixels to codes and back."""

from tokenizer.bottlenecks.bottleneck import Bottled
from tokenizer.bottlenecks.codebook import Codebook
from tokenizer.bottlenecks.ema import CodebookEMA, EMAConfig
from tokenizer.config import TokenizerConfig
from tokenizer.hierarchy import Autoencoded, HierarchicalVQVAE
from tokenizer.loss import TokenizerLoss
from tokenizer.nearest import nearest_code

__all__ = [
    "Autoencoded",
    "Bottled",
    "Codebook",
    "CodebookEMA",
    "EMAConfig",
    "HierarchicalVQVAE",
    "TokenizerConfig",
    "TokenizerLoss",
    "nearest_code",
]
