"""The stages of a run: which folder and which sections each one works on, in which order, and what is skipped."""

import logging
import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from pipelines.begun import as_begun, settle_source, warn_of_changed_source
from pipelines.compute.devices import described, hardware, started_by_a_launcher, this_worker
from pipelines.compute.launching import workers_of
from pipelines.compute.ranks import adding_up
from pipelines.compute.signals import PARENT
from pipelines.config import Config
from pipelines.errors import ConfigError, StageError
from pipelines.finished import Finished, what_came_of
from pipelines.generator import Generator
from pipelines.judge import check_classes, check_priors, judge
from pipelines.progress import counted
from pipelines.redo import Redo
from pipelines.report import PAGE
from pipelines.stages import ORDER
from pipelines.stages.encode import check_encode, encode
from pipelines.stages.export import export, files_read, is_exported, plan_export
from pipelines.stages.pack import pack
from pipelines.stages.sample import check_sample, sample
from pipelines.stages.verify import (
    size_of,
    told,
    verify_codes,
    verify_images,
    verify_priors,
    verify_samples,
    verify_tokens,
)
from pipelines.storage.fingerprint import introduced, manifest_digest, model_fingerprints, tokenizer_fingerprint
from pipelines.storage.folders import check_outside, completes, folder_of_set, is_complete, only_process, open_stage
from pipelines.storage.manifest import CodesManifest, read_manifest, shards_hold
from pipelines.storage.paths import exists, make_folder, write_json
from pipelines.storage.record import write_record
from pipelines.training.sections import at_level, prior_for, used

logger = logging.getLogger(__name__)


class Run:
    """One config at work: each method is a stage, returning whether there was anything to do.

    Args:
        config: of the run.
        redo: stages to make again from nothing.
        models: what `sample` draws with; if not given, what the config and the run folder have.
    """

    def __init__(self, config: Config, redo: Sequence[str] = (), models: Generator | None = None) -> None:
        self.config, self.models = config, models
        self.finished = Finished(config)
        self.root = self.finished.root
        if redo and this_worker().world_size > 1:
            if started_by_a_launcher():  # nobody knows who comes first
                raise ConfigError("--redo goes with processes that smalti starts; remove the stage's folder instead")
            redo = ()  # the process that started this one has emptied the folder
        self.redo = Redo(self.root, redo, config)
        self.begun = time.monotonic()
        self.is_child = os.environ.get(PARENT) == str(os.getppid())  # training names others there

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
            read_manifest(self.finished.images, "images", "pack")
            return _skip("pack", f"images come from {self.finished.images}")
        if not self.finished.needs_images():
            return _skip("pack", "tokenizer and codes come from elsewhere, so no images are needed")
        folder = self.root / "images"
        if "pack" in self.redo.stages or not is_complete(folder):
            settle_source(config.images.source, folder)
        new = self.redo.due("pack", folder)
        images = config.images if new else as_begun(config.images, config.seed, folder)
        self._open("pack", folder, {"seed": config.seed, "images": images})
        if is_complete(folder) and shards_hold(read_manifest(folder, "images", "pack"), folder, config.compute.cache):
            warn_of_changed_source(images, config.seed, config.compute.cache, folder)
            return _skip("pack", f"{folder} is complete")
        self._begin("pack", config.images.source, folder)
        with workers_of(config.compute):
            pack(images, config.seed, config.compute, folder, partial(check_classes, config.sample))
        return self._close("pack", folder)

    def train_tokenizer(self) -> bool:
        """Image shards to a tokenizer."""
        config = self.config
        if config.tokenizer.from_:
            self.finished.tokenizer()
            return _skip("train-tokenizer", f"the tokenizer comes from {config.tokenizer.from_}")
        made_from = {"images": manifest_digest(read_manifest(self.finished.images, "images", "pack"))}
        settings = {"seed": config.seed, "tokenizer": used(config.tokenizer), "made_from": made_from}
        with self._alone(self.root / "tokenizer"):
            folder = self._open("train-tokenizer", self.root / "tokenizer", settings)
            if is_complete(folder):
                return _skip("train-tokenizer", f"{folder} is complete")
            from pipelines.stages.train_tokenizer import train_tokenizer  # Lightning takes seconds to import

            self._begin("train-tokenizer", self.finished.images, folder)
            training = at_level(config.tokenizer.training, 0, 1)
            train_tokenizer(config.tokenizer, training, config.seed, config.compute, self.finished.images, folder)
        return self._close("train-tokenizer", folder)

    def encode(self) -> bool:
        """Image shards to code shards."""
        config = self.config
        if config.codes.from_:
            self.finished.checked_codes()
            return _skip("encode", f"codes come from {self.finished.codes}")
        tokenizer = self.finished.tokenizer()
        check_encode(config.encode, tokenizer, self.finished.images)
        folder = self._open("encode", self.root / "codes", {"seed": config.seed, "encode": config.encode})
        if is_complete(folder) and self.finished.codes_fit(tokenizer):
            return _skip("encode", f"{folder} is complete")
        if this_worker().rank == 0:
            self.finished.tokenizer_held_out(strict=False)
        self._begin("encode", self.finished.images, folder)
        with workers_of(config.compute):
            encode(config.encode, config.seed, config.compute, tokenizer, self.finished.images, folder)
        return self._close("encode", folder)

    def export(self) -> bool:
        """Code shards to token shards."""
        config, asked = self.config, self.config.export
        self.finished.checked_codes()
        codes, folder = self.finished.codes, folder_of_set(self.root, asked.folder, "export")
        check_outside(folder, "export", files_read(asked))
        plan = plan_export(asked, config.seed, config.compute, codes, folder)  # refuses before anything is touched
        self._open("export", folder, {"seed": config.seed, "export": asked})
        if is_complete(folder) and is_exported(plan, config.compute.cache):
            return _skip("export", f"{folder} is complete")
        self._begin("export", codes, folder)
        with workers_of(config.compute):
            export(asked, config.seed, config.compute, codes, folder)
        return self._close("export", folder)

    def train_prior(self, level: int | None = None) -> bool:
        """Code shards to one level's prior, or to all of them in turn."""
        manifest = self.finished.checked_codes()
        levels = len(manifest["levels"])
        if level is not None and not 0 <= level < levels:
            raise ConfigError(f"--level must lie in [0, {levels}), got {level}")
        numbers = range(levels) if level is None else [level]
        check_priors(self.config.prior, numbers, manifest, "train-prior" in self.redo.stages)
        # All are emptied before any is trained: the processes of a job do not come to the next level together.
        for folder in (self.finished.level(number) for number in numbers if "train-prior" in self.redo.stages):
            with self._alone(folder):
                self.redo.empty("train-prior", folder)
        done = [self._train_level(number, manifest) for number in numbers]
        return any(done)

    def _train_level(self, level: int, manifest: CodesManifest) -> bool:
        config, stage = self.config, "train-prior"
        section = prior_for(config.prior, level, [one["codebook_size"] for one in manifest["levels"]])
        settings = {"seed": config.seed, "prior": used(section), "made_from": {"codes": manifest_digest(manifest)}}
        folder = self.finished.level(level)
        with self._alone(folder):
            self._open(stage, folder, settings)
            if is_complete(folder):
                return _skip(stage, f"{folder} is complete")
            from pipelines.stages.train_prior import train_prior  # Lightning takes seconds to import

            self._begin(stage, self.finished.codes, folder)
            codes, unpacked = self.finished.codes, self.finished.unpacked
            train_prior(section, level, config.seed, config.compute, codes, unpacked, folder)
        return self._close(stage, folder)

    def sample(self) -> bool:
        """Priors and tokenizer to sample shards."""
        config = self.config
        if self.models:
            tokenizer, prior = self.models.tokenizer, self.models.prior
        else:
            tokenizer, prior = self.finished.tokenizer(), self.finished.prior()
        check_sample(config.sample, tokenizer, prior, tokenizer_fingerprint(tokenizer))
        if self.models and config.sample.reject > 1:
            raise StageError("sample.reject needs the classifier of a run, which published models lack; set it to 1")
        if config.sample.reject > 1 and not self.finished.has_images():
            raise StageError(f"sample.reject needs a run's training images, and {self.root} has none; set it to 1")
        settings = {"seed": config.seed, "sample": config.sample}
        folder = self._open("sample", folder_of_set(self.root, config.sample.folder, "sample"), settings)
        if is_complete(folder) and self.finished.samples_fit(folder, tokenizer, prior):
            return _skip("sample", f"{folder} is complete")
        self._begin("sample", counted(config.sample.count, "image"), folder)
        classifier = self.finished.classifier() if config.sample.reject > 1 else None
        with workers_of(config.compute):
            sample(config.sample, config.seed, config.compute, tokenizer, prior, folder, classifier)
        return self._close("sample", folder)

    def evaluate(self) -> bool:
        """Measure what is there: a tokenizer where images are, priors where codes are, samples, and the bound.

        Raises:
            StageError: nothing is there, or what is there does not belong together.
        """
        from pipelines.stages.evaluate import evaluate, table  # its metrics take seconds to import

        make_folder(self.root)
        self._begin("evaluate", self.root, self.root / "metrics.json")
        with workers_of(self.config.compute), adding_up(self.config.compute):
            figures = evaluate(*self.finished.subject(), self.config.evaluate.skip)
        if this_worker().rank == 0:
            print(table(figures))
            write_json(self.root / "metrics.json", figures)
            self._keep_record("evaluate", f"figures in {self.root / 'metrics.json'}")
        return True

    def verify(self) -> bool:
        """Check what is there of a run, file by file, in the order in which it was made; models by loading them.

        Raises:
            StageError: the first thing that is not what it should be, named; or, where the rest holds, what is not
                finished.
        """
        cache, images, tokenizer, codes, prior = self.config.compute.cache, None, None, None, None
        if self.finished.has_images():
            images = verify_images(self.finished.images, cache)
            told(self.finished.images, size_of(images))
        if self.finished.has_tokenizer():
            tokenizer = self.finished.tokenizer()
            told(self.config.tokenizer.from_ or self.root / "tokenizer", tokenizer_fingerprint(tokenizer)[:12])
        if images and tokenizer:
            self.finished.tokenizer_held_out()
        if is_complete(self.finished.codes):
            codes = verify_codes(self.finished.codes, images, tokenizer, cache)
            told(self.finished.codes, size_of(codes))
        if codes and self.finished.has_priors():
            prior = self.finished.prior()
            verify_priors(prior, codes)
            self.finished.prior_held_out()
            told(self.root / "prior", counted(len(prior.levels), "level"))
        samples = self.root / self.config.sample.folder
        if tokenizer and prior and is_complete(samples):
            models = model_fingerprints(tokenizer, prior)
            marks = self.finished.marks(read_manifest(samples, "samples", "sample"), models)
            told(samples, size_of(verify_samples(samples, tokenizer, marks, cache)))
        tokens = self.root / self.config.export.folder
        if codes and is_complete(tokens):
            told(tokens, counted(verify_tokens(tokens, codes), "record"))
        if unfinished := self.finished.unfinished():
            raise StageError("; ".join(unfinished))
        if not (images or tokenizer or codes):
            raise StageError(f"{self.root} holds nothing finished to verify; is it the right run_dir?")
        return True

    def all(self) -> None:
        """Do every stage in order in this process; a stage that is made again takes those after it along."""
        self.check_order()
        first = min((ORDER.index(stage) for stage in self.redo.stages), default=len(ORDER))
        self.redo.stages = set(ORDER[first:])
        for name in ORDER:
            self._do(name)
        self.redo.done()

    def judge(self, stages: Sequence[str]) -> None:
        """Raise ConfigError for what the stages ahead would refuse; see `pipelines.judge`."""
        if self.models or not set(stages) & set(ORDER[:-1]):
            return
        config = self.config
        images = read_manifest(self.finished.images, "images", "pack") if is_complete(self.finished.images) else None
        codes = read_manifest(self.finished.codes, "codes", "encode") if config.codes.from_ else None
        judge(config, stages, images, codes, self.finished.tokenizer() if config.tokenizer.from_ else None)

    def check_order(self) -> None:
        """Raise ConfigError for what cannot be done, or not in order, before anything is done."""
        if self.config.codes.from_ and not self.config.tokenizer.from_:
            raise ConfigError("codes.from goes with tokenizer.from, the tokenizer that wrote those codes; name it too")
        if this_worker().world_size > 1:
            raise ConfigError("run starts its processes itself; under torchrun or Slurm start the stages one by one")
        self.judge(ORDER)

    def _open(self, stage: str, folder: Path, settings: dict) -> Path:
        sections = {name: getattr(self.config, name) for name in ("images", "tokenizer", "codes")}
        check_outside(folder, stage, {f"{name}.from": section.from_ for name, section in sections.items()})
        if this_worker().rank == 0:
            self.redo.empty(stage, folder)
            open_stage(folder, stage, settings, introduced(Config))
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
        alone = this_worker().world_size == 1 and self.config.compute.num_nodes == 1
        if completes(folder) if alone else is_complete(folder):
            self.redo.settled(folder)
            level = f"-{folder.name}" * (stage == "train-prior")
            self._keep_record(stage, what_came_of(folder), level)
        elif not alone:
            logger.info("%s: this process is done, the others are not yet", stage)
        else:
            raise StageError(
                f"{stage} has ended but {folder} lacks a shard, or one is damaged; give the same command again"
            )
        return True

    def _keep_record(self, stage: str, came: str, level: str = "") -> None:
        """Say what came of a stage, and keep how long it took and where."""
        seconds, page = time.monotonic() - self.begun, self.root / PAGE
        if this_worker().rank == 0:
            write_record(self.root, stage + level, seconds, hardware(self.config.compute))
        look = f"look at {page}" if exists(page) else "`smalti report` shows it"
        logger.info("%s: %s; %.0f s; %s", stage, came, seconds, look)

    def _alone(self, folder: Path) -> AbstractContextManager[None]:
        return only_process(folder) if this_worker().rank == 0 else nullcontext()


def _skip(stage: str, why: str) -> bool:
    logger.info("%s: skipped, %s", stage, why)
    return False
