"""The class of an image beside it: what makes a tokenizer conditional.

B batch, C channels, h w grid.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

# Class index of each image, -1 where none is known; None where no image has one.
Classes = Sequence[int] | Tensor | np.ndarray | None
# Channels in which a class stands beside others.
CHANNELS = 16


def class_tensor(classes: Sequence[int] | Tensor | np.ndarray, count: int) -> Tensor:
    """Return class indices as a tensor (B,).

    Raises:
        ValueError: they are no integers or not as many as there are images.
    """
    given = torch.as_tensor(classes)
    if given.shape != (count,) or given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise ValueError(f"classes must be {count} integers, one per image, got {given.dtype} {tuple(given.shape)}")
    return given


class BesideClass(nn.Module):
    """Lays a vector of the class of each image beside what is known of it, the same in all cells.

    Args:
        num_classes: of images; a further vector stands for no class.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.vectors = nn.Embedding(num_classes + 1, CHANNELS)

    def forward(self, values: Tensor, classes: Classes) -> Tensor:
        """Return values (B, C, h, w) with CHANNELS more.

        Raises:
            ValueError: classes are no integers or not as many; in eval mode, which reads them back, one does not exist.
        """
        rows = self._rows(classes, len(values))
        vectors = self.vectors(rows)[:, :, None, None].expand(-1, -1, *values.shape[2:])
        return torch.cat([values, vectors], 1)

    def _rows(self, classes: Classes, count: int) -> Tensor:
        """Return the row of the class of each image, int64 (B,)."""
        none, device = self.vectors.num_embeddings - 1, self.vectors.weight.device
        if classes is None:
            return torch.full((count,), none, device=device)
        given = class_tensor(classes, count).to(device, torch.int64)
        if not (self.training or torch.compiler.is_compiling()) and count and (highest := int(given.max())) >= none:
            raise ValueError(f"classes must lie in [-1, {none}), -1 for none, got {highest}")
        return torch.where(given < 0, none, given)
