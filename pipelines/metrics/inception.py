"""The Inception network of published FIDs, for the weights file of torch-fidelity, which itself needs torchvision.

B batch, C channels, H W pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Pixels a side that the network sees.
SIDE = 299


class Conv(NamedTuple):
    """A convolution by its name in the file; of stride 1 it keeps the size."""

    name: str
    channels: int
    kernel: int | tuple[int, int] = 1
    stride: int = 1


# A branch: convolutions one after another. Where two share a place, both read what came before.
Branch = Sequence[Conv | tuple[Conv, Conv]]


class _Normed(nn.Module):
    """Convolution, batch norm and ReLU."""

    def __init__(self, in_channels: int, conv: Conv, padding: tuple[int, int] | None = None) -> None:
        super().__init__()
        high, wide = (conv.kernel, conv.kernel) if isinstance(conv.kernel, int) else conv.kernel
        kept = (high // 2, wide // 2) if conv.stride == 1 else (0, 0)
        self.conv = nn.Conv2d(in_channels, conv.channels, (high, wide), conv.stride, padding or kept, bias=False)
        self.bn = nn.BatchNorm2d(conv.channels, eps=0.001)

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(features)))


class _Mixed(nn.Module):
    """Branches side by side, and one that pools.

    Args:
        in_channels: of what comes in.
        branches: those that do not pool.
        pooled: channels of the convolution after pooling; 0 halves the sides and has none.
        pool_max: take the greatest instead of the mean. The last block does: a slip of the original, kept by all.
    """

    def __init__(self, in_channels: int, branches: Sequence[Branch], pooled: int, pool_max: bool = False) -> None:
        super().__init__()
        self.branches, self.pool_max = branches, pool_max or not pooled
        self.out_channels = pooled or in_channels
        for branch in branches:
            before = in_channels
            for place in branch:
                convs = (place,) if isinstance(place, Conv) else place
                for conv in convs:
                    self.add_module(conv.name, _Normed(before, conv))
                before = sum(conv.channels for conv in convs)
            self.out_channels += before
        self.branch_pool = _Normed(in_channels, Conv("branch_pool", pooled)) if pooled else None

    def forward(self, features: Tensor) -> Tensor:
        found = [self._branch(branch, features) for branch in self.branches]
        if self.branch_pool is None:
            return torch.cat([*found, F.max_pool2d(features, 3, 2)], 1)
        pooled = (
            F.max_pool2d(features, 3, 1, 1)
            if self.pool_max
            else F.avg_pool2d(features, 3, 1, 1, count_include_pad=False)  # as TensorFlow does
        )
        return torch.cat([*found, self.branch_pool(pooled)], 1)

    def _branch(self, branch: Branch, features: Tensor) -> Tensor:
        for place in branch:
            convs = (place,) if isinstance(place, Conv) else place
            features = torch.cat([getattr(self, conv.name)(features) for conv in convs], 1)
        return features


DOUBLE = (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, 3))
FIVES = (
    (Conv("branch1x1", 64),),
    (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, 5)),
    (*DOUBLE, Conv("branch3x3dbl_3", 96, 3)),
)
TO_HALF = ((Conv("branch3x3", 384, 3, 2),), (*DOUBLE, Conv("branch3x3dbl_3", 96, 3, 2)))
TO_QUARTER = (
    (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, 3, 2)),
    (
        *(Conv("branch7x7x3_1", 192), Conv("branch7x7x3_2", 192, (1, 7)), Conv("branch7x7x3_3", 192, (7, 1))),
        Conv("branch7x7x3_4", 192, 3, 2),
    ),
)
WIDE = (
    (Conv("branch1x1", 320),),
    (Conv("branch3x3_1", 384), (Conv("branch3x3_2a", 384, (1, 3)), Conv("branch3x3_2b", 384, (3, 1)))),
    (
        *(Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, 3)),
        (Conv("branch3x3dbl_3a", 384, (1, 3)), Conv("branch3x3dbl_3b", 384, (3, 1))),
    ),
)


def _sevens(width: int) -> Sequence[Branch]:
    across, down = (1, 7), (7, 1)
    names = [f"branch7x7dbl_{number}" for number in range(1, 6)]
    return (
        (Conv("branch1x1", 192),),
        (Conv("branch7x7_1", width), Conv("branch7x7_2", width, across), Conv("branch7x7_3", 192, down)),
        (
            *(Conv(names[0], width), Conv(names[1], width, down), Conv(names[2], width, across)),
            *(Conv(names[3], width, down), Conv(names[4], 192, across)),
        ),
    )


# Blocks by their names in the file: branches, channels after pooling, whether pooling takes the greatest.
BLOCKS: dict[str, tuple[Sequence[Branch], int, bool]] = {
    "Mixed_5b": (FIVES, 32, False),
    "Mixed_5c": (FIVES, 64, False),
    "Mixed_5d": (FIVES, 64, False),
    "Mixed_6a": (TO_HALF, 0, True),
    "Mixed_6b": (_sevens(128), 192, False),
    "Mixed_6c": (_sevens(160), 192, False),
    "Mixed_6d": (_sevens(160), 192, False),
    "Mixed_6e": (_sevens(192), 192, False),
    "Mixed_7a": (TO_QUARTER, 0, True),
    "Mixed_7b": (WIDE, 192, False),
    "Mixed_7c": (WIDE, 192, True),
}


class Inception(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to the 2,048 features before the last layer.

    Resizes as TensorFlow 1 did: bilinear from the top left corner, without antialiasing, so that figures are those of
    papers. `make parity` holds it to torch-fidelity's with the same weights.

    Source: Szegedy et al. 2016; Heusel et al. 2017 (FID); torch-fidelity, for names and the resize.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Normed(3, Conv("", 32, 3, 2))
        self.Conv2d_2a_3x3 = _Normed(32, Conv("", 32, 3), (0, 0))
        self.Conv2d_2b_3x3 = _Normed(32, Conv("", 64, 3))
        self.Conv2d_3b_1x1 = _Normed(64, Conv("", 80))
        self.Conv2d_4a_3x3 = _Normed(80, Conv("", 192, 3), (0, 0))
        channels = 192
        for name, (branches, pooled, pool_max) in BLOCKS.items():
            block = _Mixed(channels, branches, pooled, pool_max)
            self.add_module(name, block)
            channels = block.out_channels
        self.fc = nn.Linear(channels, 1008)

    def forward(self, images: Tensor) -> Tensor:
        levels = (images + 1) * 127.5
        features = (tensorflow_resized(levels, SIDE) - 128) / 128
        features = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(features)))
        features = F.max_pool2d(features, 3, 2)
        features = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(features)), 3, 2)
        for name in BLOCKS:
            features = getattr(self, name)(features)
        return features.mean((2, 3))


def tensorflow_resized(images: Tensor, side: int) -> Tensor:
    """Return (B, C, side, side): pixel i lies at i * H / side, between its two neighbours on either axis."""
    for axis in (2, 3):
        size = images.shape[axis]
        place = torch.arange(side, device=images.device) * (size / side)
        low = place.long()
        share = (place - low).reshape([-1 if other == axis else 1 for other in range(4)])
        first = images.index_select(axis, low)
        images = first + (images.index_select(axis, (low + 1).clamp(max=size - 1)) - first) * share
    return images
