"""What the page of a run takes: seconds, memory and bytes, of a run of 2,000 and of one of 100,000 images.

    python -m benchmarks.report

Images are scikit-learn's digits, moved at random, in shards of 10,000; models are small and hardly trained, as a report
reads no more of them for that. Seconds and memory are those of the whole command, `smalti report`, in a process of its
own; the shards' checksums are computed anew, as on a machine that has not seen them. The machine of these figures had
several others' work to do: seconds of CPU carry over, seconds do not.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from benchmarks.measure import main, print_table
from pipelines.cli import main as smalti
from pipelines.data.pictures import encode_image, to_picture
from pipelines.storage.manifest import write_manifest
from pipelines.storage.receipts import write_shard

COUNTS, SHARD, VAL_SHARE = (2_000, 100_000), 10_000, 10
FEW = {"training": {"steps": 50, "batch_size": 64, "val_every": 50, "checkpoint_every": 50}}
SETTINGS = {
    "tokenizer": {"model": {"strides": [8, 4], "codebook_size": 64, "code_dim": 16, "width": 32}, **FEW},
    "prior": {"transformer": {"width": 64, "depth": 2, "heads": 4}, **FEW},
    "sample": {"count": 100},
}


def pictures(count: int, seed: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield samples of an image shard: digits of 16x16 pixels, each moved by up to two."""
    digits, generator = load_digits(), np.random.default_rng(seed)
    images = (digits.images.repeat(2, 1).repeat(2, 2) * 255 / 16).astype(np.uint8)
    for number in range(count):
        row = int(generator.integers(len(images)))
        pixels = np.roll(images[row], generator.integers(-2, 3, 2), (0, 1))[None]
        label = str(digits.target[row]).encode()
        yield f"{seed}-{number:06d}", {"png": encode_image(to_picture(pixels), "png"), "cls": label}


def made_up(folder: Path, count: int) -> None:
    """Write a folder of image shards: a tenth of the images are the val split."""
    folder.mkdir()
    splits: dict[str, list[str]] = {"train": [], "val": []}
    for split, number in (("train", count - count // VAL_SHARE), ("val", count // VAL_SHARE)):
        for first in range(0, number, SHARD):
            name = f"{split}-{first // SHARD:06d}.tar"
            samples = pictures(min(SHARD, number - first), len(splits["train"]) + 1000 * (split == "val"))
            write_shard(folder / name, samples, {"made_from": None, "fingerprints": {}, "settings": "0" * 64})
            splits[split].append(name)
    names = [str(number) for number in range(10)]
    contents = {"kind": "images", "class_names": names, "image_size": 16, "channels": 1}
    write_manifest(folder, splits, {**contents, "made_from": "made up", "preprocessing": {}, "skipped": 0})


def run_of(folder: Path, count: int) -> Path:
    """Make a run of so many images, all but its report; return its config."""
    made_up(folder / "images", count)
    config = folder / "config.yaml"  # JSON is YAML
    settings = {"run_dir": str(folder / "run"), "images": {"from": str(folder / "images")}, **SETTINGS}
    config.write_text(json.dumps(settings))
    for stage in ("train-tokenizer", "encode", "train-prior", "sample"):
        assert smalti([stage, str(config)]) == 0
    return config


def measure() -> dict[str, dict[str, float]]:
    """Return seconds, MiB of memory and kB of the page, by number of images."""
    figures = {}
    for count in COUNTS:
        with tempfile.TemporaryDirectory() as folder:
            config = run_of(Path(folder), count)
            environment = os.environ | {"XDG_CACHE_HOME": str(Path(folder) / "cache")}
            begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-m", "pipelines.cli", "report", str(config)], check=True, env=environment)
            seconds, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
            figures[f"{count:,} images"] = {
                "seconds": seconds,
                "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
                "peak_mib": after.ru_maxrss / 1024,
                "kilobytes": (Path(folder) / "run" / "report.html").stat().st_size / 1000,
            }
    rows = [[name, *(f"{value:,.1f}" for value in found.values())] for name, found in figures.items()]
    print_table(["run of", "seconds", "of CPU", "peak MiB", "page, kB"], rows)
    return figures


if __name__ == "__main__":
    main("report", measure)
