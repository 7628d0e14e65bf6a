"""What the nearest-code lookup and the EMA step cost, beside a bare matrix product and vector-quantize-pytorch.

    python -m benchmarks.lookup

The limit is `vectors @ codebook.T`: the product that any exact lookup makes, its (N, K) scores written to new memory
and never read. "mapped" is a harder limit: the same product into memory that it has already written before.
N vectors, K codebook_size, D code_dim.
"""

import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import DEVICE, interleaved_medians, main, print_table, resident_mib
from tokenizer import Bottled, Codebook, CodebookEMA, EMAConfig, nearest_code
from tokenizer.bottlenecks.ema import assignment_statistics

try:
    from vector_quantize_pytorch import VectorQuantize
except ImportError:
    VectorQuantize = None

SHAPES = [(16384, 512, 64), (16384, 8192, 64), (16384, 16384, 8)]
# From the first shape to each of the others one size grows fourfold.
GROWTH = {"base": (4096, 2048, 64), "N": (16384, 2048, 64), "K": (4096, 8192, 64)}
MEMORY_SHAPE = (262144, 65536, 64)
REPEATS = 5
DECAY = 0.99


def ema_step(codebook: Codebook, vectors: Tensor) -> Callable[[], None]:
    """Return our whole step of training a codebook: look up, sum, update; `vectors` float32 (N, D)."""
    ema = CodebookEMA(codebook, EMAConfig(decay=DECAY, revival_threshold=0.0)).to(DEVICE)

    def step() -> None:
        output = codebook(vectors.T[None, :, :, None])
        ema.update(codebook, assignment_statistics(output, len(codebook.vectors), output.observed[:256]), 10**6)

    return step


def peer_layer(vectors: Tensor, codes: Tensor, training: bool) -> Callable[[], object]:
    """Return vector-quantize-pytorch's forward with the same codes and settings; in training it takes its EMA step."""
    layer = VectorQuantize(
        dim=vectors.shape[1],
        codebook_size=len(codes),
        decay=DECAY,
        commitment_weight=0.25,
        rotation_trick=False,
        kmeans_init=False,
    )
    layer.to(codes).codebook = codes
    layer.train(training)
    return lambda: layer(vectors[None])


def drawn(n: int, k: int, d: int) -> tuple[Tensor, Codebook]:
    """Return normal vectors (N, D) and a codebook of normal codes."""
    torch.manual_seed(0)
    return torch.randn(n, d, device=DEVICE), Codebook(k, d).to(DEVICE)


def works_of(n: int, k: int, d: int) -> dict[str, Callable[[], object]]:
    """Return what is timed at one shape; lookups and steps have a codebook each."""
    vectors, codebook = drawn(n, k, d)
    codes, scores = codebook.vectors.clone(), torch.empty(n, k, device=DEVICE)
    works: dict[str, Callable[[], object]] = {
        "product": lambda: vectors @ codes.T,
        "product, mapped": lambda: torch.mm(vectors, codes.T, out=scores),
        "lookup": lambda: nearest_code(vectors, codes),
        "step": ema_step(codebook, vectors),
    }
    if VectorQuantize is not None:
        works["peer lookup"] = peer_layer(vectors, codes, training=False)
        works["peer step"] = peer_layer(vectors, codes, training=True)
    return works


def compare_shapes() -> list[dict]:
    """Time every shape, print the table, return its rows."""
    rows = []
    for n, k, d in SHAPES:
        with torch.no_grad():
            ms = {name: 1e3 * s for name, s in interleaved_medians(works_of(n, k, d), REPEATS).items()}
        ratios = {f"{name} / product": ms[name] / ms["product"] for name in ("lookup", "step")}
        ratios |= {f"{name} / mapped": ms[name] / ms["product, mapped"] for name in ("lookup", "step")}
        ratios |= {
            f"peer {name} / ours": ms[f"peer {name}"] / ms[name] for name in ("lookup", "step") if VectorQuantize
        }
        rows.append({"N": n, "K": k, "D": d, "ms": ms, "ratios": ratios})
    for part, title in (("ms", "milliseconds"), ("ratios", "ratios")):
        print(f"\n{title}")
        print_table(["N, K, D", *rows[0][part]], [[f"{r['N']}, {r['K']}, {r['D']}", *r[part].values()] for r in rows])
    return rows


def growth() -> dict[str, dict[str, float]]:
    """Return the exponents with which time grows with N and K.

    All sizes take turns, or a slow minute would bend the slope.
    """
    works = {size: works_of(*shape) for size, shape in GROWTH.items()}
    turns = {f"{size} {name}": work for size in works for name, work in works[size].items()}
    with torch.no_grad():
        seconds = interleaved_medians(turns, REPEATS)
    exponents = {
        size: {name: math.log(seconds[f"{size} {name}"] / seconds[f"base {name}"], 4) for name in works[size]}
        for size in ("N", "K")
    }
    print("\ntime grows with the power of")
    print_table(["", *exponents["N"]], [[variable, *values.values()] for variable, values in exponents.items()])
    return exponents


def extra_mib(work: str) -> float:
    """Return how far memory rises over inputs and state, in MiB; for a process of its own, under Linux.

    What is resident on a CPU, what is allocated on a GPU.

    Args:
        work: "lookup", from vectors to codes, or "EMA", from codes to the moved codebook.
    """
    vectors, codebook = drawn(*MEMORY_SHAPE)
    ema = CodebookEMA(codebook, EMAConfig(decay=DECAY, revival_threshold=0.0)).to(DEVICE)
    size, dim = codebook.vectors.shape
    output = Bottled(vectors, (torch.randint(size, (len(vectors),), device=DEVICE),), {}, vectors)
    small, few = drawn(64, 64, dim)
    ema_step(few, small)()  # libraries load their code and start their threads
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = resident_mib("VmRSS")
    if work == "lookup":
        nearest_code(vectors, codebook.vectors)
    else:
        ema.update(codebook, assignment_statistics(output, size, vectors[:256]), 10**6)
    peak = torch.cuda.max_memory_allocated() / 2**20 if DEVICE.type == "cuda" else resident_mib("VmHWM")
    return peak - before


def memory() -> dict[str, float]:
    """Measure the extra memory of a lookup and of an EMA step after it, each in a new process."""
    figures = {}
    for work in ("lookup", "EMA"):
        with multiprocessing.get_context("spawn").Pool(1) as process:
            figures[work] = process.apply(extra_mib, (work,))
    print(f"\nextra memory at N, K, D = {MEMORY_SHAPE}, MiB")
    print_table(list(figures), [list(figures.values())])
    return figures


def measure() -> dict:
    """Measure everything."""
    if VectorQuantize is None:
        print("vector-quantize-pytorch is missing, its columns too: pip install '.[bench]'")
    settings = {"decay": DECAY, "repeats": REPEATS, "memory_shape": MEMORY_SHAPE}
    return {"settings": settings, "shapes": compare_shapes(), "growth": growth(), "extra_mib": memory()}


if __name__ == "__main__":
    main("lookup", measure)
