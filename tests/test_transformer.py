import pytest
import torch

from prior.transformer import TransformerConfig, rotary_angles


def test_rotary_positions_know_rows_and_columns() -> None:
    angles = rotary_angles((3, 4), 8)[0].view(3, 4, 8)
    assert torch.equal(angles[:, 0, :4], angles[:, 3, :4])  # the first half turns with the row alone
    assert torch.equal(angles[0, :, 4:], angles[2, :, 4:])  # the second with the column alone
    assert not torch.equal(angles[0, 0, :4], angles[1, 0, :4])
    assert not torch.equal(angles[0, 0, 4:], angles[0, 1, 4:])


def test_a_width_that_does_not_split_into_rotary_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"multiple of 4 \* heads, got 20 with 2 heads"):
        TransformerConfig(width=20, depth=1, heads=2)


def test_heads_that_do_not_share_keys_evenly_are_refused() -> None:
    with pytest.raises(ValueError, match="heads must be a multiple of kv_heads, got 4 and 3"):
        TransformerConfig(width=32, heads=4, kv_heads=3)
