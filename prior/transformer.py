"""A Transformer over the raster of codes, its rotary positions knowing rows and columns.

B batch, C width, h w code grid, K codebook_size, T = h*w, d width of a head.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from prior.checks import Float32Module
from prior.sizes import check_sizes

if TYPE_CHECKING:
    from prior.cached import CachedDecoder


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Size of a Transformer; each field one value for all levels or a list of one per level, coarse to fine.

    Attributes:
        width: C, channels; a multiple of 4 * heads, for rotary pairs of rows and columns.
        depth: layers.
        heads: attention heads.
        kv_heads: heads of keys and values, each shared by heads / kv_heads queries; 0 for as many as heads. Fewer
            make a smaller cache (Ainslie et al. 2023, grouped-query attention).
        conditioning_blocks: residual blocks over the coarser levels' codes.
    """

    width: int | list[int] = 512
    depth: int | list[int] = 12
    heads: int | list[int] = 8
    kv_heads: int | list[int] = 0
    conditioning_blocks: int | list[int] = 2

    def __post_init__(self) -> None:
        check_sizes(self, at_least={"conditioning_blocks": 0, "kv_heads": 0})
        if isinstance(self.width, int) and isinstance(self.heads, int) and self.width % (4 * self.heads):
            raise ValueError(f"width must be a multiple of 4 * heads, got {self.width} with {self.heads} heads")
        if isinstance(self.heads, int) and isinstance(self.kv_heads, int) and self.heads % (self.kv_heads or 1):
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")


def rotary_angles(grid: tuple[int, int], head_dim: int, base: float = 10000.0) -> Tensor:
    """Return the rotation angles of each position: (1, T, d), half of each head turned by row, half by column.

    Source: Su et al. 2021, equation 15, applied to the two axes of the grid in turn.
    """
    frequencies = base ** -(torch.arange(0, head_dim // 2, 2) / (head_dim // 2))  # (d / 4,)
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (rows, columns)]  # (T, d / 4) each
    return torch.cat(angles, 1).repeat_interleave(2, dim=1)[None]


def attention_kernels() -> AbstractContextManager[None]:
    """Allow the kernels of attention that x-transformers does, which keeps them as values that cannot be pickled."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION])


class CodeTransformer(Float32Module):
    """Autoregressive network over one level's codes.

    The input at position t is the embedding of code t - 1 plus the condition at t, so that a position knows where it
    stands and what the coarser levels hold there.

    Args:
        codebook_size: K.
        grid: (h, w).
        config: one level's sizes, no lists.
        dropout: after the embeddings, in attention and in feed-forward.

    Source: Vaswani et al. 2017; feed-forward of Shazeer 2020 (SwiGLU), norm of Zhang and Sennrich 2019 (RMSNorm).
    """

    angles: Tensor

    def __init__(self, codebook_size: int, grid: tuple[int, int], config: TransformerConfig, dropout: float) -> None:
        super().__init__()
        from x_transformers import Decoder as DecoderStack  # takes a second to import, and most stages need none
        from x_transformers.attend import Attend

        assert isinstance(config.width, int) and isinstance(config.heads, int)
        head_dim = config.width // config.heads
        self.embedding = nn.Embedding(codebook_size, config.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.start = nn.Parameter(0.02 * torch.randn(config.width))
        self.dropout = nn.Dropout(dropout)
        self.layers = DecoderStack(
            dim=config.width,
            depth=config.depth,
            heads=config.heads,
            attn_kv_heads=config.kv_heads or None,
            attn_dim_head=head_dim,
            attn_flash=True,
            attn_dropout=dropout,
            ff_glu=True,
            ff_swish=True,
            ff_mult=8 / 3,
            ff_dropout=dropout,
            use_rmsnorm=True,
        )
        for layer in self.layers.modules():
            if isinstance(layer, Attend):
                layer.sdp_context_manager = attention_kernels
        self.head = nn.Linear(config.width, codebook_size)
        self.register_buffer("angles", rotary_angles(grid, head_dim), persistent=False)

    def forward(self, codes: Tensor, condition: Tensor) -> Tensor:
        """Return the logits (B, h, w, K) of each code given those before it in raster order.

        Args:
            codes: int64 (B, h, w).
            condition: (B, C, h, w), from `Conditioning`.
        """
        embedded = self.embedding(codes.flatten(1))  # (B, T, C)
        start = self.start.expand(len(codes), 1, -1).to(embedded)
        tokens = torch.cat([start, embedded[:, :-1]], 1) + condition.flatten(2).transpose(1, 2)
        hidden = self.layers(self.dropout(tokens), rotary_pos_emb=(self.angles, 1.0))
        return self.head(hidden).unflatten(1, codes.shape[1:])

    def decoder(self, condition: Tensor) -> "CachedDecoder":
        """Return a decoder that yields one position's logits after another, each computed once."""
        from prior.cached import CachedDecoder

        return CachedDecoder(self, condition)
