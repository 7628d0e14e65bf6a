"""What figures were made of, and whether two of them may be put side by side."""

import re
from collections.abc import Iterable
from typing import Any

from pipelines.errors import StageError
from pipelines.metrics.subject import Subject
from pipelines.storage.folders import differences

# What is seen of images through a tokenizer.
OF_TOKENIZER = {"output", "reconstructions", "reconstruction_features", "decoded", "posterior"}
# What a metric needs where images are compared by features.
OF_FEATURES = {"features", "reconstruction_features", "moments"}
# Of a split, what may differ between runs that are compared: what was drawn and chosen.
DRAWN = ("samples", "settings", "fingerprints", "chosen_with_seed")


def models_of(needs: Iterable[str]) -> set[str]:
    """Return which models, "tokenizer" and "prior", a metric looks at on the val split."""
    seen = {need.removeprefix("val.") for need in needs}
    return ({"tokenizer"} if seen & OF_TOKENIZER else set()) | ({"prior"} if seen & {"nats", "rate"} else set())


def made(subject: Subject, needs: Iterable[str]) -> dict[str, Any]:
    """Return what the figures of a metric with these needs are made of, plain data.

    Of each split its count and what tells it from another; the fingerprints of the models that are looked at; the
    feature space, where images are compared in one; seed and kind of device.
    """
    needs = list(needs)
    splits = dict.fromkeys(need.partition(".")[0] for need in needs)
    about = {name: {"count": subject.splits[name].count, **subject.splits[name].about} for name in splits}
    looked_at = tuple(models_of(needs))
    models = {name: mark for name, mark in subject.marks.items() if name.startswith(looked_at)}
    space = any(need.partition(".")[2] in OF_FEATURES for need in needs) and subject.features
    features = {"features": subject.features.record()} if space and subject.features else {}
    return {"splits": about, "models": models, **features, "seed": subject.seed, "device": subject.device.type}


def unlike(one: dict[str, Any], other: dict[str, Any], other_split: bool = False) -> str:
    """Return what keeps two figures from being put side by side, "" if nothing does, from what they were `made` of.

    They must be of the same images, and of equally many samples, in the same feature space.

    Args:
        one: what the first is made of.
        other: the same of the second.
        other_split: whether the same images may have been split by another seed.
    """
    dropped = (*DRAWN, *(["images"] if other_split else []))

    def compared(made_of: dict[str, Any]) -> dict[str, Any]:
        splits = {
            name: {key: value for key, value in about.items() if key not in dropped}
            for name, about in made_of.get("splits", {}).items()
        }
        return {"features": made_of.get("features"), **splits}

    found = differences(compared(one), compared(other))
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", "; ".join(found[:3]))  # fingerprints as people compare them


def check_alike(name: str, figures: dict[str, dict[str, Any]]) -> None:
    """Raise StageError, naming what differs, unless the figures of a metric were made alike.

    Args:
        name: of the metric.
        figures: its figures of several runs, by what to call each.
    """
    (first, one), *others = figures.items()
    for called, other in others:
        if told := unlike(one.get("made", {}), other.get("made", {})):
            raise StageError(
                f"{name} of {first} and of {called} were not made alike ({told}); give both `smalti evaluate` alike"
            )
