"""A mixture of Gaussians over all numbers of a level, one share of its components for each class.

p(x | c) = sum over k of p(k | c) N(x; m_k, S_k), and without class p(x) = sum over k of p(k) N(x; m_k, S_k). Coarser
levels are not looked at. With components at training images, each the q(z | x) of its image, it is the aggregated
posterior (Makhzani et al. 2016; Hoffman and Johnson 2016).

B batch, d channels, h w grid, n = d*h*w, K components, C classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prior.continuous import Continuous, ContinuousConfig, normal_quantile
from prior.known import Known
from prior.sampling import inverse_cdf
from prior.sizes import MAX_WIDTH

# Numbers of a level that may have full covariances, and of all these matrices together.
MOST_FULL, MOST_ENTRIES = 512, 2**25
# Numbers that are fitted to, at most, as they and the shares of components are in memory.
MOST_NUMBERS = 2**26
# Numbers beside components in memory at once.
AT_ONCE = 2**23


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(ContinuousConfig):
    """Which mixture; each field one value for all levels or a list of one per level, coarse to fine.

    Attributes:
        components: K; with `at: images` the training images, drawn by seed, that one stands at, and 0 for all.
        at: "clusters", found by EM; or "images": each component is the q(z | x) of an encoded training image, which
            makes all of them the aggregated posterior.
        covariance: of a component: "diagonal"; or "full", for levels of at most 512 numbers.
    """

    components: int | list[int] = 32
    at: Literal["clusters", "images"] | list[Literal["clusters", "images"]] = "clusters"
    covariance: Literal["diagonal", "full"] | list[Literal["diagonal", "full"]] = "diagonal"

    def __post_init__(self) -> None:
        for components in self.components if isinstance(self.components, list) else [self.components]:
            if not 0 <= components <= MAX_WIDTH:
                raise ValueError(f"components must lie in [0, {MAX_WIDTH}], got {components}")
        if self.components == 0 and self.at == "clusters":
            raise ValueError("components must be at least 1 with at: clusters, got 0")
        if self.at == "images" and self.covariance == "full":
            raise ValueError("covariance must be diagonal with at: images, as each q(z | x) is, got full")

    def build(
        self, levels: Sequence[tuple[tuple[int, int], int | None, int]], num_classes: int, dropout: float
    ) -> "Mixture":
        """See `ContinuousConfig`."""
        grid, _, channels = levels[-1]
        assert isinstance(self.components, int)
        return Mixture((channels, *grid), self.components, num_classes, self.covariance == "full")

    def check(self, level: int, numbers: int, samples: int | None = None) -> None:
        """Judge, before anything is built, whether a level can have such a mixture.

        Args:
            level: 0 for the coarsest; the fields are its own, no lists.
            numbers: n that it holds.
            samples: to fit to; None where they are not known.

        Raises:
            ValueError: covariances would be too large, or there are fewer samples than components.
        """
        assert isinstance(self.components, int)
        if self.covariance == "full" and numbers > MOST_FULL:
            raise ValueError(
                f"covariance full is for at most {MOST_FULL} numbers per level, and level {level} holds {numbers}; "
                "set prior.mixture.covariance to diagonal"
            )
        if self.covariance == "full" and self.components > (most := MOST_ENTRIES // numbers**2):
            raise ValueError(
                f"prior.mixture.components must be at most {most} with covariance full, as level {level} holds "
                f"{numbers} numbers, got {self.components}; set fewer, or prior.mixture.covariance to diagonal"
            )
        if samples is not None and self.at == "clusters":
            fitted = min(samples, MOST_NUMBERS // max(self.components, numbers))
            if self.components > fitted:
                raise ValueError(
                    f"prior.mixture.components must be at most as many as the samples that level {level} is fitted "
                    f"to, {fitted}, got {self.components}"
                )


class Mixture(Continuous):
    """A mixture, at first of equal components N(0, I).

    Args:
        shape: (d, h, w).
        components: K.
        num_classes: C; 0 when the data has none.
        full: whether covariances are full.

    Attributes:
        weights: float32 (C + 1, K): p(k | class), and in the last row p(k).
        means: float32 (K, n).
        scales: standard deviations, float32 (K, n); or Cholesky factors of full covariances, (K, n, n).

    Raises:
        ValueError: there are no components, or more numbers than full covariances can be of.
    """

    weights: Tensor
    means: Tensor
    scales: Tensor

    def __init__(self, shape: Sequence[int], components: int, num_classes: int, full: bool) -> None:
        super().__init__()
        self.shape, n = tuple(shape), math.prod(shape)
        self.num_uniforms = n + 1  # the first picks the component
        if components < 1:
            raise ValueError(f"components must be at least 1, got {components}")
        if full and (n > MOST_FULL or components * n * n > MOST_ENTRIES):
            raise ValueError(
                f"covariance full is for at most {MOST_FULL} numbers and {MOST_ENTRIES} entries of all matrices, got "
                f"{components} components of {n} numbers; set it to diagonal"
            )
        self.register_buffer("weights", torch.full((num_classes + 1, components), 1 / components))
        self.register_buffer("means", torch.zeros(components, n))
        self.register_buffer("scales", torch.eye(n).repeat(components, 1, 1) if full else torch.ones(components, n))

    @property
    def full(self) -> bool:
        """Whether covariances are full."""
        return self.scales.ndim == 3

    def log_weights(self, classes: Tensor | None, batch_size: int) -> Tensor:
        """Return log p(k | class), float64 (B, K)."""
        weights = self.weights.double()
        rows = weights[-1].expand(batch_size, -1) if classes is None else weights[classes]
        return (rows / rows.sum(1, keepdim=True)).log()

    def log_parts(self, values: Tensor) -> Tensor:
        """Return log of the density of each number given those before it under each component, float64 (B, K, n).

        Args:
            values: float (B, n).
        """
        apart = values.double()[:, None] - self.means.double()  # (B, K, n)
        scales = self.scales.double()
        if self.full:
            whitened = torch.linalg.solve_triangular(scales, apart.permute(1, 2, 0), upper=False).permute(2, 0, 1)
            scales = scales.diagonal(dim1=1, dim2=2)
        else:
            whitened = apart / scales
        return -0.5 * (whitened.square() + math.log(2 * math.pi)) - scales.log()

    def chunks(self, values: Tensor, classes: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
        """Return values (B, n) and classes in parts that are small enough to stand beside all components."""
        rows = max(1, AT_ONCE // self.means.numel())
        labels = [None] * -(-len(values) // rows) if classes is None else classes.split(rows)
        return list(zip(values.split(rows), labels, strict=True))

    def nats(self, values: Tensor, coarser: list[Tensor], classes: Tensor | None) -> Tensor:
        """See `Continuous`: those of each number given those before it, as they are stored."""
        found = []
        for some, labels in self.chunks(values.flatten(1), classes):
            logs = self.log_weights(labels, len(some))[:, :, None]  # (B, K, 1)
            up_to = torch.cat([logs, logs + self.log_parts(some).cumsum(2)], 2).logsumexp(1)  # (B, 1 + n)
            found.append(-up_to.diff(dim=1))
        return torch.cat(found).view(values.shape)

    def draw(
        self,
        uniforms: Tensor,
        coarser: list[Tensor],
        classes: Tensor | None,
        temperature: float = 1.0,
        known: Known | None = None,
    ) -> Tensor:
        """See `Continuous`: by the exact conditional distribution of the rest given what is known."""
        logs = self.log_weights(classes, len(uniforms))
        if known is not None:
            given = known.values.double().flatten(1)
            mask = known.mask[:, None].expand(-1, self.shape[0], -1, -1).flatten(1)  # (B, n)
            logs = logs + self._log_of_known(given, mask)
        component = inverse_cdf(logs.softmax(1), uniforms[:, 0])
        noise = normal_quantile(uniforms[:, 1:]) * math.sqrt(temperature)
        means, scales = self.means.double()[component], self.scales.double()[component]
        if not self.full:
            return (means + scales * noise).float().view(-1, *self.shape)
        values = means + (scales @ noise[:, :, None])[:, :, 0]
        if known is not None:
            covariance = scales @ scales.mT
            gaps = ((given - values) * mask)[:, :, None]
            values = values + (covariance @ torch.linalg.solve(_of_known(covariance, mask), gaps))[:, :, 0]
        return values.float().view(-1, *self.shape)

    def _log_of_known(self, values: Tensor, mask: Tensor) -> Tensor:
        """Return log of the density of the numbers where the mask (B, n) is true, of each component, (B, K)."""
        if not self.full:
            parts = [
                (self.log_parts(some) * which[:, None]).sum(2)
                for (some, _), (which, _) in zip(self.chunks(values, None), self.chunks(mask, None), strict=True)
            ]
            return torch.cat(parts)
        covariance, found = self.scales.double() @ self.scales.double().mT, []
        for one, which in zip(values, mask, strict=True):
            factors = torch.linalg.cholesky(_of_known(covariance, which.expand(len(covariance), -1)))
            apart = ((one - self.means.double()) * which)[:, :, None]
            whitened = torch.linalg.solve_triangular(factors, apart, upper=False)[:, :, 0]
            logs = factors.diagonal(dim1=1, dim2=2).log().sum(1)
            found.append(-0.5 * (whitened.square().sum(1) + which.sum() * math.log(2 * math.pi)) - logs)
        return torch.stack(found)


def _of_known(covariance: Tensor, mask: Tensor) -> Tensor:
    """Return covariances (B, n, n) of what the mask (B, n) holds, the identity for the rest."""
    both = mask[:, :, None] & mask[:, None, :]
    return torch.where(both, covariance, torch.eye(mask.shape[1], dtype=covariance.dtype, device=covariance.device))
