"""The bottleneck of a variational autoencoder: each cell a diagonal Gaussian, of which the decoder sees a sample.

B batch, D code_dim, h w grid.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tokenizer.bottlenecks.averages import Averages, moments, variances
from tokenizer.bottlenecks.bottleneck import LEAST_USED, Bottled, Settings, VectorSizes
from tokenizer.bottlenecks.numbers import Numbers
from tokenizer.checks import float_tensor

# Natural logarithms of variances beyond these would leave float32.
LOG_VARIANCES = (-30.0, 20.0)
# A unit whose mean varies less over images says nothing of them (Burda et al. 2016, section 5.2).
ACTIVE_VARIANCE = 0.01


@dataclass(frozen=True, kw_only=True)
class GaussianConfig(Settings):
    """How a Gaussian bottleneck is trained.

    Attributes:
        beta: weight of the KL divergence to N(0, I), in nats per value of an image, beside the reconstruction loss.
            With the losses "gaussian" and "bernoulli", which are in nats too, 1 makes the sum the negative ELBO. With
            "mse", 2 s^2 makes it that of a Gaussian likelihood of variance s^2, times 2 s^2.
        beta_warmup: optimizer steps in which beta rises to that, so that the decoder learns to listen before the KL
            divergence silences the encoder; validation's loss is of the whole beta from the start.
        free_bits: bits that each number of the latent may take for nothing, in its mean over the global batch: below
            them nothing draws its KL divergence down.

    Source: Kingma and Welling 2014, appendix B; Higgins et al. 2017, equation 4 (beta); Sønderby et al. 2016
    (warm-up); Kingma et al. 2016 (free bits, here of each number by itself).
    """

    called: ClassVar[str] = "VAE"
    unread: ClassVar[tuple[str, ...]] = ("codebook_size", "normalize")
    rate: ClassVar[str] = "kl"

    beta: float = 0.02
    beta_warmup: int = field(default=0, metadata={"introduced": 0})
    free_bits: float = field(default=0.0, metadata={"introduced": 0.0})

    def __post_init__(self) -> None:
        for name in ("beta", "beta_warmup", "free_bits"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    @property
    def whole_batch(self) -> bool:
        """What is free is so of a mean over the batch."""
        return self.free_bits > 0

    def build(self, sizes: VectorSizes) -> "Gaussian":
        """Return the bottleneck of one level, of code_dim numbers per cell."""
        return Gaussian(sizes.code_dim)

    def weights(self, num_levels: int, num_values: int) -> dict[str, float]:
        """Return the weight of the KL divergence of an image, of its sum over levels."""
        weight = self.beta / num_values
        return {"kl": 0.0, "charged": weight} if self.free_bits else {"kl": weight}

    def shares(self, step: int) -> dict[str, float]:
        """Return the share of beta in a step: a line up to 1."""
        share = min(1.0, (step + 1) / max(1, self.beta_warmup))
        return {"kl": share, "charged": share}

    def batch_losses(self, averaged: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return "charged", the sum of the mean KL divergences (D*h*w,), none counted as less than what is free."""
        return {"charged": averaged["kl"].clamp(min=self.free_bits * math.log(2)).sum()} if self.free_bits else {}

    def warnings(self, figures: Mapping[str, float]) -> list[str]:
        """Warn of a posterior that is the same for every image."""
        if (active := figures.get("active", 1.0)) >= LEAST_USED:
            return []
        return [f"tells images apart by {active:.1%} of its units: the posterior has collapsed; try a lower beta"]


class Gaussian(Numbers):
    """Features are means and log-variances; what is seen and stored is mean + noise * standard deviation.

    Without noise, as in validation, that is the mean. The loss "kl" is KL(q || N(0, I)) of an image in nats.

    Args:
        code_dim: D.
    """

    def __init__(self, code_dim: int) -> None:
        super().__init__(2 * code_dim, code_dim, noise_channels=code_dim)

    def forward(self, features: Tensor, noise: Tensor | None = None) -> Bottled:
        """Draw from the Gaussians of features (B, 2 D, h, w), with noise (B, D, h, w) of N(0, I).

        Raises:
            ValueError: features are no floats, or have another number of channels.
        """
        features = float_tensor("features", features, ("B", self.features, "h", "w"))
        with torch.autocast(features.device.type, enabled=False):
            mean, log_variance = features.chunk(2, 1)
            log_variance = log_variance.clamp(*LOG_VARIANCES)
            sample = mean if noise is None else mean + noise * (0.5 * log_variance).exp()
            kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        observed = mean.detach().movedim(1, -1).flatten(0, 2)
        kl = kl.flatten(1)  # (B, D*h*w)
        return Bottled(
            seen=sample,
            stored=(sample,),
            losses={"kl": kl.sum(1)},
            observed=observed,
            averaged={"kl": kl},
            posterior=torch.cat([mean, log_variance], 1),
        )

    def log_posterior(self, posterior: Tensor, stored: Sequence[Tensor]) -> Tensor:
        """Return log q(z | x) of numbers (…, D, h, w) under features (…, 2 D, h, w), a density, in nats; float64."""
        (values,) = stored
        mean, log_variance = posterior.double().chunk(2, -3)
        log_variance = log_variance.clamp(*LOG_VARIANCES)
        squares = (values - mean).square() * (-log_variance).exp()
        return -0.5 * (squares + log_variance + math.log(2 * math.pi)).flatten(-3).sum(-1)

    def figures(self) -> Averages:
        """Return the share of active units, of nothing yet: by ACTIVE_VARIANCE in the mean over cells."""
        return Averages(self.zero.device, moments, _active)


def _active(means: Tensor) -> dict[str, float]:
    return {"active": float((variances(means) > ACTIVE_VARIANCE).double().mean())}
