"""Sampling from a Transformer: the cached decoder, x-transformers' own, and what the machine allows.

    python -m benchmarks.transformer

A Transformer of 14.6M parameters draws 256 codes; its decoder is made once, for all batches. x-transformers'
AutoregressiveWrapper draws with its cache from the same weights; to make both compute the same, the decoder takes the
wrapper's layers and rotary positions (along the raster, not rows and columns), starts from the wrapper's prompt and is
given a condition of zero. The limit at batch 1 is the time to read the weights once a position, at the speed of a plain
sum over memory. Beside it stand the products of those weights alone; attention over the cache comes on top. On a GPU a
Transformer of 24 layers of width 1024 draws too, in bfloat16 and beside the speed of a copy in its memory.
"""

import torch
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

from benchmarks.measure import DEVICE, bytes_per_s, interleaved_medians, main, print_table
from prior.decoder import RecomputingDecoder
from prior.transformer import CodeTransformer, TransformerConfig
from prior.transformer_decoder import TransformerDecoder

GRID, CODEBOOK_SIZE = (16, 16), 512
LENGTH = GRID[0] * GRID[1]
CONFIG = TransformerConfig(width=384, depth=6, heads=6)
LARGE = TransformerConfig(width=1024, depth=24, heads=16)
LARGE_GRID, LARGE_CODEBOOK_SIZE = (24, 24), 16384


def peer_and_ours() -> tuple[AutoregressiveWrapper, CodeTransformer]:
    """Return x-transformers' sampler and our network, with the same layers, weights and positions."""
    layers = Decoder(
        dim=CONFIG.width,
        depth=CONFIG.depth,
        heads=CONFIG.heads,
        attn_dim_head=64,
        attn_flash=True,
        ff_glu=True,
        ff_swish=True,
        ff_mult=4,
        use_rmsnorm=True,
        rotary_pos_emb=True,
        rotary_emb_dim=64,
    )
    wrapper = TransformerWrapper(
        num_tokens=CODEBOOK_SIZE, max_seq_len=LENGTH + 1, attn_layers=layers, use_abs_pos_emb=False
    )
    ours = CodeTransformer(CODEBOOK_SIZE, GRID, CONFIG, 0.0)
    ours.layers = layers
    wrapper.token_emb.emb.weight.copy_(ours.embedding.weight)
    wrapper.to_logits.weight.copy_(ours.head.weight)
    ours.head.bias.zero_()  # the wrapper's head has none
    ours.start.copy_(ours.embedding.weight[0])  # the wrapper is prompted with code 0
    ours.angles = layers.rotary_pos_emb.forward_from_seq_len(LENGTH)[0]
    return AutoregressiveWrapper(wrapper).eval().to(DEVICE), ours.eval().to(DEVICE)


def likeliest(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Choose as `generate` does at temperature 0."""
    return logits.argmax(-1)


def linears(decoder: TransformerDecoder) -> list:
    """Return the layers that every position's features are multiplied by."""
    inner = [
        linear
        for attention, feed_forward in decoder.layers
        for linear in (attention.project, attention.merge, feed_forward.first, feed_forward.last)
    ]
    return [*inner, decoder.head]


def measure_batch(peer: AutoregressiveWrapper, network: CodeTransformer, batch: int, speed: float) -> dict[str, float]:
    """Return the seconds a position takes each way, and whether all ways agree."""
    condition = torch.zeros(batch, CONFIG.width, *GRID, device=DEVICE)
    prompt = torch.zeros(batch, 1, dtype=torch.int64, device=DEVICE)
    uniforms = torch.zeros(batch, LENGTH, device=DEVICE)
    decoder = TransformerDecoder(network, condition)
    layers = linears(decoder)
    rows = [torch.randn(batch, layer.inputs, device=DEVICE) for layer in layers]

    def draw() -> torch.Tensor:
        decoder.restart(condition)
        return decoder.draw(likeliest, uniforms)

    def products() -> None:
        for _ in range(LENGTH):
            for layer, row in zip(layers, rows, strict=True):
                layer(row)

    works = {
        "ours": draw,
        "x-transformers": lambda: peer.generate(prompt, LENGTH, temperature=0.0, cache_kv=True),
        "products": products,
    }
    seconds = {name: median / LENGTH for name, median in interleaved_medians(works, repeats=5).items()}
    plain = RecomputingDecoder(network, condition)
    seconds |= interleaved_medians({"recomputing": lambda: plain.step(None)}, repeats=5)
    codes, theirs = draw(), works["x-transformers"]()
    full = network(codes.view(batch, *GRID), condition).flatten(1, 2)
    decoder.restart(condition)
    steps = [decoder.step(previous) for previous in [None, *codes.t()[:-1]]]
    return seconds | {
        "weights read once": sum(layer.bytes for layer in layers) / speed,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "largest_logit_difference": float((torch.stack(steps, 1) - full).abs().max()),
        "codes_like_peers": float((codes == theirs).float().mean()),
    }


def measure_large(config: TransformerConfig, speed: float) -> dict[str, float]:
    """Return what share of the memory's speed a large Transformer in bfloat16 reaches at batch 1."""
    network = CodeTransformer(LARGE_CODEBOOK_SIZE, LARGE_GRID, config, 0.0).eval().to(DEVICE)
    condition = torch.zeros(1, config.width, *LARGE_GRID, device=DEVICE)
    uniforms = torch.zeros(1, LARGE_GRID[0] * LARGE_GRID[1], device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        decoder = TransformerDecoder(network, condition)
        size = sum(layer.bytes for layer in linears(decoder))

        def draw() -> None:
            decoder.restart(condition)
            decoder.draw(likeliest, uniforms)

        seconds = interleaved_medians({"draw": draw}, repeats=5)["draw"] / uniforms.shape[1]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(
        f"{parameters / 1e6:.0f}M in bfloat16, batch 1: {seconds * 1e3:.2f} ms a position, "
        f"{size / seconds / 1e9:.0f} GB/s of weights, {size / seconds / speed:.0%} of a copy in memory"
    )
    return {"seconds": seconds, "weight_bytes": size, "parameters": parameters, "share": size / seconds / speed}


@torch.no_grad()
def measure() -> dict:
    """Time batch 1 and 16, and print the table."""
    torch.manual_seed(0)
    speed, figures, rows = bytes_per_s(), {}, []
    print(f"memory is read at {speed / 1e9:.0f} GB/s")
    peer, network = peer_and_ours()
    for batch in (1, 16):
        found = figures[f"batch {batch}"] = measure_batch(peer, network, batch, speed)
        ways = ("ours", "x-transformers", "recomputing", "products", "weights read once")
        ratios = [f"{found[way] / found['ours']:.2f}" for way in ("x-transformers", "products")]
        exactness = [f"{found['largest_logit_difference']:.0e}", f"{found['codes_like_peers']:.1%}"]
        label = f"{found['parameters'] / 1e6:.1f}M, batch {batch}"
        rows.append([label, *(found[way] * 1e3 for way in ways), *ratios, *exactness])
    header = ["ms a position", *ways, "faster", "of products", "logits off by", "codes like theirs"]
    print_table(header, rows)
    if DEVICE.type == "cuda":
        figures["large"] = measure_large(LARGE, speed)
    return figures | {"bytes_per_s": speed}


if __name__ == "__main__":
    main("transformer", measure)
