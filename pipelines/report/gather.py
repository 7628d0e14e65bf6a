"""What a run folder holds, as the parts of a page; a part that cannot be made does not keep the others away."""

from collections.abc import Callable
from functools import cached_property
from typing import TypeVar

import torch

from pipelines.compute.devices import inference_device
from pipelines.config import Config
from pipelines.errors import UserError, told_to_user
from pipelines.finished import Finished
from pipelines.report.curves import Chart, charts, read_rows
from pipelines.report.figures import figures_of, told
from pipelines.report.head import Head, images_facts, prior_facts, settings_of, stages, tokenizer_facts
from pipelines.report.reading import Images, read_images
from pipelines.report.tokenized import Quality, Tokenized, quality, tokenized
from pipelines.storage.folders import is_complete
from pipelines.storage.manifest import read_manifest
from prior import LevelPrior
from tokenizer import HierarchicalVQVAE

T = TypeVar("T")


class Gathered:
    """A run, part by part; None or empty where its folder holds nothing for a part.

    Args:
        command: what makes the run again, without the "smalti run" before it.
        config: of the run.
    """

    def __init__(self, command: str, config: Config) -> None:
        self.command, self.config = command, config
        self.finished = Finished(config)
        self.root = self.finished.root
        self.name = self.root.name
        self.missing: dict[str, str] = {}  # parts that could not be made, and why
        self.device = inference_device(config.compute)
        self.head = self.part("head", self._head)
        self.charts = self.part("curves", self._charts) or []
        self.quality = self.part("reconstructions", self._quality)

    def part(self, name: str, make: Callable[[], T]) -> T | None:
        """Make a part; what a user can mend is kept for the page, and for the end of the command."""
        try:
            with told_to_user(), torch.no_grad():
                return make()
        except (UserError, OSError) as error:
            self.missing[name] = " ".join(str(error).split())
            return None

    @cached_property
    def tokenizer(self) -> HierarchicalVQVAE | None:
        """The tokenizer, on the device; None where none is finished."""
        return self.finished.tokenizer().to(self.device) if self.finished.has_tokenizer() else None

    @cached_property
    def priors(self) -> dict[int, LevelPrior]:
        """Finished priors by level, on the device."""
        found = {}
        for level in range(len(self.tokenizer.levels) if self.tokenizer else 0):
            if is_complete(folder := self.finished.level(level)):
                files = self.config.compute.cache.files(folder, ["config.json", "model.safetensors"])
                found[level] = LevelPrior.from_pretrained(files).eval().to(self.device)
        return found

    @cached_property
    def images(self) -> dict[str, Images]:
        """Images that are read, by split."""
        if not self.finished.has_images():
            return {}
        cache = self.config.compute.cache
        found = {split: read_images(self.finished.images, split, self.config.seed, cache) for split in ("train", "val")}
        return {split: images for split, images in found.items() if images}

    @cached_property
    def tokenized(self) -> dict[str, Tokenized]:
        """The images through the tokenizer, by split."""
        if not self.tokenizer:
            return {}
        return {split: tokenized(self.tokenizer, images) for split, images in self.images.items()}

    def _head(self) -> Head:
        facts = images_facts(self.finished) if self.finished.has_images() else []
        facts += tokenizer_facts(self.tokenizer) if self.tokenizer else []
        facts += prior_facts(self.priors) if self.priors else []
        figures = figures_of(self.root, len(self.tokenizer.levels) if self.tokenizer else 0)
        rows = stages(self.finished, self.tokenizer, self.priors, {})
        return Head(facts, told(figures), rows, settings_of(self.finished))

    def _charts(self) -> list[Chart]:
        found = charts(read_rows(self.root / "tokenizer"), "tokenizer")
        for folder in sorted((self.root / "prior").glob("level*")):
            found += charts(read_rows(folder), f"prior, {folder.name.replace('level', 'level ')}")
        return found

    def _quality(self) -> Quality | None:
        if not self.tokenizer or "val" not in self.images:
            return None
        return quality(self.tokenizer, self.images["val"], self.tokenized["val"], self.class_names)

    @cached_property
    def class_names(self) -> list[str]:
        """Names of the classes; empty where there are none."""
        if self.finished.has_images():
            return read_manifest(self.finished.images, "images", "pack")["class_names"]
        return read_manifest(self.finished.codes, "codes", "encode")["class_names"]
