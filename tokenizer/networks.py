"""Encoder and decoder: strided convolutions and residual blocks, as in VQ-VAE-2.

B batch, C channels, H W pixels or feature rows and columns.
"""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """ReLU, 3x3 to `residual_width`, ReLU, 1x1 back to `width`, added to the input."""

    def __init__(self, width: int, residual_width: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(width, residual_width, 3, padding=1)
        self.expand = nn.Conv2d(residual_width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) to the same shape."""
        return x + self.expand(F.relu(self.squeeze(F.relu(x))))


def encoder(in_channels: int, width: int, residual_width: int, residual_blocks: int, stride: int) -> nn.Sequential:
    """Build a network from (B, in_channels, H, W) to (B, width, H / stride, W / stride); stride a power of two.

    Halvings by 4x4 convolutions (the first of several to width / 2), a 3x3 convolution, residual blocks.

    Source: Razavi et al. 2019, appendix A; widths as in DeepMind's example.
    """
    halvings = stride.bit_length() - 1
    widths = [in_channels, width // 2, *[width] * (halvings - 1)]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(widths[-1], width, 3, padding=1)]
    layers += [ResidualBlock(width, residual_width) for _ in range(residual_blocks)]
    return nn.Sequential(*layers, nn.ReLU())


def decoder(
    in_channels: int, out_channels: int, width: int, residual_width: int, residual_blocks: int, stride: int
) -> nn.Sequential:
    """Build a network from (B, in_channels, H, W) to (B, out_channels, H * stride, W * stride): the encoder mirrored.

    Source: Razavi et al. 2019, appendix A.
    """
    doublings = stride.bit_length() - 1
    widths = [*[width] * (doublings - 1), width // 2, out_channels] if doublings > 1 else [width, out_channels]
    layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, padding=1)]
    layers += [ResidualBlock(width, residual_width) for _ in range(residual_blocks)]
    for before, after in pairwise(widths):
        layers += [nn.ReLU(), nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)]
    return nn.Sequential(*layers)


def upsampling(channels: int, factor: int) -> nn.Sequential:
    """Build log2(factor) 4x4 transposed convolutions that keep the channels and double the grid."""
    doublings = factor.bit_length() - 1
    return nn.Sequential(*[nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1) for _ in range(doublings)])
