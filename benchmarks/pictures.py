"""Made-up pictures for benchmarks: smooth colours with some noise, which compress like photographs."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.data.pictures import encode_image
from pipelines.storage.manifest import write_manifest
from pipelines.storage.receipts import write_shard

# Different pictures made; a folder of more repeats them under other names.
DIFFERENT = 200


def pictures(count: int, size: int, extension: str = "jpg", seed: int = 0) -> list[bytes]:
    """Return files of size x size pixels, jpg or png; beyond `DIFFERENT` they repeat."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(min(count, DIFFERENT)):
        colours = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        pixels = np.asarray(colours.resize((size, size), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = np.clip(pixels + generator.integers(-12, 13, pixels.shape), 0, 255).astype(np.uint8)
        made.append(encode_image(Image.fromarray(noisy), extension))
    return [made[number % len(made)] for number in range(count)]


@contextmanager
def packed(count: int, size: int, shard_size: int, extension: str = "jpg") -> Iterator[Path]:
    """Yield a run folder whose `images` folder holds so many pictures, all of them for training but one."""
    with tempfile.TemporaryDirectory() as run:
        folder = Path(run) / "images"
        folder.mkdir()
        files, names = pictures(count, size, extension), []
        for number, first in enumerate(range(0, count, shard_size)):
            names.append(f"train-{number:06d}.tar")
            part = enumerate(files[first : first + shard_size], first)
            write_shard(folder / names[-1], ((f"{key:08d}", {extension: data}) for key, data in part), {})
        write_shard(folder / "val-000000.tar", [("val", {extension: files[0]})], {})
        contents = {"kind": "images", "image_size": size, "channels": 3, "class_names": [], "preprocessing": {}}
        write_manifest(folder, {"train": names, "val": ["val-000000.tar"]}, contents)
        yield Path(run)
