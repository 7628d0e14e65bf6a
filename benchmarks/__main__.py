"""Run every benchmark, and write benchmarks/README.md: `python -m benchmarks`."""

import ast
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
NAMES = ("lookup", "pixelsnail", "transformer", "training", "curves", "encode", "export", "growth", "ddp", "report")
HEAD = """\
# Benchmarks

`make bench` runs all of these and writes this page; `python -m benchmarks.NAME` runs one. Each prints what stands below
its name here and writes its figures to `results/NAME.json`. Times are medians of interleaved runs; ratios carry over to
other machines, times do not. No GPU was at hand, and its figures are open: `make gpu` tests and times one, into
`results/NAME-OF-THE-GPU.json`.
"""


def section(name: str) -> str:
    """Run a benchmark, and return its part of the page."""
    print(f"== {name}", flush=True)
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout, flush=True)
    (HERE / "results" / f"{name}.txt").write_text(done.stdout)
    return described(name)


def described(name: str) -> str:
    """Return a benchmark's part of the page: what its script says of itself, and what it printed last."""
    about = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())) or ""
    about = re.sub(r"\n+ +python -m [^\n]*\n", "\n", about)
    return f"## {name}\n\n{about}\n\n```\n{(HERE / 'results' / f'{name}.txt').read_text().rstrip()}\n```\n"


if __name__ == "__main__":
    for one in NAMES if len(sys.argv) < 2 else sys.argv[1:]:
        section(one)
    written = [one for one in NAMES if (HERE / "results" / f"{one}.txt").exists()]
    (HERE / "README.md").write_text("\n".join([HEAD, *map(described, written)]))
