"""Every shipped config loads and builds its models, on the meta device, so that size costs nothing."""

from pathlib import Path

import pytest
import torch

from benchmarks.ladder import RUNGS
from pipelines.config import Config, load_config
from pipelines.stages.train_prior import level_config
from pipelines.training.sections import prior_for
from prior import LevelPrior
from tokenizer import HierarchicalVQVAE

FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
LADDER = sorted(path for path in (FOLDER / "ladder").glob("*.yaml") if path.stem != "base")
GRIDS = {
    "cifar10": [4, 8],
    "cifar10-16": [8, 16],
    "cifar10-vae": [4, 8],
    "digits": [2, 4],
    "faces1024": [32, 64, 128],
    "imagenet256": [32, 64],
    "imagenet256-transformer": [16],
}


def build(config: Config) -> tuple[HierarchicalVQVAE, list[LevelPrior]]:
    section = config.tokenizer
    with torch.device("meta"):
        tokenizer = HierarchicalVQVAE(section.model, config.images.size, config.images.channels, section.family, 1)
        sizes, channels = tokenizer.codebook_sizes, [level.channels for level in tokenizer.levels]
        priors = []
        for level in range(len(sizes)):
            own = prior_for(config.prior, level, sizes)
            priors.append(LevelPrior(level_config(own, level, tokenizer.grids, sizes, ["a"], "", channels)))
    return tokenizer, priors


def test_the_configs_are_those_the_readme_lists() -> None:
    assert {path.stem for path in CONFIGS} == set(GRIDS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_builds_its_models(path: Path) -> None:
    tokenizer, priors = build(load_config(path))
    assert tokenizer.grids == [(side, side) for side in GRIDS[path.stem]]
    assert all(isinstance(model, torch.nn.Module) for model in [tokenizer, *priors])


def test_rungs_of_the_ladder_differ_in_nothing_but_what_they_are_about() -> None:
    assert {path.stem for path in LADDER} | {"uniform"} == set(RUNGS)
    configs = {path.stem: load_config(path) for path in LADDER}
    first = configs["autoencoder"]
    for name, config in configs.items():
        assert config.tokenizer.training == first.tokenizer.training
        assert config.prior.training == first.prior.training
        assert (config.tokenizer.model.width, config.seed) == (first.tokenizer.model.width, first.seed)
        assert config.images.size == first.images.size
        if name != "vae-aggregated":  # which has as many components as there are images
            build(config)
    assert len({config.run_dir for config in configs.values()}) == len(configs)


def test_the_published_settings_are_kept() -> None:
    config = load_config(CONFIGS[[path.stem for path in CONFIGS].index("imagenet256")])
    model, codebook = config.tokenizer.model, config.tokenizer.ema
    assert (model.codebook_sizes, model.code_dims, model.width) == ([512, 512], [64, 64], 128)
    assert (codebook.decay, codebook.commitment_weight, config.tokenizer.training.batch_size) == (0.99, 0.25, 128)
