import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prior import LevelPrior
from tests.priors import NETWORKS, draw_codes, tiny_level

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
