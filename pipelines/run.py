"""The stages of a run: which folder and which sections each one works on, in which order, and what is skipped."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from pipelines.cache import Cache
from pipelines.compute import started_by_a_launcher, this_worker
from pipelines.config import Config, at_level
from pipelines.encode import encode
from pipelines.errors import ConfigError, StageError
from pipelines.fingerprint import hashed, manifest_digest, tokenizer_fingerprint
from pipelines.finished import Finished
from pipelines.held_out import check_codes_of_images
from pipelines.manifest import all_receipts, read_manifest
from pipelines.pack import pack
from pipelines.places import make_folder, place
from pipelines.processes import workers_of
from pipelines.sample import model_fingerprints, sample
from pipelines.sections import PriorConfig
from pipelines.shards import write_json
from pipelines.stage import is_complete, only_process, open_stage
from pipelines.verify import verify_codes, verify_images, verify_priors, verify_samples
from prior import HierarchicalPrior, LevelPrior
from tokenizer import HierarchicalVQVAE

logger = logging.getLogger(__name__)

STAGES = ("pack", "train-tokenizer", "encode", "train-prior", "sample", "evaluate")


class Run(Finished):
    """One config at work: each method is a stage, returning whether there was anything to do.

    Args:
        config: of the run.
        redo: stages to make again from nothing.
    """

    def __init__(self, config: Config, redo: Sequence[str] = ()) -> None:
        super().__init__(config)
        self.redo = set(redo)
        if self.redo and this_worker().world_size > 1:
            if started_by_a_launcher():  # nobody knows who comes first
                raise ConfigError("--redo goes with processes that smalti starts; remove the stage's folder instead")
            self.redo = set()  # the process that started this one has emptied the folder

    def stage(self, name: str, level: int | None = None) -> bool:
        """Do one stage."""
        if name == "train-prior":
            return self.train_prior(level)
        stages = {
            "pack": self.pack,
            "train-tokenizer": self.train_tokenizer,
            "encode": self.encode,
            "sample": self.sample,
            "evaluate": self.evaluate,
            "verify": self.verify,
        }
        return bool(stages[name]())

    def pack(self) -> bool:
        """Images of a source to image shards."""
        config = self.config
        if config.images.from_:
            read_manifest(self.images, "images", "pack")
            return _skip("pack", f"images come from {self.images}")
        if not self.needs_images():
            return _skip("pack", "tokenizer and codes come from elsewhere, so no images are needed")
        folder = self._open("pack", self.root / "images", {"seed": config.seed, "images": config.images})
        if is_complete(folder) and shards_hold(read_manifest(folder, "images", "pack"), folder, config.compute.cache):
            return _skip("pack", f"{folder} is complete")
        with workers_of(config.compute):
            pack(config.images, config.seed, config.compute, folder)
        return True

    def train_tokenizer(self) -> bool:
        """Image shards to a tokenizer."""
        config = self.config
        if config.tokenizer.from_:
            self._tokenizer()
            return _skip("train-tokenizer", f"the tokenizer comes from {config.tokenizer.from_}")
        if config.compute.strategy == "fsdp":
            raise ConfigError("compute.strategy fsdp is for priors; codebooks need whole models, so use ddp")
        made_from = {"images": manifest_digest(read_manifest(self.images, "images", "pack"))}
        settings = {"seed": config.seed, "tokenizer": config.tokenizer, "made_from": made_from}
        with self._alone(self.root / "tokenizer"):
            folder = self._open("train-tokenizer", self.root / "tokenizer", settings)
            if is_complete(folder):
                return _skip("train-tokenizer", f"{folder} is complete")
            from pipelines.train_tokenizer import train_tokenizer  # Lightning takes seconds to import

            training = at_level(config.tokenizer.training, 0, 1)
            train_tokenizer(config.tokenizer, training, config.seed, config.compute, self.images, folder)
        return True

    def encode(self) -> bool:
        """Image shards to code shards."""
        config = self.config
        if config.codes.from_:
            self._checked_codes()
            return _skip("encode", f"codes come from {self.codes}")
        tokenizer = self._tokenizer()
        folder = self._open("encode", self.root / "codes", {"seed": config.seed, "encode": config.encode})
        if is_complete(folder) and self._codes_fit(tokenizer):
            return _skip("encode", f"{folder} is complete")
        with workers_of(config.compute):
            encode(config.encode, config.seed, config.compute, tokenizer, self.images, folder)
        return True

    def train_prior(self, level: int | None = None) -> bool:
        """Code shards to one level's prior, or to all of them in turn."""
        manifest = self._checked_codes()
        levels = len(manifest["levels"])
        if level is not None and not 0 <= level < levels:
            raise ConfigError(f"--level must lie in [0, {levels}), got {level}")
        done = [self._train_level(number, manifest) for number in ([level] if level is not None else range(levels))]
        return any(done)

    def _train_level(self, level: int, manifest: dict) -> bool:
        config, stage = self.config, "train-prior"
        section = prior_at_level(config.prior, level, len(manifest["levels"]))
        prior = hashed(section)
        del prior["pixelsnail" if section.network == "transformer" else "transformer"]  # the size that is not used
        settings = {"seed": config.seed, "prior": prior, "made_from": {"codes": manifest_digest(manifest)}}
        folder = self.root / "prior" / f"level{level}"
        with self._alone(folder):
            self._open(stage, folder, settings)
            if is_complete(folder):
                return _skip(stage, f"{folder} is complete")
            from pipelines.train_prior import train_prior  # Lightning takes seconds to import

            train_prior(section, level, config.seed, config.compute, self.codes, self.unpacked, folder)
        return True

    def sample(self) -> bool:
        """Priors and tokenizer to sample shards."""
        config = self.config
        tokenizer, prior = self._tokenizer(), self._prior()
        settings = {"seed": config.seed, "sample": config.sample}
        folder = self._open("sample", self.root / config.sample.folder, settings)
        if is_complete(folder) and self._samples_fit(folder, tokenizer, prior):
            return _skip("sample", f"{folder} is complete")
        with workers_of(config.compute):
            sample(config.sample, config.seed, config.compute, tokenizer, prior, folder)
        return True

    def evaluate(self) -> bool:
        """Measure what is there: a tokenizer where images are, priors where codes are, and the bound where all are.

        Raises:
            StageError: nothing is there, or what is there does not belong together.
        """
        from pipelines.evaluate import evaluate, table  # its metrics take seconds to import

        if this_worker().rank > 0:
            return _skip("evaluate", "the first process does it")
        make_folder(self.root)
        images = self.images if self.has_images() else None
        tokenizer = self._tokenizer() if self.has_tokenizer() else None
        prior = self._prior() if self.has_priors() and self._checked_codes() else None
        known: dict[str, bool | None] = {}
        if tokenizer and images:
            known["tokenizer"] = self.tokenizer_held_out()
        if prior:
            known["prior"] = self.prior_held_out()
        if not known:
            raise StageError(f"{self.root} must hold a tokenizer and images, or priors and codes, to be evaluated")
        if tokenizer and images and prior:
            check_codes_of_images(self.codes, images)
            known["bound"] = known["tokenizer"] and known["prior"]
        config = self.config
        figures = evaluate(tokenizer, images, prior, self.codes, self.unpacked, config.seed, config.compute)
        figures = {part: {"held_out": known[part], **found} for part, found in figures.items()}
        print(table(figures))
        write_json(self.root / "metrics.json", figures)
        return True

    def verify(self) -> bool:
        """Check what is there of a run, file by file, in the order in which it was made; models by loading them.

        Raises:
            StageError: the first thing that is not what it should be, named.
        """
        cache, images, tokenizer, codes, prior = self.config.compute.cache, None, None, None, None
        if self.has_images():
            images = verify_images(self.images, cache)
            _verified(self.images, _count(images))
        if self.has_tokenizer():
            tokenizer = self._tokenizer()
            _verified(self.tokenizer, tokenizer_fingerprint(tokenizer)[:12])
        if images and tokenizer:
            self.tokenizer_held_out()
        if is_complete(self.codes):
            codes = verify_codes(self.codes, images, tokenizer, cache)
            _verified(self.codes, _count(codes))
        if codes and self.has_priors():
            prior = self._prior()
            verify_priors(prior, codes)
            self.prior_held_out()
            _verified(self.root / "prior", f"{len(prior.levels)} levels")
        samples = self.root / self.config.sample.folder
        if tokenizer and prior and is_complete(samples):
            _verified(samples, _count(verify_samples(samples, tokenizer, prior, cache)))
        if not (images or tokenizer or codes):
            raise StageError(f"{self.root} holds nothing finished to verify; is it the right run_dir?")
        return True

    def all(self) -> None:
        """Do every stage in order in this process; a stage that is made again takes those after it along."""
        self.check_order()
        first = min((STAGES.index(stage) for stage in self.redo), default=len(STAGES))
        self.redo = set(STAGES[first:])
        for name in STAGES:
            self.stage(name)

    def check_order(self) -> None:
        """Raise ConfigError for what cannot be done in order."""
        if self.config.codes.from_ and not self.config.tokenizer.from_:
            raise ConfigError("codes.from goes with tokenizer.from, the tokenizer that wrote those codes; name it too")
        if this_worker().world_size > 1:
            raise ConfigError("run starts its processes itself; under torchrun or Slurm start the stages one by one")

    def _open(self, stage: str, folder: Path, settings: dict) -> Path:
        if this_worker().rank == 0:
            open_stage(folder, stage, settings, redo=stage in self.redo)
        else:  # the first worker judges the settings for all
            make_folder(folder)
        return folder

    def _alone(self, folder: Path) -> AbstractContextManager[None]:
        return only_process(folder) if this_worker().rank == 0 else nullcontext()

    def _tokenizer(self) -> HierarchicalVQVAE:
        name = self.config.tokenizer.from_
        if name and "://" not in name:
            return HierarchicalVQVAE.from_pretrained(name)
        folder = place(name) if name else self.root / "tokenizer"
        if not is_complete(folder):
            raise StageError(f"{folder} holds no finished tokenizer; run `smalti train-tokenizer` first")
        return HierarchicalVQVAE.from_pretrained(self._model(folder))

    def _model(self, folder: Path) -> Path:
        return self.config.compute.cache.files(folder, ["config.json", "model.safetensors"])

    def _level_folders(self) -> list[Path]:
        try:
            levels = len(read_manifest(self.codes, "codes", "encode")["levels"])
        except StageError:
            return []
        return [self.root / "prior" / f"level{level}" for level in range(levels)]

    def _prior(self) -> HierarchicalPrior:
        folders = self._level_folders() or [self.root / "prior" / "level0"]
        for folder in folders:
            if not is_complete(folder):
                raise StageError(f"{folder} holds no finished prior; run `smalti train-prior` first")
        return HierarchicalPrior([LevelPrior.from_pretrained(self._model(folder)) for folder in folders]).eval()

    def _checked_codes(self) -> dict:
        """The codes' manifest; where this run has the tokenizer too, they must belong together."""
        manifest = read_manifest(self.codes, "codes", "encode")
        if self.has_tokenizer():
            tokenizer = self._tokenizer()
            mark = tokenizer_fingerprint(tokenizer)
            if manifest["tokenizer"] != mark:
                raise StageError(
                    f"{self.codes} was written with tokenizer {manifest['tokenizer'][:12]} "
                    f"but this run's is {mark[:12]}; "
                    "run `smalti encode` with this tokenizer"
                )
        return manifest

    def _codes_fit(self, tokenizer: HierarchicalVQVAE) -> bool:
        manifest = read_manifest(self.codes, "codes", "encode")
        images = read_manifest(self.images, "images", "pack")
        mark = tokenizer_fingerprint(tokenizer)
        fits = manifest["tokenizer"] == mark and manifest["made_from"] == manifest_digest(images)
        return fits and shards_hold(manifest, self.codes, self.config.compute.cache)

    def _samples_fit(self, folder: Path, tokenizer: HierarchicalVQVAE, prior: HierarchicalPrior) -> bool:
        manifest = read_manifest(folder, "samples", "sample")
        fits = manifest["fingerprints"] == model_fingerprints(tokenizer, prior)
        return fits and shards_hold(manifest, folder, self.config.compute.cache)


def prior_at_level(config: PriorConfig, level: int, num_levels: int) -> PriorConfig:
    """Return the section for one level: every list replaced by this level's value."""
    section = at_level(config, level, num_levels)
    return replace(
        section,
        transformer=at_level(config.transformer, level, num_levels),
        pixelsnail=at_level(config.pixelsnail, level, num_levels),
        training=at_level(config.training, level, num_levels),
    )


def shards_hold(manifest: dict, folder: Path, cache: Cache) -> bool:
    """Whether all shards of a manifest are what it says; one that is not is made again by the stage."""
    receipts = [receipt for _, receipt in all_receipts(manifest)]
    wrong = next((receipt for receipt in receipts if not cache.holds(folder / receipt["shard"], receipt)), None)
    if wrong:
        logger.warning("%s is missing or damaged", folder / wrong["shard"])
    return wrong is None


def _verified(folder: Path, what: str) -> None:
    logger.info("verify: %s holds what it says (%s)", folder, what)


def _count(manifest: dict) -> str:
    receipts = [receipt for _, receipt in all_receipts(manifest)]
    return f"{len(receipts)} shards, {sum(receipt['samples'] for receipt in receipts)} samples"


def _skip(stage: str, why: str) -> bool:
    logger.info("%s: skipped, %s", stage, why)
    return False
