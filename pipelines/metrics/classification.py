"""What samples teach a classifier about real images, beside what as many real images teach it."""

from typing import Any

import torch

from pipelines.metrics.classifier import SIDE as CLASSIFIER_SIDE
from pipelines.metrics.classifier import STEPS, accuracy, train_classifier
from pipelines.metrics.copies import shrunk
from pipelines.metrics.metric import Metric, Rows
from pipelines.metrics.subject import Seen, Subject


class ClassificationScore(Metric):
    """Classification accuracy score: train on samples, test on val images, beside training on as many real images.

    The classifier is small and the same for both, so that only their gap says something of samples. The figures depend
    on how many samples there are.

    Source: Ravuri and Vinyals 2019, section 3.
    """

    name = "classification"
    needs = tuple(f"{name}.{what}" for name in ("train", "val", "samples") for what in ("pixels", "classes"))
    more_is_better = ("trained_on_samples",)

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        assert subject.prior and subject.tokenizer
        self.class_names = subject.prior.class_names
        side, channels = min(subject.tokenizer.image_size, CLASSIFIER_SIDE), subject.tokenizer.channels
        drawn = subject.splits["samples"].count
        self.counts = {name: subject.splits[name].count for name in ("train", "val", "samples")}
        self.counts["train"] = min(self.counts["train"], drawn)  # chosen by seed, in the order of the choice
        self.pixels = {
            name: Rows(count, channels, side, side, dtype=torch.uint8) for name, count in self.counts.items()
        }
        self.labels = {name: Rows(count, dtype=torch.int64) for name, count in self.counts.items()}

    def update(self, seen: Seen) -> None:
        rows = [row for row in seen.rows if row < self.counts[seen.split]]
        if self.class_names and rows:
            self.pixels[seen.split].put(rows, shrunk(seen.pixels[: len(rows)], CLASSIFIER_SIDE))
            self.labels[seen.split].put(rows, seen.classes[: len(rows)])

    def compute(self) -> dict[str, Any]:
        if not self.class_names:
            return {}
        device = self.subject.device
        images = {name: rows.all().to(device) for name, rows in self.pixels.items()}
        labels = {name: rows.all().to(device) for name, rows in self.labels.items()}
        found = {}
        for name in ("samples", "train"):
            model = train_classifier(images[name], labels[name], len(self.class_names), self.subject.seed)
            found[name] = accuracy(model, images["val"], labels["val"])
        return {
            "images": self.counts["samples"],
            "real_images": self.counts["train"],
            "val_images": self.counts["val"],
            "steps": STEPS,
            "trained_on_samples": found["samples"].overall,
            "trained_on_real": found["train"].overall,
            "of_classes_trained_on_samples": dict(zip(self.class_names, found["samples"].of_classes, strict=True)),
            "of_classes_trained_on_real": dict(zip(self.class_names, found["train"].of_classes, strict=True)),
        }

    @classmethod
    def table(cls, figures: dict[str, Any]) -> list[str]:
        samples, real = figures["of_classes_trained_on_samples"], figures["of_classes_trained_on_real"]
        told = {name: real[name] - samples[name] for name in samples if samples[name] is not None}
        worst = sorted(told, key=lambda name: -told[name])[:3]
        return [
            f"classification: of {figures['val_images']} val images by a small classifier",
            f"  trained on {figures['images']} samples {figures['trained_on_samples']:.1%}, "
            f"on {figures['real_images']} real images {figures['trained_on_real']:.1%}",
            "  most lost: " + ", ".join(f"{name} {real[name]:.1%} to {samples[name]:.1%}" for name in worst),
        ]
