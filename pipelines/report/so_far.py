"""Models of trainings that are not finished: the best checkpoint so far."""

from pathlib import Path
from typing import Any

from torch import nn

from pipelines.errors import StageError
from pipelines.finished import Finished
from pipelines.storage.folders import is_complete
from pipelines.storage.manifest import classes_for_prior, read_manifest
from pipelines.storage.paths import exists
from pipelines.training.sections import prior_for
from prior import LevelPrior
from tokenizer import HierarchicalVQVAE


def tokenizer_so_far(finished: Finished) -> HierarchicalVQVAE | None:
    """Return the tokenizer in training, as of its best validation; None before the first one.

    Raises:
        StageError: its checkpoint cannot be read, or was made with other settings.
    """
    best = finished.root / "tokenizer" / "checkpoints" / "best.ckpt"
    if finished.config.tokenizer.from_ or not exists(best) or not finished.has_images():
        return None
    section, manifest = finished.config.tokenizer, read_manifest(finished.images, "images", "pack")
    model = HierarchicalVQVAE(
        section.model, manifest["image_size"], manifest["channels"], section.family, len(manifest["class_names"])
    )
    return _with_weights(model, best)


def prior_so_far(finished: Finished, level: int) -> LevelPrior | None:
    """Return a level's prior in training, as of its best validation; None before the first one.

    Raises:
        StageError: its checkpoint cannot be read, or was made with other settings.
    """
    best = finished.level(level) / "checkpoints" / "best.ckpt"
    if not exists(best) or not is_complete(finished.codes):
        return None
    from pipelines.stages.train_prior import level_config  # Lightning takes seconds to import

    manifest = read_manifest(finished.codes, "codes", "encode")
    levels = manifest["levels"]
    sizes, grids = [one["codebook_size"] for one in levels], [(one["grid"][0], one["grid"][1]) for one in levels]
    channels = [] if all(sizes) else [one.get("channels", 1) for one in levels]
    section = prior_for(finished.config.prior, level, sizes)
    names = classes_for_prior(manifest, str(section.network))
    about = (grids, sizes, names, manifest["tokenizer"], channels)
    return _with_weights(LevelPrior(level_config(section, level, *about)), best)


def _with_weights(model: Any, checkpoint: Path) -> Any:
    """Return a model in eval mode with the weights of a checkpoint of its training."""
    assert isinstance(model, nn.Module)
    from pipelines.training.checkpoints import WholeCheckpoints

    found = WholeCheckpoints().load_checkpoint(checkpoint)["state_dict"]
    weights = {name.removeprefix("model."): one for name, one in found.items() if name.startswith("model.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise StageError(f"{checkpoint} was made with other settings than the config's ({reason})") from error
    return model.eval()
