import pytest
import torch

from prior.decoding import RecomputingDecoder
from prior.transformer import CodeTransformer, TransformerConfig, rotary_angles
from tests.priors import decoded, randomize


@pytest.mark.parametrize(("depth", "heads", "grid"), [(1, 1, (1, 3)), (2, 2, (3, 4)), (3, 4, (4, 4))])
def test_the_cached_decoder_gives_the_logits_of_the_full_forward(depth: int, heads: int, grid: tuple[int, int]) -> None:
    network = CodeTransformer(7, grid, TransformerConfig(width=16, depth=depth, heads=heads), 0.0)
    randomize(network)
    codes, condition = torch.randint(7, (3, *grid)), torch.randn(3, 16, *grid)
    with torch.no_grad():
        full = network(codes, condition).flatten(1, 2)
        assert torch.allclose(decoded(network.decoder(condition), codes), full, atol=1e-4)
        assert torch.allclose(decoded(RecomputingDecoder(network, condition), codes), full, atol=1e-4)


def test_rotary_positions_know_rows_and_columns() -> None:
    angles = rotary_angles((3, 4), 8)[0].view(3, 4, 8)
    assert torch.equal(angles[:, 0, :4], angles[:, 3, :4])  # the first half turns with the row alone
    assert torch.equal(angles[0, :, 4:], angles[2, :, 4:])  # the second with the column alone
    assert not torch.equal(angles[0, 0, :4], angles[1, 0, :4])
    assert not torch.equal(angles[0, 0, 4:], angles[0, 1, 4:])


def test_a_width_that_does_not_split_into_rotary_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"multiple of 4 \* heads, got 20 with 2 heads"):
        TransformerConfig(width=20, depth=1, heads=2)
