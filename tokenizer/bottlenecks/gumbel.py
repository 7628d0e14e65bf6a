"""The bottleneck of a discrete VAE: each cell a categorical distribution over codes, relaxed so that gradients pass.

B batch, K codebook_size, D code_dim, h w grid.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.bottlenecks.bottleneck import Bottled, Place, Settings, VectorSizes, no_observation
from tokenizer.bottlenecks.usage import CodeUsage
from tokenizer.checks import Float32Module, check_codes, code_grids, float_tensor

# Normal noise becomes Gumbel noise by its quantile; beyond these it would be infinite.
LEAST, MOST = 1e-7, 1 - 1e-7


@dataclass(frozen=True, kw_only=True)
class GumbelConfig(Settings):
    """How a relaxed categorical bottleneck is trained.

    Attributes:
        beta: weight of the KL divergence to the uniform distribution, in nats per value of an image, beside the
            reconstruction loss; see `GaussianConfig`.
        temperature: of the relaxation, at first; the lower, the nearer to one code, and the noisier gradients are.
        final_temperature: reached geometrically after `anneal_steps`.
        anneal_steps: optimizer steps from the first temperature to the last.
        straight_through: whether the decoder sees one code, with the gradient of the relaxation; else the relaxation.

    Source: Jang et al. 2017, sections 2.1 and 2.2; Maddison et al. 2017.
    """

    unread: ClassVar[tuple[str, ...]] = ("normalize",)
    called: ClassVar[str] = "Gumbel-softmax VAE"
    mend: ClassVar[str] = "a lower beta, a lower learning rate or fewer codes"

    beta: float = 0.02
    temperature: float = 1.0
    final_temperature: float = 0.5
    anneal_steps: int = 10000
    straight_through: bool = True

    def __post_init__(self) -> None:
        if not self.beta >= 0:
            raise ValueError(f"beta must not be negative, got {self.beta}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if not 0 < self.final_temperature <= self.temperature:
            raise ValueError(
                f"final_temperature must lie in (0, {self.temperature}], the first one, got {self.final_temperature}"
            )
        if self.anneal_steps < 1:
            raise ValueError(f"anneal_steps must be at least 1, got {self.anneal_steps}")

    def build(self, sizes: VectorSizes) -> "Gumbel":
        """Return the bottleneck of one level, of K codes of D numbers."""
        return Gumbel(sizes.codebook_size, sizes.code_dim, self.temperature, self.straight_through)

    def weights(self, num_levels: int, num_values: int) -> dict[str, float]:
        """Return the weight of the KL divergence of an image, of its sum over levels."""
        return {"kl": self.beta / num_values}

    def learner(self, bottleneck: "Gumbel") -> "Annealing":
        """Return what lowers the temperature."""
        return Annealing(self)

    def temperature_at(self, step: int) -> float:
        """Return the temperature after so many optimizer steps."""
        share = min(1.0, step / self.anneal_steps)
        return self.temperature * (self.final_temperature / self.temperature) ** share


class Gumbel(Float32Module):
    """Features are logits of K codes; what is seen is the vector of a code that is drawn from them.

    Drawn by the Gumbel-max trick: the code of the largest logit + noise. Gradients pass as if the decoder saw the
    softmax of these over the temperature. Without noise, as in validation, it is the likeliest code. The loss "kl" is
    KL(q || uniform) = log K - H(q), summed over the cells of an image, in nats.

    Args:
        codebook_size: K.
        code_dim: D.
        temperature: of the relaxation, until it is set anew.
        straight_through: see `GumbelConfig`.
    """

    temperature: Tensor

    def __init__(self, codebook_size: int, code_dim: int, temperature: float, straight_through: bool) -> None:
        super().__init__()
        self.features = self.noise_channels = codebook_size
        self.channels, self.sizes, self.straight_through = code_dim, (codebook_size,), straight_through
        self.vectors = nn.Parameter(torch.randn(codebook_size, code_dim))
        # Saved, so that a resumed training relaxes as it did; nothing after training looks at it.
        self.register_buffer("temperature", torch.tensor(float(temperature)))

    def forward(self, features: Tensor, noise: Tensor | None = None) -> Bottled:
        """Draw from the distributions of logits (B, K, h, w), with noise (B, K, h, w) of N(0, I).

        Raises:
            ValueError: features are no floats, or have another number of channels.
        """
        logits = float_tensor("features", features, ("B", self.features, "h", "w"))
        with torch.autocast(logits.device.type, enabled=False):
            log_q = logits.log_softmax(1)
            drawn = log_q if noise is None else log_q + _gumbel(noise)
            codes = drawn.argmax(1)
            seen = relaxed = (drawn / self.temperature).softmax(1)  # (B, K, h, w)
            if self.straight_through or noise is None:
                seen = F.one_hot(codes, self.features).movedim(-1, 1) + (relaxed - relaxed.detach())
            seen = torch.einsum("bkhw,kd->bdhw", seen, self.vectors)
            kl = math.log(self.features) + (log_q.exp() * log_q).sum(1)
        return Bottled(seen, (codes,), {"kl": kl.flatten(1).sum(1)}, no_observation(logits), posterior=logits)

    def log_posterior(self, posterior: Tensor, stored: Sequence[Tensor]) -> Tensor:
        """Return log q(z | x) of codes (…, h, w) under logits (…, K, h, w), in nats; float64."""
        (codes,) = stored
        log_q = posterior.double().log_softmax(-3)
        return log_q.take_along_dim(codes.unsqueeze(-3), -3).flatten(-3).sum(-1)

    def lookup(self, stored: Sequence[Tensor | np.ndarray]) -> Tensor:
        """Return the vectors (B, D, h, w) of a grid of codes (B, h, w).

        Raises:
            ValueError: they are no integers, have another shape, or one is out of range.
        """
        (codes,) = stored
        codes = code_grids("codes", codes, self.vectors.device)
        check_codes(codes, len(self.vectors))
        return self.vectors[codes].movedim(-1, 1)

    def blank(self) -> Tensor:
        """Return the mean vector (D,), what the uniform distribution shows."""
        return self.vectors.mean(0)

    def figures(self) -> CodeUsage:
        """Return perplexity and usage, which have seen nothing yet."""
        return CodeUsage(self.sizes, self.vectors.device)


class Annealing(nn.Module):
    """A learner that lowers the temperature with the steps."""

    def __init__(self, config: GumbelConfig) -> None:
        super().__init__()
        self.config = config

    def start(self, bottleneck: Gumbel, observed: Tensor, seed: int) -> None:
        """It begins with the first temperature."""

    def statistics(self, bottleneck: Gumbel, output: Bottled, place: Place) -> Sequence[Tensor]:
        """None are needed."""
        return ()

    @torch.no_grad()
    def update(self, bottleneck: Gumbel, statistics: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        """Set the temperature of the next step; nothing is read back from the device."""
        bottleneck.temperature.fill_(self.config.temperature_at(step + 1))
        return {}


def _gumbel(noise: Tensor) -> Tensor:
    """Return Gumbel noise for standard normal noise: the same uniforms through both quantiles."""
    uniforms = (0.5 * torch.erfc(-noise.double() * math.sqrt(0.5))).clamp(LEAST, MOST)
    return -(-uniforms.log()).log().float()
