"""What every fast decoder must draw: the codes of the one that computes everything anew."""

import pytest
import torch

from prior.decoder import RecomputingDecoder
from tests.priors import NETWORKS, tiny_prior


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_codes_are_those_of_the_recomputing_decoder(
    network: str, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = tiny_prior(network, [(2, 2), (4, 4)], [16, 16])
    fast = prior.sample([0, 1, 2], seed=3, guidance=guidance)
    monkeypatch.setattr("prior.level.decoder_of", RecomputingDecoder)
    plain = prior.sample([0, 1, 2], seed=3, guidance=guidance)
    assert all(torch.equal(a, b) for a, b in zip(fast, plain, strict=True))
