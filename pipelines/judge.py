"""What a later stage would refuse after hours is refused before the first one begins."""

import math
from collections.abc import Collection, Iterable
from importlib.util import find_spec
from pathlib import Path

from pipelines.compute.devices import ComputeConfig, local_processes, on_gpu, this_worker
from pipelines.config import Config
from pipelines.errors import ConfigError
from pipelines.metrics.features import load_features
from pipelines.stages.evaluate import check_names
from pipelines.stages.sample import SampleConfig, class_indices
from pipelines.storage.manifest import CodesManifest, ImagesManifest, receipts_of
from pipelines.storage.shards import level_shape
from pipelines.training.sections import (
    PriorConfig,
    TrainingConfig,
    at_level,
    prior_for,
    stored_numbers,
    stored_sizes,
)
from tokenizer import HierarchicalVQVAE


def judge(
    config: Config,
    stages: Collection[str],
    images: ImagesManifest | None,
    codes: CodesManifest | None,
    tokenizer: HierarchicalVQVAE | None,
) -> None:
    """Refuse what the stages ahead cannot do with what is there already.

    Args:
        config: of the run.
        stages: that are to be done.
        images: manifest of the images, where they are packed.
        codes: manifest of the codes, where they come from another run.
        tokenizer: where it comes from elsewhere.

    Raises:
        ConfigError: names the settings that do not go together.
    """
    sizes = tokenizer.codebook_sizes if tokenizer else stored_sizes(config.tokenizer)
    if codes:
        sizes = [level["codebook_size"] for level in codes["levels"]]
    config.check_levels(sizes)
    if not codes:
        _check_images(config, images, tokenizer)
    if known := codes or images:
        check_classes(config.sample, known["class_names"])
    if codes and not config.images.from_ and config.sample.reject > 1:
        raise ConfigError("sample.reject needs the images that its classifier is trained on; name images.from too")
    if "evaluate" in stages:
        _check_evaluate(config, images or codes)
    training = []
    if "train-tokenizer" in stages and not tokenizer:
        training.append(at_level(config.tokenizer.training, 0, 1))
        if config.tokenizer.family.whole_batch and training[0].micro_batches > 1:
            raise ConfigError(
                f"tokenizer.training.micro_batches must be 1 with bottleneck {config.tokenizer.bottleneck}, whose loss "
                f"is of the whole batch and no sum of parts, got {training[0].micro_batches}; use more processes"
            )
        if config.tokenizer.family.probes and training[0].compile is True:
            raise ConfigError(
                f"tokenizer.training.compile must be false or auto with bottleneck {config.tokenizer.bottleneck}: "
                "gradients of gradients go through no compiled model"
            )
        if config.tokenizer.model.conditional and images and not images["class_names"]:
            raise ConfigError("tokenizer.model.conditional needs classes, and these images have none; set it to false")
        if config.compute.strategy == "fsdp":
            raise ConfigError("compute.strategy fsdp is for priors; codebooks need whole models, so use ddp")
    family = tokenizer.bottleneck if tokenizer else config.tokenizer.family
    if "encode" in stages and not codes and config.encode.posterior and not family.rate:
        raise ConfigError("encode.posterior is of levels that hold draws of numbers, as gaussian's; set it to false")
    if "train-prior" in stages:
        priors = [prior_for(config.prior, level, sizes) for level in range(len(sizes))]
        for level, (prior, numbers) in enumerate(zip(priors, _numbers(config, images, codes, tokenizer), strict=True)):
            _check_mixture(prior, level, numbers, config.encode.posterior, codes)
        training += [prior.training for prior in priors]
    for section in training:
        _check_training(section, config.compute)


def _check_images(config: Config, images: ImagesManifest | None, tokenizer: HierarchicalVQVAE | None) -> None:
    """Refuse images of another size than the tokenizer's, trained or to be trained."""
    size, channels = config.images.size, config.images.channels
    if images:
        size, channels = images["image_size"], images["channels"]
    if tokenizer is None:
        try:
            config.tokenizer.model.grids(size)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    elif (tokenizer.image_size, tokenizer.channels) != (size, channels):
        raise ConfigError(
            f"the tokenizer reads images of {tokenizer.image_size} pixels and {tokenizer.channels} channels but those "
            f"of this run have {size} and {channels}; set images.size and images.channels to the tokenizer's"
        )


def check_classes(config: SampleConfig, class_names: list[str]) -> None:
    """Refuse samples of classes that there are not.

    Args:
        config: what shall be drawn.
        class_names: of the images or codes; known once their source is opened.

    Raises:
        ConfigError: there are no classes to choose or guide by.
        StageError: one that is asked for is none of them.
    """
    class_indices(config.classes, class_names)
    guidance = config.guidance if isinstance(config.guidance, list) else [config.guidance]
    if not class_names and any(value != 1 for value in guidance):
        raise ConfigError("sample.guidance needs classes, and these images have none; set it to 1")
    if not class_names and config.reject > 1:
        raise ConfigError("sample.reject needs classes, and these images have none; set it to 1")


def _check_evaluate(config: Config, known: ImagesManifest | CodesManifest | None) -> None:
    """Refuse a feature space or a reference that is not here, and metrics that there are not."""
    asked, images = config.evaluate, config.images
    check_names(asked.skip)
    size, channels = (known["image_size"], known["channels"]) if known else (images.size, images.channels)
    if asked.reference and not Path(asked.reference).is_file():
        raise ConfigError(f"evaluate.reference must name a file that exists, there is no {asked.reference}")
    load_features(asked.features, size, channels)


def _numbers(
    config: Config, images: ImagesManifest | None, codes: CodesManifest | None, tokenizer: HierarchicalVQVAE | None
) -> list[int]:
    """Return how many codes or numbers each level holds, coarse to fine."""
    if codes:
        return [math.prod(level_shape(level)) for level in codes["levels"]]
    if tokenizer:
        return [math.prod(level.grid) * level.channels for level in tokenizer.levels]
    return stored_numbers(config.tokenizer, images["image_size"] if images else config.images.size)


def check_priors(section: PriorConfig, levels: Iterable[int], codes: CodesManifest, built: bool) -> None:
    """Refuse priors that codes cannot have.

    Args:
        section: of the config.
        levels: whose priors are to be trained.
        codes: manifest of the codes.
        built: whether to try each network too, without its weights; needed where a finished prior is to make way.

    Raises:
        ConfigError: names the setting.
    """
    sizes = [one["codebook_size"] for one in codes["levels"]]
    for level in levels:
        prior = prior_for(section, level, sizes)
        _check_mixture(prior, level, math.prod(level_shape(codes["levels"][level])), codes=codes)
        if built:
            from pipelines.stages.train_prior import check_prior  # Lightning takes seconds to import

            check_prior(prior, level, codes)


def _check_mixture(
    prior: PriorConfig, level: int, numbers: int, stored: bool = True, codes: CodesManifest | None = None
) -> None:
    """Refuse a mixture too large for a level, of more components than samples, or at q(z | x) that are not stored."""
    if prior.network != "mixture":
        return
    samples = sum(receipt["samples"] for receipt in receipts_of(codes, "train")) if codes else None
    try:
        prior.mixture.check(level, numbers, samples)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if prior.mixture.at == "images" and not (codes.get("posterior", False) if codes else stored):
        raise ConfigError("prior.mixture.at images needs q(z | x) beside the codes; set encode.posterior to true")


def _check_training(config: TrainingConfig, compute: ComputeConfig) -> None:
    """Refuse what a training job cannot be given here."""
    processes = max(this_worker().world_size, local_processes(compute) * compute.num_nodes)
    assert isinstance(config.batch_size, int)
    if config.batch_size % (processes * config.micro_batches):
        raise ConfigError(
            f"batch_size must be a multiple of processes * micro_batches, got {config.batch_size} for "
            f"{processes} * {config.micro_batches}"
        )
    if compute.strategy == "fsdp" and not on_gpu(compute):
        raise ConfigError("compute.strategy fsdp needs GPUs, and there are none here; use ddp")
    if compute.strategy == "fsdp" and config.weight_ema:
        raise ConfigError("compute.strategy fsdp keeps no averaged weights; set weight_ema to 0")
    if compute.logger != "csv" and find_spec(compute.logger) is None:
        raise ConfigError(f"compute.logger {compute.logger} needs its package; run `pip install {compute.logger}`")
