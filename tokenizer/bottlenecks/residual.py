"""Residual quantisation: each of several codebooks takes what those before it have left.

B batch, K codebook_size, D code_dim, h w grid, N latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from tokenizer.bottlenecks.bottleneck import Bottled, Place, Settings, VectorSizes
from tokenizer.bottlenecks.codebook import Codebook, passed_back
from tokenizer.bottlenecks.ema import CodebookEMA, EMAConfig
from tokenizer.bottlenecks.usage import CodeUsage
from tokenizer.checks import Float32Module

# Statistics of one codebook's average.
STATISTICS = 3


@dataclass(frozen=True, kw_only=True)
class ResidualConfig(Settings):
    """A chain of EMA codebooks.

    Attributes:
        depth: codebooks, and so grids of codes of one stride.
        ema: how each of them learns.
    """

    of_model: ClassVar[tuple[str, ...]] = ("depth",)
    unread: ClassVar[tuple[str, ...]] = ("normalize",)
    called: ClassVar[str] = "VQ-VAE of residual codebooks"
    mend: ClassVar[str] = EMAConfig.mend

    depth: int = 2
    ema: EMAConfig = field(default_factory=EMAConfig)

    def __post_init__(self) -> None:
        if not 1 <= self.depth <= 16:
            raise ValueError(f"depth must lie in 1 to 16, got {self.depth}")

    def build(self, sizes: VectorSizes) -> "Residual":
        """Return the codebooks of one level, all of K vectors."""
        return Residual(sizes.codebook_size, sizes.code_dim, self.depth, self.ema.gradient)

    def weights(self, num_levels: int, num_values: int) -> dict[str, float]:
        """Return the weight of the commitment, of its mean over codebooks and levels."""
        return self.ema.weights(num_levels, num_values)

    def learner(self, bottleneck: "Residual") -> "ResidualEMA":
        """Return the running counts and sums of all codebooks."""
        return ResidualEMA(bottleneck, self.ema)


class Residual(Float32Module):
    """The sum of one vector of each codebook; the i-th is nearest to what the first i - 1 have left.

    The loss "commitment" is the mean over codebooks of the squared distance of latents to the sum so far.

    Source: Zeghidour et al. 2021, algorithm 1; Lee et al. 2022, equation 7 (commitment).

    Args:
        codebook_size: K.
        code_dim: D.
        depth: codebooks.
        gradient: see `EMAConfig`.
    """

    books: Sequence[Codebook]
    noise_channels = 0

    def __init__(self, codebook_size: int, code_dim: int, depth: int, gradient: str = "straight") -> None:
        super().__init__()
        self.features = self.channels = code_dim
        self.sizes, self.gradient = (codebook_size,) * depth, gradient
        self.books = nn.ModuleList(Codebook(codebook_size, code_dim) for _ in range(depth))  # type: ignore[assignment]

    def forward(self, latents: Tensor, noise: Tensor | None = None) -> Bottled:
        """Quantise latents (B, D, h, w); see `Codebook`."""
        parts = []
        left = latents.float()
        for book in self.books:
            parts.append(book(left))
            left = left - parts[-1].seen.detach()
        nearest = sum((part.seen.detach() for part in parts), start=torch.zeros_like(left))
        return Bottled(
            seen=passed_back(latents.float(), nearest, self.gradient, 1),
            stored=tuple(part.stored[0] for part in parts),
            losses={"commitment": torch.stack([part.losses["commitment"] for part in parts]).mean(0)},
            observed=parts[0].observed,
        )

    def lookup(self, stored: Sequence[Tensor | np.ndarray]) -> Tensor:
        """Return the sum of the vectors (B, D, h, w) of as many grids of codes as there are codebooks."""
        vectors = [book.lookup([codes]) for book, codes in zip(self.books, stored, strict=True)]
        return sum(vectors[1:], start=vectors[0])

    def blank(self) -> Tensor:
        """Return the sum of the mean vectors (D,)."""
        return torch.stack([book.blank() for book in self.books]).sum(0)

    def figures(self) -> CodeUsage:
        """Return perplexity and usage of each codebook, which have seen nothing yet."""
        return CodeUsage(self.sizes, self.books[0].vectors.device)


class ResidualEMA(nn.Module):
    """A `CodebookEMA` for each codebook, which sees what those before have left.

    Args:
        bottleneck: the codebooks.
        config: how each learns.
    """

    each: Sequence[CodebookEMA]

    def __init__(self, bottleneck: Residual, config: EMAConfig) -> None:
        super().__init__()
        self.each = nn.ModuleList(CodebookEMA(book, config) for book in bottleneck.books)  # type: ignore[assignment]

    @torch.no_grad()
    def start(self, bottleneck: Residual, observed: Tensor, seed: int) -> None:
        """Set each codebook to the k-means centres of what is left of latents (N, D)."""
        left = observed
        for depth, (book, ema) in enumerate(zip(bottleneck.books, self.each, strict=True)):
            ema.start(book, left, seed + 101 * depth)
            left = left - _nearest(book, left)

    @torch.no_grad()
    def statistics(self, bottleneck: Residual, output: Bottled, place: Place) -> list[Tensor]:
        """Return the sums over a micro-batch of all codebooks; see `CodebookEMA`."""
        left = output.observed
        found: list[Tensor] = []
        for book, ema, codes in zip(bottleneck.books, self.each, output.stored, strict=True):
            found += ema.statistics(book, output._replace(stored=(codes,), observed=left), place)
            left = left - book.table[codes.flatten()]
        return found

    @torch.no_grad()
    def update(self, bottleneck: Residual, statistics: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Take one step of all; return "revived" (depth,)."""
        counted = []
        for depth, (book, ema) in enumerate(zip(bottleneck.books, self.each, strict=True)):
            own = statistics[STATISTICS * depth : STATISTICS * (depth + 1)]
            counted.append(ema.update(book, own, step)["revived"])
        return {"revived": torch.stack(counted)}


def _nearest(book: Codebook, latents: Tensor) -> Tensor:
    """Return the nearest vector of each latent (N, D)."""
    return book(latents[:, :, None, None]).seen[:, :, 0, 0]
