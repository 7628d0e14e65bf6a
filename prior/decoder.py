"""Decoders: one position's logits after another, for sampling.

B batch, C width, h w code grid, K codebook_size.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

# From logits (B, K) and uniforms (B,) of one position to its codes, int64 (B,). Equal ones choose alike.
Choose = Callable[[Tensor, Tensor], Tensor]

# Stands for a code that is not known.
UNKNOWN = -1


class Decoder(Protocol):
    """Yields the logits of position 0, 1, 2, … in raster order, told each drawn code in turn."""

    def step(self, previous: Tensor | None) -> Tensor:
        """Return the logits (B, K) of the next position; previous is int64 (B,), None at the first."""
        ...

    def draw(self, choose: Choose, uniforms: Tensor, known: Tensor | None = None) -> Tensor:
        """Return the codes int64 (B, T) of all positions, from position 0 on.

        Args:
            choose: a code by its uniform.
            uniforms: (B, T).
            known: int64 (B, T), codes that are not chosen, their uniforms unread; -1 where one is to be; None for none.
        """
        ...

    def restart(self, condition: Tensor) -> None:
        """Begin again at position 0, under another condition (B, C, h, w) of the same shape."""
        ...


# Decoders of earlier batches, by level, shape of the condition, and type of products.
Decoders = dict[tuple[int, torch.Size, torch.dtype], Decoder]


def draw_by_steps(decoder: Decoder, choose: Choose, uniforms: Tensor, known: Tensor | None = None) -> Tensor:
    """Draw with a decoder's steps; see `Decoder.draw`."""
    given = torch.full(uniforms.shape, UNKNOWN, device=uniforms.device) if known is None else known
    codes: list[Tensor] = []
    for uniform, code in zip(uniforms.t(), given.t(), strict=True):
        codes.append(chosen_unless_known(choose(decoder.step(codes[-1] if codes else None), uniform), code))
    return torch.stack(codes, 1)


def chosen_unless_known(chosen: Tensor, known: Tensor) -> Tensor:
    """Return the codes of a position (B,): those that are known, else those that were chosen."""
    return torch.where(known == UNKNOWN, chosen, known)


def working_dtype(like: Tensor) -> torch.dtype:
    """Return the type that matrix products take here: autocast's where it is on, otherwise that of the tensor.

    Decoders lay weights out in it once: autocast would cast them at every position.
    """
    device = like.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype


class RecomputingDecoder:
    """Calls the whole network for every position: slow, plain, and the measure of every faster decoder.

    Args:
        network: maps codes (B, h, w) and condition (B, C, h, w) to logits (B, h, w, K).
        condition: (B, C, h, w).
    """

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor], condition: Tensor) -> None:
        self.network = network
        self.restart(condition)

    def step(self, previous: Tensor | None) -> Tensor:
        """See `Decoder.step`."""
        if previous is not None:
            self.codes.view(len(previous), -1)[:, self.position - 1] = previous
        logits = self.network(self.codes, self.condition).flatten(1, 2)[:, self.position]
        self.position += 1
        return logits

    def draw(self, choose: Choose, uniforms: Tensor, known: Tensor | None = None) -> Tensor:
        """See `Decoder.draw`."""
        return draw_by_steps(self, choose, uniforms, known)

    def restart(self, condition: Tensor) -> None:
        """See `Decoder.restart`."""
        self.condition = condition
        b, _, h, w = condition.shape
        self.codes = torch.zeros(b, h, w, dtype=torch.int64, device=condition.device)
        self.position = 0
