"""PixelSNAIL one position at a time: every layer keeps what later positions will ask of it.

Each layer is one product of the features (B, C) of a position, so that sampling is bound by reading the weights once a
position.

B batch, C width, h w code grid, K codebook_size, T = h*w, d width of a head.

Source: Ramachandran et al. 2017, "Fast Generation for Convolutional Autoregressive Models".
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prior.decoder import Choose, draw_by_steps, working_dtype
from prior.packed_linear import PackedLinear
from prior.pixelsnail import CausalAttention, CausalConv2d, GatedResidualBlock, PixelSNAIL


class Place(NamedTuple):
    """Where a position lies: its index in raster order, its row and its column."""

    position: int
    row: int
    column: int


def pointwise(layer: nn.Conv2d, dtype: torch.dtype, channels: slice = slice(None), bias: bool = True) -> PackedLinear:
    """Return a 1x1 convolution, or the part of one that sees the given slice of its input channels."""
    return PackedLinear(layer.weight[:, channels, 0, 0], layer.bias if bias else None, dtype)


class IncrementalConvolution:
    """A `CausalConv2d` whose inputs arrive one by one.

    Only the rows that a position can see are kept, in a ring: row r lies at r modulo their number. Their margins, and
    the rows above the first, stay zero.

    Args:
        layer: its kernels, flattened side by side, become one matrix over all positions in sight.
        dtype: of weights and kept inputs.
        batch: B.
        columns: w.
    """

    def __init__(self, layer: CausalConv2d, dtype: torch.dtype, batch: int, columns: int) -> None:
        kernels = [layer.above.weight, layer.left.weight]  # (out, in, rows, columns) each
        flat = torch.cat([kernel.permute(0, 2, 3, 1).flatten(1) for kernel in kernels], 1)
        self.linear = PackedLinear(flat, layer.above.bias, dtype)
        self.reach = layer.reach
        self.left = layer.left.kernel_size[1]
        shape = (self.reach + 1, batch, columns + 2 * self.reach, layer.left.in_channels)
        self.rows = torch.zeros(shape, dtype=dtype, device=flat.device)

    def clear(self) -> None:
        """Forget all inputs: what lies above the first row is zero again."""
        self.rows.zero_()

    def put(self, x: Tensor, place: Place) -> None:
        """Keep the input (B, in_channels) of a place."""
        self.rows[place.row % len(self.rows), :, place.column + self.reach] = x

    def output(self, place: Place) -> Tensor:
        """Return the output (B, out_channels) at a place; all inputs that it sees have been put."""
        _, row, column = place
        sights = [(row - distance, 2 * self.reach + 1) for distance in range(self.reach, 0, -1)] + [(row, self.left)]
        seen = [self.rows[above % len(self.rows), :, column : column + length] for above, length in sights]
        return self.linear(torch.cat(seen, 1).flatten(1))


class IncrementalBlock:
    """A `GatedResidualBlock` whose inputs arrive one by one."""

    def __init__(self, block: GatedResidualBlock, dtype: torch.dtype, batch: int, columns: int) -> None:
        self.first = IncrementalConvolution(block.first, dtype, batch, columns)
        self.second = IncrementalConvolution(block.second, dtype, batch, columns)
        self.condition = pointwise(block.condition, dtype)

    def start_row(self, condition: Tensor) -> None:
        """Take the condition of a whole row, (w, B, C), in one product."""
        self.conditions = self.condition(condition)

    def step(self, x: Tensor, previous: Tensor, place: Place) -> Tensor:
        """Features (B, C) of a place, and the embedding (B, C) of the code before it, to new features."""
        self.first.put(F.elu(x), place)
        hidden = self.first.output(place) + self.conditions[place.column]
        self.second.put(F.elu(hidden), place)
        return x + F.glu(self.second.output(place), dim=1)


class IncrementalAttention:
    """A `CausalAttention` whose inputs arrive one by one; keys and values of all positions so far are kept."""

    def __init__(self, layer: CausalAttention, dtype: torch.dtype, batch: int, length: int) -> None:
        width = layer.merge.out_channels
        self.query = pointwise(layer.query, dtype, slice(width), bias=False)
        self.query_condition = pointwise(layer.query, dtype, slice(width, None))
        self.key_value = pointwise(layer.key_value, dtype, slice(2 * width), bias=False)
        self.key_value_condition = pointwise(layer.key_value, dtype, slice(2 * width, None))
        self.merge, self.gate = pointwise(layer.merge, dtype), pointwise(layer.gate, dtype)
        self.heads = layer.heads
        head_dim = layer.merge.in_channels // layer.heads
        shape = (2, batch, layer.heads, length, head_dim)
        self.keys, self.values = torch.zeros(shape, dtype=dtype, device=layer.merge.weight.device)

    def start_row(self, condition: Tensor) -> None:
        """Take the condition of a whole row, (w, B, C), in one product each."""
        self.query_conditions = self.query_condition(condition)
        self.key_value_conditions = self.key_value_condition(condition)

    def step(self, x: Tensor, previous: Tensor, place: Place) -> Tensor:
        """Features (B, C) of a place, and the embedding (B, C) of the code before it, to new features."""
        query = self.query(x) + self.query_conditions[place.column]
        key_value = self.key_value(torch.cat([x, previous], 1)) + self.key_value_conditions[place.column]
        seen = place.position + 1
        for kept, new in zip((self.keys, self.values), key_value.chunk(2, 1), strict=True):
            kept[:, :, place.position] = new.unflatten(1, (self.heads, -1))
        query = query.unflatten(1, (self.heads, 1, -1))  # (B, n, 1, d)
        attended = F.scaled_dot_product_attention(query, self.keys[:, :, :seen], self.values[:, :, :seen])
        merged = self.merge(attended.flatten(1))  # (B, C)
        return x + F.glu(self.gate(F.elu(merged + x)), dim=1)


class PixelSNAILDecoder:
    """Decoder of a `PixelSNAIL` that computes each position once; see `prior.decoder.Decoder`.

    What depends on the condition alone is computed a row at a time: once a position would read those weights w times
    as often, the whole grid at once would keep T rows a layer.

    Args:
        network: in eval mode; kernels are copied, laid out anew.
        condition: (B, C, h, w).
    """

    @torch.no_grad()
    def __init__(self, network: PixelSNAIL, condition: Tensor) -> None:
        b, _, h, w = condition.shape
        dtype = working_dtype(condition)
        self.embedding = network.embedding
        self.start = IncrementalConvolution(network.start, dtype, b, w)
        self.layers: list[IncrementalBlock | IncrementalAttention] = []
        for number, stack in enumerate(network.stacks):
            self.layers.extend(IncrementalBlock(block, dtype, b, w) for block in stack)
            if len(network.attentions):
                self.layers.append(IncrementalAttention(network.attentions[number], dtype, b, h * w))
        self.head = pointwise(network.head, dtype)
        self.restart(condition)

    @torch.no_grad()
    def step(self, previous: Tensor | None) -> Tensor:
        """See `prior.decoder.Decoder.step`."""
        place = self._place(self.position)
        if place.column == 0:
            self._start_row(place.row)
        if previous is None:
            embedded = torch.zeros_like(self.conditions[0])
        else:
            embedded = self.embedding(previous)  # (B, C)
            self.start.put(embedded, self._place(self.position - 1))
        x = self.start.output(place) + self.conditions[place.column]
        for layer in self.layers:
            x = layer.step(x, embedded, place)
        self.position += 1
        return self.head(F.elu(x))

    def draw(self, choose: Choose, uniforms: Tensor, known: Tensor | None = None) -> Tensor:
        """See `prior.decoder.Decoder.draw`."""
        return draw_by_steps(self, choose, uniforms, known)

    def restart(self, condition: Tensor) -> None:
        """See `prior.decoder.Decoder.restart`."""
        self.condition = condition
        self.position = 0
        self.start.clear()
        for layer in self.layers:
            if isinstance(layer, IncrementalBlock):
                layer.first.clear()
                layer.second.clear()

    def _place(self, position: int) -> Place:
        return Place(position, *divmod(position, self.condition.shape[3]))

    def _start_row(self, row: int) -> None:
        self.conditions = self.condition[:, :, row].permute(2, 0, 1).contiguous()  # (w, B, C)
        for layer in self.layers:
            layer.start_row(self.conditions)
