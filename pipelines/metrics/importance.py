"""Bounds of many draws: nearer to log p(x) than one draw comes, the nearer the more there are.

-log p(x) <= -E log 1/K sum_k p(x, z_k) / q(z_k | x), which falls with K; K = 1 is the bound of rate + distortion.

B batch, K draws.
"""

import math
from typing import Any

import torch
from torch import Tensor

from pipelines.data.batches import epoch_permutation
from pipelines.metrics.bound import OF, grey_levels, interval95, pixel_nats, scales_of
from pipelines.metrics.information import importance_bounds
from pipelines.metrics.metric import Metric, Rows, title
from pipelines.metrics.subject import Seen, Subject
from tokenizer.posterior import log_posterior

# Val images that are looked at, at most.
IMAGES = 200


class ImportanceBounds(Metric):
    """Importance-weighted bounds of p(x) in bits per dimension, of 1, 10, 100, … draws, of IMAGES val images at most.

    Each takes the draws of those before it. Only of what is drawn from q(z | x): codes that are not have but one.

    Source: Burda et al. 2016, equation 8.
    """

    name = "importance"
    less_is_better = ("bits_per_dim_1", "bits_per_dim_10", "bits_per_dim_100")
    needs = ("val.images", "val.posterior", "val.rate", "train.images")

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        most, count = subject.importance_samples, subject.splits["val"].count
        self.samples = [n for n in (10**power for power in range(len(str(most)))) if n < most] + [most] * (most > 0)
        chosen = sorted(epoch_permutation(subject.seed, 0, (count,))[:IMAGES].tolist())
        self.places = {row: place for place, row in enumerate(chosen)}
        self.bounds = {condition: Rows(len(chosen), len(self.samples)) for condition in subject.conditions}
        self.scales = scales_of(subject) if self.samples else None

    def update(self, seen: Seen) -> None:
        own = [number for number, row in enumerate(seen.rows) if row in self.places]
        if seen.split != "val" or not own or not self.samples:
            return
        places = [self.places[seen.rows[number]] for number in own]
        draws = [self._log_weights(seen, own, draw) for draw in range(self.samples[-1])]
        for condition, bounds in self.bounds.items():
            log_weights = torch.stack([draw[condition] for draw in draws], 1)
            bounds.put(places, importance_bounds(log_weights, self.samples))

    def compute(self) -> dict[str, Any]:
        if not self.samples:
            return {}
        unit = math.log(2) * self.subject.dims
        bounds = {condition: rows.all() / unit for condition, rows in self.bounds.items()}  # (N, number of bounds)
        figures: dict[str, Any] = {"images": len(self.places)}
        for number, samples in enumerate(self.samples):
            own = {condition: bits[:, number] for condition, bits in bounds.items()}
            figures[f"bits_per_dim_{samples}"] = {condition: float(bits.mean()) for condition, bits in own.items()}
            figures[f"bits_per_dim_{samples}_interval95"] = {name: interval95(bits) for name, bits in own.items()}
        return figures

    def _log_weights(self, seen: Seen, own: list[int], draw: int) -> dict[str, Tensor]:
        """Return log p(x, z) - log q(z | x) of one draw for some images of a batch, float64 (B,), by condition."""
        tokenizer, prior = self.subject.tokenizer, self.subject.prior
        assert tokenizer and prior and self.scales is not None
        output = seen.drawn(draw, own)
        stored = [grid for level in output.levels for grid in level.stored]
        posteriors = [level.posterior for level in output.levels if level.posterior is not None]  # of all of them
        log_q = log_posterior(tokenizer, posteriors, stored)
        device = output.reconstruction.device
        scales, pixels = self.scales.float().to(device)[:, None, None], seen.pixels[own].to(device)
        distortion = pixel_nats(pixels, grey_levels(output.reconstruction), scales).flatten(1).double().sum(1)
        found = {}
        for condition in self.bounds:
            classes = seen.classes[own] if condition == "given_class" else None
            found[condition] = -(prior.nll(stored, classes) + distortion + log_q).cpu()
        return found

    @classmethod
    def table(cls, figures: dict[str, Any]) -> list[str]:
        shown = [name for name in figures if name.startswith("bits_per_dim_") and not name.endswith("_interval95")]
        lines = [title("importance-weighted bounds", figures), "  bits per image dimension at most, by draws per image"]
        lines.append(f"  {'-log2 of':<13}" + "".join(f" {name.rpartition('_')[2]:>9}" for name in shown))
        for condition, what in OF.items():
            if condition in figures[shown[0]]:
                bits = "".join(f" {figures[name][condition]:>z9.4f}" for name in shown)
                lines.append(f"  {what:<13}{bits}")
        return lines
