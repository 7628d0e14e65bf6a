"""What a GPU makes of smalti: all tests that need one, then short timings beside what the GPU itself can do.

    make gpu

The limits are measured on the spot: bytes per second of a plain copy in its memory, operations per second of a plain
matrix product, in float32 (TF32 off) and in bfloat16. Operations are those of convolutions and products. Bytes are what
operators read and write one by one; what is compiled moves fewer, so its share is that of the plain step's bytes. Of a
sampled position bytes and operations are those of its weights, read once.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import pixelsnail, transformer
from benchmarks.lookup import drawn
from benchmarks.measure import DEVICE, bytes_per_s, interleaved_medians, main, print_table
from benchmarks.training import WAYS, operations_per_s, prior_step, tokenizer_step
from prior import CodeTransformer, PixelSNAIL, PixelSNAILConfig, TransformerConfig
from prior.level import decoder_of
from tokenizer import HierarchicalVQVAE, TokenizerConfig, nearest_code


class Sizes(NamedTuple):
    """What is timed.

    Attributes:
        lookups: N, K, D each.
        images: side in pixels, batch, width of the tokenizer.
        prior: its size, side of its grid, batch.
        sampled: side of the grid, K, batches.
        networks: what samples.
        product: side of the matrices of the bare product.
        copy: bytes of the bare copy.
        ways: of training, from `benchmarks.training.WAYS`.
        repeats: timed rounds.
    """

    lookups: tuple[tuple[int, int, int], ...] = ((65536, 512, 64), (65536, 8192, 64), (65536, 16384, 8))
    images: tuple[int, int, int] = (256, 32, 128)
    prior: tuple[TransformerConfig, int, int] = (TransformerConfig(width=768, depth=12, heads=12), 24, 16)
    sampled: tuple[int, int, tuple[int, ...]] = (16, 16384, (1, 16))
    networks: tuple[TransformerConfig, PixelSNAILConfig] = (
        TransformerConfig(width=1024, depth=24, heads=16),
        PixelSNAILConfig(width=256),
    )
    product: int = 8192
    copy: int = 2**30
    ways: tuple[str, ...] = ("plain float32", "… and bfloat16", "… and compiled")
    repeats: int = 5


class Limits(NamedTuple):
    """What the device reaches in the plainest work: bytes and operations per second."""

    bytes: float
    float32: float
    bfloat16: float


class Work(NamedTuple):
    """One timed thing: seconds, bytes, operations, whether in bfloat16, and how many make its rate, of what."""

    seconds: float
    bytes: int
    operations: int
    half: bool
    count: int
    unit: str


class BytesCounter(TorchDispatchMode):
    """Adds up the bytes that operators read and write; those that only look at memory otherwise do neither."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def counted(work: Callable[[], object]) -> tuple[int, int]:
    """Return the bytes and operations of a piece of work."""
    with BytesCounter() as counter:
        work()
    with FlopCounterMode(display=False) as operations:
        work()
    return counter.bytes, operations.get_total_flops()


def timed(work: Callable[[], object], repeats: int) -> float:
    """Return the median seconds of a piece of work; three rounds before them compile and warm up."""
    return interleaved_medians({"": work}, repeats, warmup=3)[""]


@torch.no_grad()
def lookups(sizes: Sizes) -> dict[str, Work]:
    """Time the nearest-code lookup."""
    works = {}
    for n, k, d in sizes.lookups:
        vectors, codebook = drawn(n, k, d)
        seconds = timed(lambda v=vectors, c=codebook: nearest_code(v, c.vectors), sizes.repeats)  # type: ignore[misc]
        works[f"lookup, K {k}, D {d}"] = Work(seconds, 4 * d * (n + k) + 8 * n, 2 * n * k * d, False, n, "vectors")
    return works


def steps(sizes: Sizes) -> dict[str, Work]:
    """Time training steps of both stages."""
    side, batch, width = sizes.images
    config, grid, tokens = sizes.prior
    stages: dict[str, tuple[Callable[..., Callable[[], None]], int, str]] = {
        "stage one": (lambda *way: tokenizer_step(*way, size=side, batch=batch, width=width), batch, "images"),
        "stage two": (
            lambda *way: prior_step(*way, size=config, grid=(grid, grid), batch=tokens),
            tokens * grid**2,
            "tokens",
        ),
    }
    works = {}
    for stage, (make, count, unit) in stages.items():
        for name in sizes.ways:
            channels_last, half, compiled = WAYS[name]
            amounts = counted(make(channels_last, half, False))
            seconds = timed(make(channels_last, half, compiled), sizes.repeats)
            works[f"{stage}, {name.removeprefix('… and ')}"] = Work(seconds, *amounts, half, count, unit)
    return works


@torch.no_grad()
def encoding(sizes: Sizes) -> dict[str, Work]:
    """Time the bare encoder on images in the device's memory."""
    side, batch, width = sizes.images
    model = HierarchicalVQVAE(TokenizerConfig(width=width), side, 3).eval()
    model = model.to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.rand(batch, 3, side, side, device=DEVICE).contiguous(memory_format=torch.channels_last)
    works = {}
    for half in (False, True):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
            amounts = counted(lambda: model.encode(images))
            seconds = timed(lambda: model.encode(images), sizes.repeats)
        works[f"encode, {'bfloat16' if half else 'float32'}"] = Work(seconds, *amounts, half, batch, "images")
    return works


@torch.no_grad()
def sampling(sizes: Sizes) -> dict[str, Work]:
    """Time a position of both decoders in bfloat16."""
    (side, codebook_size, batches), (config, snail) = sizes.sampled, sizes.networks
    networks: dict[str, tuple[CodeTransformer | PixelSNAIL, int, Callable[[Any], list]]] = {
        "Transformer": (
            CodeTransformer(codebook_size, (side, side), config, 0.0),
            config.width,  # type: ignore[dict-item]
            transformer.linears,
        ),
        "PixelSNAIL": (PixelSNAIL(codebook_size, snail, 0.0), snail.width, pixelsnail.linears),  # type: ignore[dict-item]
    }
    works = {}
    for name, (network, width, linears) in networks.items():
        network.eval().to(DEVICE)
        for batch in batches:
            condition = torch.zeros(batch, width, side, side, device=DEVICE)
            uniforms = torch.zeros(batch, side**2, dtype=torch.float64, device=DEVICE)
            with torch.autocast(DEVICE.type, torch.bfloat16):
                decoder = decoder_of(network, condition)

                def draw(decoder=decoder, condition=condition, uniforms=uniforms) -> None:  # type: ignore[no-untyped-def]
                    decoder.restart(condition)
                    decoder.draw(transformer.likeliest, uniforms)

                seconds = timed(draw, min(3, sizes.repeats)) / side**2
            weights = sum(layer.bytes for layer in linears(decoder))
            works[f"{name}, batch {batch}"] = Work(seconds, weights, weights * batch, True, batch, "codes")
    return works


def measure(sizes: Sizes = Sizes()) -> dict:  # noqa: B008  # a NamedTuple never changes
    """Measure limits and works, and print the table."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    products = (operations_per_s(dtype, sizes.product) for dtype in (torch.float32, torch.bfloat16))
    limits = Limits(bytes_per_s(sizes.copy), *products)
    print(
        f"a copy moves {limits.bytes / 1e9:.0f} GB/s; a product makes {limits.float32 / 1e12:.1f} TFLOP/s in float32, "
        f"{limits.bfloat16 / 1e12:.1f} in bfloat16"
    )
    works = lookups(sizes) | steps(sizes) | encoding(sizes) | sampling(sizes)
    rows, figures = [], {}
    for name, work in works.items():
        peak = limits.bfloat16 if work.half else limits.float32
        rate, bandwidth = work.count / work.seconds, work.bytes / work.seconds / limits.bytes
        operations = work.operations / work.seconds / peak
        rows.append([name, work.seconds * 1e3, f"{rate:.3g} {work.unit}", f"{bandwidth:.0%}", f"{operations:.0%}"])
        figures[name] = work._asdict() | {"share_of_bandwidth": bandwidth, "share_of_peak": operations}
    print_table(["", "ms", "per second", "of the copy", "of the product"], rows)
    return {"limits": limits._asdict(), "works": figures}


def missing() -> str:
    """Return what is missing for a GPU, in a sentence; empty where there is one."""
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install one that is built with it"
    return f"torch {torch.__version__} finds no CUDA GPU; look at nvidia-smi and CUDA_VISIBLE_DEVICES"


def run() -> int:
    """Test and time, or say why not; return the exit code."""
    if lacking := missing():
        print(f"make gpu is skipped, for there is no GPU that torch can use: {lacking}")
        return 0
    if code := subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "-rs"], check=False).returncode:
        return code
    main(re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name()).strip("-"), measure)
    return 0


if __name__ == "__main__":
    sys.exit(run())
