import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.compute.memory import VARIABLES

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="not glibc"
)
# A command that ends at once; then blocks of 40 MiB, freed and fetched again ten times.
FETCHING = """
import resource
from pipelines.cli import main

main(["no stage"])
size = 40 * 2**20
b"x" * size
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    b"x" * size
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
# Rounds of blocks of a batch's sizes, kept for a while beside small ones: the peak after 10 rounds and after 50.
BATCHES = """
from pathlib import Path
from pipelines.compute.memory import keep_freed_memory

keep_freed_memory()
for rounds in (10, 40):
    for number in range(rounds):
        blocks, small = [], []
        for size in (40, 3, 20, 7, 20, 1, 40):
            blocks = [*blocks[-2:], bytes([number]) * (size * 2**20)]
            small = [*small[-99:], bytearray(number * 100)]
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


def said_by(script: str, **environment: str) -> list[float]:
    """Return the numbers that a script prints in a process whose malloc has these settings alone."""
    plain = {name: value for name, value in os.environ.items() if name not in (*VARIABLES, "GLIBC_TUNABLES")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=plain | environment, capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.splitlines()]


def test_a_command_keeps_freed_memory_for_what_comes_next() -> None:
    assert said_by(FETCHING)[0] < 100  # page faults


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_environment_says_of_memory_is_left_alone(name: str) -> None:
    value = "glibc.malloc.tcache_count=7" if name == "GLIBC_TUNABLES" else str(2**17)
    assert said_by(FETCHING, **{name: value})[0] > 150


def test_memory_that_is_kept_does_not_grow() -> None:
    early, late = said_by(BATCHES)
    assert late < 1.03 * early
