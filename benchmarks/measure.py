"""What benchmarks share: interleaved medians, tables, and result files that say where and on what they were measured.

Run a benchmark from the repository's folder: `python -m benchmarks.NAME`.
"""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def interleaved_medians(works: dict[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, float]:
    """Return the median seconds of each piece of work.

    All take turns, so that a slow minute of the machine falls on every one of them.

    Args:
        works: name to what is timed, called without arguments.
        repeats: timed rounds.
        warmup: rounds before those, not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(warmup + repeats):
        for name, work in works.items():
            _wait_for_device()
            start = time.perf_counter()
            work()
            _wait_for_device()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def bytes_per_s(size: int = 256 * 2**20, repeats: int = 9) -> float:
    """Return how many bytes a second memory gives: to a plain sum on a CPU, in a copy (read and written) on a GPU.

    Args:
        size: bytes touched, far more than any cache holds.
        repeats: timed rounds.
    """
    values = torch.ones(size // 4, device=DEVICE)
    target = torch.empty_like(values)
    on_gpu = DEVICE.type == "cuda"
    seconds = interleaved_medians({"": (lambda: target.copy_(values)) if on_gpu else values.sum}, repeats)[""]
    return size * (1 + on_gpu) / seconds


def resident_mib(field: str) -> float:
    """Return a field of this process's memory status, in MiB: VmRSS, resident now, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**10


def machine() -> dict[str, str | int]:
    """Return what the figures were measured on: processor, threads, versions, commit and date."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under their header, the first column to the left, numbers to the right."""
    cells = [list(header)] + [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        first, *others = (
            text.ljust(w) if n == 0 else text.rjust(w) for n, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *others]))


def main(name: str, measure: Callable[[], dict]) -> None:
    """Measure, and write figures and machine to benchmarks/results/NAME.json.

    Args:
        name: of the benchmark.
        measure: prints its tables and returns its figures.
    """
    where = machine()
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    start = time.perf_counter()
    figures = measure()
    print(f"measured in {time.perf_counter() - start:.0f} s")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": where, "figures": figures}, indent=1) + "\n")


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _commit() -> str:
    """Return the commit, with a + where the tree differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":!results", ":!README.md")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")
