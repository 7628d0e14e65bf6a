"""Stage evaluate: how good tokenizer, priors and samples are, as far as they are there."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch

from pipelines.errors import StageError
from pipelines.metrics import METRICS
from pipelines.metrics.gathered import SplitFeatures
from pipelines.metrics.metric import Metric, figures_of
from pipelines.metrics.provenance import OF_FEATURES, made, models_of
from pipelines.metrics.subject import Subject, batches


@torch.no_grad()
def evaluate(subject: Subject, held_out: dict[str, bool | None], skip: Sequence[str] = ()) -> dict[str, Any]:
    """Return the figures of all metrics whose needs are met, by their names; the same on any number of processes.

    Each split that one of them needs is passed through once, for all of them.

    Args:
        subject: what is evaluated.
        held_out: whether the val split was held out from the training of "tokenizer" and "prior"; None where that is
            not known.
        skip: names of metrics to leave out.

    Raises:
        StageError: one of those is no metric.
    """
    check_names(skip)
    there = subject.there()
    metrics = [kind(subject) for kind in METRICS if set(kind.needs) <= there and kind.name not in skip]
    gathered = _gathered(subject, {need for metric in metrics for need in metric.needs})
    for split in {split.name: split for split in subject.splits.values()}.values():
        looking: list[Any] = [metric for metric in metrics if split.name in _shown(subject, metric)]
        looking += [one for one in {*gathered.values()} if one.split is split]
        for seen in batches(subject, split) if looking else ():
            for one in looking:
                one.update(seen)
    subject.gathered.update({need: gathered[need].compute() for need in gathered})
    figures: dict[str, Any] = {}
    for metric in metrics:
        if found := metric.compute():
            models = models_of(metric.needs)
            known = {"held_out": all(held_out[model] for model in models) or None} if models else {}
            own = known | found | {"made": made(subject, metric.needs)}
            *above, last = metric.name.split(".")
            reduce(lambda place, part: place.setdefault(part, {}), above, figures).setdefault(last, {}).update(own)
    return figures


def check_names(skip: Sequence[str]) -> None:
    """Raise StageError where one of the metrics to leave out is none."""
    names = [kind.name for kind in METRICS]
    if strangers := ", ".join(sorted(set(skip) - set(names))):
        raise StageError(f"evaluate.skip must name metrics, got {strangers}; there are {', '.join(names)}")


def _shown(subject: Subject, metric: Metric) -> set[str]:
    """Return the names of the splits whose batches a metric is shown: those of which it needs more than features."""
    splits = {name for name, _, what in (need.partition(".") for need in metric.needs) if what not in OF_FEATURES}
    return {subject.splits[name].name for name in splits}


def _gathered(subject: Subject, needs: set[str]) -> dict[str, SplitFeatures]:
    """Return what gathers the features that are needed, by need; one for all that need the same."""
    found: dict[tuple[str, str], SplitFeatures] = {}
    by_need = {}
    for need in sorted(needs):  # in the same order on all ranks
        name, _, what = need.partition(".")
        if what not in OF_FEATURES or (what == "moments" and subject.moments):
            continue
        what = "features" if what == "moments" else what
        split = subject.splits[name]
        if (split.name, what) not in found:
            found[split.name, what] = SplitFeatures(subject, split, what == "reconstruction_features")
        by_need[f"{name}.{what}"] = found[split.name, what]
    return by_need


def table(figures: dict[str, Any]) -> str:
    """Return the figures of `metrics.json` as tables for a terminal of 80 columns."""
    # Without `made` a metric was left out, and what is found are those that stand below it, "samples.frechet".
    found = [(metric, figures_of(figures, metric.name)) for metric in METRICS]
    return "\n\n".join("\n".join(metric.table(own)) for metric, own in found if "made" in own)
