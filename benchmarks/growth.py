"""How time grows with codebook, grid, batch and images: exponents between neighbouring sizes.

    python -m benchmarks.growth

An exponent of 1 means that twice the size takes twice the time, 0 that it takes the same; where the exponents of a line
differ, growth bends. Sizes of a line take turns. How lookup grows stands in its own part, and processes in that of DDP.
The Transformers here have width 256 and depth 4, PixelSNAILs width 128, tokenizers width 64 at 32 pixels; a batch is 4
samples or 16 images, a codebook 512 codes, and a sampled grid 16x16, where the line does not say otherwise.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.measure import DEVICE, interleaved_medians, main, print_table
from benchmarks.pictures import packed
from benchmarks.training import WAYS, prior_step, tokenizer_step
from pipelines.compute.devices import ComputeConfig
from pipelines.stages.encode import EncodeConfig, encode
from prior import HierarchicalPrior, LevelConfig, LevelPrior, PixelSNAILConfig, TransformerConfig
from tokenizer import HierarchicalVQVAE, TokenizerConfig

TRANSFORMER = TransformerConfig(width=256, depth=4, heads=4)
PIXELSNAIL = PixelSNAILConfig(width=128, blocks=2, attention=False)
ATTENDING = PixelSNAILConfig(width=128, blocks=2)
FLOAT32 = WAYS["channels-last"]


def sampling(
    size: TransformerConfig | PixelSNAILConfig, positions: int = 256, batch: int = 4, codebook_size: int = 512
) -> Callable[[], object]:
    """Return a function that draws a batch of one level from beginning to end."""
    config = LevelConfig(
        level=0,
        grids=[(math.isqrt(positions),) * 2],
        codebook_sizes=[codebook_size],
        class_names=[],
        size=size,
    )
    prior = HierarchicalPrior([LevelPrior(config)]).eval().to(DEVICE)
    return lambda: prior.sample(indices=range(batch))


def tokenizer_training(side: int = 32, batch: int = 16, codebook_size: int = 512) -> Callable[[], None]:
    """Return a function that takes a training step of stage one."""
    return tokenizer_step(*FLOAT32, size=side, batch=batch, codebook_size=codebook_size, width=64)


def prior_training(positions: int = 256, batch: int = 4) -> Callable[[], None]:
    """Return a function that takes a training step of stage two."""
    return prior_step(*FLOAT32, size=TRANSFORMER, grid=(math.isqrt(positions),) * 2, batch=batch)


def encoding(batch: int) -> Callable[[], object]:
    """Return a function that encodes a batch of images that lie in memory."""
    model = HierarchicalVQVAE(TokenizerConfig(width=64), 32, 3).eval().to(DEVICE)
    images = torch.rand(batch, 3, 32, 32, device=DEVICE)
    return lambda: model.encode(images)


def encoding_stage(images: Path) -> Callable[[], None]:
    """Return a function that encodes a folder of image shards, with all that the stage does."""
    model = HierarchicalVQVAE(TokenizerConfig(width=64), 32, 3).eval()

    def work() -> None:
        with TemporaryDirectory() as out:
            encode(EncodeConfig(), 0, ComputeConfig(), model, images, Path(out))

    return work


def measure_line(title: str, unit: str, works: dict[int, Callable[[], object]], per: Callable[[int], int]) -> dict:
    """Time one line of sizes.

    Args:
        title: what grows with what.
        unit: what the times are of.
        works: what is timed, by size, ascending.
        per: size to how many of the unit the work holds.
    """
    found = interleaved_medians({str(size): work for size, work in works.items()}, repeats=3)
    sizes = list(works)
    seconds = [found[str(size)] / per(size) for size in sizes]
    steps = zip(zip(seconds, sizes, strict=True), zip(seconds[1:], sizes[1:], strict=True), strict=False)
    exponents = [math.log(later / earlier) / math.log(large / small) for (earlier, small), (later, large) in steps]
    return {"title": title, "unit": unit, "sizes": sizes, "seconds": seconds, "exponents": exponents}


def measure() -> dict:
    """Time all lines, and print the table."""
    torch.manual_seed(0)
    lines = []

    def line(title: str, unit: str, make: Callable, sizes: Sequence[int], per: Callable[[int], int]) -> None:
        lines.append(measure_line(title, unit, {size: make(size) for size in sizes}, per))

    def one(size: int) -> int:
        return 1

    grids, batches, codebooks = (64, 256, 1024), (1, 4, 16, 64), (512, 4096, 32768)
    for name, size in (("Transformer", TRANSFORMER), ("PixelSNAIL", PIXELSNAIL), ("… with attention", ATTENDING)):
        line(f"{name}, positions", "position", lambda n, size=size: sampling(size, positions=n), grids, lambda n: n)
        line(f"{name}, batch", "position", lambda n, size=size: sampling(size, batch=n), batches, lambda n: 256)
    line(
        "Transformer, codebook",
        "position",
        lambda n: sampling(TRANSFORMER, codebook_size=n),
        codebooks,
        lambda n: 256,
    )
    line("tokenizer training, batch", "step", lambda n: tokenizer_training(batch=n), (4, 16, 64), one)
    line("tokenizer training, side", "step", lambda n: tokenizer_training(side=n), (32, 64, 128), one)
    line("tokenizer training, codebook", "step", lambda n: tokenizer_training(codebook_size=n), codebooks, one)
    line("prior training, positions", "step", lambda n: prior_training(positions=n), grids, one)
    line("prior training, batch", "step", lambda n: prior_training(batch=n), batches, one)
    line("encoding, batch", "image", encoding, batches, lambda n: n)
    counts = (500, 2000, 8000)
    with packed(500, 32, 1000) as few, packed(2000, 32, 1000) as more, packed(8000, 32, 1000) as many:
        folders = {n: run / "images" for n, run in zip(counts, (few, more, many), strict=True)}
        line("encode, images", "stage", lambda n: encoding_stage(folders[n]), counts, one)
    rows = [
        [
            found["title"],
            ", ".join(map(str, found["sizes"])),
            found["unit"],
            ", ".join(f"{seconds * 1e3:.3g}" for seconds in found["seconds"]),
            ", ".join(f"{exponent:.2f}" for exponent in found["exponents"]),
        ]
        for found in lines
    ]
    print_table(["what grows with what", "sizes", "time of a", "ms", "exponents"], rows)
    return {found["title"]: found for found in lines}


if __name__ == "__main__":
    main("growth", measure)
