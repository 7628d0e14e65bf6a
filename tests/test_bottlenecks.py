"""Laws of every family of bottlenecks, and of each by itself."""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipelines.data.noise import normals
from pipelines.storage.fingerprint import tokenizer_fingerprint
from tokenizer import HierarchicalVQVAE, TokenizerConfig
from tokenizer.bottlenecks import KINDS, kind_of
from tokenizer.bottlenecks.bottleneck import Settings, VectorSizes
from tokenizer.bottlenecks.codebook import Codebook
from tokenizer.bottlenecks.contractive import ContractiveConfig
from tokenizer.bottlenecks.fsq import FSQ, FSQConfig
from tokenizer.bottlenecks.gaussian import Gaussian, GaussianConfig
from tokenizer.bottlenecks.gradient import GradientConfig, KMeansStart
from tokenizer.bottlenecks.identity import IdentityConfig
from tokenizer.bottlenecks.sparse import SparseConfig
from tokenizer.posterior import log_posterior, summands

SIZES = VectorSizes(codebook_size=16, code_dim=4, normalize=False)
FAMILIES = [kind() for kind in KINDS.values()]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=list(KINDS))


def tokenizer(family: Settings) -> HierarchicalVQVAE:
    sizes = {"codebook_size": 16, "code_dim": 4, "width": 8, "residual_width": 4, "residual_blocks": 1}
    return HierarchicalVQVAE(TokenizerConfig(strides=[8, 4], **sizes), 16, 1, family).eval()  # type: ignore[arg-type]


def noise_for(model: HierarchicalVQVAE, places: Sequence[int]) -> list[Tensor | None] | None:
    parts = list(zip(model.bottlenecks, model.level_grids, strict=True))
    if not parts[0][0].noise_channels:
        return None
    return [normals(0, 0, places, (part.noise_channels, *grid)) for part, grid in parts]


@every_family
def test_what_is_seen_is_what_is_looked_up_and_gradients_reach_the_features(family: Settings) -> None:
    bottleneck = family.build(SIZES)
    features = torch.randn(2, bottleneck.features, 3, 5, requires_grad=True)
    noise = torch.randn(2, bottleneck.noise_channels, 3, 5) if bottleneck.noise_channels else None
    output = bottleneck(features, noise)
    assert output.seen.shape == (2, bottleneck.channels, 3, 5)
    assert torch.allclose(bottleneck.lookup(output.stored), output.seen, atol=1e-6)
    assert [tuple(stored.shape[-2:]) for stored in output.stored] == [(3, 5)] * len(bottleneck.sizes)
    assert all(int(codes.max()) < size for codes, size in zip(output.stored, bottleneck.sizes, strict=True) if size)
    (gradient,) = torch.autograd.grad(output.seen.sum(), features, allow_unused=True)
    assert gradient.abs().sum() > 0
    assert bottleneck.blank().shape == (bottleneck.channels,)


@every_family
def test_looking_changes_nothing_in_training_as_in_eval(family: Settings) -> None:
    bottleneck = family.build(SIZES)
    before = {name: tensor.clone() for name, tensor in bottleneck.state_dict().items()}
    for training in (True, False):
        bottleneck.train(training)(torch.randn(2, bottleneck.features, 3, 5))
    assert all(torch.equal(tensor, before[name]) for name, tensor in bottleneck.state_dict().items())


@every_family
def test_losses_have_weights_and_one_value_for_each_image(family: Settings) -> None:
    bottleneck = family.build(SIZES)
    features = torch.randn(3, bottleneck.features, 2, 2)
    together = bottleneck(features).losses
    averaged = {name: values.mean(0) for name, values in bottleneck(features).averaged.items()}
    of_jacobian = {"contraction"} if family.probes else set()
    assert set(together) | set(family.batch_losses(averaged)) | of_jacobian == set(family.weights(2, 256))
    alone = [bottleneck(features[number : number + 1]).losses for number in range(3)]
    for name, values in together.items():
        assert torch.allclose(values, torch.cat([losses[name] for losses in alone]), rtol=1e-5)


@every_family
def test_figures_of_parts_are_those_of_the_whole_and_filling_does_not_count(family: Settings) -> None:
    bottleneck = family.build(SIZES)
    features = torch.randn(5, bottleneck.features, 3, 3)
    whole, parts = bottleneck.figures(), bottleneck.figures()
    whole.update(bottleneck(features), torch.ones(5))
    parts.update(bottleneck(features[:3]), torch.ones(3))
    filled = torch.cat([features[3:], torch.full((1, bottleneck.features, 3, 3), 9.0)])
    parts.update(bottleneck(filled), torch.tensor([1.0, 1.0, 0.0]))
    assert len(whole.compute()) == len(bottleneck.sizes)
    assert all(torch.allclose(one, other) for one, other in zip(whole.sums, parts.sums, strict=True))
    for one, other in zip(whole.compute(), parts.compute(), strict=True):
        assert one == pytest.approx(other)


@every_family
def test_a_family_warns_where_little_of_a_level_is_in_use_and_only_there(family: Settings) -> None:
    bottleneck = family.build(SIZES)
    figures = bottleneck.figures()
    figures.update(bottleneck(torch.randn(2, bottleneck.features, 2, 2)), torch.ones(2))
    names = figures.compute()[0]
    assert not family.warnings(dict.fromkeys(names, 1.0))
    (warning,) = family.warnings(dict.fromkeys(names, 0.02))
    assert "2.0% of its" in warning and "collapsed" in warning


def test_a_family_with_losses_of_a_batch_is_of_whole_batches() -> None:
    class Mean(Settings):
        def batch_losses(self, averaged: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {"mean": averaged["units"].mean()}

    assert Mean().whole_batch and not Settings().whole_batch


@every_family
def test_what_a_family_calls_its_rate_is_a_loss_of_its_numbers(family: Settings) -> None:
    bottleneck = family.build(SIZES)
    assert not family.rate or family.rate in bottleneck(torch.randn(1, bottleneck.features, 2, 2)).losses
    assert not family.rate or bottleneck.sizes == (None,)
    assert bool(family.rate) == (bottleneck.noise_channels > 0 and bottleneck.sizes == (None,))


@every_family
def test_a_tokenizer_of_each_family_is_saved_and_loaded_as_it_was(family: Settings, tmp_path: Path) -> None:
    model = tokenizer(family)
    images = torch.rand(2, 1, 16, 16) * 2 - 1
    stored = model.encode(images, noise_for(model, [0, 1]))
    model.save_pretrained(tmp_path)
    loaded = HierarchicalVQVAE.from_pretrained(tmp_path)
    assert type(loaded.bottleneck) is type(family) and loaded.levels == model.levels
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(model)
    for one, other in zip(loaded.encode(images, noise_for(model, [0, 1])), stored, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(loaded.decode(stored), model.decode(stored))
    assert loaded.decode(stored[:1]).shape == images.shape


def test_families_have_fingerprints_of_their_own() -> None:
    settings = [tokenizer(family).settings for family in [*FAMILIES, FSQConfig(levels=[3, 3])]]
    assert len({str(one) for one in settings}) == len(settings)


def test_training_settings_are_no_part_of_a_model() -> None:
    torch.manual_seed(0)
    one = tokenizer_fingerprint(tokenizer(GaussianConfig(beta=0.1)))
    torch.manual_seed(0)
    assert one == tokenizer_fingerprint(tokenizer(GaussianConfig(beta=0.2)))


@pytest.mark.parametrize("levels", [[3, 4], [8, 5, 5], [5, 3, 4, 3]])
def test_every_code_of_finite_scalars_stands_for_one_combination_and_comes_back(levels: list[int]) -> None:
    quantiser = FSQ(levels)
    number = quantiser.sizes[0]
    codes = torch.arange(number).view(1, 1, number)
    values = quantiser.lookup([codes])  # (1, D, 1, K)
    combinations = {tuple(values[0, :, 0, code].tolist()) for code in range(number)}
    wanted = product(*[[(digit - size // 2) / (size // 2) for digit in range(size)] for size in levels])
    assert {tuple(round(value, 5) for value in one) for one in combinations} == {
        tuple(round(value, 5) for value in one) for one in wanted
    }
    half = (torch.tensor(levels) - 1) * (1 - 1e-3) / 2
    offset = torch.tensor([0.5 * (size % 2 == 0) for size in levels])
    rounded = values * torch.tensor([size // 2 for size in levels])[:, None, None]
    inside = ((rounded + offset[:, None, None]) / half[:, None, None]).clamp(-0.9999, 0.9999)
    features = torch.atanh(inside) - torch.atanh(offset / half)[:, None, None]
    assert torch.equal(quantiser(features).stored[0], codes)


def test_the_gradient_of_finite_scalars_is_that_of_the_bounded_channels() -> None:
    quantiser, features = FSQ([5]), torch.randn(1, 1, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(quantiser(features).seen.sum(), features)
    half = (5 - 1) * (1 - 1e-3) / 2
    assert torch.allclose(gradient, (1 - torch.tanh(features).square()) * half / 2, atol=1e-5)


def test_channels_that_cannot_be_rounded_are_refused() -> None:
    with pytest.raises(ValueError, match="levels must name 3 or more values for each channel"):
        FSQConfig(levels=[8, 2])
    with pytest.raises(ValueError, match="levels must name 3 or more"):
        FSQConfig(levels=[])
    with pytest.raises(ValueError, match="features must have 2 channels, got 3"):
        FSQ([3, 3])(torch.zeros(1, 3, 2, 2))


def test_the_kl_divergence_is_that_of_torch() -> None:
    features = torch.randn(3, 8, 2, 2)
    mean, log_variance = features.chunk(2, 1)
    q = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    assert torch.allclose(Gaussian(4)(features).losses["kl"], expected, rtol=1e-5)


def test_beta_rises_in_a_line_and_stays() -> None:
    assert [GaussianConfig(beta_warmup=4).shares(step)["kl"] for step in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]
    assert GaussianConfig().shares(0)["kl"] == 1


def test_free_bits_are_charged_whether_taken_or_not_and_only_beyond_them_kl_divergence_is_drawn_down() -> None:
    family = GaussianConfig(beta=1.0, free_bits=1.0)
    assert family.whole_batch and family.weights(1, 10) == {"kl": 0.0, "charged": 0.1}
    assert not GaussianConfig().whole_batch and GaussianConfig().batch_losses({"kl": torch.ones(2)}) == {}
    features = torch.zeros(4, 4, 1, 1)  # of two numbers the second takes more than a bit
    features[:, 1], features[:, 0] = 3.0, torch.linspace(0, 1.5, 4)[:, None, None]
    features.requires_grad_()
    output = family.build(VectorSizes(codebook_size=2, code_dim=2, normalize=False))(features)
    kl = output.averaged["kl"]
    taken = kl.detach()
    assert torch.allclose(taken.sum(1), output.losses["kl"]) and taken[3, 0] > math.log(2) > taken[:, 0].mean()
    charged = family.batch_losses({"kl": kl.mean(0)})["charged"]
    assert charged.item() == pytest.approx(math.log(2) + 4.5)
    (gradient,) = torch.autograd.grad(charged, features)
    assert (gradient[:, [0, 2]] == 0).all() and (gradient[:, 1] > 0).all()
    with pytest.raises(ValueError, match="free_bits must not be negative, got -1"):
        GaussianConfig(free_bits=-1)


def test_a_gaussian_is_drawn_from_with_its_mean_and_variance() -> None:
    features = torch.tensor([1.5, -0.7]).view(1, 2, 1, 1).expand(4000, 2, 1, 1)
    drawn = Gaussian(1)(features, normals(0, 0, range(4000), (1, 1, 1))).seen.flatten().double()
    assert float(drawn.mean()) == pytest.approx(1.5, abs=0.05)
    assert float(drawn.var()) == pytest.approx(2.718281828**-0.7, rel=0.1)


def test_units_that_do_not_vary_are_not_active() -> None:
    bottleneck = Gaussian(2)
    features = torch.zeros(50, 4, 2, 2)
    features[:, 0] = torch.randn(2, 2)  # a pattern, the same in every image, says nothing of one
    features[:, 1] = torch.randn(50, 2, 2)
    figures = bottleneck.figures()
    figures.update(bottleneck(features), torch.ones(50))
    assert figures.compute() == [{"active": 0.5}]


def test_the_divergence_is_that_of_coins_and_least_where_units_are_as_active_as_asked() -> None:
    family = SparseConfig(rho=0.2)
    means = torch.tensor([0.1, 0.2, 0.7])
    coins = torch.distributions.Bernoulli
    expected = torch.distributions.kl_divergence(coins(torch.full((3,), 0.2)), coins(means)).mean()
    assert torch.allclose(family.batch_losses({"activation": means})["divergence"], expected)
    assert float(family.batch_losses({"activation": torch.full((3,), 0.2)})["divergence"]) == pytest.approx(0, abs=1e-6)
    assert family.batch_losses({"activation": torch.tensor([0.0, 1.0])})["divergence"].isfinite()


def test_a_penalty_on_means_is_of_the_batch_as_a_whole_and_one_on_activations_of_each_image() -> None:
    assert SparseConfig().whole_batch and SparseConfig().weights(2, 256) == {"activation": 0.0, "divergence": 0.05}
    assert not SparseConfig(penalty="l1").whole_batch and SparseConfig(penalty="l1").weights(2, 1) == {
        "activation": 0.05
    }
    with pytest.raises(ValueError, match="rho must lie between 0 and 1, got 1"):
        SparseConfig(rho=1)


def test_units_above_a_half_are_active() -> None:
    bottleneck, features = SparseConfig().build(SIZES), torch.full((2, 4, 1, 1), -1.0)
    features[0, :3] = 1.0
    figures = bottleneck.figures()
    figures.update(bottleneck(features), torch.ones(2))
    assert figures.compute() == [{"active_share": 3 / 8, "alive": 3 / 4}]


def test_units_that_are_never_or_always_active_and_numbers_that_hardly_vary_are_dead() -> None:
    sparse, features = SparseConfig().build(SIZES), torch.full((3, 4, 2, 2), -1.0)
    features[:, 0] = 1.0
    features[0, 1, 0, 0] = 1.0
    figures = sparse.figures()
    figures.update(sparse(features), torch.ones(3))
    assert figures.compute()[0]["alive"] == 1 / 4
    for family in (IdentityConfig(), ContractiveConfig()):
        bottleneck, features = family.build(SIZES), torch.randn(50, 4, 2, 2)
        features[:, 1] = 5 + 1e-3 * features[:, 1]
        features[:, 2] = torch.randn(2, 2)  # a pattern, the same in every image
        figures = bottleneck.figures()
        figures.update(bottleneck(features), torch.ones(50))
        assert figures.compute()[0]["alive"] == 1 / 2


def test_units_that_all_stand_still_are_dead_and_have_no_deviation_however_far_apart_they_are() -> None:
    features = torch.tensor([-3.0, 0.0, 1.0, 8.0])[:, None, None] + 1e-4 * torch.randn(50, 4, 2, 2)
    features[:, 1] = 0
    for family in (IdentityConfig(), ContractiveConfig()):
        figures = (bottleneck := family.build(SIZES)).figures()
        figures.update(bottleneck(features), torch.ones(50))
        (found,) = figures.compute()
        assert found["alive"] == 0 and found["std"] < 1e-3
        assert "the others are dead" in family.warnings(found)[0]


def test_moments_of_what_is_passed_as_it_is() -> None:
    bottleneck, features = IdentityConfig().build(SIZES), 3 * torch.randn(2, 4, 3, 3) + 1
    figures = bottleneck.figures()
    figures.update(bottleneck(features), torch.ones(2))
    (found,) = figures.compute()
    assert found["mean"] == pytest.approx(float(features.mean()), abs=1e-5)
    assert found["std"] == pytest.approx(float(features.var(0, correction=0).mean().sqrt()), abs=1e-5)


def test_each_loss_of_a_learned_codebook_moves_its_own_side() -> None:
    codebook = GradientConfig().build(SIZES)
    features = torch.randn(2, 4, 3, 3, requires_grad=True)
    losses = codebook(features).losses
    assert torch.allclose(losses["codebook"], losses["commitment"])
    of_codebook = torch.autograd.grad(losses["codebook"].sum(), [features, codebook.vectors], allow_unused=True)
    of_commitment = torch.autograd.grad(losses["commitment"].sum(), [features, codebook.vectors], allow_unused=True)
    assert of_codebook[0] is None and of_codebook[1].abs().sum() > 0
    assert of_commitment[1] is None and of_commitment[0].abs().sum() > 0


def test_a_codebook_moved_by_gradients_starts_from_centres_of_the_first_batch() -> None:
    codebook = Codebook(4, 2, learned=True)
    centres = torch.tensor([[0.0, 0.0], [10, 0], [0, 10], [10, 10]])
    KMeansStart(10).start(codebook, (centres[:, None] + 0.01 * torch.randn(4, 20, 2)).flatten(0, 1), seed=1)
    assert isinstance(codebook.vectors, nn.Parameter)
    assert float(torch.cdist(centres, codebook.vectors.detach()).amin(1).max()) < 0.1


def test_noise_belongs_to_a_place_and_a_step_whoever_draws_it() -> None:
    together = normals(3, 7, range(6), (2, 3))
    assert torch.equal(together, torch.cat([normals(3, 7, range(4), (2, 3)), normals(3, 7, [4, 5], (2, 3))]))
    assert not torch.equal(together, normals(3, 8, range(6), (2, 3)))
    assert not torch.equal(together, normals(4, 7, range(6), (2, 3)))
    assert len({tuple(one.flatten().tolist()) for one in together}) == 6


DRAWING = [family for family in FAMILIES if family.build(SIZES).noise_channels]


@pytest.mark.parametrize("family", DRAWING, ids=[kind_of(family) for family in DRAWING])
def test_the_posterior_of_what_is_stored_is_that_of_torch_and_adds_up_over_levels(family: Settings) -> None:
    model, images = tokenizer(family), torch.rand(3, 1, 16, 16) * 2 - 1
    levels = model(images, noise_for(model, range(3))).levels
    stored = [grid for level in levels for grid in level.stored]
    expected = torch.zeros(3, dtype=torch.float64)
    for level in levels:
        assert level.posterior is not None
        posterior = level.posterior.double()
        if isinstance(family, GaussianConfig):
            mean, log_variance = posterior.chunk(2, 1)
            q = torch.distributions.Normal(mean, (0.5 * log_variance).exp()).log_prob(level.stored[0].double())
        else:
            q = torch.distributions.Categorical(logits=posterior.movedim(1, -1)).log_prob(level.stored[0])
        expected += q.flatten(1).sum(1)
    found = log_posterior(model, [level.posterior for level in levels if level.posterior is not None], stored)
    assert torch.allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("family", DRAWING, ids=[kind_of(family) for family in DRAWING])
def test_pairs_have_the_posterior_of_one_image_where_coarser_levels_are_anothers(family: Settings) -> None:
    """Held against a model that is handed the coarser level of the other image."""
    model, images = tokenizer(family), torch.rand(3, 1, 16, 16) * 2 - 1
    stored = model.encode(images, noise_for(model, range(3)))
    parts = summands(model, images, stored)
    found = log_posterior(model, [one.pairs(slice(3)) for one in parts], [grid[:, None] for grid in stored])
    assert torch.allclose(found.diagonal(), log_posterior(model, [one.total for one in parts], stored), rtol=1e-9)
    for n, m in product(range(3), range(3)):
        top = model.bottlenecks[0].lookup([stored[0][n : n + 1]])
        coarse, fine = (features[m : m + 1] for features in model.features(images))
        known = torch.cat([model.context_decoders[0](top), fine], 1)
        given = [model.projections[0](coarse), model.projections[1](known)]
        alone = log_posterior(model, given, [grid[n : n + 1] for grid in stored])
        assert torch.allclose(found[n, m], alone[0], rtol=1e-4)
    assert not torch.allclose(found, found.T)
