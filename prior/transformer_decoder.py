"""A Transformer one position at a time: keys and values of all positions lie in place from the start.

All shapes are fixed, and position and code are tensors, so that on a GPU a position, its draw included, is one graph.

B batch, C width, h w code grid, K codebook_size, T = h*w, d width of a head, n heads, m of them for keys and values.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from x_transformers.x_transformers import GLU, Attention, AttentionLayers, FeedForward, RMSNorm

from prior.decoder import UNKNOWN, Choose, chosen_unless_known, working_dtype
from prior.packed_linear import PackedLinear
from prior.transformer import CodeTransformer

BUCKET = 64  # attention looks at a multiple of so many positions, masked; a graph is captured for each


def after_norm(norm: RMSNorm, weight: Tensor) -> Tensor:
    """Return the weight (out, C) of a layer times the gain of the RMSNorm before it, whose norm alone remains."""
    return weight * (norm.g + float(norm.unit_offset)) * norm.scale


class CachedAttention:
    """Norm, attention and residual of x-transformers for one position, keys and values written in place.

    Args:
        norm: its gain is multiplied into the projections.
        layer: queries, keys and values become one product.
        dtype: of weights, keys and values.
        batch: B.
        length: positions that are kept.
    """

    def __init__(self, norm: RMSNorm, layer: Attention, dtype: torch.dtype, batch: int, length: int) -> None:
        projections = torch.cat([layer.to_q.weight, layer.to_k.weight, layer.to_v.weight])
        self.project = PackedLinear(after_norm(norm, projections), None, dtype)
        merge = isinstance(layer.to_out, nn.Linear)
        self.merge = PackedLinear(layer.to_out.weight, None, dtype) if merge else None
        self.heads, self.kv_heads = layer.heads, layer.kv_heads
        self.head_dim = layer.to_q.out_features // layer.heads
        shape = (batch, 2 * self.kv_heads, length, self.head_dim)  # keys, then values
        self.kept = torch.zeros(shape, dtype=dtype, device=projections.device)

    def step(self, x: Tensor, turn: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        """Features (B, C) of a position to new features.

        Args:
            x: (B, C).
            turn: e to the i times the position's angles, complex (d / 2,).
            position: int64 (1,).
            mask: (1, length), 0 for the positions to look at and -inf for others.
        """
        heads = self.project(F.normalize(x, dim=1)).unflatten(1, (-1, self.head_dim))  # (B, n + m + m, d)
        turned, values = heads.split([self.heads + self.kv_heads, self.kv_heads], 1)
        pairs = torch.view_as_complex(turned.float().unflatten(2, (-1, 2)))  # (B, n + m, d / 2)
        turned = torch.view_as_real(pairs * turn).flatten(2).to(heads.dtype)
        query, keys = turned.split([self.heads, self.kv_heads], 1)
        self.kept.index_copy_(2, position, torch.cat([keys, values], 1)[:, :, None])
        # Heads that share keys are queries of one attention: query head r * m + i goes with key head i.
        query = query.unflatten(1, (-1, self.kv_heads)).transpose(1, 2)  # (B, m, n / m, d)
        keys, values = self.kept[:, :, : mask.shape[1]].chunk(2, 1)  # (B, m, length, d)
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        merged = attended.transpose(1, 2).flatten(1)  # (B, C)
        return x + (merged if self.merge is None else self.merge(merged))


class GatedFeedForward:
    """Norm, SwiGLU feed-forward and residual of x-transformers for one position."""

    def __init__(self, norm: RMSNorm, layer: FeedForward, dtype: torch.dtype) -> None:
        first, last = layer.ff[0].proj, layer.ff[2]
        self.first = PackedLinear(after_norm(norm, first.weight), first.bias, dtype)
        self.last = PackedLinear(last.weight, last.bias, dtype)

    def step(self, x: Tensor) -> Tensor:
        """Features (B, C) of a position to new features."""
        up, gate = self.first(F.normalize(x, dim=1)).chunk(2, 1)
        return x + self.last(up * F.silu(gate))


class TransformerDecoder:
    """Decoder of a `CodeTransformer` that computes each position once; see `prior.decoder.Decoder`.

    Args:
        network: in eval mode; its weights are copied, laid out anew.
        condition: (B, C, h, w).
    """

    @torch.no_grad()
    def __init__(self, network: CodeTransformer, condition: Tensor) -> None:
        check_layers(network.layers)
        self.batch, self.length = len(condition), condition[0, 0].numel()
        dtype, kept = working_dtype(condition), -(-self.length // BUCKET) * BUCKET
        layers = network.layers.layers
        self.layers = [
            (
                CachedAttention(attention[0][0], attention[1], dtype, self.batch, kept),
                GatedFeedForward(feed_forward[0][0], feed_forward[1], dtype),
            )
            for attention, feed_forward in zip(layers[::2], layers[1::2], strict=True)
        ]
        self.head = PackedLinear(after_norm(network.layers.final_norm, network.head.weight), network.head.bias, dtype)
        # What precedes the first code is one more code.
        self.embedding = torch.cat([network.embedding.weight, network.start[None]])
        angles = network.angles[0, :, ::2].float()
        self.turns = torch.polar(torch.ones_like(angles), angles)  # (T, d / 2)
        device = condition.device
        self.code = torch.zeros(self.batch, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.places = torch.arange(kept, device=device)
        self.condition = torch.empty(self.length, self.batch, condition.shape[1], device=device)
        self.uniforms = torch.empty(self.length, self.batch, dtype=torch.float64, device=device)
        self.drawn = torch.empty(self.length, self.batch, dtype=torch.int64, device=device)
        self.known = torch.empty(self.length, self.batch, dtype=torch.int64, device=device)
        self.choose: Choose | None = None  # that of the graphs
        self.graphs: dict[int, Callable[[], None]] = {}  # by the places that attention looks at
        if condition.is_cuda:  # what all graphs share: where they are captured, and where temporaries lie
            self.capture = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.restart(condition)

    @torch.no_grad()
    def restart(self, condition: Tensor) -> None:
        """See `prior.decoder.Decoder.restart`."""
        self.condition.copy_(condition.flatten(2).permute(2, 0, 1))  # (T, B, C)
        self.code.fill_(len(self.embedding) - 1)
        self.position.zero_()
        self.steps = 0

    @torch.no_grad()
    def step(self, previous: Tensor | None) -> Tensor:
        """See `prior.decoder.Decoder.step`."""
        if previous is not None:
            self.code.copy_(previous)
        self.position.fill_(self.steps)
        self.steps += 1
        return self._logits(-(-self.steps // BUCKET) * BUCKET)

    @torch.no_grad()
    def draw(self, choose: Choose, uniforms: Tensor, known: Tensor | None = None) -> Tensor:
        """See `prior.decoder.Decoder.draw`."""
        self.uniforms.copy_(uniforms.t())
        if known is None:
            self.known.fill_(UNKNOWN)
        else:
            self.known.copy_(known.t())
        if choose != self.choose:
            self.choose = choose
            self.graphs.clear()
        with torch.cuda.device_of(self.code):
            for first in range(0, self.length, BUCKET):
                draw_one = self._drawing(choose, first + BUCKET)
                for _ in range(min(BUCKET, self.length - first)):
                    draw_one()
        return self.drawn.t().clone()

    def _drawing(self, choose: Choose, places: int) -> Callable[[], None]:
        """Return what draws the next position: plain on a CPU, a graph on a GPU."""
        one = partial(self._draw_position, choose, places)
        if not self.code.is_cuda:
            return one
        if places not in self.graphs:
            self.graphs[places] = captured(one, [self.code, self.position], *self.capture)
        return self.graphs[places]

    def _draw_position(self, choose: Choose, places: int) -> None:
        """Draw the codes at self.position into self.drawn, and move on."""
        uniform = self.uniforms.index_select(0, self.position)[0]
        known = self.known.index_select(0, self.position)[0]
        self.code.copy_(chosen_unless_known(choose(self._logits(places), uniform), known))
        self.drawn.index_copy_(0, self.position, self.code[None])
        self.position += 1

    def _logits(self, places: int) -> Tensor:
        """Return the logits (B, K) at self.position after self.code, looking at so many places from the first."""
        x = self.embedding.index_select(0, self.code) + self.condition.index_select(0, self.position)[0]
        turn = self.turns.index_select(0, self.position)[0]
        mask = torch.zeros(1, places, dtype=self.head.dtype, device=x.device)
        mask = mask.masked_fill(self.places[:places] > self.position, -torch.inf)
        for attention, feed_forward in self.layers:
            x = feed_forward.step(attention.step(x, turn, self.position, mask))
        return self.head(F.normalize(x, dim=1))


def captured(work: Callable[[], None], state: list[Tensor], side: torch.cuda.Stream, pool: Any) -> Callable[[], None]:
    """Return work on fixed tensors as one launch: its hundreds of small kernels would wait for Python one by one.

    Args:
        work: reads and writes the same memory at each call, on the current device.
        state: what a call changes and the next one depends on; put back after the calls that capturing takes.
        side: the stream to capture on.
        pool: of memory, which graphs may share that are replayed one at a time.
    """
    before = [tensor.clone() for tensor in state]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()  # libraries set themselves up, which a capture does not allow
    torch.cuda.current_stream().wait_stream(side)
    for tensor, value in zip(state, before, strict=True):
        tensor.copy_(value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
        work()  # notes the kernels down without running them
    return graph.replay


def check_layers(stack: AttentionLayers) -> None:
    """Assert that the stack holds the layers that this file computes by hand, and their parameters alone.

    x-transformers has many options; one that is not known here would make other logits without a word.
    """
    for number, (norms, layer, _) in enumerate(stack.layers):
        assert type(norms[0]) is RMSNorm and norms[1] is norms[2] is None, "a layer must start, not end, in RMSNorm"
        assert type(layer) is (FeedForward if number % 2 else Attention), "attention must alternate with feed-forward"
        names = {name for name, _ in layer.named_parameters()}
        if isinstance(layer, Attention):
            known = {"to_q.weight", "to_k.weight", "to_v.weight", "to_out.weight"}
            assert known - {"to_out.weight"} <= names <= known, f"attention must hold {known}, got {names}"
            assert not layer.qk_norm and layer.rotate_num_heads == layer.heads, "heads must be turned whole, unnormed"
        else:
            known = {"ff.0.proj.weight", "ff.0.proj.bias", "ff.2.weight", "ff.2.bias"}
            assert names == known, f"feed-forward must hold {known}, got {names}"
            assert type(layer.ff[0]) is GLU and type(layer.ff[0].act) is nn.SiLU, "feed-forward must be SwiGLU"
    assert type(stack.final_norm) is RMSNorm, "the stack must end in RMSNorm"
