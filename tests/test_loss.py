import pytest
import torch

from tokenizer import TokenizerLoss


@pytest.mark.parametrize(("kind", "expected"), [("mse", 4.0), ("l1", 2.0)])
def test_the_loss_is_reconstruction_and_weighted_mean_commitment(kind: str, expected: float) -> None:
    images = torch.zeros(2, 1, 4, 4)
    losses = [{"commitment": torch.tensor([0.0, 2.0])}, {"commitment": torch.tensor([3.0, 3.0])}]
    assert TokenizerLoss(kind, {"commitment": 0.125})(images + 2, images, losses).item() == expected + 0.25 * 2  # type: ignore[arg-type]
