"""The stages of a run: which folder and which sections each one works on, in which order, and what is skipped."""

import json
import logging
import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from pipelines.compute import described, started_by_a_launcher, this_worker
from pipelines.config import Config
from pipelines.encode import encode
from pipelines.errors import ConfigError, StageError
from pipelines.export import export, is_exported, plan_export
from pipelines.fingerprint import digest, hashed, manifest_digest, tokenizer_fingerprint
from pipelines.generator import Generator
from pipelines.held_out import check_codes_of_images, held_out
from pipelines.judge import judge
from pipelines.manifest import all_receipts, read_manifest, shards_hold
from pipelines.pack import pack, settle_source
from pipelines.places import exists, is_local, make_folder, place, read_bytes
from pipelines.processes import workers_of
from pipelines.redo import Redo
from pipelines.sample import model_fingerprints, sample
from pipelines.scan import ORDERS
from pipelines.sections import at_level, prior_at_level
from pipelines.shards import write_json
from pipelines.signals import PARENT
from pipelines.stage import check_outside, folder_of_set, is_complete, named_folder, only_process, open_stage
from pipelines.verify import verify_codes, verify_images, verify_priors, verify_samples, verify_tokens
from prior import HierarchicalPrior, LevelPrior
from tokenizer import HierarchicalVQVAE

logger = logging.getLogger(__name__)

# Of a model's validation figures, those that one line has room for.
SHOWN = ("_mse", "_psnr", "_perplexity", "_nats_per_code")
STAGES = ("pack", "train-tokenizer", "encode", "train-prior", "sample", "evaluate")


class Run:
    """One config at work: each method is a stage, returning whether there was anything to do.

    Args:
        config: of the run.
        redo: stages to make again from nothing.
        models: what `sample` draws with; if not given, what the config and the run folder have.
    """

    def __init__(self, config: Config, redo: Sequence[str] = (), models: Generator | None = None) -> None:
        self.config, self.models = config, models
        self.root = place(config.run_dir, writable=True)
        if redo and this_worker().world_size > 1:
            if started_by_a_launcher():  # nobody knows who comes first
                raise ConfigError("--redo goes with processes that smalti starts; remove the stage's folder instead")
            redo = ()  # the process that started this one has emptied the folder
        self.redo = Redo(self.root, redo, config)
        self.is_child = os.environ.get(PARENT) == str(os.getppid())  # training names others there

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

    def stage(self, name: str, level: int | None = None) -> bool:
        """Do one stage."""
        self.redo = Redo(self.root, self.redo.stages, self.config, name, level)
        self.judge([name])
        done = self._do(name, level)
        self.redo.done()
        return done

    def _do(self, name: str, level: int | None = None) -> bool:
        if name == "train-prior":
            return self.train_prior(level)
        stages = {
            "pack": self.pack,
            "train-tokenizer": self.train_tokenizer,
            "encode": self.encode,
            "sample": self.sample,
            "export": self.export,
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
        if not self._needs_images():
            return _skip("pack", "tokenizer and codes come from elsewhere, so no images are needed")
        folder = self.root / "images"
        if "pack" in self.redo.stages or not is_complete(folder):
            settle_source(config.images.source, folder)
        self._open("pack", folder, {"seed": config.seed, "images": config.images})
        if is_complete(folder) and shards_hold(read_manifest(folder, "images", "pack"), folder, config.compute.cache):
            return _skip("pack", f"{folder} is complete")
        self._begin("pack", config.images.source, folder)
        with workers_of(config.compute):
            pack(config.images, config.seed, config.compute, folder)
        return self._close("pack", folder)

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

            self._begin("train-tokenizer", self.images, folder)
            training = at_level(config.tokenizer.training, 0, 1)
            train_tokenizer(config.tokenizer, training, config.seed, config.compute, self.images, folder)
        return self._close("train-tokenizer", folder)

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
        self._begin("encode", self.images, folder)
        with workers_of(config.compute):
            encode(config.encode, config.seed, config.compute, tokenizer, self.images, folder)
        return self._close("encode", folder)

    def export(self) -> bool:
        """Code shards to token shards."""
        config, asked = self.config, self.config.export
        self._checked_codes()
        folder = folder_of_set(self.root, asked.folder, "export")
        order = "" if asked.order in ORDERS else asked.order
        read = {"order": order, "vocab.ids": asked.vocab.ids, "text.tokenizer": asked.text.tokenizer}
        check_outside(folder, "export", {f"export.{setting}": name for setting, name in read.items()})
        plan = plan_export(asked, config.seed, config.compute, self.codes, folder)  # refuses before anything is touched
        self._open("export", folder, {"seed": config.seed, "export": asked})
        if is_complete(folder) and is_exported(plan, config.compute.cache):
            return _skip("export", f"{folder} is complete")
        self._begin("export", self.codes, folder)
        with workers_of(config.compute):
            export(asked, config.seed, config.compute, self.codes, folder)
        return self._close("export", folder)

    def train_prior(self, level: int | None = None) -> bool:
        """Code shards to one level's prior, or to all of them in turn."""
        manifest = self._checked_codes()
        levels = len(manifest["levels"])
        if level is not None and not 0 <= level < levels:
            raise ConfigError(f"--level must lie in [0, {levels}), got {level}")
        numbers = range(levels) if level is None else [level]
        # All are emptied before any is trained: the processes of a job do not come to the next level together.
        for folder in (self._level(number) for number in numbers if "train-prior" in self.redo.stages):
            with self._alone(folder):
                self.redo.empty("train-prior", folder)
        done = [self._train_level(number, manifest) for number in numbers]
        return any(done)

    def _level(self, number: int) -> Path:
        return self.root / "prior" / f"level{number}"

    def _train_level(self, level: int, manifest: dict) -> bool:
        config, stage = self.config, "train-prior"
        section = prior_at_level(config.prior, level, len(manifest["levels"]))
        prior = hashed(section)
        del prior["pixelsnail" if section.network == "transformer" else "transformer"]  # the size that is not used
        settings = {"seed": config.seed, "prior": prior, "made_from": {"codes": manifest_digest(manifest)}}
        folder = self._level(level)
        with self._alone(folder):
            self._open(stage, folder, settings)
            if is_complete(folder):
                return _skip(stage, f"{folder} is complete")
            from pipelines.train_prior import train_prior  # Lightning takes seconds to import

            self._begin(stage, self.codes, folder)
            train_prior(section, level, config.seed, config.compute, self.codes, self.unpacked, folder)
        return self._close(stage, folder)

    def sample(self) -> bool:
        """Priors and tokenizer to sample shards."""
        config = self.config
        given = self.models
        tokenizer, prior = (given.tokenizer, given.prior) if given else (self._tokenizer(), self._prior())
        settings = {"seed": config.seed, "sample": config.sample}
        folder = self._open("sample", folder_of_set(self.root, config.sample.folder, "sample"), settings)
        if is_complete(folder) and self._samples_fit(folder, tokenizer, prior):
            return _skip("sample", f"{folder} is complete")
        self._begin("sample", f"{config.sample.count} images", folder)
        with workers_of(config.compute):
            sample(config.sample, config.seed, config.compute, tokenizer, prior, folder)
        return self._close("sample", folder)

    def evaluate(self) -> bool:
        """Measure what is there: a tokenizer where images are, priors where codes are, and the bound where all are.

        Raises:
            StageError: nothing is there, or what is there does not belong together.
        """
        from pipelines.evaluate import evaluate, table  # its metrics take seconds to import

        if this_worker().rank > 0:
            return _skip("evaluate", "the first process does it")
        make_folder(self.root)
        images = self.images if self._has_images() else None
        tokenizer = self._tokenizer() if self._has_tokenizer() else None
        prior = self._prior() if self._has_priors() and self._checked_codes() else None
        known: dict[str, bool | None] = {}
        if tokenizer and images:
            known["tokenizer"] = self._tokenizer_held_out()
        if prior:
            known["prior"] = self._prior_held_out()
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
        if self._has_images():
            images = verify_images(self.images, cache)
            _verified(self.images, _count(images))
        if self._has_tokenizer():
            tokenizer = self._tokenizer()
            _verified(self.root / "tokenizer", tokenizer_fingerprint(tokenizer)[:12])
        if images and tokenizer:
            self._tokenizer_held_out()
        if is_complete(self.codes):
            codes = verify_codes(self.codes, images, tokenizer, cache)
            _verified(self.codes, _count(codes))
        if codes and self._has_priors():
            prior = self._prior()
            verify_priors(prior, codes)
            self._prior_held_out()
            _verified(self.root / "prior", f"{len(prior.levels)} levels")
        samples = self.root / self.config.sample.folder
        if tokenizer and prior and is_complete(samples):
            _verified(samples, _count(verify_samples(samples, tokenizer, prior, cache)))
        tokens = self.root / self.config.export.folder
        if codes and is_complete(tokens):
            _verified(tokens, f"{verify_tokens(tokens, codes)} records")
        if not (images or tokenizer or codes):
            raise StageError(f"{self.root} holds nothing finished to verify; is it the right run_dir?")
        return True

    def all(self) -> None:
        """Do every stage in order in this process; a stage that is made again takes those after it along."""
        self.check_order()
        first = min((STAGES.index(stage) for stage in self.redo.stages), default=len(STAGES))
        self.redo.stages = set(STAGES[first:])
        for name in STAGES:
            self._do(name)
        self.redo.done()

    def judge(self, stages: Sequence[str]) -> None:
        """Raise ConfigError for what the stages ahead would refuse; see `pipelines.judge`."""
        if self.models or not set(stages) & set(STAGES[:-1]):
            return
        config = self.config
        images = read_manifest(self.images, "images", "pack") if is_complete(self.images) else None
        codes = read_manifest(self.codes, "codes", "encode") if config.codes.from_ else None
        judge(config, stages, images, codes, self._tokenizer() if config.tokenizer.from_ else None)

    def check_order(self) -> None:
        """Raise ConfigError for what cannot be done, or not in order, before anything is done."""
        if self.config.codes.from_ and not self.config.tokenizer.from_:
            raise ConfigError("codes.from goes with tokenizer.from, the tokenizer that wrote those codes; name it too")
        if this_worker().world_size > 1:
            raise ConfigError("run starts its processes itself; under torchrun or Slurm start the stages one by one")
        self.judge(STAGES)

    def _open(self, stage: str, folder: Path, settings: dict) -> Path:
        sections = {name: getattr(self.config, name) for name in ("images", "tokenizer", "codes")}
        check_outside(folder, stage, {f"{name}.from": section.from_ for name, section in sections.items()})
        if this_worker().rank == 0:
            self.redo.empty(stage, folder)
            open_stage(folder, stage, settings)
        else:  # the first worker judges the settings for all
            make_folder(folder)
        return folder

    def _begin(self, stage: str, source: object, folder: Path) -> None:
        self.begun = time.monotonic()
        logger.info("%s: %s -> %s (%s)", stage, source, folder, described(self.config.compute))

    def _close(self, stage: str, folder: Path) -> bool:
        """End a stage that had something to do; where others may still be at work, they complete it."""
        if self.is_child:  # who started this process sees to the rest
            return True
        if is_complete(folder):
            self.redo.settled(folder)
            logger.info("%s: %s; %.0f s", stage, what_came_of(folder), time.monotonic() - self.begun)
        elif this_worker().world_size > 1 or self.config.compute.num_nodes > 1:
            logger.info("%s: this process is done, the others are not yet", stage)
        else:
            raise StageError(
                f"{stage} has ended but {folder} lacks a shard, or one is damaged; give the same command again"
            )
        return True

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

    def _has_images(self) -> bool:
        return self._needs_images() and is_complete(self.images)

    def _has_tokenizer(self) -> bool:
        return bool(self.config.tokenizer.from_) or is_complete(self.root / "tokenizer")

    def _has_priors(self) -> bool:
        if not is_complete(self.codes):
            return False
        levels = len(read_manifest(self.codes, "codes", "encode")["levels"])
        return all(is_complete(self.root / "prior" / f"level{level}") for level in range(levels))

    def _needs_images(self) -> bool:
        """Whether the config leaves anything to do with images; another run's codes and tokenizer need none."""
        config = self.config
        return bool(config.images.from_) or not (config.tokenizer.from_ and config.codes.from_)

    def _tokenizer_held_out(self) -> bool | None:
        name, own = self.config.tokenizer.from_, not (self.config.tokenizer.from_ or self.config.images.from_)
        return held_out([place(name) if name else self.root / "tokenizer"], "images", self.images, own)

    def _prior_held_out(self) -> bool | None:
        return held_out(self._level_folders(), "codes", self.codes, own=not self.config.codes.from_)

    def _model(self, folder: Path) -> Path:
        return self.config.compute.cache.files(folder, ["config.json", "model.safetensors"])

    def _level_folders(self) -> list[Path]:
        try:
            levels = len(read_manifest(self.codes, "codes", "encode")["levels"])
        except StageError:
            return []
        return [self._level(number) for number in range(levels)]

    def _prior(self) -> HierarchicalPrior:
        folders = self._level_folders() or [self._level(0)]
        for folder in folders:
            if not is_complete(folder):
                raise StageError(f"{folder} holds no finished prior; run `smalti train-prior` first")
        return HierarchicalPrior([LevelPrior.from_pretrained(self._model(folder)) for folder in folders]).eval()

    def _checked_codes(self) -> dict:
        """The codes' manifest; where this run has the tokenizer too, they must belong together."""
        manifest = read_manifest(self.codes, "codes", "encode")
        if self._has_tokenizer():
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


def what_came_of(folder: Path) -> str:
    """Return the result of a finished stage in a few words, from what its folder holds."""
    for name, key, unit in (("manifest.json", "splits", "samples"), ("layout.json", "shards", "records")):
        if exists(folder / name):
            splits = json.loads(read_bytes(folder / name))[key]
            counts = {split: sum(shard[unit] for shard in shards) for split, shards in splits.items()}
            total = sum(map(len, splits.values()))
            return f"{', '.join(f'{count:,} {split}' for split, count in counts.items())} in {total} shards"
    figures = json.loads(read_bytes(folder / "metrics.json"))
    shown = {name.removeprefix("val_"): value for name, value in figures.items() if name.endswith(SHOWN)}
    return "val " + ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in shown.items())


def _verified(folder: Path, what: str) -> None:
    logger.info("verify: %s holds what it says (%s)", folder, what)


def _count(manifest: dict) -> str:
    receipts = [receipt for _, receipt in all_receipts(manifest)]
    return f"{len(receipts)} shards, {sum(receipt['samples'] for receipt in receipts)} samples"


def _skip(stage: str, why: str) -> bool:
    logger.info("%s: skipped, %s", stage, why)
    return False
