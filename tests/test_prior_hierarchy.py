from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from prior import HierarchicalPrior, sampling, uniforms
from tests.priors import NETWORKS, draw_codes, tiny_level, tiny_prior

# Small enough that all 64 sets of grids can be listed.
GRIDS, SIZES = [(1, 2), (2, 2)], [2, 2]


def all_grids() -> list[torch.Tensor]:
    flat = torch.tensor(list(product(range(2), repeat=6)))
    return [flat[:, :2].view(-1, 1, 2), flat[:, 2:].view(-1, 2, 2)]


def outcome(codes: list[torch.Tensor]) -> torch.Tensor:
    bits = torch.cat([code.flatten(1) for code in codes], 1)
    return (bits * 2 ** torch.arange(5, -1, -1)).sum(1)


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """p-value of the counts under the probabilities, rare outcomes taken together."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    return float(chi2.sf(((counts - expected) ** 2 / expected).sum(), len(counts) - 1))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("classes", [0, 3])
def test_likelihoods_sum_to_one_over_all_grids(network: str, classes: int) -> None:
    prior = tiny_prior(network, GRIDS, SIZES, classes)
    for label in range(classes) or [None]:
        labels = None if label is None else torch.full((64,), label)
        with torch.no_grad():
            total = float((-prior.nll(all_grids(), labels)).exp().sum())
        assert total == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_samples_follow_the_exact_distribution(network: str) -> None:
    prior = tiny_prior(network, GRIDS, SIZES, scale=0.2)
    with torch.no_grad():
        exact = (-prior.nll(all_grids(), torch.full((64,), 1))).exp().numpy()
    codes = prior.sample([1] * 20000, seed=0)
    assert chi_square(np.bincount(outcome(codes), minlength=64), exact) > 0.001


def test_the_chi_square_finds_a_sampler_tilted_by_five_per_cent(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = tiny_prior("transformer", GRIDS, SIZES, scale=0.2)
    with torch.no_grad():
        exact = (-prior.nll(all_grids(), torch.full((64,), 1))).exp().numpy()
    honest = sampling.filtered_probabilities

    def tilted(*arguments: object) -> torch.Tensor:
        probabilities = honest(*arguments) * torch.tensor([1.05, 1.0], dtype=torch.float64)  # type: ignore[arg-type]
        return probabilities / probabilities.sum(-1, keepdim=True)

    monkeypatch.setattr(sampling, "filtered_probabilities", tilted)
    codes = prior.sample([1] * 20000, seed=0)
    assert chi_square(np.bincount(outcome(codes), minlength=64), exact) < 0.001


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_sample_does_not_depend_on_its_batch(network: str, guidance: float) -> None:
    """But for codes whose uniform lies within 1e-5 of an edge of the distribution."""
    grids, sizes, count = [(2, 2), (4, 4)], [16, 16], 9
    prior = tiny_prior(network, grids, sizes)
    labels = [index % 3 for index in range(count)]
    edges: list[torch.Tensor] = []
    whole = [codes.flatten(1) for codes in prior.sample(labels, seed=5, guidance=guidance)]
    whole_codes = torch.cat(whole, 1)
    for batch in (1, 3, 8):
        parts = [
            prior.sample(labels[i : i + batch], seed=5, guidance=guidance, indices=range(i, min(i + batch, count)))
            for i in range(0, count, batch)
        ]
        codes = torch.cat([torch.cat([level.flatten(1) for level in part], 1) for part in parts])
        for index in range(count):
            differing = (codes[index] != whole_codes[index]).nonzero()
            if len(differing):  # the first one must have been a close call; what follows builds on it
                edges.append(_distance_to_edge(prior, whole, index, int(differing[0]), labels, guidance))
    assert all(float(edge) < 1e-5 for edge in edges)


def _distance_to_edge(
    prior: HierarchicalPrior, whole: list[torch.Tensor], index: int, place: int, labels: list[int], guidance: float
) -> torch.Tensor:
    number = 0 if place < whole[0].shape[1] else 1
    position = place - (whole[0].shape[1] if number else 0)
    level = prior.levels[number]
    coarser = [codes[index : index + 1].view(1, *prior.levels[0].config.grids[-1]) for codes in whole[:number]]
    own = whole[number][index : index + 1].view(1, *level.config.grids[-1])
    given, free = (
        level.logits(own, coarser, label).flatten(1, 2)[:, position] for label in (torch.tensor([labels[index]]), None)
    )
    cumulative = sampling.filtered_probabilities(free + guidance * (given - free)).cumsum(-1)
    return (cumulative - uniforms(5, index, place + 1)[place]).abs().min()


def test_level_0_ignores_level_1() -> None:
    grids, sizes = [(2, 2), (4, 4)], [16, 16]
    prior = tiny_prior("transformer", grids, sizes)
    alone = HierarchicalPrior([prior.levels[0]])
    assert torch.equal(prior.sample([0, 1, 2])[0], alone.sample([0, 1, 2])[0])


def test_settings_per_level_are_those_of_the_level() -> None:
    grids, sizes = [(2, 2), (4, 4)], [16, 16]
    prior = tiny_prior("transformer", grids, sizes)
    plain = prior.sample([0, 1, 2])
    greedy_below = prior.sample([0, 1, 2], top_k=[0, 1])
    assert torch.equal(plain[0], greedy_below[0])
    assert not torch.equal(plain[1], greedy_below[1])
    assert torch.equal(greedy_below[1], prior.sample([0, 1, 2], top_k=[0, 1], temperature=[1.0, 9.0])[1])


def test_guidance_moves_away_from_no_class() -> None:
    prior = tiny_prior("transformer", [(2, 2), (4, 4)], [16, 16])
    plain, zero = prior.sample([0, 1, 2]), prior.sample([0, 1, 2], guidance=0.0)
    assert all(torch.equal(a, b) for a, b in zip(zero, prior.sample(indices=range(3)), strict=True))
    assert not torch.equal(plain[1], prior.sample([0, 1, 2], guidance=4.0)[1])


def test_saving_and_loading_gives_the_same_samples(tmp_path: Path) -> None:
    prior = tiny_prior("pixelsnail", [(2, 2), (4, 4)], [16, 16])
    prior.save_pretrained(tmp_path)
    loaded = HierarchicalPrior.from_pretrained(tmp_path)
    codes = [prior.sample([0, 1], seed=1), loaded.sample([0, 1], seed=1)]
    assert all(torch.equal(a, b) for a, b in zip(*codes, strict=True))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="level0, level1"):
        HierarchicalPrior.from_pretrained(tmp_path / "empty")


def test_classes_may_be_a_list() -> None:
    prior, codes = tiny_prior("transformer", [(2, 2)], [16]), draw_codes([(2, 2)], [16])
    assert torch.equal(prior.nll(codes, [1, 2]), prior.nll(codes, torch.tensor([1, 2])))


def test_an_unconditional_prior_samples_without_classes() -> None:
    prior = tiny_prior("transformer", [(2, 2)], [16], num_classes=0)
    assert prior.sample(indices=range(4))[0].shape == (4, 2, 2)
    assert prior.nll(draw_codes([(2, 2)], [16])).shape == (2,)


def test_what_does_not_belong_together_is_refused() -> None:
    grids = [(2, 2), (4, 4)]
    top = tiny_level("transformer", grids[:1], [16])
    with pytest.raises(ValueError, match="disagree on grids, codebook sizes or classes"):
        HierarchicalPrior([top, tiny_level("transformer", grids, [8, 16])])
    with pytest.raises(ValueError, match="level 1 must be there"):
        HierarchicalPrior([top, top])
    prior = tiny_prior("transformer", grids, [16, 16])
    with pytest.raises(ValueError, match=r"classes must lie in \[0, 3\), got \[3\]"):
        prior.sample([3])
    with pytest.raises(ValueError, match=r"classes must lie in \[0, 3\), got \[0, 5\]"):
        prior.nll(draw_codes(grids, [16, 16]), [0, 5])
    with pytest.raises(ValueError, match=r"one value or one per level \(2\)"):
        prior.sample([0], temperature=[1.0])
    with pytest.raises(ValueError, match="guidance needs classes"):
        prior.sample(indices=range(2), guidance=2.0)
    with pytest.raises(ValueError, match="equally many, got 3 and 2"):
        prior.sample([0, 1], indices=range(3))


@pytest.mark.parametrize("network", NETWORKS)
def test_kept_decoders_draw_what_new_ones_do(network: str) -> None:
    prior, decoders = tiny_prior(network, [(2, 3), (4, 5)], [16, 16]), {}
    for labels, settings in (
        ([0, 1], {}),
        ([2, 1], {"seed": 1}),
        ([1, 1], {"guidance": 2.0}),
        ([0, 2, 1], {}),
        ([0, 2], {"top_k": 3}),
    ):
        kept, new = (prior.sample(labels, **settings, **more) for more in ({"decoders": decoders}, {}))
        assert all(torch.equal(a, b) for a, b in zip(kept, new, strict=True))
    assert len(decoders) == 6  # two levels, for batches of two, of three and of two guided


def test_decoders_are_kept_by_the_type_of_their_products() -> None:
    prior, decoders = tiny_prior("transformer", GRIDS, SIZES), {}
    prior.sample([0], decoders=decoders)
    with torch.autocast("cpu", torch.bfloat16):
        prior.sample([0], decoders=decoders)
    assert {key[2] for key in decoders} == {torch.float32, torch.bfloat16}
