"""The EMA codebook: its vectors are exponential moving averages of the latents assigned to each.

K codebook_size, D code_dim, N latents of one rank's micro-batch, R revival candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.bottlenecks.bottleneck import Bottled, Place, Settings, VectorSizes
from tokenizer.bottlenecks.codebook import Codebook
from tokenizer.bottlenecks.kmeans import counts_and_sums, kmeans

# At most this many codes are revived in one step; the rest wait for the next.
MAX_REVIVED = 256


@dataclass(frozen=True, kw_only=True)
class EMAConfig(Settings):
    """How EMA codebooks learn.

    Attributes:
        decay: share of the running counts and sums kept at each optimizer step, once they are grown; see
            `young_decay`.
        commitment_weight: weight of the commitment loss beside the reconstruction loss.
        kmeans_iterations: Lloyd iterations of the start from the first batch; 0 starts from latents drawn from it.
        revival_threshold: a code whose running count falls under this share of the mean count is replaced by a
            latent of the current batch; 0 turns revival off.
        gradient: how that of the decoder goes back to latents: "straight", as if the codebook were not there, or
            "rotation" (Fifty et al. 2024).
    """

    called: ClassVar[str] = "VQ-VAE"
    mend: ClassVar[str] = "a lower learning rate, a higher revival_threshold or fewer codes"

    decay: float = 0.99
    commitment_weight: float = 0.25
    kmeans_iterations: int = 10
    revival_threshold: float = 0.05
    gradient: Literal["straight", "rotation"] = field(default="straight", metadata={"introduced": "straight"})

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {self.decay}")
        if self.commitment_weight < 0:
            raise ValueError(f"commitment_weight must not be negative, got {self.commitment_weight}")
        if self.kmeans_iterations < 0:
            raise ValueError(f"kmeans_iterations must not be negative, got {self.kmeans_iterations}")
        if not 0 <= self.revival_threshold < 1:
            raise ValueError(f"revival_threshold must lie in [0, 1), got {self.revival_threshold}")

    def build(self, sizes: VectorSizes) -> Codebook:
        """Return a codebook for one level."""
        return Codebook(sizes.codebook_size, sizes.code_dim, sizes.normalize, gradient=self.gradient)

    def weights(self, num_levels: int, num_values: int) -> dict[str, float]:
        """Return the weight of the commitment: beta of equation 3, of the mean over levels."""
        return {"commitment": self.commitment_weight / num_levels}

    def learner(self, bottleneck: Codebook) -> "CodebookEMA":
        """Return the running counts and sums of a codebook."""
        return CodebookEMA(bottleneck, self)


def young_decay(decay: float, step: int) -> float:
    """Return the decay of an average that forgets its start sooner while it is young: min(decay, (1 + n) / (10 + n)).

    In its first hundred steps an encoder's latents grow tenfold and more. Codes that trail behind them leave the
    decoder so little of a coarse level that it may learn to do without.

    Args:
        decay: of the grown average.
        step: n, steps taken before this one.
    """
    return min(decay, (1 + step) / (10 + step))


class Statistics(NamedTuple):
    """Sums over latents that add up over micro-batches and ranks.

    Attributes:
        counts: float32 (K,), latents assigned to each code.
        sums: float32 (K, D), their sums.
        candidates: float32 (R, D), latents that may replace dead codes; zero where another rank or micro-batch
            holds the latent, so that addition merges them too.
    """

    counts: Tensor
    sums: Tensor
    candidates: Tensor


def candidate_positions(num_latents: int, codebook_size: int, seed: int) -> Tensor:
    """Draw which latents of the global batch may replace dead codes: int64 (R,) in [0, num_latents).

    A function of its arguments alone, so that every rank draws the same ones.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(num_latents, (min(codebook_size, MAX_REVIVED),), generator=generator)


def take_owned(latents: Tensor, positions: Tensor, offset: int) -> Tensor:
    """Return the latents (N, D) at the given positions of the global batch, zero where they lie elsewhere.

    Args:
        latents: float32 (N, D), this micro-batch's part of the global batch.
        positions: int64 (R,), positions in the global batch.
        offset: position of the first of these latents in the global batch.
    """
    # A blocking copy would make the host wait for the device at every step.
    local = positions.to(latents.device, non_blocking=True) - offset
    owned = (local >= 0) & (local < len(latents))
    return torch.where(owned[:, None], latents[local.clamp(0, len(latents) - 1)], 0.0)


def assignment_statistics(output: Bottled, codebook_size: int, candidates: Tensor) -> Statistics:
    """Sum the latents of each code, without a one-hot matrix.

    Args:
        output: what the codebook made of this micro-batch.
        codebook_size: K.
        candidates: float32 (R, D), from `take_owned`.
    """
    return Statistics(*counts_and_sums(output.observed, output.stored[0].flatten(), codebook_size), candidates)


class CodebookEMA(nn.Module):
    """The running counts and sums behind one codebook: N_i and m_i of the paper, in float32.

    They are the state of training, not of the model: the exported tokenizer has none.

    Departure from the paper: a code without latents in a step keeps its vector exactly, and a code out of use is
    revived, so no Laplace smoothing is needed.

    Source: van den Oord et al. 2017, appendix A.1, equations 6 to 8.
    """

    counts: Tensor
    sums: Tensor

    def __init__(self, codebook: Codebook, config: EMAConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("counts", torch.ones(len(codebook.vectors)))
        self.register_buffer("sums", codebook.vectors.clone())

    @torch.no_grad()
    def start(self, codebook: Codebook, latents: Tensor, seed: int) -> None:
        """Set the codebook to the k-means centres of latents.

        Args:
            codebook: the one to set.
            latents: float32 (N, D), the same on every rank.
            seed: draws the first centres.
        """
        size = len(codebook.vectors)
        centres = kmeans(latents, size, self.config.kmeans_iterations, codebook.normalize, seed)
        codebook.vectors.copy_(centres)
        self.counts.fill_(len(latents) / size)
        self.sums.copy_(centres * self.counts[:, None])

    @torch.no_grad()
    def statistics(self, codebook: Codebook, output: Bottled, place: Place) -> Statistics:
        """Return the sums over a micro-batch's latents.

        Args:
            codebook: the one that it moves.
            output: what the codebook made of the micro-batch.
            place: of the micro-batch in its step.
        """
        size, per_image = len(self.counts), output.stored[0][0].numel()
        positions = candidate_positions(place.of * per_image, size, place.seed)
        return assignment_statistics(output, size, take_owned(output.observed, positions, place.first * per_image))

    @torch.no_grad()
    def update(self, codebook: Codebook, statistics: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Take one EMA step, then revive dead codes; once per optimizer step.

        Args:
            codebook: the one to move.
            statistics: `Statistics` of all micro-batches of all ranks, summed.
            step: optimizer steps before this one; a young average moves faster.

        Returns:
            "revived": int64 scalar tensor, how many codes were. No value is read back from the device.
        """
        counts, sums, candidates = statistics
        decay = young_decay(self.config.decay, step)
        self.counts.lerp_(counts, 1 - decay)
        self.sums.lerp_(sums, 1 - decay)
        used = (counts > 0)[:, None]
        codebook.vectors.copy_(torch.where(used, self._means(codebook.normalize), codebook.vectors))
        return {"revived": self._revive(codebook, candidates)}

    def _means(self, normalize: bool) -> Tensor:
        """Return the mean latent of each code (K, D), or its direction."""
        means = self.sums / self.counts[:, None].clamp(min=1e-12)
        return F.normalize(means, dim=1) if normalize else means

    def _revive(self, codebook: Codebook, candidates: Tensor) -> Tensor:
        """Put current latents in the place of dead codes, their counts and sums reset with them.

        A revived code starts at the mean count, so it has the time of a living one to prove itself.
        """
        mean_count = self.counts.mean()
        dead = self.counts < self.config.revival_threshold * mean_count
        order = dead.cumsum(0) - 1  # (K,) the n-th dead code takes the n-th candidate
        revived = dead & (order < len(candidates))
        replacement = candidates[order.clamp(0, len(candidates) - 1)]
        codebook.vectors.copy_(torch.where(revived[:, None], replacement, codebook.vectors))
        self.counts.copy_(torch.where(revived, mean_count, self.counts))
        self.sums.copy_(torch.where(revived[:, None], replacement.mul_(mean_count), self.sums))
        return revived.sum()
