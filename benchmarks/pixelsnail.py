"""Sampling from a PixelSNAIL: the incremental decoder, the recomputing one, and what the machine allows.

    python -m benchmarks.pixelsnail

The top level has a 32x32 grid and attention, at a common width and at the common 85M parameters; the bottom level has
64x64 codes and no attention. Figures are of one position, from a row in the middle of the grid. The recomputing decoder
does the same forward at every position, so that a few of them stand for all. The limit at batch 1 is the time to read
the weights that a position needs once, at the speed of a plain sum over memory. Beside it stand the products of those
weights alone.
"""

import torch

from benchmarks.measure import DEVICE, bytes_per_s, interleaved_medians, main, print_table
from prior.decoder import RecomputingDecoder
from prior.packed_linear import PackedLinear
from prior.pixelsnail import PixelSNAIL, PixelSNAILConfig
from prior.pixelsnail_decoder import IncrementalBlock, PixelSNAILDecoder

CODEBOOK_SIZE = 512
# Side of the grid, and size.
LEVELS = {
    "top": (32, PixelSNAILConfig(width=256)),
    "top, large": (32, PixelSNAILConfig(width=544)),
    "bottom": (64, PixelSNAILConfig(width=256, attention=False)),
}


def linears(decoder: PixelSNAILDecoder) -> list[PackedLinear]:
    """Return the layers that every position's features are multiplied by."""
    layers = [decoder.start.linear, decoder.head]
    for layer in decoder.layers:
        if isinstance(layer, IncrementalBlock):
            layers += [layer.first.linear, layer.second.linear]
        else:
            layers += [layer.query, layer.key_value, layer.merge, layer.gate]
    return layers


def largest_difference(network: PixelSNAIL, batch: int) -> float:
    """Return how far the incremental decoder's logits lie from the full forward's, over a 6x6 grid."""
    codes = torch.randint(CODEBOOK_SIZE, (batch, 6, 6), device=DEVICE)
    condition = torch.randn(batch, network.head.in_channels, 6, 6, device=DEVICE)
    decoder, before = PixelSNAILDecoder(network, condition), [None, *codes.flatten(1).t()]
    steps = torch.stack([decoder.step(previous) for previous in before[:-1]], 1)
    return float((steps - network(codes, condition).flatten(1, 2)).abs().max())


def measure_level(network: PixelSNAIL, side: int, batch: int, speed: float) -> dict[str, float]:
    """Return the seconds a position takes each way, and what they were measured on."""
    condition = torch.randn(batch, network.head.in_channels, side, side, device=DEVICE)
    code = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    fast, plain = PixelSNAILDecoder(network, condition), RecomputingDecoder(network, condition)
    layers = linears(fast)
    rows = [torch.randn(batch, layer.inputs, device=DEVICE) for layer in layers]
    middle = side // 2 * side

    def draw_row() -> None:
        fast.position = middle
        for _ in range(side):
            fast.step(code)

    def products() -> None:
        for layer, row in zip(layers, rows, strict=True):
            layer(row)

    seconds = interleaved_medians({"ours": draw_row, "products": products}, repeats=7)
    seconds["ours"] /= side
    plain.position = middle
    # A forward of the large network at batch 16 takes half a minute.
    seconds |= interleaved_medians({"recomputing": lambda: plain.step(code)}, 3 if batch == 1 else 1, warmup=0)
    return seconds | {
        "weights once": sum(layer.bytes for layer in layers) / speed,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "largest_logit_difference": largest_difference(network, batch),
    }


@torch.no_grad()
def measure() -> dict:
    """Time all levels at batch 1 and 16, and print the table."""
    torch.manual_seed(0)
    speed, figures, rows = bytes_per_s(), {}, []
    print(f"memory is read at {speed / 1e9:.0f} GB/s")
    ways = ("ours", "recomputing", "products", "weights once")
    for name, (side, config) in LEVELS.items():
        network = PixelSNAIL(CODEBOOK_SIZE, config, 0.0).eval().to(DEVICE)
        for batch in (1, 16):
            found = figures[f"{name}, batch {batch}"] = measure_level(network, side, batch, speed)
            times = [found[way] * 1e3 for way in ways]
            ratios = [f"{found[way] / found['ours']:.2f}" for way in ("recomputing", "products")]
            label = f"{name}, {side}x{side}, {found['parameters'] / 1e6:.0f}M, batch {batch}"
            rows.append([label, *times, *ratios, f"{found['largest_logit_difference']:.0e}"])
    print_table(["ms a position", *ways, "faster", "of products", "logits off by"], rows)
    return figures | {"bytes_per_s": speed}


if __name__ == "__main__":
    main("pixelsnail", measure)
