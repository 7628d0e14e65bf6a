from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.compute import ComputeConfig
from pipelines.errors import StageError
from pipelines.fingerprint import tokenizer_fingerprint
from pipelines.run import prior_at_level
from pipelines.sample import SampleConfig, class_indices, sample
from pipelines.sections import PriorConfig
from pipelines.train_prior import level_config
from prior import HierarchicalPrior, LevelConfig, LevelPrior
from tests.priors import SIZES
from tests.test_hierarchy import tiny
from tokenizer import HierarchicalVQVAE


@pytest.mark.parametrize(
    ("wanted", "names", "indices"),
    [
        ([0], ["1", "0"], [0]),
        (["0"], ["1", "0"], [1]),
        ([1, "1"], ["1", "2"], [1, 0]),
        (["1"], ["cat", "dog"], [1]),
        (["dog", 0], ["cat", "dog"], [1, 0]),
        ([], ["cat", "dog"], [0, 1]),
        ([], [], []),
    ],
)
def test_a_whole_number_is_an_index_and_a_string_a_name(wanted: list, names: list[str], indices: list[int]) -> None:
    assert class_indices(wanted, names) == indices


@pytest.mark.parametrize("wanted", [7, -1, "-1", "2", "bird", True, "", "²"])
def test_what_is_no_class_is_refused(wanted: str | int) -> None:
    with pytest.raises(StageError, match=r"which is none of the 2 classes: 1, 7; write a name as a string, an index"):
        class_indices([wanted], ["1", "7"])


def models(num_levels: int = 2, **changes: object) -> tuple[HierarchicalVQVAE, HierarchicalPrior]:
    """A tokenizer of two levels and priors of so many of them."""
    tokenizer, levels = tiny([8, 4]).eval(), []
    for level in range(num_levels):
        config = LevelConfig(
            level=level,
            grids=tokenizer.grids[: level + 1],
            codebook_sizes=[16] * (level + 1),
            class_names=["cat", "dog"],
            size=SIZES["transformer"],
            tokenizer=tokenizer_fingerprint(tokenizer),
        )
        levels.append(LevelPrior(replace(config, **changes)).eval())  # type: ignore[arg-type]
    return tokenizer, HierarchicalPrior(levels)


def draw(folder: Path, models: tuple[HierarchicalVQVAE, HierarchicalPrior], **settings: object) -> None:
    config = SampleConfig(count=2, batch_size=2, **settings)  # type: ignore[arg-type]
    compute = ComputeConfig(accelerator="cpu", threads=torch.get_num_threads(), num_workers=0)
    sample(config, 0, compute, *models, folder)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        (
            {"unconditional": False},
            {"guidance": 2.0},
            r"guidance cannot be 2\.0: level 0 never learned samples without",
        ),
        ({"unconditional": False}, {"guidance": [1.0, 0.5]}, r"guidance cannot be 0\.5: level 1 never learned"),
        ({"class_names": []}, {"guidance": 2.0}, "guidance needs classes, but the prior was trained without"),
        ({}, {"temperature": [1.0]}, r"sample\.temperature must be one value or one per level \(2\)"),
    ],
)
def test_what_a_prior_cannot_be_drawn_with_is_refused_before_work_begins(
    changes: dict, settings: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(StageError, match=message):
        draw(tmp_path, models(**changes), **settings)
    assert not list(tmp_path.iterdir())


def test_a_prior_that_lacks_a_level_of_its_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="the tokenizer has 2 levels but there are priors of 1"):
        draw(tmp_path, models(num_levels=1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("class_dropout", "names", "unconditional"), [(0.1, ["a"], True), (0.0, ["a"], False), (0.0, [], True)]
)
def test_a_prior_records_its_levels_and_whether_it_learned_without_class(
    class_dropout: float, names: list[str], unconditional: bool
) -> None:
    section = prior_at_level(PriorConfig(class_dropout=class_dropout), 0, 2)
    config = level_config(section, 0, [(2, 2), (4, 4)], [16, 16], names, "")
    assert (config.unconditional, config.num_levels) == (unconditional, 2)
