"""Stage evaluate: how good tokenizer, priors and samples are, as far as they are there."""

from typing import Any

import torch

from pipelines.metrics import METRICS
from pipelines.metrics.subject import Subject, batches

# Which model's training a figure of the val split may have seen it in.
MODEL_OF = {"output": "tokenizer", "reconstructions": "tokenizer", "decoded": "tokenizer"}
MODEL_OF |= {"nats": "prior", "rate": "prior"}


@torch.no_grad()
def evaluate(subject: Subject, held_out: dict[str, bool | None]) -> dict[str, Any]:
    """Return the figures of all metrics whose needs are met, by their names; the same on any number of processes.

    Only what one of them needs is passed through, once for all.

    Args:
        subject: what is evaluated.
        held_out: whether the val split was held out from the training of "tokenizer" and "prior"; None where that is
            not known.
    """
    there = subject.there()
    metrics = [kind(subject) for kind in METRICS if set(kind.needs) <= there]
    for name, split in subject.splits.items():
        looking = [metric for metric in metrics if any(need.startswith(f"{name}.") for need in metric.needs)]
        for seen in batches(subject, split) if looking else ():
            for metric in looking:
                metric.update(seen)
    figures: dict[str, Any] = {}
    for metric in metrics:
        needs = [need.removeprefix("val.") for need in metric.needs]
        models = {MODEL_OF[need] for need in needs if need in MODEL_OF}
        known = {"held_out": all(held_out[model] for model in models) or None} if models else {}
        if found := metric.compute():
            place = figures
            for part in metric.name.split("."):
                place = place.setdefault(part, {})
            place |= known | found
    return figures


def table(figures: dict[str, Any]) -> str:
    """Return the figures of `metrics.json` as tables for a terminal of 80 columns."""
    tables = []
    for metric in METRICS:
        found: Any = figures
        for part in metric.name.split("."):
            found = found.get(part, {})
        if found:
            tables.append("\n".join(metric.table(found)))
    return "\n\n".join(tables)
