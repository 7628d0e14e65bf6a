"""Shared tiny things: a run of every stage on a few digits, made once a test process."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pipelines.report import reading
from pipelines.storage.cache import Cache

# A slow machine is no failed law.
hypothesis.settings.register_profile("smalti", deadline=None)
hypothesis.settings.load_profile("smalti")
# One thread each: threads of several processes that wait for a core take it from those that compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="smalti-tests-")  # nobody's own cache

# In float32, so that laws of equality hold on machines with bfloat16 too.
TRAINING = {
    "steps": 6,
    "batch_size": 32,
    "learning_rate": 1e-3,
    "val_every": 3,
    "checkpoint_every": 3,
    "precision": "32-true",
}
TINY = {
    "images": {"source": "digits", "size": 16, "channels": 1, "upscale": True, "shard_size": 700},
    "tokenizer": {
        "model": {"strides": [8, 4], "codebook_size": [16, 32], "code_dim": 8, "width": 16, "residual_width": 8},
        "augment": {"flip": False, "shift": 1},
        "training": dict(TRAINING),
    },
    "prior": {
        "network": ["transformer", "pixelsnail"],
        "transformer": {"width": 16, "depth": 1, "heads": 2, "conditioning_blocks": 1},
        "pixelsnail": {
            "width": 8,
            "blocks": 1,
            "residual_blocks": 1,
            "heads": 2,
            "attention_width": 8,
            "conditioning_blocks": 1,
        },
        "training": dict(TRAINING),
    },
    "sample": {"count": 7, "batch_size": 4, "shard_size": 4},
    "evaluate": {"skip": ["classification"], "importance_samples": 3},  # the classifiers train for seconds
    "compute": {"accelerator": "cpu", "threads": 1, "num_workers": 0},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What waits for other processes comes first: one worker does it, with one server of `tests.jobs`, and none last.
    items.sort(key=lambda item: not hasattr(item.module, "Job") and not hasattr(item.module, "ranks"))  # type: ignore[attr-defined]
    for item in items if not torch.cuda.is_available() else []:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def merged(settings: dict, changes: dict) -> dict:
    """Nested dictionaries, the second over the first."""
    result = dict(settings)
    for key, value in changes.items():
        result[key] = (
            merged(result[key], value) if isinstance(result.get(key), dict) and isinstance(value, dict) else value
        )
    return result


@pytest.fixture(autouse=True, scope="session")
def _few_images_in_reports() -> None:
    # `run` makes a report at its end, and reading all of a tiny run's images would take longer than training on them.
    reading.MOST_IMAGES = 200


@pytest.fixture(scope="session")
def write_config() -> Callable[..., Path]:
    """Write the tiny config with changes, for a run folder beside it."""

    def write(folder: Path, changes: dict | None = None) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(merged({"run_dir": str(folder / "run"), **TINY}, changes or {})))
        return path

    return write


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path]) -> Path:
    """A config whose run is complete; tests that write take a copy."""
    from pipelines.cli import main

    config = write_config(tmp_path_factory.mktemp("tiny"))
    assert main(["run", str(config), "--traceback"]) == 0
    return config


@pytest.fixture(scope="session")
def numbers_run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path]) -> Path:
    """A config whose codes are numbers of a VAE that has hardly learned, their q(z | x) beside them."""
    from pipelines.cli import main

    changes = {
        "images": {"from": str(tiny_run.parent / "run" / "images")},
        "tokenizer": {"bottleneck": "gaussian", "training": {"steps": 1, "val_every": 1}},
        "encode": {"posterior": True},
        "prior": {"network": "auto"},
    }
    config = write_config(tmp_path_factory.mktemp("numbers"), changes)
    assert main(["train-tokenizer", str(config)]) == main(["encode", str(config)]) == 0
    return config


@pytest.fixture
def copy_of(tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path]) -> Callable[..., Path]:
    """The complete tiny run in a folder of its own, with changes to its config."""

    def copy(changes: dict | None = None) -> Path:
        config = write_config(tmp_path / "copy", changes)
        shutil.copytree(tiny_run.parent / "run", config.parent / "run")
        return config

    return copy


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """A cache of its own for a test."""
    return Cache(tmp_path / "cache of this test", 2**30)


@pytest.fixture
def smalti(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run a command in this process: its exit code and what it said."""
    from pipelines.cli import main

    def run(*arguments: str | Path) -> tuple[int, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    """Forty random 20x24 pictures in two class folders."""
    generator = np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / "pictures" / ("cat" if number % 2 else "dog") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return tmp_path / "pictures"
