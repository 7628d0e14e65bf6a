"""Laws of what is done with latents, on tiny models; the command on tiny runs."""

import csv
import json
import math
from collections import Counter
from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor

from pipelines.data.noise import stored_noise
from pipelines.explore import area_under_roc, complete, direction, edit, interpolate, likely_path, score, slerp, vary
from prior import HierarchicalPrior, Known, MixtureConfig, prefix
from tests.priors import draw_codes, randomize, tiny_prior
from tests.test_bottlenecks import every_family
from tests.test_bottlenecks import tokenizer as untrained
from tests.test_normal import normal_prior
from tokenizer import HierarchicalVQVAE, TokenizerConfig
from tokenizer.bottlenecks.bottleneck import Settings
from tokenizer.bottlenecks.ema import EMAConfig
from tokenizer.bottlenecks.gaussian import GaussianConfig

Smalti = Callable[..., tuple[int, str]]
GRIDS, SIZES = [(1, 2), (2, 2)], [2, 3]
SCALES = torch.tensor([9.0], dtype=torch.float64)


def tokenizer(family: Settings) -> HierarchicalVQVAE:
    """One whose codes differ from image to image."""
    model = untrained(family)
    randomize(model)
    return model


def prior_of(model: HierarchicalVQVAE) -> HierarchicalPrior | None:
    sizes = model.codebook_sizes
    return None if None in sizes else tiny_prior("transformer", model.grids, [size for size in sizes if size])


def images(number: int) -> Tensor:
    return torch.rand(number, 1, 16, 16) * 2 - 1


@every_family
def test_the_ends_of_an_interpolation_are_the_reconstructions(family: Settings) -> None:
    model = tokenizer(family)
    first, last = images(2).split(1)
    one, other = model.encode(first), model.encode(last)
    found = interpolate(model, prior_of(model), one, other, steps=3, beam=1)
    assert found.shares[0] == 0 and found.shares[-1] == 1 and len(found.images) == len(found.shares) == 3
    ends = torch.cat([model.decode(one), model.decode(other)])
    assert torch.allclose(found.images[[0, -1]], ends, atol=1e-5)
    for level, start, end in zip(found.stored, one, other, strict=True):
        assert torch.allclose(level[[0, -1]], torch.cat([start, end]), atol=1e-5)


def test_an_arc_keeps_to_the_shell_and_its_angle_grows_evenly() -> None:
    first, last = torch.randn(2, 5, 3, 4).split(1)
    shares = torch.linspace(0, 1, 7, dtype=torch.float64)
    last = last * first.norm() / last.norm()
    points = slerp(first[0], last[0], shares).flatten(1)
    assert torch.allclose(points.norm(dim=1), first.norm().expand(7), rtol=1e-5)
    unit = points / points.norm(dim=1, keepdim=True)
    angles = torch.acos((unit[1:] * unit[:-1]).sum(1).clamp(-1, 1))
    assert torch.allclose(angles, angles.mean().expand(6), rtol=1e-3)
    norms = slerp(first[0], 3 * last[0], shares).flatten(1).norm(dim=1)
    assert torch.allclose(norms, first.norm() * (1 + 2 * shares.float()), rtol=1e-5)
    assert torch.allclose(slerp(first[0], -first[0], shares)[3], torch.zeros(5, 3, 4), atol=1e-6)
    assert torch.isfinite(slerp(torch.zeros(2), torch.ones(2), shares)).all()


def test_a_path_changes_one_code_a_step_coarse_levels_first_and_judges_each_grid() -> None:
    prior = tiny_prior("transformer", [(2, 2), (3, 4)], [5, 6])
    one, other = (draw_codes([(2, 2), (3, 4)], [5, 6], 1) for _ in range(2))
    path = likely_path(prior, one, other, label=1, beam=2)
    grids = torch.cat([level.flatten(1) for level in path.codes], 1)
    assert torch.equal(grids[0], torch.cat([level.flatten() for level in one]))
    assert torch.equal(grids[-1], torch.cat([level.flatten() for level in other]))
    steps = grids[1:] != grids[:-1]
    assert bool((steps.sum(1) == 1).all()) and len(steps) == int((grids[0] != grids[-1]).sum())
    places = steps.int().argmax(1)
    assert places.tolist() == sorted(places.tolist(), key=lambda place: place >= 4)
    assert torch.allclose(path.nats, prior.nll(path.codes, [1] * len(grids)), rtol=1e-5)


@pytest.mark.parametrize("beam", [1, 99])
@torch.no_grad()
def test_a_wide_beam_finds_the_path_of_least_nats_and_a_greedy_one_each_best_step(beam: int) -> None:
    torch.manual_seed(13)  # by most others the greedy path is the best
    prior = tiny_prior("transformer", [(2, 2)], [5], 0)
    one, other = torch.zeros(1, 2, 2, dtype=torch.int64), torch.tensor([[[1, 2], [3, 4]]])
    found = likely_path(prior, [one], [other], beam=beam)

    def after(places: tuple[int, ...]) -> float:
        codes = one.clone().flatten()
        codes[list(places)] = other.flatten()[list(places)]
        return float(prior.nll([codes.view(1, 2, 2)]))

    orders = {order: sum(after(order[:n]) for n in range(5)) for order in permutations(range(4))}
    greedy: tuple[int, ...] = ()
    while len(greedy) < 4:
        left = [(*greedy, place) for place in range(4) if place not in greedy]
        greedy = min(left, key=after)
    expected = orders[greedy] if beam == 1 else min(orders.values())
    assert float(found.nats.sum()) == pytest.approx(expected, rel=1e-5)
    assert min(orders.values()) < orders[greedy]  # so that the two differ here


@every_family
def test_variants_keep_coarse_levels_to_the_bit_and_differ_in_the_finest(family: Settings) -> None:
    model, image = tokenizer(family), images(1)
    last = len(model.levels) - 1
    prior = prior_of(model) or normal_prior([4, 4], model.grids)
    found = vary(model, prior, image, count=6, keep=last, seed=2)
    for level, kept in zip(found.stored[:last], model.encode(image), strict=False):
        assert torch.equal(level, kept.expand_as(level))
    assert len(found.stored[last].unique(dim=0)) > 1 and found.images.shape == (6, 1, 16, 16)
    again = vary(model, prior, image, count=3, keep=last, seed=2)
    assert torch.equal(again.stored[last], found.stored[last][:3])
    with pytest.raises(ValueError, match="can be kept and the finer ones drawn, got 0"):
        vary(model, prior, image, keep=0)


def test_one_level_that_draws_nothing_has_no_variants() -> None:
    model = HierarchicalVQVAE(TokenizerConfig(strides=[4], width=8, codebook_size=8, code_dim=4), 8, 1).eval()
    with pytest.raises(ValueError, match="a tokenizer of one level that draws nothing has no variants"):
        vary(model, None, torch.zeros(1, 1, 8, 8))


def test_variants_of_a_gaussian_are_draws_around_its_mean() -> None:
    model, image = tokenizer(GaussianConfig()), images(1)
    found = vary(model, None, image, count=4000)
    drawn, mean = found.stored[0].double(), model.encode(image)[0][0]
    assert bool(((drawn.mean(0) - mean).abs() < 5 * drawn.std(0) / 4000**0.5).all()) and drawn.std(0).min() > 0


@torch.no_grad()
def exact(prior: HierarchicalPrior, known: list[Known | None], label: int | None) -> tuple[dict[tuple, float], float]:
    """The conditional of a prior by enumeration of all grids, and -log p of what is known."""
    levels = [(h * w, (h, w), size) for (h, w), size, _ in prior.levels[-1].config.levels]
    every = [range(size or 0) for length, _, size in levels for _ in range(length)]
    rows = torch.tensor(list(product(*every))).split([length for length, _, _ in levels], 1)
    codes = [flat.view(-1, *grid) for flat, (_, grid, _) in zip(rows, levels, strict=True)]
    fits = torch.ones(len(codes[0]), dtype=torch.bool)
    for level, one in zip(codes, known, strict=True):
        if one is not None:
            fits &= ((level == one.values) | ~one.mask).flatten(1).all(1)
    codes = [level[fits] for level in codes]
    log_p = -prior.nll(codes, None if label is None else [label] * int(fits.sum()))
    found = torch.cat([level.flatten(1) for level in codes], 1).tolist()
    shares = torch.softmax(log_p, 0).tolist()
    return {tuple(row): share for row, share in zip(found, shares, strict=True)}, -float(log_p.logsumexp(0))


def apart(codes: list[Tensor], shares: dict[tuple, float]) -> float:
    """Total variation between draws and a distribution."""
    rows = Counter(tuple(row) for row in torch.cat([level.flatten(1) for level in codes], 1).tolist())
    assert set(rows) <= set(shares)
    return sum(abs(rows[row] / rows.total() - share) for row, share in shares.items()) / 2


def everywhere(known: list[Known | None], count: int) -> list[Known | None]:
    return [one and Known(*(part.expand(count, -1, -1) for part in one)) for one in known]


def cells(values: list[list[int]], mask: list[list[int]]) -> Known:
    return Known(torch.tensor([values]), torch.tensor([mask]).bool())


@pytest.mark.parametrize("network", ["transformer", "pixelsnail"])
@pytest.mark.parametrize(
    "known",
    [
        [None, cells([[1, 2], [0, 1]], [[1, 1], [1, 1]])],  # a fine level, and nothing of the coarse one
        [None, cells([[0, 0], [0, 2]], [[0, 1], [1, 1]])],
        [cells([[0, 1]], [[0, 1]]), cells([[0, 1], [2, 0]], [[0, 1], [1, 1]])],
        [None, cells([[1, 2], [0, 0]], [[1, 1], [1, 0]])],  # by then particles have been drawn anew
    ],
)
def test_particles_come_as_often_as_the_exact_conditional_has_them(network: str, known: list[Known | None]) -> None:
    prior = tiny_prior(network, GRIDS, SIZES)
    shares, nats = exact(prior, known, label=2)
    found = complete(prior, known, label=2, count=8000, particles=8000)
    assert apart(found.stored, shares) < 0.03 and found.distinct <= len(shares)
    assert found.known_nats == pytest.approx(nats, abs=0.02) and 1000 < found.ess < 8000
    raster = prior.complete(everywhere(known, 4000), [2] * 4000)
    assert apart(raster.codes, shares) > 0.1  # what particles mend


def test_what_is_drawn_after_particles_were_drawn_anew_follows_what_each_has_before_it() -> None:
    prior = tiny_prior("transformer", [(2, 4)], [2], 0)
    known: list[Known | None] = [cells([[0, 0, 0, 0], [0, 0, 0, 0]], [[0, 0, 1, 1], [1, 1, 0, 0]])]
    shares, nats = exact(prior, known, None)
    found = complete(prior, known, count=10000, particles=10000)
    assert found.ess < 2500  # so that they were
    assert apart(found.stored, shares) < 0.04 and found.known_nats == pytest.approx(nats, abs=0.05)


def test_a_prefix_is_completed_exactly_and_every_particle_counts() -> None:
    prior = tiny_prior("transformer", GRIDS, SIZES)
    codes = draw_codes(GRIDS, SIZES, 1)
    known: list[Known | None] = [prefix(codes[0].flatten(1), (1, 2)), prefix(codes[1].flatten(1)[:, :1], (2, 2))]
    found = complete(prior, known, label=1, count=32, particles=32, seed=5)
    assert found.ess == pytest.approx(32) and found.known_nats == pytest.approx(exact(prior, known, 1)[1], rel=1e-5)
    drawn = prior.complete(everywhere(known, 32), [1] * 32, seed=5)
    assert all(torch.equal(one, other) for one, other in zip(found.stored, drawn.codes, strict=True))


def test_numbers_that_do_not_depend_on_one_another_are_completed_exactly() -> None:
    prior = normal_prior()
    values = [torch.randn(1, channels, *grid) for _, channels, grid in _shapes(prior)]
    known: list[Known | None] = [Known(values[0], torch.ones(1, *values[0].shape[2:]).bool())]
    found = complete(prior, known, count=3, particles=5)
    assert found.ess == 5 and torch.equal(found.stored[0], values[0].expand_as(found.stored[0]))
    assert len(found.stored[1].unique(dim=0)) == 3
    with pytest.raises(ValueError, match="count must be from 1 to 5, the number of particles, got 6"):
        complete(prior, known, count=6, particles=5)


def _shapes(prior: HierarchicalPrior) -> list[tuple[int | None, int, tuple[int, int]]]:
    return [(size, channels, grid) for grid, size, channels in prior.levels[-1].config.levels]


@every_family
def test_an_edit_of_strength_0_is_the_reconstruction_and_1_moves_mean_to_mean(family: Settings) -> None:
    model, image = tokenizer(family), images(1)
    source, target = images(70), images(5)
    towards = direction(model, source, target)
    still, moved, back = edit(model, image, towards, [0, 1, -1])
    assert torch.allclose(still, model.decode(model.encode(image))[0], atol=1e-3)
    assert not torch.allclose(moved, still, atol=1e-4) and not torch.allclose(back, moved, atol=1e-4)
    means = [
        torch.stack([model.seen(model.encode(one[None]))[0][0] for one in some]).mean(0) for some in (source, target)
    ]
    assert torch.allclose(towards[0], means[1] - means[0], atol=1e-5)


@every_family
def test_the_bound_of_an_image_is_the_sum_of_its_maps(family: Settings) -> None:
    model = tokenizer(family)
    prior, pixels = prior_of(model), torch.randint(256, (3, 1, 16, 16), dtype=torch.uint8)
    found = score(model, prior, pixels, SCALES)
    assert torch.allclose(found.pixel_nats.double().sum((1, 2)), found.distortion, rtol=1e-5)
    alone = score(model, prior, pixels[1:2], SCALES, places=range(1, 2))
    assert torch.allclose(alone.distortion, found.distortion[1:2], rtol=1e-5)
    if prior is None and not family.rate:
        assert found.rate is None and found.bound is None
        return
    assert found.rate is not None and found.bound is not None
    assert torch.equal(found.bound, found.rate + found.distortion)
    if prior is None:
        return
    assert torch.allclose(sum(level.flatten(1).sum(1) for level in found.code_nats), found.rate)  # type: ignore[arg-type]
    codes = model.encode(pixels.float() / 127.5 - 1)
    assert torch.allclose(found.rate, prior.nll(codes), rtol=1e-5)
    assert torch.allclose(found.images, model.decode(codes), atol=1e-5)


def test_the_rate_of_numbers_under_the_normal_prior_is_their_divergence() -> None:
    model, pixels = tokenizer(GaussianConfig()), torch.randint(256, (2, 1, 16, 16), dtype=torch.uint8)
    noise = stored_noise(model, [5, 9])
    output = model(pixels.float() / 127.5 - 1, noise)
    kl = torch.stack([level.losses["kl"].double() for level in output.levels]).sum(0)
    for prior in (None, normal_prior([4, 4], model.grids)):
        found = score(model, prior, pixels, SCALES, places=[5, 9])
        assert found.rate is not None and torch.equal(found.rate, kl)


def test_the_rate_of_numbers_under_another_prior_is_their_divergence_in_the_mean_over_draws() -> None:
    model, pixels = tokenizer(GaussianConfig()), torch.randint(256, (1, 1, 16, 16), dtype=torch.uint8)
    pixels = pixels.expand(2000, -1, -1, -1)
    same = normal_prior([4, 4], model.grids, MixtureConfig(components=2))  # as it begins: both are N(0, I)
    drawn, exact = score(model, same, pixels, SCALES).rate, score(model, None, pixels, SCALES).rate
    assert drawn is not None and exact is not None
    apart = drawn - exact
    assert apart.std() > 0 and abs(float(apart.mean())) < 5 * float(apart.std()) / 2000**0.5


def test_without_a_prior_codes_have_no_rate() -> None:
    found = score(tokenizer(EMAConfig()), None, torch.zeros(1, 1, 16, 16, dtype=torch.uint8), SCALES)
    assert found.rate is None and found.code_nats == []


@pytest.mark.parametrize("values", [3, 1000])
def test_the_area_under_the_curve_is_that_of_scikit_learn_ties_and_all(values: int) -> None:
    scores, anomalous = torch.randint(values, (200,)).double() / 7, torch.rand(200) < 0.2
    assert area_under_roc(scores, anomalous) == pytest.approx(roc_auc_score(anomalous, scores))
    assert area_under_roc(anomalous.double(), anomalous) == 1 and area_under_roc(torch.ones(200), anomalous) == 0.5
    with pytest.raises(ValueError, match="images must be anomalous and not, got 0 and 200"):
        area_under_roc(scores, torch.zeros(200, dtype=torch.bool))


def table_of(folder: Path, what: str) -> list[dict[str, str]]:
    with (folder / f"{what}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def explore(tiny_run: Path, tmp_path: Path, smalti: Smalti) -> Callable[..., tuple[int, str, list[dict[str, str]]]]:
    """Explore the tiny run into a folder that holds other things: exit code, what was said, the table."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")

    def run(what: str, *arguments: str) -> tuple[int, str, list[dict[str, str]]]:
        code, said = smalti("explore", what, tiny_run, *arguments, "--out", tmp_path / "out")
        assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
        if code:
            return code, said, []
        with Image.open(tmp_path / "out" / f"{what}.png") as picture:
            assert picture.width > 64 and picture.height > 48
        return code, said, table_of(tmp_path / "out", what)

    return run


def test_interpolate_writes_each_step(explore: Callable) -> None:
    code, said, table = explore("interpolate", "--keys", "0", "5", "--steps", "4", "--beam", "1")
    assert code == 0 and len(table) == 4 and "on a path that costs at most" in said
    assert [row["share"] for row in table][:: len(table) - 1] == ["0.0", "1.0"]
    code, said, drawn = explore("interpolate", "--classes", "3", "8", "--beam", "1", "--seed", "5")
    assert code == 0 and {row["from"] + row["to"] for row in drawn} == {"38"}
    assert explore("interpolate", "--keys", "0")[:2] == (
        2,
        "smalti: error: interpolate takes two images by --keys or two classes by --classes, not both\n",
    )


def test_vary_keeps_the_coarse_level_and_says_how_much_has_changed(explore: Callable) -> None:
    code, said, table = explore("vary", "--classes", "2", "7", "--count", "3")
    assert code == 0 and "3 variants of each of 2 images, finer levels drawn again" in said
    assert [row["class"] for row in table] == ["2"] * 3 + ["7"] * 3
    assert all(0 < float(row["changed"]) <= 16 / 20 for row in table)
    code, said, _ = explore("vary", "--keep", "2")
    assert code == 1 and "of 2 levels 1 to 1 can be kept and the finer ones drawn, got 2" in said


def test_complete_says_what_its_particles_are_worth_and_what_a_raster_prior_does_not_look_at(explore: Callable) -> None:
    code, said, table = explore("complete", "--keys", "1", "--known", "bottom", "--count", "2", "--particles", "16")
    assert code == 0 and "of 16 particles; rows called raster only keep the known cells" in said
    assert [row["how"] for row in table] == ["particles"] * 2 + ["raster"] * 2
    assert 1 <= float(table[0]["ess"]) < 16 and table[3]["ess"] == ""
    code, said, table = explore("complete", "--keys", "1", "--known", "6", "--particles", "16")
    assert code == 0 and "exact, as nothing known comes after anything drawn" in said
    assert {row["how"] for row in table} == {"exact"} and float(table[0]["ess"]) == pytest.approx(16)
    assert explore("complete", "--known", "middle")[0] == explore("complete", "--known", "20")[0] == 2


def test_edit_starts_from_the_reconstruction(explore: Callable) -> None:
    code, said, table = explore("edit", "--from", "1", "--to", "7", "--strengths", "-1", "0", "2")
    assert code == 0 and "4 images from 1 to 7, whose means are" in said
    assert {row["class"] for row in table} == {"1"} and [row["strength"] for row in table[:3]] == ["-1.0", "0.0", "2.0"]
    assert float(table[1]["changed"]) == pytest.approx(0, abs=1e-6) and float(table[2]["changed"]) > 0
    code, said, _ = explore("edit", "--from", "1", "--to", "ten")
    assert code == 1 and "names 'ten', which is none of the 10 classes" in said


def test_score_tells_every_image_and_the_area_under_the_curve(explore: Callable) -> None:
    code, said, table = explore("score", "--anomalous", "3")
    assert code == 0 and len(table) == 179 and "mean bound of -log p(x) " in said
    for row in table:
        assert float(row["bound_nats"]) == pytest.approx(float(row["rate_nats"]) + float(row["distortion_nats"]))
    labels = np.array([row["class"] == "3" for row in table])
    assert [row["anomalous"] for row in table] == [str(int(label)) for label in labels]
    for name in ("mse", "distortion_nats", "rate_nats", "bound_nats"):
        area = roc_auc_score(labels, [float(row[name]) for row in table])
        assert f"{name.removesuffix('_nats')} {area:.3f}" in said


def test_the_bound_that_score_tells_is_the_one_that_evaluate_finds(explore: Callable, tiny_run: Path) -> None:
    figures = json.loads((tiny_run.parent / "run" / "metrics.json").read_text())["bound"]
    _, _, table = explore("score")
    mean = sum(float(row["bound_nats"]) for row in table) / len(table) / 256 / math.log(2)
    assert mean == pytest.approx(figures["bits_per_dim"]["without_class"], rel=1e-4)


def test_only_its_own_two_files_are_replaced(explore: Callable, tmp_path: Path) -> None:
    assert explore("vary", "--keys", "0")[0] == explore("vary", "--keys", "1")[0] == 0
    assert table_of(tmp_path / "out", "vary")[0]["key"] != table_of(tmp_path / "out", "vary")[0]["class"]
    for name in ("vary.csv", "vary.png"):
        before = (tmp_path / "out" / name).read_bytes()
        (tmp_path / "out" / name).write_bytes(b"mine")
        code, said, _ = explore("vary", "--keys", "0")
        assert code == 1 and f"{name} must not be overwritten" in said
        assert (tmp_path / "out" / name).read_bytes() == b"mine"
        (tmp_path / "out" / name).write_bytes(before)


def test_wrong_usage_is_told_in_a_sentence(explore: Callable, smalti: Smalti, tiny_run: Path) -> None:
    assert smalti("explore", "--help")[0] == smalti("explore", "vary", "--help")[0] == 0
    assert "there is no 'dream' to explore; there are interpolate, vary" in smalti("explore", "dream")[1]
    assert smalti("explore", "vary", tiny_run)[0] == 2
    assert "name a config: smalti explore vary CONFIG.yaml" in smalti("explore", "vary", "--out", "x")[1]
    code, said, _ = explore("vary", "--keys", "nobody")
    assert code == 1 and "the val split has no image 'nobody'; name a key, such as 0000" in said
    code, said, _ = explore("vary", "--count", "0")
    assert code == 2 and "--count must be at least 1, got 0" in said
    code, said, _ = explore("interpolate", "--keys", "3", "8", "--classes", "1", "2")
    assert code == 2 and "two images by --keys or two classes by --classes, not both" in said
    code, said, _ = explore("edit", "--from", "3", "--to", "3")
    assert code == 2 and "--from and --to must be two classes, got 3 twice" in said
    code, said, _ = explore("vary", "--prior.widht=3")
    assert code == 2 and "widht" in said
