"""A Transformer one position at a time: keys and values of all positions lie in place from the start.

A position's features are the columns of a (C, B) matrix, so that each layer is weight @ features: for a few columns
the fastest product there is. All shapes are fixed and the position is a tensor, so that on a GPU a step is one graph.

B batch, C width, h w code grid, K codebook_size, T = h*w, d width of a head, n heads, m of them for keys and values.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from x_transformers.x_transformers import GLU, Attention, AttentionLayers, FeedForward, RMSNorm

from prior.decoding import working_dtype

if TYPE_CHECKING:
    from prior.transformer import CodeTransformer

BUCKET = 64  # attention looks at a multiple of so many positions, masked; a graph is captured for each


def unit_columns(x: Tensor) -> Tensor:
    """Return the columns of (C, B) at length one: RMSNorm but for its gain, which the weight after it takes in."""
    return F.normalize(x, dim=0)


def after_norm(norm: RMSNorm, weight: Tensor) -> Tensor:
    """Return the weight (out, C) of a layer times the gain of the RMSNorm before it."""
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
        self.project = after_norm(norm, projections).to(dtype)
        self.merge = layer.to_out.weight.to(dtype) if isinstance(layer.to_out, nn.Linear) else None
        self.heads, self.kv_heads = layer.heads, layer.kv_heads
        self.head_dim = layer.to_q.out_features // layer.heads
        self.keys, self.values = self.project.new_zeros(2, batch, self.kv_heads, length, self.head_dim)

    def step(self, x: Tensor, turn: tuple[Tensor, Tensor], position: Tensor, mask: Tensor) -> Tensor:
        """Features (C, B) of a position to new features.

        Args:
            x: (C, B).
            turn: cosines and signed sines of the position, (d / 2, 2, 1) each.
            position: int64 (1,).
            mask: (1, length), 0 for the positions to look at and -inf for others.
        """
        heads = (self.project @ unit_columns(x)).unflatten(0, (-1, self.head_dim))  # (n + m + m, d, B)
        pairs = heads[: -self.kv_heads].unflatten(1, (-1, 2))  # (n + m, d / 2, 2, B)
        turned = (pairs * turn[0] + pairs.flip(2) * turn[1]).flatten(1, 2).to(heads.dtype)
        for kept, new in ((self.keys, turned[self.heads :]), (self.values, heads[-self.kv_heads :])):
            kept.index_copy_(2, position, new.permute(2, 0, 1)[:, :, None])
        # Heads that share keys are queries of one attention: query head r * m + i goes with key head i.
        query = turned[: self.heads].unflatten(0, (-1, self.kv_heads)).permute(3, 1, 0, 2).contiguous()
        length = mask.shape[1]
        attended = F.scaled_dot_product_attention(
            query, self.keys[:, :, :length], self.values[:, :, :length], attn_mask=mask
        )  # (B, m, n / m, d)
        merged = attended.permute(2, 1, 3, 0).flatten(0, 2)  # (C, B)
        return x + (merged if self.merge is None else self.merge @ merged)


class GatedFeedForward:
    """Norm, SwiGLU feed-forward and residual of x-transformers for one position."""

    def __init__(self, norm: RMSNorm, layer: FeedForward, dtype: torch.dtype) -> None:
        first, last = layer.ff[0].proj, layer.ff[2]
        self.first = after_norm(norm, first.weight).to(dtype)
        self.last = last.weight.to(dtype)
        self.biases = [linear.bias[:, None].to(dtype) for linear in (first, last)]

    def step(self, x: Tensor) -> Tensor:
        """Features (C, B) of a position to new features."""
        up, gate = torch.addmm(self.biases[0], self.first, unit_columns(x)).chunk(2)
        return x + torch.addmm(self.biases[1], self.last, up * F.silu(gate))


class CachedDecoder:
    """Decoder of a `CodeTransformer` that computes each position once; see `prior.decoding.Decoder`.

    Args:
        network: in eval mode; its weights are copied, laid out anew.
        condition: (B, C, h, w).
    """

    @torch.no_grad()
    def __init__(self, network: "CodeTransformer", condition: Tensor) -> None:
        check_layers(network.layers)
        batch, length, dtype = len(condition), condition[0, 0].numel(), working_dtype(condition)
        kept = -(-length // BUCKET) * BUCKET
        layers = network.layers.layers
        self.layers = [
            (
                CachedAttention(attention[0][0], attention[1], dtype, batch, kept),
                GatedFeedForward(feed_forward[0][0], feed_forward[1], dtype),
            )
            for attention, feed_forward in zip(layers[::2], layers[1::2], strict=True)
        ]
        self.head = after_norm(network.layers.final_norm, network.head.weight).to(dtype)
        self.head_bias = network.head.bias[:, None].to(dtype)
        # What precedes the first code is one more code.
        self.embedding = torch.cat([network.embedding.weight, network.start[None]])
        self.condition = condition.flatten(2).permute(2, 1, 0).contiguous()  # (T, C, B)
        angles = network.angles[0].unflatten(1, (-1, 2))[..., None]  # (T, d / 2, 2, 1)
        self.turns = angles.cos(), angles.sin() * angles.new_tensor([-1.0, 1.0])[:, None]
        self.code = torch.full((batch,), len(network.embedding.weight), device=condition.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=condition.device)
        self.places = torch.arange(kept, device=condition.device)
        self.steps = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def step(self, previous: Tensor | None) -> Tensor:
        """See `prior.decoding.Decoder.step`."""
        if previous is not None:
            self.code.copy_(previous)
        self.position.fill_(self.steps)
        length = (self.steps // BUCKET + 1) * BUCKET
        logits = self._replayed_logits(length) if self.code.is_cuda else self._logits(length)
        self.steps += 1
        return logits

    def _replayed_logits(self, length: int) -> Tensor:
        """Return `_logits` by one launch: a step's hundreds of small kernels would wait for Python."""
        if self.graph is None or self.steps % BUCKET == 0:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._logits(length)  # libraries set themselves up, which a capture does not allow
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.graph_logits = self._logits(length)
        self.graph.replay()
        return self.graph_logits.clone()  # the next replay writes to the same place

    def _logits(self, length: int) -> Tensor:
        """Return the logits (B, K) at self.position after self.code, looking at the first `length` places."""
        x = self.embedding.index_select(0, self.code).t() + self.condition.index_select(0, self.position)[0]
        cosine, sine = (table.index_select(0, self.position)[0] for table in self.turns)
        mask = torch.zeros(1, length, dtype=self.head.dtype, device=x.device)
        mask = mask.masked_fill(self.places[:length] > self.position, -torch.inf)
        for attention, feed_forward in self.layers:
            x = feed_forward.step(attention.step(x, (cosine, sine), self.position, mask))
        return torch.addmm(self.head_bias, self.head, unit_columns(x)).t().contiguous()


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
