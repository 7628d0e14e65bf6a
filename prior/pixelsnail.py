"""PixelSNAIL: gated causal convolutions for what is near, causal attention for what is far.

B batch, C width, h w code grid, K codebook_size, T = h*w.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from prior.checks import Float32Module
from prior.incremental import IncrementalDecoder
from prior.sizes import MAX_LAYERS, check_sizes


@dataclass(frozen=True, kw_only=True)
class PixelSNAILConfig:
    """Size of a PixelSNAIL; each field one value for all levels or a list of one per level, coarse to fine.

    Attributes:
        width: C, channels throughout.
        kernel_size: side of the causal receptive field of the first layer; the others use half of it, rounded up.
        blocks: residual stacks, each followed by attention where that is on.
        residual_blocks: gated residual blocks a stack.
        attention: whether stacks end in causal attention (usual for the top level, too dear for large grids).
        heads: attention heads.
        attention_width: channels of keys and values of all heads together.
        conditioning_blocks: residual blocks over the coarser levels' codes.
    """

    width: int | list[int] = 256
    kernel_size: int | list[int] = 5
    blocks: int | list[int] = 4
    residual_blocks: int | list[int] = 4
    attention: bool | list[bool] = True
    heads: int | list[int] = 8
    attention_width: int | list[int] = 128
    conditioning_blocks: int | list[int] = 4

    def __post_init__(self) -> None:
        check_sizes(self, at_least={"conditioning_blocks": 0})
        blocks, each = self.blocks, self.residual_blocks
        if isinstance(blocks, int) and isinstance(each, int) and blocks * each > MAX_LAYERS:
            raise ValueError(f"blocks * residual_blocks must be at most {MAX_LAYERS}, got {blocks} * {each}")
        if isinstance(self.attention_width, int) and isinstance(self.heads, int) and self.attention_width % self.heads:
            raise ValueError(
                f"attention_width must be a multiple of heads, got {self.attention_width} with {self.heads} heads"
            )


class CausalConv2d(nn.Module):
    """Convolution over rows above and, in the same row, columns to the left.

    A position's output sees the `reach` rows above it, `reach` columns to either side there, and `reach` columns to
    the left in its own row; its own position too, unless `strict`. Two dense convolutions, no masked weights.

    Source: van den Oord et al. 2016b (vertical and horizontal stack); Salimans et al. 2017, section 2.4 (shifts).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, strict: bool = False) -> None:
        super().__init__()
        self.reach = max(1, kernel_size // 2)
        self.strict = strict
        own = 0 if strict else 1
        self.above = nn.Conv2d(in_channels, out_channels, (self.reach, 2 * self.reach + 1))
        self.left = nn.Conv2d(in_channels, out_channels, (1, self.reach + own), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) to (B, out_channels, h, w)."""
        reach, width = self.reach, x.shape[-1]
        above = self.above(F.pad(x, (reach, reach, reach, 0))[:, :, :-1])
        left = F.pad(x, (reach, 0, 0, 0))
        return above + self.left(left[..., :-1] if self.strict else left)[..., :width]


class GatedResidualBlock(nn.Module):
    """ELU, causal convolution, condition, ELU, dropout, causal convolution, gate, added to the input.

    Source: Chen et al. 2018, figure 3 (residual block); Salimans et al. 2017 for the gate. Departure: no weight
    normalisation and ELU instead of its concatenation with its negative, as commonly done.
    """

    def __init__(self, width: int, kernel_size: int, dropout: float) -> None:
        super().__init__()
        self.first = CausalConv2d(width, width, kernel_size)
        self.condition = nn.Conv2d(width, width, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.second = CausalConv2d(width, 2 * width, kernel_size)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, width, h, w) both, to the same shape."""
        hidden = self.first(F.elu(x)) + self.condition(condition)
        hidden = self.second(self.dropout(F.elu(hidden)))
        return x + F.glu(hidden, dim=1)


class CausalAttention(nn.Module):
    """Attention of each position over itself and all before it in raster order, merged by a gated 1x1 block.

    Keys and values come from the features, the previous code and the condition; queries from features and
    condition. All of these know codes before their own position only, so a position may attend to itself.

    Source: Chen et al. 2018, figure 3 (attention block).
    """

    def __init__(self, width: int, attention_width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Conv2d(2 * width, attention_width, 1)
        self.key_value = nn.Conv2d(3 * width, 2 * attention_width, 1)
        self.merge = nn.Conv2d(attention_width, width, 1)
        self.gate = nn.Conv2d(width, 2 * width, 1)

    def forward(self, x: Tensor, previous: Tensor, condition: Tensor) -> Tensor:
        """All (B, C, h, w); previous is the embedding of the code one raster step earlier."""
        query = self._heads(self.query(torch.cat([x, condition], 1)))
        key, value = map(self._heads, self.key_value(torch.cat([x, previous, condition], 1)).chunk(2, dim=1))
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        attended = rearrange(attended, "b n (h w) d -> b (n d) h w", h=x.shape[2])
        return x + F.glu(self.gate(F.elu(self.merge(attended) + x)), dim=1)

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b (n d) h w -> b n (h w) d", n=self.heads)


class PixelSNAIL(Float32Module):
    """Autoregressive network over one level's codes.

    Source: Chen et al. 2018, "PixelSNAIL: An Improved Autoregressive Generative Model".

    Args:
        codebook_size: K.
        config: one level's sizes, no lists.
        dropout: inside gated blocks and attention.
    """

    stacks: Sequence[Sequence[GatedResidualBlock]]
    attentions: Sequence[CausalAttention]

    def __init__(self, codebook_size: int, config: PixelSNAILConfig, dropout: float) -> None:
        super().__init__()
        assert isinstance(config.width, int) and isinstance(config.kernel_size, int)
        assert isinstance(config.blocks, int) and isinstance(config.residual_blocks, int)
        assert isinstance(config.attention_width, int) and isinstance(config.heads, int)
        width, inner_kernel = config.width, (config.kernel_size + 1) // 2
        self.embedding = nn.Embedding(codebook_size, width)
        self.start = CausalConv2d(width, width, config.kernel_size, strict=True)
        self.stacks = nn.ModuleList(  # type: ignore[assignment]  # a ModuleList of these
            nn.ModuleList(GatedResidualBlock(width, inner_kernel, dropout) for _ in range(config.residual_blocks))
            for _ in range(config.blocks)
        )
        self.attentions = nn.ModuleList(  # type: ignore[assignment]  # a ModuleList of these
            CausalAttention(width, config.attention_width, config.heads, dropout)
            for _ in range(config.blocks if config.attention else 0)
        )
        self.head = nn.Conv2d(width, codebook_size, 1)

    def forward(self, codes: Tensor, condition: Tensor) -> Tensor:
        """Return the logits (B, h, w, K) of each code given those before it in raster order.

        Args:
            codes: int64 (B, h, w).
            condition: (B, C, h, w), from `Conditioning`.
        """
        embedded = self.embedding(codes).permute(0, 3, 1, 2)  # (B, C, h, w)
        previous = F.pad(embedded.flatten(2), (1, -1)).view_as(embedded)
        x = self.start(embedded) + condition
        for number, stack in enumerate(self.stacks):
            for block in stack:
                x = block(x, condition)
            if len(self.attentions):
                x = self.attentions[number](x, previous, condition)
        return self.head(F.elu(x)).permute(0, 2, 3, 1)

    def decoder(self, condition: Tensor) -> IncrementalDecoder:
        """Return a decoder that yields one position's logits after another, each computed once."""
        return IncrementalDecoder(self, condition)
