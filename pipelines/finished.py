"""What there is of a run, its own work or another's: folders, models, and whether they belong together."""

import json
from pathlib import Path

from pipelines.config import Config
from pipelines.data.held_out import check_codes_of_images, held_out
from pipelines.errors import StageError, told_to_user
from pipelines.metrics.opening import Folders, Models, open_subject
from pipelines.metrics.stored_classifier import StoredClassifier, classifier_of, load_classifier
from pipelines.metrics.subject import Subject
from pipelines.progress import counted
from pipelines.storage.fingerprint import digest, manifest_digest, model_fingerprints, tokenizer_fingerprint
from pipelines.storage.folders import is_complete, named_folder
from pipelines.storage.manifest import CodesManifest, SamplesManifest, read_manifest, shards_hold
from pipelines.storage.paths import exists, is_local, place, read_bytes
from prior import HierarchicalPrior, LevelPrior
from tokenizer import HierarchicalVQVAE

# Of a model's validation figures, those that one line has room for.
SHOWN = ("_mse", "_psnr", "_perplexity", "_kl", "_nats_per_code", "_nats_per_value")


class Finished:
    """A run's folders and what they hold.

    Args:
        config: of the run.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.root = place(config.run_dir, writable=True)

    @property
    def images(self) -> Path:
        """The `images` folder: this run's, or the one that images.from names."""
        return named_folder(self.config.images.from_, "images.from") or self.root / "images"

    @property
    def codes(self) -> Path:
        """The `codes` folder: this run's, or the one that codes.from names."""
        return named_folder(self.config.codes.from_, "codes.from") or self.root / "codes"

    @property
    def unpacked(self) -> Path:
        """Where codes are unpacked: in the run, or on local disk when that is elsewhere, each folder of codes apart."""
        if is_local(self.root):
            return self.root / "prior" / "codes"
        codes = self.codes.resolve() if is_local(self.codes) else self.codes
        return self.config.compute.cache.folder / "codes" / digest(str(codes))[:16]

    def level(self, number: int) -> Path:
        """Return the folder of a level's prior."""
        return self.root / "prior" / f"level{number}"

    def needs_images(self) -> bool:
        """Whether the config leaves anything to do with images; another run's tokenizer and codes need none."""
        return bool(self.config.images.from_) or not (self.config.tokenizer.from_ and self.config.codes.from_)

    def has_images(self) -> bool:
        """Whether there are images; those that the config names must be, as for the two that follow."""
        return bool(self.config.images.from_) or (self.needs_images() and is_complete(self.images))

    def has_tokenizer(self) -> bool:
        """Whether there is a tokenizer."""
        return bool(self.config.tokenizer.from_) or is_complete(self.root / "tokenizer")

    def has_priors(self) -> bool:
        """Whether there are codes, and priors of all their levels."""
        there = bool(self.config.codes.from_) or is_complete(self.codes)
        return there and all(is_complete(folder) for folder in self._levels())

    def tokenizer(self) -> HierarchicalVQVAE:
        """Load the tokenizer.

        Raises:
            StageError: there is none, or its files are not whole.
        """
        name = self.config.tokenizer.from_
        with told_to_user():
            if name and "://" not in name:
                return HierarchicalVQVAE.from_pretrained(name)
            folder = place(name) if name else self.root / "tokenizer"
            if not is_complete(folder):
                raise StageError(f"{folder} holds no finished tokenizer; run `smalti train-tokenizer` first")
            return HierarchicalVQVAE.from_pretrained(self._files(folder))

    def prior(self) -> HierarchicalPrior:
        """Load the priors of all levels.

        Raises:
            StageError: one is missing, its files are not whole, or they do not belong together.
        """
        folders = self._levels() if is_complete(self.codes) else [self.level(0)]
        for folder in folders:
            if not is_complete(folder):
                raise StageError(f"{folder} holds no finished prior; run `smalti train-prior` first")
        with told_to_user():
            return HierarchicalPrior([LevelPrior.from_pretrained(self._files(folder)) for folder in folders]).eval()

    def checked_codes(self) -> CodesManifest:
        """Return the codes' manifest; where this run has the tokenizer too, they must belong together."""
        manifest = read_manifest(self.codes, "codes", "encode")
        if self.has_tokenizer():
            mark = tokenizer_fingerprint(self.tokenizer())
            if manifest["tokenizer"] != mark:
                raise StageError(
                    f"{self.codes} was written with tokenizer {manifest['tokenizer'][:12]} but this run's is "
                    f"{mark[:12]}, another one or damaged; restore that, or run `smalti encode` with this tokenizer"
                )
        return manifest

    def codes_fit(self, tokenizer: HierarchicalVQVAE) -> bool:
        """Whether the codes are whole, of the images, and of this tokenizer."""
        manifest = read_manifest(self.codes, "codes", "encode")
        images = manifest_digest(read_manifest(self.images, "images", "pack"))
        fits = manifest["tokenizer"] == tokenizer_fingerprint(tokenizer) and manifest["made_from"] == images
        return fits and shards_hold(manifest, self.codes, self.config.compute.cache)

    def classifier(self) -> StoredClassifier:
        """Return the classifier of the run's classes, made first where there is none; see `classifier_of`."""
        return classifier_of(self.root / "classifier", self.images, self.config.seed, self.config.compute)

    def marks(self, samples: SamplesManifest, models: dict[str, str]) -> dict[str, str]:
        """Return what samples of models name them by: with the run's classifier, if samples were chosen by one.

        Args:
            samples: the manifest.
            models: fingerprints, "tokenizer", "prior0", "prior1", …
        """
        marks = dict(models)
        if "classifier" in samples["fingerprints"] and exists(self.root / "classifier" / "model.safetensors"):
            marks["classifier"] = load_classifier(self.root / "classifier").fingerprint
        return marks

    def samples_fit(self, folder: Path, tokenizer: HierarchicalVQVAE, prior: HierarchicalPrior) -> bool:
        """Whether a set of samples is whole and was drawn by these models."""
        manifest = read_manifest(folder, "samples", "sample")
        fits = manifest["fingerprints"] == self.marks(manifest, model_fingerprints(tokenizer, prior))
        return fits and shards_hold(manifest, folder, self.config.compute.cache)

    def tokenizer_held_out(self, strict: bool = True) -> bool | None:
        """Whether the images' val split was held out from the tokenizer's training; see `held_out`.

        Args:
            strict: whether a run's own tokenizer of other images is an error, as it is to whoever measures it.
        """
        name, own = self.config.tokenizer.from_, not (self.config.tokenizer.from_ or self.config.images.from_)
        return held_out([place(name) if name else self.root / "tokenizer"], "images", self.images, own and strict)

    def prior_held_out(self) -> bool | None:
        """Whether the codes' val split was held out from the priors' training; see `held_out`."""
        return held_out(self._levels(), "codes", self.codes, own=not self.config.codes.from_)

    def samples(self, tokenizer: HierarchicalVQVAE, prior: HierarchicalPrior) -> Path | None:
        """Return the folder of the set of samples, if there is a finished one.

        Raises:
            StageError: others than these models drew it, or it is damaged.
        """
        folder = self.root / self.config.sample.folder
        if not is_complete(folder):
            return None
        if not self.samples_fit(folder, tokenizer, prior):
            raise StageError(f"{folder} is damaged or was drawn by other models; run `smalti sample` first")
        return folder

    def subject(self) -> tuple[Subject, dict[str, bool | None]]:
        """Open what there is to evaluate; also whether val was held out from training, of the tokenizer and of priors.

        Raises:
            StageError: nothing is there, or what is there does not belong together.
        """
        known: dict[str, bool | None] = {}
        tokenizer = self.tokenizer() if self.has_tokenizer() else None
        images = self.images if self.has_images() and tokenizer else None
        prior = self.prior() if self.has_priors() and self.checked_codes() else None
        if images:
            known["tokenizer"] = self.tokenizer_held_out()
        if prior:
            known["prior"] = self.prior_held_out()
        if not known:
            raise StageError(
                f"{self.root} must hold a tokenizer and images, or priors and codes, to be evaluated; "
                "run `smalti run` first"
            )
        if images and prior:
            check_codes_of_images(self.codes, images)
        samples = self.samples(tokenizer, prior) if tokenizer and prior else None
        there, config = Folders(images, self.codes, self.unpacked, samples), self.config
        return open_subject(config.evaluate, config.seed, config.compute, Models(tokenizer, prior), there), known

    def unfinished(self) -> list[str]:
        """Say what the run itself has begun and not finished, and what is missing though later parts are there."""
        config = self.config
        levels = self._levels() if is_complete(self.codes) else sorted((self.root / "prior").glob("level*"))
        own_images = self.needs_images() and not config.images.from_
        parts = {
            "pack": [self.root / "images"] * own_images,
            "train-tokenizer": [self.root / "tokenizer"] * (not config.tokenizer.from_),
            "encode": [self.root / "codes"] * (not config.codes.from_),
            "export": [self.root / config.export.folder],
            "train-prior": levels,
            "sample": [self.root / config.sample.folder],
        }
        begun = {stage for stage, folders in parts.items() if any(map(_is_begun, folders))}
        needed = {stage for number, stage in enumerate(parts) if begun & {*list(parts)[number + 1 :]}} - {"export"}
        return [
            f"{folder} is {'begun, not finished' if _is_begun(folder) else 'missing, though other parts need it'}; "
            f"run `smalti {stage}`"
            for stage, folders in parts.items()
            for folder in folders
            if stage in begun | needed and not is_complete(folder)
        ]

    def _levels(self) -> list[Path]:
        levels = read_manifest(self.codes, "codes", "encode")["levels"]
        return [self.level(number) for number in range(len(levels))]

    def _files(self, folder: Path) -> Path:
        return self.config.compute.cache.files(folder, ["config.json", "model.safetensors"])


def _is_begun(folder: Path) -> bool:
    """Whether a stage has left anything in a folder: its settings, receipts or results."""
    return exists(folder / "config.yaml") or next(folder.glob("*.json"), None) is not None


def what_came_of(folder: Path) -> str:
    """Return the result of a finished stage in a few words, from what its folder holds."""
    for name, key, unit in (("manifest.json", "splits", "samples"), ("layout.json", "shards", "records")):
        if exists(folder / name):
            splits = json.loads(read_bytes(folder / name))[key]
            counts = {split: sum(shard[unit] for shard in shards) for split, shards in splits.items()}
            total = counted(sum(map(len, splits.values())), "shard")
            return f"{', '.join(f'{count:,} {split}' for split, count in counts.items())} in {total}"
    figures = json.loads(read_bytes(folder / "metrics.json")) if exists(folder / "metrics.json") else {}
    shown = {name.removeprefix("val_"): value for name, value in figures.items() if name.endswith(SHOWN)}
    return "done" + "".join(f", {name.replace('_', ' ')} {value:.4g}" for name, value in shown.items())
