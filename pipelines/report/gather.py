"""What a run folder holds, as the parts of a page; a part that cannot be made does not keep the others away."""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch

from pipelines.compared import Compared, as_compared
from pipelines.compute.devices import inference_device
from pipelines.config import Config
from pipelines.errors import StageError, UserError, told_to_user
from pipelines.finished import Finished
from pipelines.report import codebooks, curves, likelihoods, sampled, warned
from pipelines.report.figures import by_level, figures_of, read_figures, told
from pipelines.report.head import Fact, Head, images_facts, prior_facts, settings_of, stages, tokenizer_facts, versions
from pipelines.report.plane import Plane, is_plane, plane
from pipelines.report.reading import Codes, Images, read_codes, read_images
from pipelines.report.so_far import prior_so_far, tokenizer_so_far
from pipelines.report.tables import Table, of_codes
from pipelines.report.tokenized import Quality, Row, Tokenized, quality, tokenized
from pipelines.storage.fingerprint import prior_fingerprint, tokenizer_fingerprint
from pipelines.storage.folders import is_complete
from pipelines.storage.manifest import level_entries, read_manifest
from pipelines.training.sections import stored_sizes
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
        self.so_far: list[str] = []  # models that are still in training
        self.in_sight = codebooks.IN_SIGHT
        self.charts = self.part("curves", self._charts) or []
        self.quality = self.part("reconstructions", self._quality)
        self.plane = self.part("plane", self._plane)
        self.codebooks = self.part("codebooks", self._codebooks) or []
        self.mosaics = self.part("maps of codes", self._mosaics) or []
        self.maps = self.part("priors", self._maps) or []
        self.by_class = self.part("priors by class", self._by_class)
        self.drawn = self.part("samples", self._drawn) or []
        self.neighbours = self.part("nearest training images", self._neighbours)
        self.head = self.part("head", self._head)
        self.warnings = self.part("warnings", self._warnings) or []

    def part(self, name: str, make: Callable[[], T]) -> T | None:
        """Make a part; what a user can mend is kept for the page, and for the end of the command."""
        try:
            with told_to_user(), torch.no_grad():
                return make()
        except (UserError, OSError) as error:
            self.missing[name] = " ".join(str(error).split())
            return None

    @property
    def holds_something(self) -> bool:
        """Whether there is anything to report."""
        finished = self.finished
        return finished.has_images() or finished.has_tokenizer() or is_complete(finished.codes) or bool(self.charts)

    @property
    def parts(self) -> list[tuple[str, str, bool]]:
        """The page's parts: anchor, title, and whether the run has it."""
        return [
            ("curves", "curves", bool(self.charts)),
            ("reconstructions", "reconstructions", bool(self.quality)),
            ("levels", "level by level", bool(self.quality)),
            ("plane", "plane", bool(self.plane)),
            ("codebooks", "codebooks", bool(self.codebooks)),
            ("codes", "maps of codes", bool(self.mosaics)),
            ("priors", "priors", bool(self.maps)),
            ("samples", "samples", bool(self.drawn)),
            ("nearest", "nearest training images", bool(self.neighbours)),
        ]

    @cached_property
    def tokenizer(self) -> HierarchicalVQVAE | None:
        """The tokenizer, on the device, finished or as far as it is; None where there is none."""
        if self.finished.has_tokenizer():
            return self.finished.tokenizer().to(self.device)
        model = tokenizer_so_far(self.finished)
        self.so_far += ["the tokenizer"] if model else []
        return model.to(self.device) if model else None

    @cached_property
    def priors(self) -> dict[int, LevelPrior]:
        """Priors by level, on the device, finished or as far as they are."""
        found = {}
        for level in range(self.num_levels):
            if is_complete(folder := self.finished.level(level)):
                files = self.config.compute.cache.files(folder, ["config.json", "model.safetensors"])
                found[level] = LevelPrior.from_pretrained(files).eval().to(self.device)
            elif model := prior_so_far(self.finished, level):
                self.so_far.append(f"the prior of level {level}")
                found[level] = model.to(self.device)
        return found

    @cached_property
    def num_levels(self) -> int:
        """Grids that stand for an image."""
        return len(self.tokenizer.levels if self.tokenizer else stored_sizes(self.config.tokenizer))

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

    @cached_property
    def samples(self) -> Images | None:
        """Samples that are read; None where no set is complete, or its images are of other sizes or channels."""
        folder = self.root / self.config.sample.folder
        if not is_complete(folder):
            return None
        return read_images(folder, "samples", self.config.seed, self.config.compute.cache)

    @cached_property
    def codes(self) -> dict[str, Codes]:
        """Codes that priors learned from and are judged by, by split."""
        if not is_complete(self.finished.codes):
            return {}
        cache, seed = self.config.compute.cache, self.config.seed
        found = {split: read_codes(self.finished.codes, split, seed, cache) for split in ("train", "val")}
        return {split: codes for split, codes in found.items() if codes}

    @cached_property
    def codes_of(self) -> str:
        """Fingerprint of the tokenizer that wrote the codes; empty where there are none."""
        codes = self.finished.codes
        return read_manifest(codes, "codes", "encode")["tokenizer"] if is_complete(codes) else ""

    @cached_property
    def samples_fit(self) -> bool:
        """Whether the samples were drawn by the models that are there now."""
        manifest = read_manifest(self.root / self.config.sample.folder, "samples", "sample")
        models = {f"prior{level}": prior_fingerprint(prior) for level, prior in self.priors.items()}
        models |= {"tokenizer": tokenizer_fingerprint(self.tokenizer)} if self.tokenizer else {}
        return manifest["fingerprints"] == self.finished.marks(manifest, models)

    @cached_property
    def patches(self) -> dict[int, codebooks.Patches]:
        """What codes stand for in the images that are read, by level; of levels that are not continuous."""
        found: dict[int, codebooks.Patches] = {}
        sizes = self.tokenizer.codebook_sizes if self.tokenizer and self.images else []
        for level, size in enumerate(sizes):
            if size:
                stored = [one.levels[level] for one in self.tokenized.values()]
                pixels = np.concatenate([one.pixels for one in self.images.values()])
                found[level] = codebooks.patches(torch.cat(stored), size, pixels)
        return found

    @cached_property
    def costs(self) -> dict[int, dict[str, likelihoods.Costs]]:
        """What priors make of the codes that are read, by level and split."""
        found: dict[int, dict[str, likelihoods.Costs]] = {}
        marks = {prior.config.tokenizer for prior in self.priors.values()} | {self.codes_of} - {""}
        if self.codes and len(marks) > 1:
            raise StageError(
                f"{self.finished.codes} was written with tokenizer {self.codes_of[:12]}, which priors of this run did "
                "not learn the codes of; run `smalti train-prior` again"
            )
        for level, prior in self.priors.items():
            splits = [split for split in ("val", "train") if split in self.codes]
            found[level] = {split: likelihoods.costs(prior, self.codes[split]) for split in splits}
        return found

    @property
    def continuous(self) -> bool:
        """Whether priors are of numbers."""
        return any(None in prior.config.codebook_sizes for prior in self.priors.values())

    @property
    def unlearned(self) -> bool:
        """Whether all priors are N(0, I), whatever class and coarser levels."""
        return {prior.config.network for prior in self.priors.values()} == {"normal"}

    @property
    def given_class(self) -> bool:
        """Whether what priors cost is given the class."""
        return any(prior.config.class_names for prior in self.priors.values())

    @cached_property
    def class_names(self) -> list[str]:
        """Names of the classes; empty where there are none."""
        if self.finished.has_images():
            return read_manifest(self.finished.images, "images", "pack")["class_names"]
        codes = self.finished.codes
        return read_manifest(codes, "codes", "encode")["class_names"] if is_complete(codes) else []

    @property
    def looked_at(self) -> int:
        """Images of both splits that are read."""
        return sum(len(images.keys) for images in self.images.values())

    @cached_property
    def compared(self) -> Compared | None:
        """The run as it is compared with others; None where its models cannot be read."""
        return self.part("scoreboard", self._compared)

    @cached_property
    def measured(self) -> dict[str, Any]:
        """What `evaluate` found."""
        return read_figures(self.root)

    @cached_property
    def figures(self) -> dict[str, float]:
        """The figures that the run's stages have left, by name."""
        return figures_of(self.root, self.num_levels)

    def _head(self) -> Head:
        facts = images_facts(self.finished) if self.finished.has_images() else []
        facts += tokenizer_facts(self.tokenizer) if self.tokenizer else []
        facts += prior_facts(self.priors) if self.priors else []
        for part in ("samples", "reconstructions"):
            if space := self.measured.get(part, {}).get("made", {}).get("features", {}).get("features"):
                facts.append(Fact(f"{part}, feature space", str(space)))
        steps = {chart.folder: chart.steps[-1] for chart in self.charts if chart.steps}
        tokenizer = self.tokenizer if self.finished.has_tokenizer() else None
        priors = {level: one for level, one in self.priors.items() if is_complete(self.finished.level(level))}
        rows = stages(self.finished, self.num_levels, tokenizer, priors, steps)
        figures = told(self.figures)
        of_levels, made_with = by_level(figures, self.num_levels), versions(self.finished, rows)
        figures = [one for one in figures if one.level is None]
        return Head(facts, figures, of_levels, rows, made_with, settings_of(self.finished))

    def _charts(self) -> list[curves.Chart]:
        found = curves.charts(curves.read_rows(self.root / "tokenizer"), "tokenizer", "tokenizer")
        for folder in sorted((self.root / "prior").glob("level*")):
            title = f"prior, {folder.name.replace('level', 'level ')}"
            found += curves.charts(curves.read_rows(folder), title, folder.name)
        return found

    def _quality(self) -> Quality | None:
        if not self.tokenizer or "val" not in self.images:
            return None
        return quality(self.tokenizer, self.images["val"], self.tokenized["val"], self.class_names)

    def _plane(self) -> Plane | None:
        if not self.tokenizer or "val" not in self.images or not is_plane(self.tokenizer):
            return None
        return plane(self.tokenizer, self.images["val"], self.tokenized["val"].levels[0], self.class_names)

    def _codebooks(self) -> list[codebooks.Codebook]:
        model = self.tokenizer
        return [codebooks.codebook(model, level, found) for level, found in self.patches.items()] if model else []

    def _mosaics(self) -> list[Row]:
        if not self.patches or "val" not in self.images:
            return []
        return codebooks.mosaics(self.images["val"].pixels, self.tokenized["val"].levels, self.patches)

    @property
    def numbers(self) -> list[Table]:
        """The codes of the first val image, of levels that have few."""
        levels = {level: self.tokenized["val"].levels[level][0] for level in self.patches}
        return [of_codes(level, codes) for level, codes in levels.items() if codes.numel() <= codebooks.MOST_CELLS]

    def _maps(self) -> list[likelihoods.Maps]:
        val = self.images.get("val")
        same = val is not None and "val" in self.codes and len(val.keys) == len(self.codes["val"].classes)
        pixels = val.pixels if val is not None and same else None
        found = {level: costs for level, costs in self.costs.items() if "val" in costs}
        return [likelihoods.maps(self.priors[n], one["val"], one.get("train"), pixels) for n, one in found.items()]

    def _by_class(self) -> Table:
        levels = [f"level {level}, {split}" for level, splits in self.costs.items() for split in splits]
        rows = likelihoods.by_class(self.costs, self.codes, self.class_names)
        unit = "cell, of a density" if self.continuous else "code"
        return Table(f"Nats per {unit}, by class", ["class", *levels], rows if levels else [])

    @cached_property
    def bits(self) -> dict[str, np.ndarray] | None:
        """-log2 p under the priors of all levels, of samples and of as many val images; None where one is missing."""
        sizes = self.tokenizer.codebook_sizes if self.tokenizer else []
        if not self.tokenizer or None in sizes or "val" not in self.codes or not self.samples_fit:
            return None
        given, folder = bool(self.class_names), self.root / self.config.sample.folder
        levels = level_entries(self.tokenizer.levels)
        drawn = read_codes(folder, "samples", self.config.seed, self.config.compute.cache, levels)
        assert drawn
        sets = {"samples": drawn, "val": self.codes["val"].first(len(drawn.classes))}
        return {name: likelihoods.sample_bits(self.priors, codes, given) for name, codes in sets.items()}

    @property
    def val_bits(self) -> float:
        """What val images cost under the priors, in the median."""
        assert self.bits
        return float(np.median(self.bits["val"]))

    def _drawn(self) -> list[tuple[str, list[sampled.Sample]]]:
        if not self.samples:
            return []
        return sampled.by_class(self.samples, self.bits["samples"] if self.bits else None, self.class_names)

    def _neighbours(self) -> sampled.Neighbours | None:
        train = self.images.get("train")
        if not self.samples or not train or self.samples.pixels.shape[1:] != train.pixels.shape[1:]:
            return None
        return sampled.neighbours(self.samples, train, self.images.get("val"))

    def _compared(self) -> Compared:
        models = [self.tokenizer] if self.tokenizer else []
        return as_compared(self.finished, self.measured, [*models, *self.priors.values()])

    def _warnings(self) -> list[str]:
        found: list[str] = []
        if self.tokenizer:
            found += warned.of_bottlenecks(self.tokenizer.bottleneck, self.figures, self.codebooks)
        if self.quality and self.tokenizer:
            bits = [h * w * math.log2(size) if size else None for (h, w), size, _ in self.tokenizer.levels]
            found += warned.of_levels(self.quality.adds, bits)
        found += [*warned.of_priors(self.maps), *warned.of_curves(self.charts), *warned.of_figures(self.figures)]
        if self.samples and not self.samples_fit:
            found.append("The samples were drawn by other models than those that are in this folder now.")
        if "train" in self.images:
            found += warned.of_classes("training images read", self.images["train"].classes, self.class_names)
        return found
