"""What tells one result from another: every setting is either part of it, or here with the reason why it is not.

A new setting that is in neither list fails; a list that is wrong fails too.
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest

from pipelines.compute.devices import ComputeConfig
from pipelines.config import Config
from pipelines.sources.source import Source
from pipelines.stages.encode import EncodeConfig, settings_digest
from pipelines.stages.export import ExportConfig, plan_export
from pipelines.stages.pack import ImagesConfig, plan_shards, shard_jobs
from pipelines.stages.sample import SampleConfig, drawn_with
from pipelines.storage.fingerprint import digest
from pipelines.storage.folders import plain_data
from pipelines.tokens.vocabulary import TextConfig, VocabConfig
from pipelines.training.sections import NETWORKS, PriorConfig, TokenizerSection, used
from tokenizer.bottlenecks import KINDS

SHAPING: dict[type, dict[str, Any]] = {
    ImagesConfig: {
        **{"size": 32, "channels": 1, "classes": False, "upscale": True, "format": "webp"},
        **{"val_fraction": 0.5, "shard_size": 7, "image_column": "picture", "label_column": "kind"},
        **{"caption_column": "text", "keep": ["json"], "shuffle": True, "leave_out": ["a"]},
    },
    EncodeConfig: {
        **{"views": ["flip"], "crop_shift": 2, "batch_size": 8, "precision": "bfloat16", "compile": True},
        **{"posterior": True},
    },
    ExportConfig: {
        **{
            "format": ["mds"],
            "views": "all",
            "shuffle": False,
            "order": "nested",
            "levels": [1],
            "template": "<codes>",
        },
        **{"vocab": VocabConfig(base=1), "text": TextConfig(column="x"), "dtype": "uint32", "max_tokens": 99},
    },
    SampleConfig: {
        **{"classes": [1], "temperature": 0.5, "top_k": 3, "top_p": 0.5, "guidance": 2.0},
        **{"batch_size": 8, "shard_size": 7, "precision": "bfloat16", "reject": 2},
    },
}
NOT_SHAPING: dict[type, dict[str, tuple[Any, str]]] = {
    ImagesConfig: {
        "from_": ("elsewhere", "nothing is packed"),
        "source": ("parquet:x", "its identity counts, which tells what is listed; see settle_source"),
        "max_bad": (0.5, "decides whether there is a result, not what it is"),
    },
    EncodeConfig: {},
    ExportConfig: {
        "folder": ("hot", "where tokens lie"),
        "single": (True, "counts in what goes with all shards"),
    },
    SampleConfig: {
        "folder": ("hot", "where a set lies"),
        "count": (200, "each shard counts where it begins and ends"),
    },
}


def packed(config: ImagesConfig, seed: int = 0, beside: tuple[str, ...] = ("txt", "json")) -> list[Any]:
    splits = {"train": Labelled(np.arange(40) % 2)}
    source = Source(splits, ["a", "b"], "listed", beside=dict.fromkeys(beside, ""))  # type: ignore[arg-type]
    return [job[1:3] for job in shard_jobs(source, plan_shards(source, config, seed), config, Path("images"))]


def planned(config: ExportConfig, seed: int) -> list[Any]:
    codes = Path(__file__).parent / "data" / "format1" / "run" / "codes"
    return [job.provenance for job in plan_export(config, seed, ComputeConfig(), codes, Path("tokens")).jobs]


class Labelled:
    """As much of a split as is planned with."""

    def __init__(self, labels: np.ndarray) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)


# Settings of what no stage is compared with, and why.
OTHER_SECTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "run_dir": ((), "where"),
    "seed": ((), "counts in every stage by itself"),
    "codes": (("from_",), "priors are made from a manifest of codes, whose digest counts"),
    "evaluate": (
        ("features", "reference", "train_images", "importance_samples", "skip"),
        "made anew each time; metrics.json tells of what",
    ),
    "compute": (
        (
            *("accelerator", "devices", "num_nodes", "num_workers", "threads", "timeout_s", "strategy"),
            *("cache_dir", "cache_gb", "logger"),
        ),
        "where; samples name device and threads, which move their last bits",
    ),
}
IDENTITIES: dict[type, Callable[..., Any]] = {
    ImagesConfig: packed,
    EncodeConfig: lambda config, seed=0: settings_digest(config, seed),
    ExportConfig: lambda config, seed=0: planned(config, seed),
    SampleConfig: lambda config, seed=0: drawn_with(config, seed, "cpu", 1),
}


@pytest.mark.parametrize("section", IDENTITIES)
def test_every_setting_of_shards_shapes_them_or_says_why_not(section: type) -> None:
    identity, base = IDENTITIES[section], section()
    assert {field.name for field in fields(section)} == SHAPING[section].keys() | NOT_SHAPING[section].keys()
    assert not SHAPING[section].keys() & NOT_SHAPING[section].keys()
    for name, value in SHAPING[section].items():
        assert identity(section(**{name: value})) != identity(base), name
    for name, (value, why) in NOT_SHAPING[section].items():
        assert identity(section(**{name: value})) == identity(base), (name, why)
    assert identity(base, seed=1) != identity(base)


def test_digests_of_format_1_stay_what_they_were() -> None:
    """Taken with that version; what it did not count is counted only where it is not what it was."""
    for config, beside in ((ImagesConfig(), ()), (ImagesConfig(keep=[], shuffle=False), ("txt", "json"))):
        assert (
            digest(packed(config, beside=beside)) == "b816d1683a608008eb6ffc370093e31c04c2fcbe90a9011f4038c8052f98a81c"
        )
    assert settings_digest(EncodeConfig(), 0) == "e58157f7abef97e7b9abc4df028d424785bc428e5551ac3814d931b4b79282b1"
    assert (
        digest(drawn_with(SampleConfig(), 0, "cpu", 1))
        == "51981eab2ffe49d88a2aa97a838e36428d4e8244266dd752f06a13c309ebd512"
    )


def leaves(section: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    return [
        leaf
        for field in fields(section)
        for leaf in (
            leaves(getattr(section, field.name), (*path, field.name))
            if is_dataclass(getattr(section, field.name))
            else [(*path, field.name)]
        )
    ]


@pytest.mark.parametrize("kind", [*KINDS, *NETWORKS])
def test_every_setting_of_training_is_kept_and_compared_where_it_is_used(kind: str) -> None:
    def chosen() -> TokenizerSection | PriorConfig:
        return TokenizerSection(bottleneck=kind) if kind in KINDS else PriorConfig(network=kind)

    for *path, name in leaves(chosen()):
        config = chosen()
        part: Any = config
        for step in path:
            part = getattr(part, step)
        if name in ("bottleneck", "network"):
            continue
        object.__setattr__(part, name, "another")
        unused = path and path[0] in config.unused
        assert (plain_data(used(config)) == plain_data(used(chosen()))) == bool(unused), (*path, name)


def test_every_section_is_part_of_a_result_or_says_why_not() -> None:
    kinds = get_type_hints(Config)
    judged = {name for name, kind in kinds.items() if kind in (*IDENTITIES, TokenizerSection, PriorConfig)}
    assert judged.isdisjoint(OTHER_SECTIONS) and judged | OTHER_SECTIONS.keys() == kinds.keys()
    for name, (settings, _) in OTHER_SECTIONS.items():
        found = [field.name for field in fields(kinds[name])] if is_dataclass(kinds[name]) else []
        assert sorted(found) == sorted(settings), name
