"""What a level's prior knows besides its own codes: class, coarser levels, and where on the grid it stands.

B batch, C width, h w code grid, K codebook_size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvBlock(nn.Module):
    """Non-causal residual block: 3x3 convolutions over a coarser grid, which is known as a whole."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) to the same shape."""
        return x + self.second(self.dropout(F.elu(self.first(F.elu(x)))))


class Conditioning(nn.Module):
    """Sums the embeddings of class, row, column and coarser codes into one feature map (B, C, h, w).

    The coarser levels are laid over one another, each embedded, numbers by a linear map, and upsampled to the next, and
    pass through residual convolutions at the grid of the last of them.

    Source: Razavi et al. 2019, section 3.2 (class by embedding, the coarser level by a residual stack).

    Args:
        width: C.
        grid: (h, w) of the level.
        coarser: (h, w), K and channels of each coarser level, coarse to fine; K None where it is continuous.
        num_classes: 0 when the data has none. One more embedding stands for "no class given".
        blocks: residual blocks over the coarser levels.
        dropout: inside those blocks.
    """

    def __init__(
        self,
        width: int,
        grid: tuple[int, int],
        coarser: Sequence[tuple[tuple[int, int], int | None, int]],
        num_classes: int,
        blocks: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.num_classes = num_classes
        self.rows = nn.Parameter(0.02 * torch.randn(width, grid[0], 1))
        self.columns = nn.Parameter(0.02 * torch.randn(width, 1, grid[1]))
        self.classes = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.codes = nn.ModuleList(
            nn.Embedding(size, width) if size else nn.Conv2d(channels, width, 1) for _, size, channels in coarser
        )
        self.blocks = nn.ModuleList(ConvBlock(width, dropout) for _ in range(blocks if coarser else 0))

    def forward(self, coarser: list[Tensor], classes: Tensor | None, batch_size: int) -> Tensor:
        """Return the feature map (B, C, h, w).

        Args:
            coarser: int64 (B, h, w) codes of each coarser level, coarse to fine, or numbers (B, d, h, w).
            classes: int64 (B,) in [0, num_classes], the last standing for "no class given", or None for all of them.
            batch_size: B.
        """
        condition = (self.rows + self.columns).expand(batch_size, -1, -1, -1)
        if self.classes is not None:
            if classes is None:
                classes = torch.full((batch_size,), self.num_classes, device=condition.device)
            condition = condition + self.classes(classes)[:, :, None, None]
        if coarser:
            condition = condition + self._coarser_features(coarser)
        return condition

    def _coarser_features(self, coarser: list[Tensor]) -> Tensor:
        features: Tensor | None = None
        for embedding, codes in zip(self.codes, coarser, strict=True):
            embedded = embedding(codes)
            if codes.ndim == 3:
                embedded = embedded.permute(0, 3, 1, 2)  # (B, C, h, w)
            if features is not None:
                embedded = embedded + F.interpolate(features, size=codes.shape[-2:])
            features = embedded
        assert features is not None
        for block in self.blocks:
            features = block(features)
        return F.interpolate(features, size=self.grid)
