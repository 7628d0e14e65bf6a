import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prior import LevelPrior
from tests.priors import NETWORKS, draw_codes, tiny_level, tiny_prior

GRIDS, SIZES = [(2, 2), (4, 4)], [5, 6]


@pytest.mark.parametrize("network", NETWORKS)
def test_saving_and_loading_gives_the_same_likelihood(network: str, tmp_path: Path) -> None:
    level = tiny_level(network, GRIDS, SIZES)
    level.save_pretrained(tmp_path)
    loaded = LevelPrior.from_pretrained(tmp_path)
    codes, classes = draw_codes(GRIDS, SIZES), torch.tensor([0, 1])
    assert loaded.config == level.config
    assert torch.equal(level.nll(codes[1], codes[:1], classes), loaded.nll(codes[1], codes[:1], classes))


def test_a_folder_that_lacks_a_tensor_or_a_setting_is_refused(tmp_path: Path) -> None:
    tiny_level("transformer", GRIDS, SIZES).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["network.head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"first network\.head\.weight"):
        LevelPrior.from_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["grids"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="exactly the settings"):
        LevelPrior.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no readable prior"):
        LevelPrior.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("network", NETWORKS)
def test_a_tiny_prior_learns_eight_grids_by_heart(network: str) -> None:
    level = tiny_level(network, GRIDS, SIZES, scale=0.1).train()
    codes, classes = draw_codes(GRIDS, SIZES, batch=8), torch.arange(8) % 3
    optimizer = torch.optim.Adam(level.parameters(), 1e-2)
    first = float(level.nll(codes[1], codes[:1], classes).mean().detach())
    for _ in range(150):
        loss = level.nll(codes[1], codes[:1], classes).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < first / 10


@pytest.mark.parametrize("network", NETWORKS)
def test_classes_and_coarser_codes_matter(network: str) -> None:
    level = tiny_level(network, GRIDS, SIZES)
    codes = draw_codes(GRIDS, SIZES)
    nll = level.nll(codes[1], codes[:1], torch.tensor([0, 1]))
    assert not torch.allclose(nll, level.nll(codes[1], codes[:1], torch.tensor([1, 2])))
    assert not torch.allclose(nll, level.nll(codes[1], [(codes[0] + 1) % 5], torch.tensor([0, 1])))
    no_class = level.nll(codes[1], codes[:1], None)
    assert torch.equal(no_class, level.nll(codes[1], codes[:1], torch.tensor([3, 3])))


@pytest.mark.parametrize("network", NETWORKS)
def test_a_kept_decoder_draws_what_a_new_one_does(network: str) -> None:
    prior = tiny_prior(network, [(2, 3), (4, 5)], [16, 16])
    for labels, settings in (([0, 1], {}), ([2, 1], {"seed": 1}), ([1, 1], {"guidance": 2.0}), ([0, 2], {"top_k": 3})):
        kept, new = (one.sample(labels, **settings) for one in (prior, copy.deepcopy(prior)))
        assert all(torch.equal(a, b) for a, b in zip(kept, new, strict=True))


@pytest.mark.parametrize("network", NETWORKS)
def test_a_decoder_is_kept_until_weights_or_shapes_change(network: str) -> None:
    level = tiny_level(network, [(2, 3)], [7])
    first = level.decoder([], None, 2)
    assert level.decoder([], None, 2) is first
    assert level.decoder([], None, 3) is not first
    moved = level.decoder([], None, 2)
    with torch.no_grad():
        next(level.network.parameters()).add_(1)
    assert level.decoder([], None, 2) is not moved
    with torch.autocast("cpu", torch.bfloat16):
        assert level.decoder([], None, 2) is not moved
    assert copy.deepcopy(level)._decoder is None
