"""Loss curves of stage one: the plain float32 loop beside bfloat16 and the compiler.

    python -m benchmarks.curves

The demo's tokenizer trains on its digits from three seeds each way; what stands here is the MSE of the validation split
in [-1, 1]. Faster arithmetic is fine where its curve lies within the spread that seeds alone make.
"""

import csv
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measure import main, print_table
from pipelines.cli import main as smalti

SEEDS = (0, 1, 2)
WAYS = {
    "float32": {"precision": "32-true", "compile": "false"},
    "bfloat16, compiled": {"precision": "bf16-mixed", "compile": "true"},
}
STEPS, VAL_EVERY = 500, 100


def curve(folder: Path, seed: int, training: dict[str, str]) -> dict[int, float]:
    """Train from a seed, and return the validation MSE by step."""
    settings = {"steps": STEPS, "val_every": VAL_EVERY, "weight_ema": 0, **training}
    overrides = [f"--tokenizer.training.{name}={value}" for name, value in settings.items()]
    run = folder / "-".join([str(seed), *training.values()])
    overrides += [f"--seed={seed}", f"--run_dir={run}", f"--images.from={folder / 'images'}"]
    assert smalti(["train-tokenizer", "configs/digits.yaml", *overrides]) == 0
    with (run / "tokenizer" / "metrics.csv").open() as file:
        return {int(row["step"]) + 1: float(row["val_mse"]) for row in csv.DictReader(file) if row["val_mse"]}


def measure() -> dict:
    """Train all, and print the table."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        assert smalti(["pack", "configs/digits.yaml", f"--run_dir={folder}"]) == 0
        found = {way: [curve(folder, seed, settings) for seed in SEEDS] for way, settings in WAYS.items()}
    rows = []
    for step in found["float32"][0]:
        values = {way: [one[step] for one in curves] for way, curves in found.items()}
        means = {way: sum(one) / len(one) for way, one in values.items()}
        spreads = [f"{min(one):.4f} to {max(one):.4f}, mean {means[way]:.4f}" for way, one in values.items()]
        plain = values["float32"]
        rows.append([step, *spreads, "yes" if min(plain) <= means["bfloat16, compiled"] <= max(plain) else "no"])
    print_table(["step", *found, "mean within the spread"], rows)
    return {way: [{str(step): mse for step, mse in one.items()} for one in curves] for way, curves in found.items()}


if __name__ == "__main__":
    main("curves", measure)
