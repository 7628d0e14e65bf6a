"""The page on extending smalti, executed as it stands."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def apply(diff: str, root: Path) -> None:
    """Add the lines of a diff, each after the line that stands before it there."""
    path, before = root, ""
    for line in diff.splitlines():
        if line.startswith("+++ b/"):
            path = root / line.removeprefix("+++ b/")
        elif line.startswith("+"):
            text = path.read_text()
            assert text.count(f"{before}\n") == 1, f"{path}: {before!r}"
            path.write_text(text.replace(f"{before}\n", f"{before}\n{line[1:]}\n"))
        before = line[1:]


def test_bottleneck_and_metric_of_the_page_go_from_images_to_figures_of_samples(
    tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    (code, metric), diffs = blocks("python"), blocks("diff")
    lines = [line for line in code.splitlines() if line and not line.startswith(('"""', "from", "import"))]
    assert len(lines) < 40
    for package in ("tokenizer", "prior", "pipelines"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "smalti_configs").symlink_to(ROOT / "configs")
    (tmp_path / "tokenizer" / "bottlenecks" / "signs.py").write_text(code)
    (tmp_path / "pipelines" / "metrics" / "contrast.py").write_text(metric)
    for diff in diffs:
        apply(diff, tmp_path)
    few = {"training": {"steps": 2, "val_every": 2, "weight_ema": 0.9}}
    changes = {
        "images": {"from": str(tiny_run.parent / "run" / "images")},
        "tokenizer": {"model": {"code_dim": 32}, **few},
        "prior": few,
    }
    config = write_config(tmp_path / "job", changes)
    command = [sys.executable, "-m", "pipelines.cli", "run", config, "--tokenizer.bottleneck=signs"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (config.parent / "run" / "samples" / "grid.png").exists()
    figures = json.loads((config.parent / "run" / "metrics.json").read_text())["contrast"]
    assert 0 < figures["samples"] < 2 and 0 < figures["val"] < 2
    assert figures["made"]["splits"]["samples"]["count"] == 7
    assert f"contrast:\n  val {figures['val']:.5g}\n  samples {figures['samples']:.5g}\n" in done.stdout
    assert "signs" in (config.parent / "run" / "tokenizer" / "config.json").read_text()
