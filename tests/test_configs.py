"""Every shipped config loads and builds its models, on the meta device, so that size costs nothing."""

from pathlib import Path

import pytest
import torch

from pipelines.config import load_config
from pipelines.stages.train_prior import level_config
from pipelines.training.sections import prior_at_level
from prior import LevelPrior
from tokenizer import HierarchicalVQVAE

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
GRIDS = {
    "cifar10": [4, 8],
    "cifar10-16": [8, 16],
    "digits": [2, 4],
    "faces1024": [32, 64, 128],
    "imagenet256": [32, 64],
    "imagenet256-transformer": [16],
}


def build(path: Path) -> tuple[HierarchicalVQVAE, list[LevelPrior]]:
    config = load_config(path)
    with torch.device("meta"):
        tokenizer = HierarchicalVQVAE(config.tokenizer.model, config.images.size, config.images.channels)
        levels = tokenizer.config.num_levels
        priors = []
        for level in range(levels):
            section = prior_at_level(config.prior, level, levels)
            sizes = tokenizer.config.codebook_sizes
            priors.append(LevelPrior(level_config(section, level, tokenizer.grids, sizes, ["a"], "")))
    return tokenizer, priors


def test_the_configs_are_those_the_readme_lists() -> None:
    assert {path.stem for path in CONFIGS} == set(GRIDS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_builds_its_models(path: Path) -> None:
    tokenizer, priors = build(path)
    assert tokenizer.grids == [(side, side) for side in GRIDS[path.stem]]
    assert all(sum(p.numel() for p in model.parameters()) > 0 for model in [tokenizer, *priors])


def test_the_published_settings_are_kept() -> None:
    config = load_config(CONFIGS[[path.stem for path in CONFIGS].index("imagenet256")])
    model, codebook = config.tokenizer.model, config.tokenizer.ema
    assert (model.codebook_sizes, model.code_dims, model.width) == ([512, 512], [64, 64], 128)
    assert (codebook.decay, codebook.commitment_weight, config.tokenizer.training.batch_size) == (0.99, 0.25, 128)
