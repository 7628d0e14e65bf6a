"""Values that are given and only scored, by every kind of prior and every decoder."""

import pytest
import torch

from prior import FlowConfig, HierarchicalPrior, Known, LevelConfig, LevelPrior, MixtureConfig, prefix
from prior.decoder import RecomputingDecoder
from prior.em import em
from prior.mixture import Mixture
from prior.sampling import LevelSampling, inverse_cdf, uniforms
from tests.priors import NETWORKS, draw_codes, randomize, tiny_prior
from tests.test_normal import GRIDS as NORMAL_GRIDS
from tests.test_normal import normal_prior

GRIDS, SIZES, CLASSES = [(2, 2), (3, 4)], [5, 6], [0, 1, 2]


def given(network: str) -> tuple[HierarchicalPrior, list[torch.Tensor], list[int] | None]:
    """A prior, values of its levels, and classes."""
    if network == "normal":
        values = [torch.randn(3, channels, *grid) for channels, grid in zip([3, 2], NORMAL_GRIDS, strict=True)]
        return normal_prior(), values, None
    if network in SIZES_OF_NUMBERS:
        prior = numbers_prior(network)
        return prior, [torch.randn(3, d, *grid) for grid, _, d in prior.levels[-1].config.levels], CLASSES
    return tiny_prior(network, GRIDS, SIZES), draw_codes(GRIDS, SIZES, 3), CLASSES


SIZES_OF_NUMBERS = {"mixture": MixtureConfig(components=3), "flow": FlowConfig(couplings=2, width=8)}


def numbers_prior(network: str) -> HierarchicalPrior:
    """Of two levels of numbers, neither of them N(0, I)."""
    levels = []
    for number in range(2):
        config = LevelConfig(
            level=number,
            grids=NORMAL_GRIDS[: number + 1],
            codebook_sizes=[None] * (number + 1),
            channels=[3, 2][: number + 1],
            class_names=["a", "b", "c"],
            size=SIZES_OF_NUMBERS[network],
        )
        levels.append(LevelPrior(config))
        randomize(levels[-1])
        if isinstance(mixture := levels[-1].network, Mixture):
            next(em(mixture, 2 * torch.randn(30, mixture.num_uniforms - 1), torch.arange(30) % 3, 0))
    return HierarchicalPrior(levels).eval()


def masked(values: list[torch.Tensor], mask: torch.Tensor | bool) -> list[Known | None]:
    """What is known of each level: the cells of a chessboard, or all of them."""
    found: list[Known | None] = []
    for one in values:
        rows, columns = (torch.arange(length) for length in one.shape[-2:])
        board = ((rows[:, None] + columns) % 2 == 0) if mask is not True else torch.ones(one.shape[-2:]).bool()
        found.append(Known(one, board.expand(3, -1, -1)))
    return found


every_network = pytest.mark.parametrize("network", [*NETWORKS, "normal", *SIZES_OF_NUMBERS])


@every_network
@pytest.mark.parametrize("plain", [False, True])
def test_known_values_stand_and_the_nats_of_both_are_those_of_all(
    network: str, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if plain:
        monkeypatch.setattr("prior.level.decoder_of", RecomputingDecoder)
    prior, values, classes = given(network)
    known = masked(values, False)
    found = prior.complete(known, classes, seed=3)
    for one, drawn in zip(known, found.codes, strict=True):
        assert one is not None
        mask = one.mask if drawn.ndim == 3 else one.mask[:, None].expand_as(drawn)
        assert torch.equal(drawn[mask], one.values[mask])
        assert not torch.equal(drawn, one.values)
    assert torch.allclose(found.known_nats + found.drawn_nats, prior.nll(found.codes, classes))
    assert bool((found.known_nats != 0).all()) and bool((found.drawn_nats != 0).all())


@every_network
def test_with_all_known_the_nats_are_the_likelihood_and_with_nothing_it_is_a_sample(network: str) -> None:
    prior, values, classes = given(network)
    found = prior.complete(masked(values, True), classes)
    assert all(torch.equal(one, other) for one, other in zip(found.codes, values, strict=True))
    assert torch.equal(found.known_nats, prior.nll(values, classes)) and not found.drawn_nats.any()
    sample = prior.sample(classes, seed=4, indices=[0, 1, 2])
    nothing = [Known(one, torch.zeros(3, *one.shape[-2:]).bool()) for one in values]
    for known in ([], [None, None], nothing):
        drawn = prior.complete(known, classes, seed=4, indices=[0, 1, 2])
        assert all(torch.equal(one, other) for one, other in zip(drawn.codes, sample, strict=True))
        assert torch.equal(drawn.drawn_nats, prior.nll(sample, classes)) and not drawn.known_nats.any()


@pytest.mark.parametrize("network", [*NETWORKS, "normal", "flow"])
def test_what_a_sample_would_have_been_changes_nothing_when_it_is_known(network: str) -> None:
    """Uniforms of known positions are consumed: the others keep theirs. A mixture draws another component by them."""
    prior, _, classes = given(network)
    sample = prior.sample(classes, seed=5, indices=[7, 8, 9])
    again = prior.sample(classes, seed=5, indices=[7, 8, 9], known=masked(sample, False))
    assert all(torch.equal(one, other) for one, other in zip(sample, again, strict=True))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@torch.no_grad()
def test_a_prefix_is_continued_by_the_exact_conditional(network: str, guidance: float) -> None:
    """Beside the whole network, asked for one position after another with the codes so far."""
    prior = tiny_prior(network, [(3, 4)], [6])
    level, codes = prior.levels[0], torch.randint(6, (3, 3, 4))
    wanted = codes.clone()
    streams = torch.stack([torch.from_numpy(uniforms(2, index, 12)) for index in range(3)])
    classes, no_class = torch.tensor(CLASSES), torch.full((3,), 3)
    for position in range(5, 12):
        logits, without = (level.logits(wanted, [], one).flatten(1, 2)[:, position] for one in (classes, no_class))
        probabilities = (without + guidance * (logits - without)).double().softmax(1)
        wanted.view(3, -1)[:, position] = inverse_cdf(probabilities, streams[:, position])
    known = prefix(codes.flatten(1)[:, :5], (3, 4))
    (found,) = prior.sample(CLASSES, seed=2, guidance=guidance, known=[known])
    assert torch.equal(found, wanted) and not torch.equal(found, codes)


@torch.no_grad()
def test_a_decoder_that_is_kept_forgets_what_was_known() -> None:
    prior, values, classes = given("transformer")
    decoders: dict = {}
    prior.sample(classes, seed=1, known=masked(values, False), decoders=decoders)
    kept = prior.sample(classes, seed=1, decoders=decoders)
    assert all(torch.equal(one, other) for one, other in zip(kept, prior.sample(classes, seed=1), strict=True))


def test_a_coarse_level_that_is_known_is_what_finer_ones_are_drawn_for() -> None:
    prior, values, classes = given("transformer")
    known = prior.sample(classes, known=[Known(values[0], torch.ones(3, 2, 2).bool())])
    settings = LevelSampling(1.0, 0, 1.0, 1.0)
    streams = torch.stack([torch.from_numpy(uniforms(0, index, 16)) for index in range(3)])
    alone = prior.levels[1].draw([values[0]], torch.tensor(classes), streams[:, 4:], settings)
    assert torch.equal(known[0], values[0]) and torch.equal(known[1], alone)


def test_what_cannot_be_known_is_refused() -> None:
    prior, values, classes = given("transformer")
    mask = torch.ones(3, 2, 2).bool()
    with pytest.raises(ValueError, match=r"mask of level 0 must be bool \(3, 2, 2\), got torch.int64"):
        prior.sample(classes, known=[Known(values[0], mask.long())])
    with pytest.raises(ValueError, match=r"mask of level 0 must be bool \(3, 2, 2\), got torch.bool \(2, 2, 2\)"):
        prior.sample(classes, known=[Known(values[0], mask[:2])])
    with pytest.raises(ValueError, match="known of level 0 must hold 3 grids of"):
        prior.sample(classes, known=[Known(values[1], mask)])
    with pytest.raises(ValueError, match=r"must lie in \[0, 5\), got 7 to 7"):
        prior.sample(classes, known=[Known(torch.full((3, 2, 2), 7), mask)])
    with pytest.raises(ValueError, match="known must be of at most 2 levels"):
        prior.sample(classes, known=[None, None, None])
    with pytest.raises(ValueError, match="a prefix must be of at most 4 codes, got 5"):
        prefix(torch.zeros(1, 5, dtype=torch.int64), (2, 2))
    outside = torch.where(mask, values[0], 0)
    outside[:, 1, 1], mask[:, 1, 1] = 99, False  # not looked at
    assert len(prior.sample(classes, known=[Known(outside, mask)])[0]) == 3
