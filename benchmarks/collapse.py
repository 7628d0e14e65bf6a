"""Whether a level of stage one collapses: perplexities over seeds and over images that the k-means start sees.

    python -m benchmarks.collapse RUN [SEED ...]

The tokenizer of configs/cifar10.yaml trains for 500 steps of 64 images on the images that RUN has packed. MSE hides a
collapse: a level that holds little is hardly missed. What stands here is of the validation split: MSE in [-1, 1], and
each level's perplexity, of 512 codes.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measure import print_table
from pipelines.config import load_config
from pipelines.stages.train_tokenizer import TokenizerTraining, train_tokenizer
from pipelines.training.sections import at_level

STARTS = (64, 256, 1024)
STEPS = 500
RESULTS = Path(__file__).parent / "results" / "collapse.json"
SETTINGS = [f"--tokenizer.training.{name}={STEPS}" for name in ("steps", "val_every", "checkpoint_every")]


def figures(images: Path, seed: int, start: int) -> dict[str, float]:
    """Train with codebooks that start from so many images; return the validation figures."""
    honest = TokenizerTraining._start_learners
    TokenizerTraining._start_learners = lambda self, draws: honest(self, range(start))  # type: ignore[method-assign]
    try:
        with TemporaryDirectory() as name:
            config = load_config("configs/cifar10.yaml", [f"--run_dir={name}", f"--seed={seed}", *SETTINGS])
            training = at_level(config.tokenizer.training, 0, 1)
            train_tokenizer(config.tokenizer, training, seed, config.compute, images, Path(name))
            return json.loads((Path(name) / "metrics.json").read_text())
    finally:
        TokenizerTraining._start_learners = honest  # type: ignore[method-assign]


def measure(run: Path, seeds: list[int]) -> None:
    """Train from all seeds and starts that have no figures yet, and print the table of all that have."""
    for start in STARTS:
        for seed in seeds:
            if not any((row["seed"], row["start"]) == (seed, start) for row in measured()):
                one = {"seed": seed, "start": start, **figures(run / "images", seed, start)}
                RESULTS.write_text(json.dumps([*measured(), one], indent=1) + "\n")
                print(shown(one), file=sys.stderr, flush=True)
    rows = sorted(measured(), key=lambda row: (row["start"], row["seed"]))
    print_table(["images of the start", "seed", "MSE", "perplexity of level 0", "of level 1"], [shown(r) for r in rows])


def measured() -> list[dict[str, float]]:
    """Return what stands in the file of results; a run of hours goes on from it."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def shown(row: dict[str, float]) -> list[object]:
    """Return a row of the table."""
    levels = [f"{row[f'val_level{level}_perplexity']:.0f}" for level in (0, 1)]
    return [row["start"], row["seed"], f"{row['val_mse']:.4f}", *levels]


if __name__ == "__main__":
    measure(Path(sys.argv[1]), [int(seed) for seed in sys.argv[2:]] or list(range(10)))
