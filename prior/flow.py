"""A normalising flow: an invertible network that turns the numbers of a level into N(0, I), and back to draw them.

log p(x) = log N(f(x); 0, I) + log |det df/dx| (Dinh et al. 2017, equation 3), of affine couplings (equations 7 and 8).

B batch, C width, d channels, h w grid, J steps of a monotone function.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prior.conditioning import Conditioning
from prior.continuous import Continuous, ContinuousConfig, normal_nats, normal_quantile
from prior.known import Known
from prior.sizes import check_sizes

# The logarithm of a coupling's scale lies within these bounds of 0, which keeps the inverse from running away.
MOST_LOG_SCALE = 2.0
# Standard deviations are at least this share of their mean: a channel that stands still has next to none.
LEAST_SHARE = 1e-3
# Steps of a monotone function, and halvings that take its inverse to the last bit.
TANHS, HALVINGS = 16, 64


@dataclass(frozen=True, kw_only=True)
class FlowConfig(ContinuousConfig):
    """Size of a flow; each field one value for all levels or a list of one per level, coarse to fine.

    Attributes:
        couplings: layers, each of which moves half of the numbers as the other half says. A level of one number has
            no halves: a single monotone function stands there in their place.
        width: C, channels of their networks.
        conditioning_blocks: residual blocks over the coarser levels.
    """

    couplings: int | list[int] = 8
    width: int | list[int] = 64
    conditioning_blocks: int | list[int] = 1

    def __post_init__(self) -> None:
        check_sizes(self, at_least={"conditioning_blocks": 0})

    def build(
        self, levels: Sequence[tuple[tuple[int, int], int | None, int]], num_classes: int, dropout: float
    ) -> "Flow":
        """See `ContinuousConfig`."""
        assert isinstance(self.couplings, int) and isinstance(self.width, int)
        assert isinstance(self.conditioning_blocks, int)
        grid, _, channels = levels[-1]
        conditioning = Conditioning(self.width, grid, levels[:-1], num_classes, self.conditioning_blocks, dropout)
        return Flow((channels, *grid), self.couplings, self.width, conditioning, dropout)


class Coupling(nn.Module):
    """Numbers under the mask stay, and say by how much the others are scaled and shifted.

    Source: Dinh et al. 2017, section 3.2 and equation 9; the last layer starts at zero, as in Kingma and Dhariwal 2018,
    section 3.3.

    Args:
        mask: bool (d, h, w).
        width: C.
        dropout: of the hidden layer.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, width: int, dropout: float) -> None:
        super().__init__()
        channels, kernel = len(mask), 1 if mask[0].numel() == 1 else 3
        self.register_buffer("mask", mask, persistent=False)
        self.first = nn.Conv2d(channels, width, kernel, padding="same")
        self.second = nn.Conv2d(width, width, 1)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Conv2d(width, 2 * channels, kernel, padding="same")
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, values: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Return what values (B, d, h, w) become, and the logarithm of each one's scale."""
        log_scale, shift = self._moves(values, condition)
        return values * log_scale.exp() + shift, log_scale

    def inverse(self, values: Tensor, condition: Tensor) -> Tensor:
        """Return what became these values."""
        log_scale, shift = self._moves(values, condition)
        return (values - shift) * (-log_scale).exp()

    def _moves(self, values: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.first(values * self.mask) + condition
        hidden = self.dropout(self.second(F.elu(hidden)))
        log_scale, shift = self.last(F.elu(hidden)).chunk(2, 1)
        return bounded(log_scale) * ~self.mask, shift * ~self.mask


class Monotone(nn.Module):
    """exp(g) (x + sum of a_j tanh(b_j x + c_j)) + t, with a and b above 0: any one number to any other in its order.

    Source: Huang et al. 2018, section 3, with one hidden layer; the inverse by halving.

    Args:
        width: C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(width, 2 + 3 * TANHS, 1)
        nn.init.zeros_(self.head.weight)
        low, places = torch.full((TANHS,), -3.0), torch.linspace(-4, 4, TANHS)  # nearly a straight line
        self.head.bias = nn.Parameter(torch.cat([torch.zeros(2), low, torch.ones(TANHS), places]))

    def forward(self, values: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Return what values (B, 1, 1, 1) become, and the logarithm of the slope there."""
        log_scale, shift, *parts = self._parts(condition)
        raised, slope = _raised(values, *parts)
        return raised * log_scale.exp() + shift, log_scale + slope.log()

    def inverse(self, values: Tensor, condition: Tensor) -> Tensor:
        """Return what became these values."""
        log_scale, shift, heights, *parts = (part.double() for part in self._parts(condition))
        raised = (values.double() - shift) * (-log_scale).exp()
        most = heights.sum(1, keepdim=True)
        low, high = raised - most, raised + most
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            below = _raised(middle, heights, *parts)[0] < raised
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return ((low + high) / 2).to(values)

    def _parts(self, condition: Tensor) -> list[Tensor]:
        """Return g, t, a, b and c, (B, 1, 1, 1) and (B, J, 1, 1)."""
        log_scale, shift, heights, slopes, places = self.head(condition).split([1, 1, TANHS, TANHS, TANHS], 1)
        return [bounded(log_scale), shift, F.softplus(heights), F.softplus(slopes), places]


def bounded(log_scale: Tensor) -> Tensor:
    """Return logarithms of scales within their bounds."""
    return MOST_LOG_SCALE * torch.tanh(log_scale / MOST_LOG_SCALE)


def _raised(values: Tensor, heights: Tensor, slopes: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Return values + sum of heights * tanh(slopes * values + places), and its derivative."""
    steps = torch.tanh(slopes * values + places)
    raised = values + (heights * steps).sum(1, keepdim=True)
    return raised, 1 + (heights * slopes * (1 - steps.square())).sum(1, keepdim=True)


class Flow(Continuous):
    """Couplings over a grid, or over a vector where the grid is 1x1, given the coarser levels and the class.

    The share of the density that `nats` gives a number is that of the place where it stands, and no conditional one.
    What is known of a level cannot be conditioned on: the rest is drawn as without it.

    Args:
        shape: (d, h, w).
        couplings: how many.
        width: C.
        conditioning: gives the feature map (B, C, h, w) that is added in each.
        dropout: in training.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, shape: Sequence[int], couplings: int, width: int, conditioning: Conditioning, dropout: float
    ) -> None:
        super().__init__()
        self.shape, self.num_uniforms = tuple(shape), math.prod(shape)
        self.conditioning = conditioning
        self.register_buffer("mean", torch.zeros(shape[0], 1, 1))
        self.register_buffer("std", torch.ones(shape[0], 1, 1))
        layers: list[nn.Module] = [Monotone(width)]
        if self.num_uniforms > 1:
            masks = masks_of(self.shape)
            layers = [Coupling(masks[number % len(masks)], width, dropout) for number in range(couplings)]
        self.layers = nn.ModuleList(layers)

    @torch.no_grad()
    def standardize(self, values: Tensor) -> None:
        """Take mean and standard deviation of each channel from values (N, d, h, w), so that layers start near 0 and 1.

        Source: Kingma and Dhariwal 2018, section 3.1, of all training samples and then fixed.
        """
        by_channel = values.double().transpose(0, 1).flatten(1)
        std = by_channel.std(1, correction=0)
        self.mean.copy_(by_channel.mean(1)[:, None, None])
        self.std.copy_(std.clamp(min=max(1e-12, LEAST_SHARE * float(std.mean())))[:, None, None])

    def forward(self, values: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normal numbers of values (B, d, h, w), and each number's share of the log-determinant."""
        values = (values - self.mean) / self.std
        log_scales = -self.std.log().expand_as(values)
        for layer in self.layers:
            values, log_scale = layer(values, condition)
            log_scales = log_scales + log_scale
        return values, log_scales

    def inverse(self, normals: Tensor, condition: Tensor) -> Tensor:
        """Return the values of normal numbers (B, d, h, w)."""
        for layer in reversed(self.layers):
            normals = layer.inverse(normals, condition)  # type: ignore[operator]
        return normals * self.std + self.mean

    def nats(self, values: Tensor, coarser: list[Tensor], classes: Tensor | None) -> Tensor:
        """See `Continuous`."""
        with torch.autocast(values.device.type, enabled=False):  # the inverse would not undo what is rounded
            normals, log_scales = self(values, self.conditioning(coarser, classes, len(values)))
            return normal_nats(normals) - log_scales.double()

    def draw(
        self,
        uniforms: Tensor,
        coarser: list[Tensor],
        classes: Tensor | None,
        temperature: float = 1.0,
        known: Known | None = None,
    ) -> Tensor:
        """See `Continuous`."""
        with torch.autocast(uniforms.device.type, enabled=False):
            normals = (normal_quantile(uniforms) * math.sqrt(temperature)).to(self.mean).view(-1, *self.shape)
            return self.inverse(normals, self.conditioning(coarser, classes, len(uniforms)))


def masks_of(shape: Sequence[int]) -> list[Tensor]:
    """Return what couplings leave as it is, in turn, bool (d, h, w): halves of a checkerboard, then of the channels.

    Source: Dinh et al. 2017, section 3.4.
    """
    channels, rows, columns = np.indices(shape) % 2
    parts = [part.astype(bool) for part in (rows ^ columns, channels) if part.any()]
    return [torch.from_numpy(mask) for part in parts for mask in (part, ~part)]
