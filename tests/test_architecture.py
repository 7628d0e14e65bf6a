"""Data flows one way: pipelines know tokenizer and prior, which know nothing of each other or of pipelines."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {"tokenizer": {"tokenizer"}, "prior": {"prior"}, "pipelines": {"pipelines", "tokenizer", "prior"}}
SOURCES = [path for package in ALLOWED for path in sorted((ROOT / package).glob("*.py"))]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert all(alias.name != "*" for alias in node.names), f"{path}: no star imports"
            found.add(node.module or "")
    return {name.split(".")[0] for name in found}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_packages_import_only_what_lies_upstream(path: Path) -> None:
    ours = imports(path) & set(ALLOWED)
    assert ours <= ALLOWED[path.parent.name]


@pytest.mark.parametrize("package", ["tokenizer", "prior"])
def test_models_are_plain_modules(package: str) -> None:
    used = set().union(*(imports(path) for path in (ROOT / package).glob("*.py")))
    assert not used & {"lightning", "webdataset", "jsonargparse", "datasets", "PIL"}


def test_help_answers_without_importing_torch() -> None:
    code = "import sys; from pipelines.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "smalti STAGE CONFIG.yaml" in done.stdout


def test_stages_start_without_the_libraries_of_those_that_train() -> None:
    slow = ["lightning", "x_transformers", "torchmetrics", "webdataset", "datasets"]
    stages = "pipelines.run, pipelines.generator"
    code = f"import sys; import {stages}; loaded = set({slow}) & set(sys.modules); assert not loaded, loaded"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_benchmarks_import_what_there_is(path: Path) -> None:
    if path.name != "digits.py":  # the demo runs that one
        assert importlib.import_module(f"benchmarks.{path.stem}").__doc__


def test_files_stay_small_enough_to_read() -> None:
    long = {path.name: n for path in SOURCES if (n := len(path.read_text().splitlines())) > 350}
    assert not long
