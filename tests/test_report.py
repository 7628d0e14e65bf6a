"""The page in a browser, the figures that it computes itself, and runs that are only half there."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.cli import page_after_run
from pipelines.compare import COLUMNS
from pipelines.metrics.quality import TokenizerQuality
from pipelines.report import reading
from pipelines.report.codebooks import Codebook, alone, mosaic, patches
from pipelines.report.curves import charts, read_rows
from pipelines.report.figures import MEANINGS
from pipelines.report.likelihoods import Costs, Maps, Split, maps, position_nats
from pipelines.report.pictures import VIRIDIS, heat, picture
from pipelines.report.plane import COLOURS, PLOT, SHAPES, SIDE, even, is_plane, limits, plane
from pipelines.report.reading import Images, most_read, read_codes, read_images
from pipelines.report.sampled import apart
from pipelines.report.side_by_side import overlaid
from pipelines.report.tokenized import ranked
from pipelines.report.warned import of_bottlenecks, of_classes, of_curves, of_levels, of_priors
from pipelines.storage.cache import Cache
from prior import LevelConfig, LevelPrior, NormalConfig, TransformerConfig
from tokenizer import EMAConfig, HierarchicalVQVAE, TokenizerConfig
from tokenizer.bottlenecks import KINDS
from tokenizer.bottlenecks.fsq import FSQConfig
from tokenizer.bottlenecks.gaussian import GaussianConfig

Smalti = Callable[..., tuple[int, str]]
CHROMIUM = "/usr/bin/chromium"
SILENT = ("background-networking", "component-update", "sync")


@pytest.fixture(scope="module")
def visit(tiny_run: Path) -> Iterator[Any]:
    """The tiny run's page, open in a browser, and what it has asked for and complained of."""
    playwright = pytest.importorskip("playwright.sync_api")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"needs Chromium as {CHROMIUM}; run `apt-get install chromium`")
    with playwright.sync_playwright() as started:
        arguments = ["--no-sandbox", "--disable-gpu", "--no-first-run", *(f"--disable-{one}" for one in SILENT)]
        browser = started.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page(viewport={"width": 1440, "height": 900}, color_scheme="light")
        page.asked, page.said = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.goto((tiny_run.parent / "run" / "report.html").as_uri())
        yield page
        browser.close()


def test_the_page_asks_for_nothing_and_every_picture_is_there(visit: Any) -> None:
    assert [url for url in visit.asked if not url.startswith("data:")] == [visit.url]
    assert visit.said == []
    widths = visit.evaluate("[...document.images].map(image => image.complete ? image.naturalWidth : 0)")
    assert len(widths) > 50 and min(widths) > 0
    assert visit.evaluate("[...document.images].every(image => image.alt)")
    assert visit.evaluate(
        "[...document.querySelectorAll('table:not(.u-legend)')].every(one => one.caption && one.tHead)"
    )


def test_curves_tell_the_value_under_the_pointer(visit: Any) -> None:
    chart = visit.locator(".chart", has_text="tokenizer: psnr")
    values = chart.locator(".u-value")
    assert values.all_inner_texts() == ["--", "–"]
    box = chart.locator(".u-over").bounding_box()
    chart.locator(".u-over").hover(position={"x": box["width"] - 2, "y": box["height"] / 2})
    step, psnr = values.all_inner_texts()
    rows = read_rows(Path(visit.url.removeprefix("file://")).parent / "tokenizer")
    assert int(step) == rows[-1]["step"] + 1 and float(psnr) == pytest.approx(rows[-1]["val_psnr"], rel=1e-4)


@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_makes_the_page_scroll_sideways(visit: Any, width: int) -> None:
    visit.set_viewport_size({"width": width, "height": 900})
    fit = "[...document.querySelectorAll('.uplot')].every(one => one.getBoundingClientRect().right <= innerWidth)"
    visit.wait_for_function(fit)  # charts are drawn anew a moment after
    assert visit.evaluate("document.documentElement.scrollWidth") <= width
    wide = visit.evaluate("[...document.images].filter(one => one.getBoundingClientRect().right > innerWidth).length")
    assert wide == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(visit: Any, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    visit.emulate_media(color_scheme=scheme)
    visit.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    found = axe.Axe().run(visit).response["violations"]
    assert [one["id"] for one in found if one["impact"] in ("serious", "critical")] == []


def test_charts_take_the_colours_of_the_scheme(visit: Any) -> None:
    inks = set()
    for scheme in ("light", "dark"):
        visit.emulate_media(color_scheme=scheme)
        visit.wait_for_function("charts.every(one => one.plot.axes[0].stroke() === colour('--soft'))", timeout=5000)
        inks.add(visit.evaluate("charts[0].plot.axes[0].stroke()"))
    assert len(inks) == 2


def test_charts_are_told_in_words(visit: Any) -> None:
    rows = read_rows(Path(visit.url.removeprefix("file://")).parent / "tokenizer")
    label = visit.locator(".chart", has_text="tokenizer: psnr").get_by_role("img").get_attribute("aria-label")
    assert label == f"val: {rows[0]['val_psnr']:.5g} at step 3, {rows[-1]['val_psnr']:.5g} at step 6"


def page_of(run: Path) -> str:
    return (run / "report.html").read_text()


def test_the_page_says_what_was_read_and_what_came_of_it(tiny_run: Path) -> None:
    run = tiny_run.parent / "run"
    text = " ".join(re.sub(r"<[^>]+>", " ", page_of(run)).split())
    figures = json.loads((run / "metrics.json").read_text())
    assert "2x2 of 16 codes + 4x4 of 32 codes" in text
    assert f"{figures['tokenizer']['psnr']:.4g}" in text
    for words in ("1,618 train, 179 val", "at most 200 images", "smalti run", "Made with python", "cores of"):
        assert words in text
    assert "evaluate done figures of bound, codes, copies" in text
    assert (run / "report.html").stat().st_size < 1e6


def test_no_more_images_are_read_than_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_IMAGES", 2000)
    assert sum(most_read(32 * 32 * 3).values()) == 2000
    assert sum(most_read(1024 * 1024 * 3).values()) == 42


def test_images_and_codes_that_are_read_belong_together(tiny_run: Path, cache: Cache) -> None:
    run = tiny_run.parent / "run"
    images, codes = (
        read(run / name, "val", 3, cache) for name, read in (("images", read_images), ("codes", read_codes))
    )
    assert images and codes and images.total == codes.total == 179
    assert len(images.keys) == len(set(images.keys)) == 40
    assert images.classes.tolist() == codes.classes.tolist()
    tokenizer = HierarchicalVQVAE.from_pretrained(run / "tokenizer")
    again = tokenizer.encode(torch.from_numpy(images.pixels).float() / 127.5 - 1)
    assert all((a == b).float().mean() > 0.99 for a, b in zip(again, codes.levels, strict=True))
    assert read_images(run / "images", "val", 4, cache).keys != images.keys  # type: ignore[union-attr]


def test_the_patch_of_a_code_is_the_mean_of_the_cells_under_it() -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (5, 3, 8, 8), dtype=np.uint8)
    codes = torch.from_numpy(generator.integers(0, 6, (5, 2, 2)))
    codes[codes == 4] = 5
    found = patches(codes, 6, pixels)
    for code in range(6):
        cells = [
            pixels[n, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
            for n in range(5)
            for y in range(2)
            for x in range(2)
            if codes[n, y, x] == code
        ]
        assert found.counts[code] == len(cells)
        mean = np.mean(cells, 0) if cells else np.zeros((3, 4, 4))
        np.testing.assert_allclose(found.means[code].numpy(), mean, atol=1e-3)


def test_an_image_is_the_mosaic_of_codes_that_stand_for_one_cell_each() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 6, 6), dtype=np.uint8)
    codes = torch.randperm(9).view(1, 3, 3)
    assert (mosaic(codes[0], patches(codes, 9, pixels).means) == pixels[0]).all()


def test_a_code_alone_is_decoded_with_all_other_levels_blank() -> None:
    config = TokenizerConfig(strides=[8, 4], codebook_size=[16, 32], code_dim=8, width=16, residual_width=8)
    tokenizer = HierarchicalVQVAE(config, 16, 1).eval()
    top, fine = tokenizer.bottlenecks
    with torch.no_grad():
        for vectors in (top.vectors, fine.vectors):
            vectors.copy_(30 * torch.randn_like(vectors))
        seen = tokenizer.upsamplers[0](top.blank()[None, :, None, None].expand(1, -1, 2, 2))
        code = fine.lookup([torch.full((1, 4, 4), 7)])
        image = tokenizer.decoder(torch.cat([seen, code], 1)).clamp(-1, 1)
    (cell,) = alone(tokenizer, 1, torch.tensor([7]))
    expected = ((image[0, :, 8:12, 8:12] + 1) * 127.5).round().numpy()
    assert expected.std() > 10
    np.testing.assert_allclose(cell, expected, atol=1)


def test_nats_by_position_sum_to_the_likelihood(tiny_run: Path) -> None:
    codes = [torch.randint(0, 16, (3, 2, 2)), torch.randint(0, 32, (3, 4, 4))]
    classes = torch.tensor([1, 2, 3])
    for number in range(2):  # a Transformer and a PixelSNAIL
        level = LevelPrior.from_pretrained(tiny_run.parent / "run" / "prior" / f"level{number}").eval()
        with torch.no_grad():
            nats = position_nats(level, codes[number], codes[:number], classes)
            assert nats.shape == codes[number].shape
            torch.testing.assert_close(nats.double().sum((1, 2)), level.nll(codes[number], codes[:number], classes))
    config = LevelConfig(
        level=0, grids=[(2, 3)], codebook_sizes=[None], class_names=[], size=NormalConfig(), channels=[5]
    )
    normal, values = LevelPrior(config), torch.randn(4, 5, 2, 3)
    nats = position_nats(normal, values, [], None)
    torch.testing.assert_close(nats.double().sum((1, 2)), normal.nll(values, [], None), rtol=1e-5, atol=1e-5)


def test_best_median_and_worst_are_found() -> None:
    errors = np.array([5.0, 1.0, 4.0, 2.0, 3.0, 0.0, 6.0])
    assert ranked(errors, 2) == {"best": [5, 1], "median": [3, 4], "worst": [6, 0]}
    assert ranked(errors[:2], 6) == {"best": [1], "median": [1], "worst": [0]}


def test_the_nearest_training_image_is_found_and_a_copy_is_no_distance_away() -> None:
    generator = np.random.default_rng(0)
    train, images = (generator.integers(0, 256, (n, 3, 4, 4), dtype=np.uint8) for n in (20, 5))
    images[2] = train[11]
    distances, places = apart(images, train)
    each = [[np.sqrt(np.square(a.astype(float) - b).mean()) for b in train] for a in images]
    assert places.tolist() == np.argmin(each, 1).tolist() and places[2] == 11 and distances[2] == 0
    np.testing.assert_allclose(distances, np.min(each, 1), rtol=1e-5)


def flat(kind: str, **changes: Any) -> HierarchicalVQVAE:
    config = {"strides": [16], "code_dim": 2, "width": 8, "residual_width": 4} | changes
    return HierarchicalVQVAE(TokenizerConfig(**config), 16, 1, KINDS[kind]()).eval()


def test_the_plane_is_that_of_runs_whose_images_are_two_numbers() -> None:
    assert is_plane(flat("gaussian")) and is_plane(flat("identity"))
    assert not any(map(is_plane, (flat("ema"), flat("gaussian", code_dim=3), flat("gaussian", strides=[16, 8]))))


@pytest.mark.parametrize("kind", ["gaussian", "identity"])
def test_images_lie_on_the_plane_where_their_numbers_are(kind: str) -> None:
    numbers = torch.tensor([[0.0, 0.0], [1.0, -2.0], [-4.0, 4.0]]).repeat(100, 1)
    numbers[0] = 500.0  # far away, which must not squeeze the others
    images = Images(["a"] * 300, np.zeros((300, 1, 16, 16), np.uint8), np.array([0, 1, 1] * 100), 300)
    found = plane(flat(kind), images, numbers[:, :, None, None], ["zero", "one"])
    assert [group.name for group in found.groups] == ["zero", "one"] and found.normal == (kind == "gaussian")
    paths = [mark for group in found.groups for mark in group.path.split("M")[1:]]
    marks = np.array([[float(number) for number in mark.split("m")[0].split(",")] for mark in paths])
    marks[:, 1] = PLOT - marks[:, 1]  # upwards is less on a screen
    places = np.array(found.low) + marks / PLOT * (np.array(found.high) - np.array(found.low))
    shown = np.concatenate([numbers[3::3], numbers[1::3], numbers[2::3]])
    np.testing.assert_allclose(np.unique(places.round(1), axis=0), np.unique(shown, axis=0), atol=0.05)
    assert (found.images, found.outside, len(places)) == (300, 1, 299)
    assert all(low <= -2 and 1 <= high < 10 for low, high in zip(found.low, found.high, strict=True))


def test_each_axis_of_the_plane_reaches_as_far_as_its_own_points_and_over_the_prior() -> None:
    points = torch.randn(2000, 2, dtype=torch.float64) * torch.tensor([0.01, 50.0]) + torch.tensor([3.0, 0.0])
    low, high = limits(points, normal=False)
    assert 2.9 < low[0] < high[0] < 3.1 and low[1] < -100 and high[1] > 100
    low, high = limits(points, normal=True)
    assert -3 < low[0] < -2.3 and 3 < high[0] < 4


def test_the_points_that_are_decoded_lie_where_the_plot_has_them() -> None:
    points = even()
    assert torch.allclose(points[0, 0], torch.tensor([0.5, SIDE - 0.5]).double() / SIDE)
    assert torch.allclose(points[-1, -1], torch.tensor([SIDE - 0.5, 0.5]).double() / SIDE)


def test_no_two_classes_look_alike_on_the_plane() -> None:
    marks = [(COLOURS[n % len(COLOURS)], SHAPES[n % len(SHAPES)]) for n in range(20)]
    assert len(set(marks)) == 20
    assert all(one[0] != other[0] and one[1] != other[1] for one, other in pairwise(marks))


def test_heat_goes_from_dark_to_bright() -> None:
    colours = heat(np.array([[0.0, 1.0, 2.0, 9.0]]), 0, 2)
    assert colours[:, 0, 0].tolist() == VIRIDIS[0].tolist()
    assert colours[:, 0, 1].tolist() == VIRIDIS[4].tolist()
    assert colours[:, 0, 2].tolist() == colours[:, 0, 3].tolist() == VIRIDIS[-1].tolist()


@pytest.mark.parametrize(("side", "kind", "shown"), [(16, "png", 64), (96, "png", 96), (1024, "webp", 160)])
def test_small_pictures_keep_each_pixel_and_large_ones_stay_small(side: int, kind: str, shown: int) -> None:
    found = picture(np.zeros((3, side, side), np.uint8), "nothing")
    assert found.uri.startswith(f"data:image/{kind};base64,") and found.width == found.height == shown
    assert found.pixelated == (kind == "png")


def test_curves_leave_out_a_line_that_is_half_written_and_what_is_no_number(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train_loss,val_level1_usage\n9,1.5,\n19,nan,0.5\n29,1.")
    found = charts(read_rows(tmp_path), "tokenizer", "tokenizer")
    assert [(chart.figure, chart.steps) for chart in found] == [("loss", [10, 20]), ("usage", [10, 20])]
    assert [chart.lines[0][1:] for chart in found] == [(None, False, [1.5, None]), (1, True, [None, 0.5])]
    assert read_rows(tmp_path / "nowhere") == []


def book(size: int, used: int, places: int) -> Codebook:
    return Codebook(0, size, places, used, 1.0, 4, {}, [], True)


def test_collapsed_levels_and_dead_codes_are_told_apart() -> None:
    (collapsed,) = of_bottlenecks(EMAConfig(), {"tokenizer.level0_usage": 0.5}, [book(512, 12, 9000)])
    assert collapsed.startswith("Level 0 uses 2.3% of its codes: it has collapsed")
    (dead,) = of_bottlenecks(FSQConfig(), {}, [book(512, 442, 30000)])
    assert "70 of its 512 codes occur nowhere in 30,000 places" in dead and "revival" not in dead
    few, nearly_all = book(512, 442, 3000), book(512, 510, 30000)
    assert not [*of_bottlenecks(EMAConfig(), {}, [few, nearly_all])]


def test_units_that_say_nothing_are_warned_of_by_their_bottleneck() -> None:
    figures = {"tokenizer.psnr": 20.0, "tokenizer.level0_active": 0.5, "tokenizer.level1_active": 0.02}
    (collapsed,) = of_bottlenecks(GaussianConfig(), figures, [])
    assert collapsed.startswith("Level 1 tells images apart by 2.0% of its units: the posterior has collapsed")


def test_a_level_that_the_decoder_hardly_looks_at_is_named() -> None:
    (one,) = of_levels({0: 0.1, 1: 3.0}, [36.0, 36.0, 72.0])
    assert "looks at level 0: without it reconstructions lose 0.1 dB, though it takes 25% of the bits" in one
    (other,) = of_levels({0: 0.1}, [None, None])
    assert "lose 0.1 dB. A coarser stride for it, or fewer channels for finer levels" in other


def test_a_density_is_told_in_nats_and_codes_in_bits() -> None:
    nats = Costs(torch.full((1, 2, 2), 3.0), [0])
    sizes = {"level": 0, "grids": [(2, 2)], "class_names": []}
    small = TransformerConfig(width=8, depth=1, heads=1)
    codes = LevelPrior(LevelConfig(**sizes, codebook_sizes=[16], size=small))
    numbers = LevelPrior(LevelConfig(**sizes, codebook_sizes=[None], size=NormalConfig(), channels=[5]))
    assert [maps(level, nats, None, None).images[0][2] for level in (codes, numbers)] == ["17 bits", "12 nats"]


@pytest.mark.parametrize(("train", "warned"), [(2.0, True), (2.6, False)])
def test_a_prior_that_has_learned_by_heart_is_named(train: float, warned: bool) -> None:
    nothing = picture(np.zeros((1, 2, 2), np.uint8), "nothing")
    maps = Maps(1, Split(2.7, nothing, 9), Split(train, nothing, 9), 0, 1, [], 1, "nats per code")
    assert bool([*of_priors([maps])]) == warned


def test_classes_without_images_are_named_where_there_are_enough_to_tell() -> None:
    (one,) = of_classes("training images read", np.array([0, 2] * 50), ["ant", "bee", "cow"])
    assert one == "None of 100 training images read is of class bee."
    assert not [*of_classes("training images read", np.array([0, 2]), ["ant", "bee", "cow"])]


def test_validation_that_turned_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,val_nats_per_code\n9,3\n19,2\n29,2.5\n")
    (one,) = of_curves(charts(read_rows(tmp_path), "prior, level 1", "level1"))
    assert one.startswith("prior, level 1: validation was best at step 20, 2, and is 2.5 at 30.")


def test_curves_of_several_runs_are_laid_over_one_another(tmp_path: Path) -> None:
    found = []
    for name, text in (("a", "step,val_loss\n9,3\n19,2\n"), ("b", "step,val_loss,val_psnr\n19,4,20\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(text)
        found.append(charts(read_rows(tmp_path / name), "tokenizer", "tokenizer"))
    (chart,) = overlaid(found, ["a", "b"])
    assert (chart.figure, chart.steps) == ("loss", [10, 20])
    assert [(line.name, line.values) for line in chart.lines] == [("a", [3, 2]), ("b", [None, 4])]


def test_a_run_is_shown_while_it_trains(copy_of: Callable[..., Path], smalti: Smalti) -> None:
    config = copy_of()
    run = config.parent / "run"
    for part in ("tokenizer", "prior/level1"):
        (run / part / "model.safetensors").unlink()
    shutil.rmtree(run / "samples")
    with (run / "prior" / "level1" / "metrics.csv").open("a") as file:
        file.write("99,1")
    code, said = smalti("report", config)
    assert code == 0 and said == f"look at {run / 'report.html'}\n"
    text = page_of(run)
    assert "as of the best validation so far: the tokenizer, the prior of level 1" in text
    assert (
        "Level by level" in text and "by position" in text and ">begun<" in text and '<h3 id="run0-samples' not in text
    )


def test_a_run_of_images_alone_and_one_without_images_are_shown(
    tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti
) -> None:
    run = tiny_run.parent / "run"
    images = write_config(tmp_path / "images", {"images": {"from": str(run / "images")}})
    assert smalti("report", images)[0] == 0
    assert "1,618 train" in page_of(tmp_path / "images" / "run")
    parts = {name: {"from": str(run / name)} for name in ("tokenizer", "codes")}
    shutil.copytree(run / "prior", tmp_path / "codes" / "run" / "prior")
    codes = write_config(tmp_path / "codes", parts)
    assert smalti("report", codes)[0] == 0
    text = page_of(tmp_path / "codes" / "run")
    assert "by position" in text and "Reconstructions" not in text and ">elsewhere<" in text


def test_several_runs_stand_side_by_side(tiny_run: Path, copy_of: Callable[..., Path], smalti: Smalti) -> None:
    other = copy_of({"seed": 1})
    path = other.parent / "run" / "metrics.json"
    figures = json.loads(path.read_text())
    figures["samples"]["made"]["splits"]["samples"]["settings"]["temperature"] = 0.9
    path.write_text(json.dumps(figures))
    code, _ = smalti("report", other, tiny_run)
    text = page_of(other.parent / "run")
    board = re.search(r"<caption>Scoreboard</caption>.*?</table>", text, re.DOTALL)
    assert code == 0 and board
    rows = [re.sub(r"(<[^>]+>)+", " ", row).split() for row in board[0].split("</tr>")]
    kid = f"{1000 * figures['samples']['kid']:.3f}"
    assert ["seeds", "0", "0"] in rows and ["sample.temperature", "0.9", "1.0"] in rows and ["KID", kid, kid] in rows
    assert "KID: x 1000, of samples beside real images: less is better; in features of pixels" in text
    assert text.count("as run (1) gives it back") == text.count("as run (2) gives it back") == 8


def test_nothing_to_report_is_an_error(tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti) -> None:
    code, said = smalti("report", write_config(tmp_path))
    assert code == 1 and "must hold something to report, and does not; run `smalti pack` first" in said
    assert not (tmp_path / "run").exists()


def test_what_is_damaged_is_named_beside_what_is_not(copy_of: Callable[..., Path], smalti: Smalti) -> None:
    config = copy_of()
    run = config.parent / "run"
    (run / "samples" / "000000.tar").write_bytes(b"0" * 1024)
    code, said = smalti("report", config)
    assert code == 1 and "lacks a part: run: samples:" in said and "000000.tar is not the file" in said
    text = page_of(run)
    assert "The part “samples” could not be made" in text and "Level by level" in text


@pytest.mark.parametrize(("name", "data"), [("metrics.json", b"[1]"), ("tokenizer/metrics.csv", b"a,b\n1,\r2\n\r")])
def test_a_table_of_figures_that_cannot_be_read_is_named(
    name: str, data: bytes, copy_of: Callable[..., Path], smalti: Smalti
) -> None:
    config = copy_of()
    (config.parent / "run" / name).write_bytes(data)
    code, said = smalti("report", config)
    assert code == 1 and f"{name} cannot be read" in said


def test_a_report_that_fails_takes_nothing_from_the_run(
    tmp_path: Path, write_config: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    page_after_run([str(write_config(tmp_path))])
    assert "the run is complete, but its report is not" in caplog.text and "`smalti report` says more" in caplog.text


def test_stages_say_where_the_page_is(copy_of: Callable[..., Path], smalti: Smalti) -> None:
    config = copy_of()
    run = config.parent / "run"
    for stage in (["sample", config, "--redo", "sample"], ["evaluate", config]):
        _, said = smalti(*stage)
        assert said.strip().endswith(f"look at {run / 'report.html'}")


def names_in(figures: dict[str, Any]) -> Iterator[str]:
    """Names of figures, without what says whose they are."""
    for name, value in figures.items():
        if not re.fullmatch(r"level\d+|given_class|without_class|made|pixels|features|codes", name):
            yield re.sub(r"^level\d+", "levelN", name)
        if isinstance(value, dict) and name not in ("made", "nearest") and not name.startswith("of_classes"):
            yield from names_in(value)


@pytest.fixture(scope="module")
def documented() -> set[str]:
    """Names that have a row in docs/figures.md, whole and by their parts."""
    text = (Path(__file__).parent.parent / "docs" / "figures.md").read_text()
    cells = [
        found[1] for found in re.finditer(r"^(?:\| |#+ )([^|\n]+)", text, re.MULTILINE)
    ]  # first ones, and headings
    quoted = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    known = quoted | {part for name in quoted for part in name.split(".")}
    return known | {f"{name}{one[1:]}" for name in known for one in quoted if one[0] == "…"}


def bare(name: str) -> str:
    """A figure's name without the split and the number of the level."""
    return re.sub(r"^(train_|val_)?(level\d+)?", lambda found: "levelN" * bool(found[2]), name)


def test_every_figure_stands_in_the_docs(tiny_run: Path, documented: set[str]) -> None:
    run = tiny_run.parent / "run"
    written = set(names_in(json.loads((run / "metrics.json").read_text())))
    for folder in ("tokenizer", "prior/level0", "prior/level1"):
        written |= set(names_in(json.loads((run / folder / "metrics.json").read_text())))
        written |= {name for row in read_rows(run / folder) for name in row} - {"step"}
    named = {bare(name) for name in written}
    assert len(named) > 40 and named - documented == set()


@pytest.mark.parametrize("kind", KINDS)
def test_what_bottlenecks_tell_of_themselves_stands_in_the_docs(kind: str, documented: set[str]) -> None:
    family, config = KINDS[kind](), TokenizerConfig(codebook_size=16, code_dim=4, width=8, residual_width=4)
    model, images = HierarchicalVQVAE(config, 16, 1, family).eval(), torch.zeros(2, 1, 16, 16)
    quality = TokenizerQuality(model)
    with torch.no_grad():
        quality.add(images, model(images), torch.ones(2))
    named = {bare(name) for name in quality.figures()} | {f"levelN_{name}" for name in family.weights(4, 256)}
    assert len(named) > 3 and named - documented == set()


def test_what_the_page_and_the_scoreboard_show_stands_in_the_docs(documented: set[str]) -> None:
    keys = [re.sub(r"\(\?:.*", "", key).replace(r"(\d+)", "N").replace("\\", "") for key in MEANINGS]
    named = [key.replace(".given_class", "").replace(".without_class", "").split(".") for key in keys]
    shown = {parts[-1] for parts in named} | {column.figure for column in COLUMNS}
    assert {re.sub(r"_\d+$", "_N", name) for name in shown} - documented == set()  # N: bounds of so many draws
