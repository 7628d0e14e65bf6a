import pytest
import torch

from tokenizer.networks import decoder, encoder


@pytest.mark.parametrize("stride", [2, 4, 8, 16])
def test_the_decoder_undoes_the_stride_of_the_encoder(stride: int) -> None:
    images = torch.zeros(1, 3, 32, 32)
    features = encoder(3, 8, 4, 1, stride)(images)
    assert features.shape == (1, 8, 32 // stride, 32 // stride)
    assert decoder(8, 3, 8, 4, 1, stride)(features).shape == images.shape
