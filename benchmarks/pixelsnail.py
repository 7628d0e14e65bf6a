"""Sampling from a PixelSNAIL: the incremental decoder, the recomputing one, and what the machine allows.

    python -m benchmarks.pixelsnail

Figures are of one position, from a row in the middle of a 32x32 grid. The recomputing decoder does the same forward at
every position, so that a few of them stand for all. The limit at batch 1 is the time to read the weights that a
position needs once, at the speed of a plain sum over memory. Beside it stand the bare products of those weights with
as many columns as the batch has.
"""

import torch

from benchmarks.measure import bytes_per_s, interleaved_medians, main, print_table
from prior.decoding import RecomputingDecoder
from prior.incremental import IncrementalBlock, IncrementalDecoder
from prior.pixelsnail import PixelSNAIL, PixelSNAILConfig

GRID, CODEBOOK_SIZE = (32, 32), 512
MIDDLE = GRID[0] // 2 * GRID[1]
SIZES = {"width 256": PixelSNAILConfig(width=256), "width 512": PixelSNAILConfig(width=512)}


def position_weights(decoder: IncrementalDecoder) -> list[torch.Tensor]:
    """Return the matrices that every position's features are multiplied by."""
    weights = [decoder.start.weight, decoder.head.weight]
    for layer in decoder.layers:
        if isinstance(layer, IncrementalBlock):
            weights += [layer.first.weight, layer.second.weight]
        else:
            weights += [part.weight for part in (layer.query, layer.key_value, layer.merge, layer.gate)]
    return weights


def largest_difference(network: PixelSNAIL, batch: int) -> float:
    """Return how far the incremental decoder's logits lie from the full forward's, over a 6x6 grid."""
    codes, condition = torch.randint(CODEBOOK_SIZE, (batch, 6, 6)), torch.randn(batch, network.head.in_channels, 6, 6)
    decoder, before = network.decoder(condition), [None, *codes.flatten(1).t()]
    steps = torch.stack([decoder.step(previous) for previous in before[:-1]], 1)
    return float((steps - network(codes, condition).flatten(1, 2)).abs().max())


def measure_size(network: PixelSNAIL, batch: int, speed: float) -> dict[str, float]:
    """Return the seconds a position takes each way, and what they were measured on."""
    condition = torch.randn(batch, network.head.in_channels, *GRID)
    code = torch.zeros(batch, dtype=torch.int64)
    fast, plain = network.decoder(condition), RecomputingDecoder(network, condition)
    weights = position_weights(fast)
    columns = [torch.randn(weight.shape[1], batch) for weight in weights]

    def row() -> None:
        fast.position = MIDDLE
        for _ in range(GRID[1]):
            fast.step(code)

    def products() -> None:
        for weight, column in zip(weights, columns, strict=True):
            weight @ column

    seconds = interleaved_medians({"ours": row, "products": products}, repeats=5)
    seconds["ours"] /= GRID[1]
    plain.position = MIDDLE
    # A forward of the large network at batch 16 takes half a minute.
    seconds |= interleaved_medians({"recomputing": lambda: plain.step(code)}, 3 if batch == 1 else 1, warmup=0)
    weight_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    return seconds | {
        "weights read once": weight_bytes / speed,
        "weight_bytes": weight_bytes,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "largest_logit_difference": largest_difference(network, batch),
    }


@torch.no_grad()
def measure() -> dict:
    """Time two sizes at batch 1 and 16, and print the table."""
    torch.manual_seed(0)
    speed, figures, rows = bytes_per_s(), {}, []
    print(f"memory is read at {speed / 1e9:.0f} GB/s")
    for name, config in SIZES.items():
        network = PixelSNAIL(CODEBOOK_SIZE, config, 0.0).eval()
        for batch in (1, 16):
            found = figures[f"{name}, batch {batch}"] = measure_size(network, batch, speed)
            times = [found[way] * 1e3 for way in ("ours", "recomputing", "products", "weights read once")]
            ratios = [f"{found[way] / found['ours']:.2f}" for way in ("recomputing", "products")]
            label = f"{name}, {found['parameters'] / 1e6:.0f}M, batch {batch}"
            rows.append([label, *times, *ratios, f"{found['largest_logit_difference']:.0e}"])
    header = [
        "ms a position",
        "ours",
        "recomputing",
        "products",
        "weights once",
        "faster",
        "of products",
        "logits off by",
    ]
    print_table(header, rows)
    return figures | {"bytes_per_s": speed}


if __name__ == "__main__":
    main("pixelsnail", measure)
