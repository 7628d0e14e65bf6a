"""The page on extending smalti, executed as it stands."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

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


def test_the_examples_of_the_page_go_from_images_to_samples_their_figures_and_tokens(
    tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    """One run of all of them: a source, a bottleneck, a metric and a format of tokens."""
    (code, source, metric, tokens), diffs = blocks("python"), blocks("diff")
    lines = [line for line in code.splitlines() if line and not line.startswith(('"""', "from", "import"))]
    assert len(lines) < 40
    for package in ("tokenizer", "prior", "pipelines"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "smalti_configs").symlink_to(ROOT / "configs")
    (tmp_path / "tokenizer" / "bottlenecks" / "signs.py").write_text(code)
    (tmp_path / "pipelines" / "sources" / "npz.py").write_text(source)
    (tmp_path / "pipelines" / "metrics" / "contrast.py").write_text(metric)
    (tmp_path / "pipelines" / "tokens" / "jsonl.py").write_text(tokens)
    for diff in diffs:
        apply(diff, tmp_path)
    few = {"training": {"steps": 2, "val_every": 2, "weight_ema": 0.9}}
    pictures = np.random.default_rng(0).integers(0, 256, (60, 16, 16), np.uint8)
    np.savez(tmp_path / "pictures.npz", images=pictures, labels=np.arange(60) % 3)
    changes = {
        "images": {"source": f"npz:{tmp_path / 'pictures.npz'}", "val_fraction": 0.5},
        "tokenizer": {"model": {"code_dim": 32}, **few},
        "prior": few,
    }
    config = write_config(tmp_path / "job", changes)
    settings = [str(config), "--tokenizer.bottleneck=signs", "--export.format=[jsonl]"]
    stages = " or ".join(f"main({[stage, *settings]})" for stage in ("run", "export"))
    command = [sys.executable, "-c", f"from pipelines.cli import main; raise SystemExit({stages})"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (config.parent / "run" / "samples" / "grid.png").exists()
    figures = json.loads((config.parent / "run" / "metrics.json").read_text())["contrast"]
    assert 0 < figures["samples"] < 2 and 0 < figures["val"] < 2
    assert figures["made"]["splits"]["samples"]["count"] == 7
    assert f"contrast:\n  val {figures['val']:.5g}\n  samples {figures['samples']:.5g}\n" in done.stdout
    manifest = json.loads((config.parent / "run" / "images" / "manifest.json").read_text())
    assert manifest["class_names"] == ["0", "1", "2"] and {**manifest["splits"]}.keys() == {"train", "val"}
    lines = (config.parent / "run" / "tokens" / "val-000000.jsonl").read_text().splitlines()
    assert {len(json.loads(line)["input_ids"]) for line in lines} == {25}  # 4 + 16 codes and five that stand around
    assert "signs" in (config.parent / "run" / "tokenizer" / "config.json").read_text()
