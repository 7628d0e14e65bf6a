"""What a run's sampled digits are worth: are they recognised, and are they new?

    python benchmarks/digits.py runs/digits

Recognised: by SVC(gamma=0.05, C=10) trained on the 1,797 real digits in [0, 1], samples reduced to 8x8 by box
averaging. New: share of samples whose codes are not those of a training image.
"""

import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from pipelines.storage.manifest import read_manifest, receipts_of
from pipelines.storage.shards import index_shard, read_member


def read_folder(folder: Path, kind: str, split: str) -> list[dict[str, bytes]]:
    """Return the contents of every sample of a stage folder's split."""
    samples = []
    for receipt in receipts_of(read_manifest(folder, kind, kind), split):
        path = folder / receipt["shard"]
        with path.open("rb") as file:
            for sample in index_shard(path):
                samples.append({extension: read_member(file, member) for extension, member in sample.members.items()})
    return samples


def fit_judge() -> SVC:
    """Return the judge: which digit a picture reduced to 8x8 shows."""
    digits = load_digits()
    return SVC(gamma=0.05, C=10).fit(digits.images.reshape(-1, 64) / 16, digits.target)


def reduced(images: np.ndarray) -> np.ndarray:
    """Return pictures (B, H, H) as 8x8 block averages (B, 64)."""
    block = images.shape[-1] // 8
    return images.reshape(-1, 8, block, 8, block).mean((2, 4)).reshape(-1, 64)


def pixels_of(samples: list[dict[str, bytes]]) -> np.ndarray:
    """Return the pictures of samples, (B, H, W) in [0, 1]."""
    return np.stack([np.asarray(Image.open(io.BytesIO(sample["png"])), dtype=np.float64) / 255 for sample in samples])


def codes_of(sample: dict[str, bytes]) -> bytes:
    """Return all levels' codes of a sample."""
    return b"".join(value for name, value in sorted(sample.items()) if name.endswith(".npy"))


def main(run: Path) -> None:
    """Judge a run's samples, print the figures and write digits.json."""
    judge = fit_judge()
    samples = read_folder(run / "samples", "samples", "samples")
    labels = np.array([int(sample["cls"]) for sample in samples])
    judged = judge.predict(reduced(pixels_of(samples)))
    real = read_folder(run / "images", "images", "train")
    known = judge.predict(reduced(pixels_of(real))) == [int(sample["cls"]) for sample in real]
    training = {codes_of(sample) for sample in read_folder(run / "codes", "codes", "train")}
    figures = {
        "samples": len(samples),
        "recognised": float((judged == labels).mean()),
        "recognised_real": float(known.mean()),
        "repeats": float(np.mean([codes_of(sample) in training for sample in samples])),
    }
    by_class = "  ".join(f"{label}: {(judged == labels)[labels == label].mean():.0%}" for label in range(10))
    print(f"{len(samples)} samples: {figures['recognised']:.1%} recognised as their class", end="")
    print(f" (real ones: {figures['recognised_real']:.1%}), {figures['repeats']:.1%} repeat a training image's codes")
    print(f"recognised by class  {by_class}")
    (run / "digits.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
