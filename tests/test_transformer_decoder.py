import pytest
import torch

from prior.decoder import RecomputingDecoder, draw_by_steps
from prior.sampling import filtered_probabilities, inverse_cdf
from prior.transformer import CodeTransformer, TransformerConfig
from prior.transformer_decoder import BUCKET, TransformerDecoder
from tests.priors import decoded, draw_codes, randomize, tiny_level


def assert_exact(grids: list[tuple[int, int]], batch: int, **changes: object) -> None:
    sizes = [5, 7][-len(grids) :]
    level = tiny_level("transformer", grids, sizes, **changes)
    codes, classes = draw_codes(grids, sizes, batch), torch.arange(batch) % 4
    with torch.no_grad():
        full = level.logits(codes[-1], codes[:-1], classes).flatten(1, 2)
        condition = level.conditioning(codes[:-1], classes, batch)
    plain = decoded(RecomputingDecoder(level.network, condition), codes[-1])
    steps = decoded(level.decoder(codes[:-1], classes, batch), codes[-1])
    assert torch.allclose(plain, full, atol=1e-5)
    assert torch.allclose(steps, full, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (3, 1), (3, 4), (9, 8)])
def test_each_position_has_the_logits_of_the_full_forward_on_any_grid(grid: tuple[int, int], batch: int) -> None:
    assert_exact([grid], batch)


@pytest.mark.parametrize(
    "changes",
    [
        {"depth": 1, "heads": 1},
        {"depth": 3, "heads": 4},
        {"width": 24, "heads": 3},
        {"width": 24, "heads": 6, "kv_heads": 2},
        {"heads": 4, "kv_heads": 1},
    ],
)
def test_each_position_has_the_logits_of_the_full_forward_at_any_size(changes: dict) -> None:
    assert_exact([(3, 5)], 2, **changes)


def test_each_position_has_the_logits_of_the_full_forward_below_another_level() -> None:
    assert_exact([(2, 3), (4, 6)], 2)


def test_the_first_position_after_a_bucket_sees_the_last_before_it() -> None:
    network = CodeTransformer(7, (1, BUCKET + 1), TransformerConfig(width=16, depth=1, heads=2), 0.0)
    randomize(network)
    codes, condition = torch.randint(7, (1, 1, BUCKET + 1)), torch.randn(1, 16, 1, BUCKET + 1)
    changed = codes.clone()
    changed[..., BUCKET - 1] = (changed[..., BUCKET - 1] + 1) % 7
    before, after = (decoded(TransformerDecoder(network, condition), given)[0] for given in (codes, changed))
    assert torch.equal(before[:BUCKET], after[:BUCKET])
    assert not torch.allclose(before[BUCKET], after[BUCKET])


def test_under_autocast_the_logits_are_those_of_the_full_forward_up_to_its_rounding() -> None:
    level = tiny_level("transformer", [(3, 4)], [7])
    codes = draw_codes([(3, 4)], [7])
    with torch.no_grad():
        exact = level.logits(codes[0], [], None).flatten(1, 2)
        with torch.autocast("cpu", torch.bfloat16):
            half = level.logits(codes[0], [], None).flatten(1, 2).float()
            decoder = level.decoder([], None, 2)
            steps = decoded(decoder, codes[0]).float()
    assert isinstance(decoder, TransformerDecoder)
    assert decoder.layers[0][0].kept.dtype == torch.bfloat16
    rounding = float((half - exact).abs().max())
    assert rounding > 0
    assert float((steps - exact).abs().max()) < 3 * rounding


def long_network() -> CodeTransformer:
    network = CodeTransformer(7, (9, 8), TransformerConfig(width=16, depth=2, heads=2), 0.0)  # more than one bucket
    randomize(network)
    return network


def choose(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    return inverse_cdf(filtered_probabilities(logits, top_p=0.9), uniform)


def assert_draws_are_those_by_steps(device: str) -> None:
    """Twice with one decoder: what the first draw captured serves the second."""
    network = long_network().to(device)
    decoder = TransformerDecoder(network, torch.zeros(3, 16, 9, 8, device=device))
    for _ in range(2):
        condition = torch.randn(3, 16, 9, 8, device=device)
        uniforms = torch.rand(3, 72, dtype=torch.float64, device=device)
        decoder.restart(condition)
        by_steps = draw_by_steps(TransformerDecoder(network, condition), choose, uniforms)
        assert torch.equal(decoder.draw(choose, uniforms), by_steps)


def test_draws_by_fixed_tensors_are_those_by_steps() -> None:
    assert_draws_are_those_by_steps("cpu")


@pytest.mark.gpu
def test_replayed_graphs_draw_the_codes_of_the_steps() -> None:
    assert_draws_are_those_by_steps("cuda")


def test_layers_that_the_decoder_does_not_know_are_refused() -> None:
    network = CodeTransformer(7, (2, 2), TransformerConfig(width=16, depth=1, heads=2), 0.0)
    network.layers.layers[0][1].k_rmsnorm = torch.nn.RMSNorm(8)
    with pytest.raises(AssertionError, match="attention must hold"):
        TransformerDecoder(network, torch.zeros(1, 16, 2, 2))
