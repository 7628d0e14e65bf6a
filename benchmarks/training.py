"""Training steps of both stages: the plain float32 loop, and what smalti turns on where the machine has it.

    python -m benchmarks.training

Stage one is the two-level tokenizer of width 128 at 64 pixels, batch 32 (256 pixels, batch 64 on a GPU); stage two a
Transformer over 16x16 codes (on a GPU two over 24x24 codes, of 12 layers of width 768 and 24 of 1024). A step is
forward, loss, backward, optimizer and, in stage one, the EMA of the codebooks. The limit is the speed of a bare matrix
product in the same precision; the operations counted are those of convolutions and products alone. The plain loop has
our codebooks too; beside it stands the same network with those of vector-quantize-pytorch, also in float32. The share
of time that training waits for data is that of loading a batch like CIFAR's: decoded in the first epoch, from memory in
those after it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import DEVICE, interleaved_medians, main, print_table
from benchmarks.pictures import packed
from pipelines.compute.devices import ComputeConfig
from pipelines.data.images import AugmentConfig, ImageShards, TrainingImages, image_batch
from prior.level import LevelConfig, LevelPrior
from prior.transformer import TransformerConfig
from tokenizer import Bottled, CodebookEMA, EMAConfig, HierarchicalVQVAE, TokenizerConfig, TokenizerLoss
from tokenizer.bottlenecks.ema import assignment_statistics, candidate_positions, take_owned

try:
    from vector_quantize_pytorch import VectorQuantize
except ImportError:
    VectorQuantize = None

ON_GPU = DEVICE.type == "cuda"
SIZE, BATCH = (256, 64) if ON_GPU else (64, 32)
TOKENS_BATCH, GRID, CODEBOOK_SIZE = (32, (24, 24), 16384) if ON_GPU else (16, (16, 16), 512)
LARGE = [TransformerConfig(width=768, depth=12, heads=12), TransformerConfig(width=1024, depth=24, heads=16)]
PRIORS = LARGE if ON_GPU else [TransformerConfig(width=384, depth=8, heads=6)]
# What is turned on, one after the other: channels-last, bfloat16, the compiler.
WAYS = {
    "plain float32": (False, False, False),
    "channels-last": (True, False, False),
    "… and bfloat16": (True, True, False),
    "… and compiled": (True, True, True),
}


def tokenizer_step(
    channels_last: bool,
    half: bool,
    compiled: bool,
    size: int = SIZE,
    batch: int = BATCH,
    codebook_size: int = 512,
    width: int = 128,
) -> Callable[[], None]:
    """Return a function that takes one step of stage one."""
    torch.manual_seed(0)
    model = HierarchicalVQVAE(TokenizerConfig(codebook_size=codebook_size, width=width), size, 3).to(DEVICE)
    images = torch.rand(batch, 3, size, size, device=DEVICE) * 2 - 1
    if channels_last:
        model, images = (
            model.to(memory_format=torch.channels_last),
            images.contiguous(memory_format=torch.channels_last),
        )
    if compiled:
        model.compile(fullgraph=True)
    emas = [CodebookEMA(book, EMAConfig()).to(DEVICE) for book in model.bottlenecks]
    loss = TokenizerLoss("mse", {"commitment": 0.125})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=channels_last)

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
            output = model(images)
            total = loss(output.reconstruction.float(), images, [level.losses for level in output.levels])
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        for number, (ema, level) in enumerate(zip(emas, output.levels, strict=True)):
            positions = candidate_positions(len(level.observed), codebook_size, number)
            candidates = take_owned(level.observed, positions, 0)
            ema.update(model.bottlenecks[number], assignment_statistics(level, codebook_size, candidates), 10**6)

    return step


class UsualCodebook(nn.Module):
    """vector-quantize-pytorch's in the place of ours: an N x K matrix of distances, and a one-hot one for its EMA."""

    def __init__(self, codebook_size: int, code_dim: int) -> None:
        super().__init__()
        self.layer = VectorQuantize(
            dim=code_dim, codebook_size=codebook_size, decay=0.99, rotation_trick=False, accept_image_fmap=True
        )

    def forward(self, latents: Tensor, noise: None = None) -> Bottled:
        """Look up, and take an EMA step."""
        quantized, codes, commitment = self.layer(latents)
        return Bottled(quantized, (codes,), {"commitment": commitment.squeeze()}, latents)


def usual_tokenizer_step() -> Callable[[], None]:
    """Return a function that takes one step of stage one as it is usually written, in float32."""
    torch.manual_seed(0)
    config = TokenizerConfig()
    model = HierarchicalVQVAE(config, SIZE, 3).to(DEVICE)
    model.bottlenecks = nn.ModuleList(UsualCodebook(k, config.code_dim).to(DEVICE) for k in config.codebook_sizes)
    images = torch.rand(BATCH, 3, SIZE, SIZE, device=DEVICE) * 2 - 1
    loss, optimizer = TokenizerLoss("mse", {"commitment": 0.125}), torch.optim.AdamW(model.parameters(), lr=3e-4)

    def step() -> None:
        output = model(images)
        optimizer.zero_grad()
        loss(output.reconstruction, images, [level.losses for level in output.levels]).backward()
        optimizer.step()

    return step


def prior_step(
    channels_last: bool,
    half: bool,
    compiled: bool,
    size: TransformerConfig,
    grid: tuple[int, int] = GRID,
    batch: int = TOKENS_BATCH,
) -> Callable[[], None]:
    """Return a function that takes one step of stage two; the memory format means nothing to a Transformer."""
    torch.manual_seed(0)
    config = LevelConfig(level=0, grids=[grid], codebook_sizes=[CODEBOOK_SIZE], class_names=[], size=size)
    model = LevelPrior(config).to(DEVICE)
    codes = torch.randint(CODEBOOK_SIZE, (batch, *grid), device=DEVICE)
    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=channels_last)

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
            logits = model(codes, [], None)
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 2).float(), codes.flatten()).backward()
        optimizer.step()

    return step


def operations_per_s(dtype: torch.dtype, side: int = 8192 if ON_GPU else 2048) -> float:
    """Return what a bare product of square matrices reaches."""
    a, b = (torch.randn(side, side, device=DEVICE).to(dtype) for _ in range(2))
    return 2 * side**3 / interleaved_medians({"product": lambda: a @ b}, 5)["product"]


def measure_steps(
    title: str, make: Callable[..., Callable], units: int, unit: str, usual: Callable[[], None] | None = None
) -> dict:
    """Time a stage's step in every way, and as it is usually written where that is given; print the table."""
    steps = {name: make(*way) for name, way in WAYS.items()}
    if usual is not None:
        steps["vector-quantize-pytorch"] = usual
    with FlopCounterMode(display=False) as counter:
        make(False, False, False)()
    seconds = interleaved_medians(steps, repeats=7, warmup=3)
    peaks = {half: operations_per_s(torch.bfloat16 if half else torch.float32) for half in (False, True)}
    rows = []
    for name, one in seconds.items():
        reached = counter.get_total_flops() / one / peaks[name in WAYS and WAYS[name][1]]
        rows.append([name, one * 1e3, units / one, seconds["plain float32"] / one, f"{reached:.0%}"])
    print_table([title, "ms a step", f"{unit}/s", "faster", "of the bare product"], rows)
    return {"seconds": seconds, "operations": counter.get_total_flops(), "operations_per_s": [*peaks.values()]}


def measure_waiting(count: int = 1920, batch: int = 64) -> dict[str, float]:
    """Return the seconds to load a batch of 32-pixel PNGs for the first time and again, and those of its step."""
    with packed(count, 32, 1000, "png") as run:
        images = TrainingImages(ImageShards(run / "images", "train", ComputeConfig().cache), AugmentConfig(), 0)
        images[0], images[count - 1]  # shards are checked and indexed

        def load_epoch() -> None:
            for first in range(0, count, batch):
                image_batch([images[draw] for draw in range(first, first + batch)])

        first = interleaved_medians({"load": load_epoch}, repeats=1, warmup=0)["load"]
        again = interleaved_medians({"load": load_epoch}, repeats=5)["load"]
        step = interleaved_medians({"step": tokenizer_step(*WAYS["… and bfloat16"], 32, batch)}, 7, warmup=2)["step"]
        return {"first epoch": first * batch / count, "epochs after it": again * batch / count, "step": step}


def measure() -> dict:
    """Time both stages and the loading."""
    if VectorQuantize is None:
        print("vector-quantize-pytorch is missing, its row too: pip install '.[bench]'")
    usual = usual_tokenizer_step() if VectorQuantize else None
    figures = {"stage one": measure_steps("stage one", tokenizer_step, BATCH, "images", usual)}
    for size in PRIORS:
        title = f"stage two, width {size.width}"
        figures[title] = measure_steps(
            title,
            lambda *way, size=size: prior_step(*way, size=size),
            TOKENS_BATCH * GRID[0] * GRID[1],
            "tokens",
        )
    waiting = figures["waiting"] = measure_waiting()
    step = waiting["step"]
    rows = [
        [name, load * 1e3, step * 1e3, f"{load / (load + step):.1%}"]
        for name, load in waiting.items()
        if name != "step"
    ]
    print_table(["64 images of 32 px", "ms to load", "ms a step", "of the time"], rows)
    return figures


if __name__ == "__main__":
    main("training", measure)
