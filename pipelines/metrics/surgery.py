"""The bound taken apart: what it takes to reconstruct, what z tells of the image, and how far its prior is from z.

E[log q(z | x) - log p(z)] = I(x, z) + KL(q_agg || p), where q_agg(z) is the mean of q(z | x) over images: the rate,
of which the last is all that another prior could save (Hoffman and Johnson 2016).

B batch, h w grid, N images.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipelines.metrics.bound import OF, Bound
from pipelines.metrics.latents import Marks, Pairs
from pipelines.metrics.metric import Rows, title
from pipelines.metrics.subject import Seen, Subject
from prior.continuous import normal_nats
from tokenizer.bottlenecks.bottleneck import StoredGrid


class Surgery(Bound):
    """Distortion, mutual information and marginal KL in bits per dimension: the parts of the bound.

    Of what is drawn, I(x, z) is estimated from pairs of val images, see `information`, as if these N were all images
    there are; the marginal KL is the rate less that. Among more images I is more, and the marginal KL less: of N, no
    more than log N can be told. Given the class, all of this is within the images of a class.

    Codes that are not drawn are told by bounds. I(x, z) is their entropy: in expectation no less than that of the val
    split's own grids, log N at most, and no more than the rate under the best prior that is there, learned or uniform.

    Beside the run's prior stands one that nothing was learned for: uniform over codes, N(0, I) over numbers.
    """

    name = "surgery"
    less_is_better = (*Bound.less_is_better, "marginal_kl_bits_per_dim", "marginal_kl_at_most_bits_per_dim")

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        assert subject.tokenizer and subject.prior
        self.levels, count = subject.tokenizer.levels, subject.splits["val"].count
        self.classes, self.unlearned = Rows(count, dtype=torch.int64), Rows(count)
        self.latents = Pairs(subject) if subject.draws else Marks(subject)
        self.unlearned_name = "under_normal" if None in subject.tokenizer.codebook_sizes else "under_uniform"

    def update(self, seen: Seen) -> None:
        super().update(seen)
        if seen.split != "val":
            return
        nats = torch.stack([unlearned_nats(*one) for one in zip(self.levels, seen.codes, strict=True)]).sum(0).cpu()
        self.unlearned.put(seen.rows, nats + seen.log_posterior if self.subject.draws else nats)
        self.classes.put(seen.rows, seen.classes)
        self.latents.update(seen)

    def compute(self) -> dict[str, Any]:
        bound, classes, found = super().compute(), self.classes.all(), self.latents.compute()
        unit = math.log(2) * self.subject.dims
        unlearned = float(self.unlearned.all().mean()) / unit
        distortion, rates = bound["distortion_bits_per_dim"], bound["rate_bits_per_dim"]
        told: dict[str, dict[str, float]] = {}
        own: dict[str, dict[str, float]] = {}
        other: dict[str, dict[str, float]] = {}
        for condition, rate in rates.items():
            groups = classes if condition == "given_class" else torch.zeros_like(classes)
            nats = self.latents.told(found, groups) | {"log_images": groups.bincount()[groups].double().log()}
            parts = {f"{name}_bits_per_dim": float(each.mean()) / unit for name, each in nats.items()}
            if not self.subject.draws:
                # What is enough without the class is enough given it; not the other way round.
                best = min(rate, rates.get("without_class", rate), unlearned)
                parts["mutual_information_at_most_bits_per_dim"] = best
            told[condition] = parts
            own[condition], other[condition] = (of_prior(one, distortion, parts) for one in (rate, unlearned))
        seen = {"images": bound["images"], "paired_images": self.latents.paired}
        beside = {self.unlearned_name: by_figure(other)} if self.learned else {}
        return seen | {"distortion_bits_per_dim": distortion} | by_figure(told) | by_figure(own) | beside

    @classmethod
    def table(cls, figures: dict[str, Any]) -> list[str]:
        distortion, most = figures["distortion_bits_per_dim"], max(figures["log_images_bits_per_dim"].values())
        lines = [
            title("surgery of the bound", figures),
            f"  distortion {distortion:z.4f} + I(x, z) + KL(q_agg || p), bits per image dimension",
            f"  {'-log2 of':<13} {'prior':<8} {'I(x, z)':>16} {'KL(q_agg || p)':>17} {'bound':>9}",
        ]
        beside = [name for name in ("uniform", "normal") if f"under_{name}" in figures]
        for condition in figures["bits_per_dim"]:
            for name in ["learned", *beside] if beside else ["normal"]:
                own = figures[f"under_{name}"] if name in beside else figures
                parts = _shown(figures, "mutual_information", condition), _shown(own, "marginal_kl", condition)
                bits = own["bits_per_dim"][condition]
                lines.append(f"  {OF[condition]:<13} {name:<8} {parts[0]:>16} {parts[1]:>17} {bits:>z9.4f}")
        if 0 < figures["paired_images"] < figures["images"]:
            least = ", ".join(f"{bits:z.4f}" for bits in figures["mutual_information_at_least_bits_per_dim"].values())
            lines.append(f"  I from {figures['paired_images']} of them, too high in the mean; at least {least}")
        lines.append(f"  of so few images no I above log2 N, {most:z.4f} per dimension, can be seen;")
        lines.append("  of more of them I is more, and KL of the same rate less")
        return lines


def of_prior(rate: float, distortion: float, told: Mapping[str, float]) -> dict[str, float]:
    """Return what a prior adds to what codes tell, by figure: its rate, the bound, and what of the rate is marginal KL.

    Args:
        rate: in bits per dimension.
        distortion: the same.
        told: I(x, z), or bounds of it, by figure.
    """
    found = {"rate_bits_per_dim": rate, "bits_per_dim": rate + distortion}
    if "mutual_information_bits_per_dim" in told:
        return found | {"marginal_kl_bits_per_dim": rate - told["mutual_information_bits_per_dim"]}
    least, most = (told[f"mutual_information_at_{which}_bits_per_dim"] for which in ("least", "most"))
    return found | {
        "marginal_kl_at_least_bits_per_dim": rate - most,
        "marginal_kl_at_most_bits_per_dim": rate - least,
    }


def by_figure(by_condition: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return figures by name and condition, from those by condition and name."""
    names = next(iter(by_condition.values()))
    return {name: {condition: own[name] for condition, own in by_condition.items()} for name in names}


def unlearned_nats(level: StoredGrid, stored: Tensor) -> Tensor:
    """Return -log p of what is stored of a level, float64 (B,), uniform over codes, of N(0, I) over numbers."""
    if level.codebook_size:
        return torch.full(stored.shape, math.log(level.codebook_size), dtype=torch.float64).flatten(1).sum(1)
    return normal_nats(stored).flatten(1).sum(1)


def _shown(figures: Mapping[str, Any], name: str, condition: str) -> str:
    """Return a figure, or between which bounds it lies."""
    if f"{name}_bits_per_dim" in figures:
        return f"{figures[f'{name}_bits_per_dim'][condition]:z.4f}"
    low, high = (figures[f"{name}_at_{which}_bits_per_dim"][condition] for which in ("least", "most"))
    return f"{low:z.4f} to {high:z.4f}"
