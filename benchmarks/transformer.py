"""Sampling from a Transformer: the cached decoder, x-transformers' own, and what the machine allows.

    python -m benchmarks.transformer

A Transformer of 14.6M parameters draws 256 codes, all of the time counted. x-transformers' AutoregressiveWrapper draws
with its cache from the same weights; to make both compute the same, the decoder takes the wrapper's rotary positions
(along the raster, not rows and columns), starts from the wrapper's prompt and is given a condition of zero. The limit
at batch 1 is the time to read the weights once a position, at the speed of a plain sum over memory. Beside it stand the
bare products of those weights with as many columns as the batch has; attention over the cache comes on top.
"""

import torch
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

from benchmarks.measure import bytes_per_s, interleaved_medians, main, print_table
from prior.decoding import RecomputingDecoder
from prior.transformer import CodeTransformer, TransformerConfig

GRID, CODEBOOK_SIZE, LENGTH = (16, 16), 512, 256
CONFIG = TransformerConfig(width=384, depth=8, heads=6)


def peer_and_ours() -> tuple[AutoregressiveWrapper, CodeTransformer]:
    """Return x-transformers' sampler and our network, with the same weights and positions."""
    ours = CodeTransformer(CODEBOOK_SIZE, GRID, CONFIG, 0.0).eval()
    layers = Decoder(
        dim=CONFIG.width,
        depth=CONFIG.depth,
        heads=CONFIG.heads,
        attn_dim_head=64,
        attn_flash=True,
        ff_glu=True,
        ff_swish=True,
        ff_mult=8 / 3,
        use_rmsnorm=True,
        rotary_pos_emb=True,
        rotary_emb_dim=64,
    )
    wrapper = TransformerWrapper(
        num_tokens=CODEBOOK_SIZE, max_seq_len=LENGTH + 1, attn_layers=layers, use_abs_pos_emb=False
    )
    layers.load_state_dict(ours.layers.state_dict(), strict=False)  # the wrapper's has rotary frequencies besides
    wrapper.token_emb.emb.weight.copy_(ours.embedding.weight)
    wrapper.to_logits.weight.copy_(ours.head.weight)
    ours.head.bias.zero_()  # the wrapper's head has none
    ours.start.copy_(ours.embedding.weight[0])  # the wrapper is prompted with code 0
    ours.angles = layers.rotary_pos_emb.forward_from_seq_len(LENGTH)[0]
    return AutoregressiveWrapper(wrapper).eval(), ours


def draw(network: CodeTransformer, condition: torch.Tensor) -> torch.Tensor:
    """Return the likeliest codes (B, T), one after another."""
    decoder, codes = network.decoder(condition), [None]
    for _ in range(LENGTH):
        codes.append(decoder.step(codes[-1]).argmax(-1))
    return torch.stack(codes[1:], 1)


def measure_batch(peer: AutoregressiveWrapper, network: CodeTransformer, batch: int, speed: float) -> dict[str, float]:
    """Return the seconds a position takes each way, and whether all ways agree."""
    condition = torch.zeros(batch, CONFIG.width, *GRID)
    prompt = torch.zeros(batch, 1, dtype=torch.int64)
    decoder = network.decoder(condition)
    weights = [decoder.head]
    for attention, feed_forward in decoder.layers:
        weights += [attention.project, attention.merge, feed_forward.first, feed_forward.last]
    columns = [torch.randn(weight.shape[1], batch) for weight in weights]

    def products() -> None:
        for _ in range(LENGTH):
            for weight, column in zip(weights, columns, strict=True):
                weight @ column

    works = {
        "ours": lambda: draw(network, condition),
        "x-transformers": lambda: peer.generate(prompt, LENGTH, temperature=0.0, cache_kv=True),
        "products": products,
    }
    seconds = {name: median / LENGTH for name, median in interleaved_medians(works, repeats=3).items()}
    plain = RecomputingDecoder(network, condition)
    seconds |= interleaved_medians({"recomputing": lambda: plain.step(None)}, repeats=5)
    codes, theirs = works["ours"](), works["x-transformers"]()
    full = network(codes.view(batch, *GRID), condition).flatten(1, 2)
    steps = [decoder.step(previous) for previous in [None, *codes.t()[:-1]]]
    weight_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    return seconds | {
        "weights read once": weight_bytes / speed,
        "weight_bytes": weight_bytes,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "largest_logit_difference": float((torch.stack(steps, 1) - full).abs().max()),
        "codes_like_peers": float((codes == theirs).float().mean()),
    }


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
    return figures | {"bytes_per_s": speed}


if __name__ == "__main__":
    main("transformer", measure)
