"""Data flows one way: pipelines know tokenizer and prior, which know nothing of each other or of pipelines."""

import ast
import importlib
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {"tokenizer": {"tokenizer"}, "prior": {"prior"}, "pipelines": {"pipelines", "tokenizer", "prior"}}
SOURCES = [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]
# The floors of pipelines/, top to bottom: a file imports from its own room and from the floors below.
FLOORS = (
    {"cli"},
    {"run"},
    {"explore"},
    {"report"},
    {"finished", "judge", "redo", "begun", "generator", "card", "compare", "compared"},
    {"config"},
    {"stages"},
    {"training", "tokens", "metrics"},
    {"data", "sources", "compute"},
    {"storage"},
    {"errors", "progress"},
)
# Stages import no other stage, but what a stage is made of.
PARTS_OF_STAGES = {"stages.shard_job"}


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


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_import_only_what_lies_upstream(path: Path) -> None:
    ours = imports(path) & set(ALLOWED)
    assert ours <= ALLOWED[path.relative_to(ROOT).parts[0]]


@pytest.mark.parametrize("package", ["tokenizer", "prior"])
def test_models_are_plain_modules(package: str) -> None:
    used = set().union(*(imports(path) for path in (ROOT / package).rglob("*.py")))
    assert not used & {"lightning", "webdataset", "jsonargparse", "datasets", "PIL"}


def imported_files(package: str) -> dict[str, set[str]]:
    """Return, for each file of a package, the files of that package that it imports: "stages.pack", "cli"."""
    files = {
        ".".join(path.relative_to(ROOT / package).with_suffix("").parts) for path in (ROOT / package).rglob("*.py")
    }
    found: dict[str, set[str]] = {file: set() for file in files if not file.endswith("__init__")}
    for file, names in found.items():
        path = ROOT / package / f"{file.replace('.', '/')}.py"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                module = (node.module or "").removeprefix(f"{package}.")
                names |= {module, *(f"{module}.{alias.name}" for alias in node.names)} & files
    return found


def test_imports_go_down_the_floors() -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    for file, names in imported_files("pipelines").items():
        room = file.split(".")[0]
        for name in names:
            below = name.split(".")[0]
            inside = below == room if "." in file else floor[room] == floor[below]
            assert inside or floor[below] > floor[room], f"{file} imports {name}"
            assert not inside or room != "stages" or name in PARTS_OF_STAGES, f"{file} imports {name}"


@pytest.mark.parametrize("package", ALLOWED)
def test_no_files_import_one_another_in_a_circle(package: str) -> None:
    graph = imported_files(package)
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError, naming the circle


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
