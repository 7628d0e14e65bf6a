"""Tiny priors with no layer left at a zero start, and what tests ask of them."""

import torch
from torch import nn

from prior import HierarchicalPrior, LevelConfig, LevelPrior, PixelSNAILConfig, TransformerConfig
from prior.decoder import Decoder

SIZES = {
    "transformer": TransformerConfig(width=16, depth=2, heads=2, conditioning_blocks=1),
    "pixelsnail": PixelSNAILConfig(
        width=8, kernel_size=5, blocks=2, residual_blocks=2, heads=2, attention_width=8, conditioning_blocks=1
    ),
}
NETWORKS = tuple(SIZES)


def randomize(module: nn.Module, scale: float = 0.3) -> nn.Module:
    """Draw every parameter, so that none hides a path behind a zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=scale)
    return module.eval()


def tiny_level(
    network: str,
    grids: list[tuple[int, int]],
    codebook_sizes: list[int],
    num_classes: int = 3,
    scale: float = 0.3,
    **changes: object,
) -> LevelPrior:
    size = SIZES[network] if not changes else type(SIZES[network])(**vars(SIZES[network]) | changes)  # type: ignore[arg-type]
    config = LevelConfig(
        level=len(grids) - 1,
        grids=grids,
        codebook_sizes=codebook_sizes,
        class_names=[f"class{number}" for number in range(num_classes)],
        size=size,
    )
    level = LevelPrior(config)
    randomize(level, scale)
    return level.eval()


def tiny_prior(
    network: str, grids: list[tuple[int, int]], codebook_sizes: list[int], num_classes: int = 3, scale: float = 0.3
) -> HierarchicalPrior:
    return HierarchicalPrior(
        [tiny_level(network, grids[: n + 1], codebook_sizes[: n + 1], num_classes, scale) for n in range(len(grids))]
    ).eval()


def draw_codes(grids: list[tuple[int, int]], sizes: list[int], batch: int = 2) -> list[torch.Tensor]:
    return [torch.randint(size, (batch, *grid)) for grid, size in zip(grids, sizes, strict=True)]


@torch.no_grad()
def decoded(decoder: Decoder, codes: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, K) of every position, stepped through with the given codes."""
    steps, previous = [], None
    for position in range(codes[0].numel()):
        steps.append(decoder.step(previous))
        previous = codes.flatten(1)[:, position]
    return torch.stack(steps, 1)


@torch.no_grad()
def assert_causal(logits_of, codes: torch.Tensor, codebook_size: int, next_sees: bool = True) -> None:
    """Perturbing a code moves no logits at or before its position, and does move some after it.

    Without attention the first of a row does not see the last of the row above: `next_sees` is False there.
    """
    before = logits_of(codes).flatten(1, 2)
    length = before.shape[1]
    for position in range(length):
        changed = codes.clone()
        row = changed.view(len(codes), -1)
        row[:, position] = (row[:, position] + 1) % codebook_size
        moved = (logits_of(changed).flatten(1, 2) - before).abs().amax((0, 2))
        assert float(moved[: position + 1].max()) == 0, f"code {position} is seen at or before its own position"
        if position + 1 < length:
            assert float(moved[position + 1 :].max()) > 1e-6, f"code {position} is not seen by any later one"
        if position + 1 < length and (next_sees or (position + 1) % codes.shape[2]):
            assert float(moved[position + 1]) > 1e-6, f"code {position} is not seen by the next"
