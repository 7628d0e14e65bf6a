"""Each family of bottlenecks goes from images to samples by one setting, and every promise of a run holds for it."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.config import load_config
from pipelines.data.batches import epoch_permutation
from pipelines.errors import ConfigError
from pipelines.metrics import METRICS, latents
from pipelines.metrics.information import information
from pipelines.metrics.latents import Pairs
from pipelines.metrics.subject import Seen
from pipelines.metrics.surgery import Surgery
from pipelines.report.curves import charts, read_rows
from pipelines.run import Run
from pipelines.stages.evaluate import evaluate
from pipelines.storage.shards import index_shard, read_member
from pipelines.training.sections import stored_sizes
from prior import HierarchicalPrior, LevelPrior
from prior.mixture import Mixture
from tokenizer.posterior import log_posterior

Smalti = Callable[..., tuple[int, str]]
# Of families of numbers that have another prior than N(0, I) here.
PRIORS = {"sparse": "mixture", "identity": "flow"}
FEW = {"training": {"steps": 2, "val_every": 2, "checkpoint_every": 1, "weight_ema": 0.9, "log_every": 1}}


@pytest.fixture(
    scope="module", params=["gradient", "residual", "gumbel", "fsq", "gaussian", "sparse", "contractive", "identity"]
)
def finished(
    request: pytest.FixtureRequest, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory, write_config: Callable
) -> Path:
    from pipelines.cli import main

    images = {"from": str(tiny_run.parent / "run" / "images")}
    changes = {"images": images, "tokenizer": FEW, "prior": {"network": PRIORS.get(request.param, "auto"), **FEW}}
    config = write_config(tmp_path_factory.mktemp(request.param), changes)
    assert main(["run", str(config), f"--tokenizer.bottleneck={request.param}", "--traceback"]) == 0
    return config


def kind_of(config: Path) -> str:
    kind = json.loads((config.parent / "run/tokenizer/config.json").read_text())["bottleneck"]["kind"]
    return f"--tokenizer.bottleneck={kind}"


def test_one_setting_leads_from_images_to_samples_and_nothing_is_done_twice(finished: Path, smalti: Smalti) -> None:
    run = finished.parent / "run"
    assert (run / "samples" / "grid.png").stat().st_size > 100
    names = json.loads((run / "samples" / "manifest.json").read_text())["class_names"]
    levels = json.loads((run / "codes" / "manifest.json").read_text())["levels"]
    assert bool(names) != kind_of(finished).endswith(("gaussian", "contractive"))  # N(0, I) knows no classes
    assert len(levels) == (4 if "residual" in kind_of(finished) else 2)
    code, said = smalti("run", finished, kind_of(finished))
    assert code == 0 and said.count("skipped") == 4 + len(levels)
    assert "report: look at" in said and "could not be made" not in (run / "report.html").read_text()
    code, said = smalti("verify", finished, kind_of(finished))
    assert code == 0 and said.count("holds what it says") == 5
    code, said = smalti("run", finished, "--prior.network=auto")
    assert code == 1 and "made with other settings (tokenizer.bottleneck" in said


def test_a_prior_of_numbers_has_its_figures_in_the_files_that_the_report_reads(finished: Path) -> None:
    config = load_config(finished, [kind_of(finished)])
    for level, size in enumerate(stored_sizes(config.tokenizer)):
        folder = finished.parent / "run" / "prior" / f"level{level}"
        figures = json.loads((folder / "metrics.json").read_text())
        assert ("val_nats_per_value" in figures) == (size is None)
        if PRIORS.get(config.tokenizer.bottleneck):
            found = [row["val_nats_per_value"] for row in read_rows(folder) if "val_nats_per_value" in row]
            assert min(found) == pytest.approx(figures["val_nats_per_value"], rel=1e-4)
            assert "nats_per_value" in {chart.figure for chart in charts(read_rows(folder), "", "")}


def test_the_report_names_the_prior_of_numbers_that_it_is(finished: Path) -> None:
    page = " ".join((finished.parent / "run" / "report.html").read_text().split())
    kind = kind_of(finished).partition("=")[2]
    unlearned = kind in ("gaussian", "contractive")
    assert ("N(0, I), which has learned nothing" in page) == unlearned
    assert ("How unlikely the prior finds the numbers, given the class" in page) == (kind in PRIORS)
    assert ("level 0 mixture of 32 components" in page) == (kind == "sparse") and "mixture 0" not in page
    assert ("nats per value, given the class" in page) == (kind in PRIORS)


def test_validation_draws_where_training_does_and_says_what_it_would_be_without_noise(finished: Path) -> None:
    figures = json.loads((finished.parent / "run" / "tokenizer" / "metrics.json").read_text())
    noisy = kind_of(finished).endswith(("gaussian", "gumbel"))
    assert ("val_mse_without_noise" in figures) == noisy
    if kind_of(finished).endswith("gaussian"):
        assert figures["val_mse_without_noise"] < figures["val_mse"]
        kl = sum(figures[f"val_level{level}_kl"] for level in (0, 1))
        assert figures["val_loss"] == pytest.approx(figures["val_mse"] + 0.02 * kl / 256)


def test_the_parts_of_the_bound_add_up_to_it_and_more_draws_lower_it(finished: Path) -> None:
    figures, kind = json.loads((finished.parent / "run" / "metrics.json").read_text()), kind_of(finished)
    if kind.endswith(("sparse", "contractive", "identity")):  # numbers without a density
        assert not {"bound", "surgery", "importance"} & figures.keys()
        return
    bound, parts = figures["bound"], figures["surgery"]
    drawn = kind.endswith(("gaussian", "gumbel"))
    assert ("importance" in figures) == drawn and parts["paired_images"] == (179 if drawn else 0)
    for given, bits in bound["bits_per_dim"].items():

        def of(name: str, given: str = given) -> float:
            return parts[f"{name}_bits_per_dim"][given]

        assert of("mutual_information_at_least") <= of("log_images") + 1e-9
        if not drawn:
            assert 0 <= of("marginal_kl_at_least") <= of("marginal_kl_at_most")
            for one, other in (("least", "most"), ("most", "least")):
                told = of(f"mutual_information_at_{one}") + of(f"marginal_kl_at_{other}")
                assert parts["distortion_bits_per_dim"] + told == pytest.approx(bits)
            continue
        told = of("mutual_information") + of("marginal_kl")
        assert parts["distortion_bits_per_dim"] + told == pytest.approx(bits)
        assert of("mutual_information") == pytest.approx(of("mutual_information_at_least"))  # all of them are paired
        assert figures["importance"]["bits_per_dim_1"][given] == pytest.approx(bits, abs=0.02)  # other draws
        assert figures["importance"]["made"]["models"] == bound["made"]["models"] != {}
        assert figures["importance"]["bits_per_dim_3"][given] < figures["importance"]["bits_per_dim_1"][given]


def test_what_pairs_tell_is_what_one_pass_over_all_images_does_and_of_fewer_it_brackets_that(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kind_of(finished).endswith(("gaussian", "gumbel")):
        return
    subject, _ = Run(load_config(finished, [kind_of(finished)])).finished.subject()
    seen = Seen(subject, subject.splits["val"], list(range(179)), 0)
    assert subject.tokenizer
    with torch.no_grad():
        pairs = [part.pairs(slice(None)) for part in seen.posterior]
        log_q = log_posterior(subject.tokenizer, pairs, [grid[:, None] for grid in seen.codes])
    whole = information(log_q, torch.zeros(179, dtype=torch.int64), torch.tensor([179]))
    unit = math.log(2) * 256
    found = json.loads((finished.parent / "run" / "metrics.json").read_text())["surgery"]
    mutual = found["mutual_information_bits_per_dim"]["without_class"]
    assert mutual == pytest.approx(float(whole.estimate.mean()) / unit, rel=1e-4)
    monkeypatch.setattr(latents, "PAIRED_NUMBERS", 40**2 * Pairs(subject).numbers)
    skip = [kind.name for kind in METRICS if kind.name != "surgery"]
    few = evaluate(subject, {"tokenizer": True, "prior": True}, skip)["surgery"]
    chosen = epoch_permutation(0, 0, (179,))[:40].copy()
    some = information(log_q[chosen][:, chosen], torch.zeros(40, dtype=torch.int64), torch.tensor([179]))
    assert few["paired_images"] == 40
    for name, nats in (("mutual_information", some.estimate), ("mutual_information_at_least", some.at_least)):
        assert few[f"{name}_bits_per_dim"]["without_class"] == pytest.approx(float(nats.mean()) / unit, rel=1e-4)
    assert "from 40 of them" in "\n".join(Surgery.table(few)) and max(map(len, Surgery.table(few))) <= 80


def test_codes_are_made_again_to_the_same_bytes(finished: Path, smalti: Smalti) -> None:
    codes = finished.parent / "run" / "codes"
    before = {path.name: path.read_bytes() for path in codes.glob("*.tar")}
    assert smalti("encode", finished, kind_of(finished), "--redo", "encode")[0] == 0
    assert {path.name: path.read_bytes() for path in codes.glob("*.tar")} == before


@pytest.mark.parametrize(
    "asked",
    [["vary", "--count", "2"], ["complete", "--known", "right"], ["edit", "--from", "0", "--to", "1"], ["score"]],
)
def test_latents_of_each_family_can_be_explored(
    finished: Path, asked: list[str], tmp_path: Path, smalti: Smalti
) -> None:
    what, *options = asked
    options += [] if what == "score" else ["--keys", "0"]
    code, said = smalti("explore", what, finished, kind_of(finished), *options, "--out", tmp_path)
    if what == "complete" and kind_of(finished).endswith("identity"):  # whose prior is a flow
        assert code == 1 and "numbers are completed under normal and mixture alone, and this is flow" in said
        return
    if what == "vary" and kind_of(finished).endswith("gumbel"):
        assert "q(z | x) drawn again" in said
    assert code == 0 and {path.name for path in tmp_path.iterdir()} == {f"{what}.png", f"{what}.csv"}
    header = (tmp_path / f"{what}.csv").read_text().splitlines()[0]
    if what == "score":
        assert ("bound_nats" in header) != kind_of(finished).endswith(("sparse", "identity", "contractive"))


def test_two_numbers_an_image_are_a_plane_in_the_report_and_can_be_explored(
    tiny_run: Path, tmp_path: Path, write_config: Callable, smalti: Smalti
) -> None:
    model = {"strides": [16], "codebook_size": 16, "code_dim": 2}  # no codebook is there to have that size
    changes = {"images": {"from": str(tiny_run.parent / "run" / "images")}, "prior": {"network": "auto"}}
    config = write_config(tmp_path, changes | {"tokenizer": {**FEW, "bottleneck": "gaussian", "model": model}})
    assert smalti("train-tokenizer", config)[0] == smalti("report", config)[0] == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The plane of two numbers" in page and "Val images on the plane, by class" in page
    assert "The plane of two numbers" not in (tiny_run.parent / "run" / "report.html").read_text()
    for ends in ("--keys", "--classes"):
        assert smalti("explore", "interpolate", config, ends, "0", "1", "--out", tmp_path / "out")[0] == 0
    code, said = smalti("explore", "vary", config, "--keep", "1", "--out", tmp_path / "out")
    assert code == 1 and "holds no finished prior" in said
    code, said = smalti("explore", "score", config, "--anomalous", "9", "--out", tmp_path / "out")
    assert code == 0 and "area under the ROC curve" in said and "rate " in said


def test_numbers_in_shards_are_float32_and_damage_is_named(
    tiny_run: Path, tmp_path: Path, write_config: Callable, smalti: Smalti
) -> None:
    images = {"from": str(tiny_run.parent / "run" / "images")}
    changes = {"images": images, "tokenizer": FEW, "prior": {"network": "auto"}}
    config, kind = write_config(tmp_path, changes), "--tokenizer.bottleneck=gaussian"
    assert smalti("train-tokenizer", config, kind)[0] == smalti("encode", config, kind)[0] == 0
    shard = tmp_path / "run" / "codes" / "val-000000.tar"
    sample = index_shard(shard)[0]
    with shard.open("rb") as file:
        data = read_member(file, sample.members["level0.npy"])
    array = np.frombuffer(data, np.float32, offset=128).reshape(8, 2, 2)
    assert np.isfinite(array).all()
    manifest = json.loads((tmp_path / "run" / "codes" / "manifest.json").read_text())
    assert manifest["levels"][0] == {"grid": [2, 2], "codebook_size": None, "channels": 8}
    code, said = smalti("train-prior", config, kind, "--prior.network=transformer")
    assert (
        code == 2
        and "prior.network must be normal, mixture or flow where level 0 holds numbers, got transformer" in said
    )
    code, said = smalti("export", config, kind)
    assert code == 2 and "tokens are made of codes" in said


def test_settings_of_another_family_are_refused_on_the_command_line(tiny_run: Path, smalti: Smalti) -> None:
    code, said = smalti("run", tiny_run, "--tokenizer.fsq.levels=[5,5]")
    assert code == 2 and "--tokenizer.fsq.levels would change nothing: tokenizer.bottleneck is ema" in said
    code, said = smalti("run", tiny_run, "--tokenizer.bottleneck=fsq", "--tokenizer.model.codebook_size=8")
    assert code == 2 and "--tokenizer.model.codebook_size would change nothing: tokenizer.bottleneck is fsq" in said
    code, said = smalti("run", tiny_run, "--prior.network=auto", "--tokenizer.bottleneck=gaussian", "--sample.top_k=3")
    assert code == 2 and "sample.top_k, top_p and guidance are of codes, and level 0 holds numbers" in said
    code, said = smalti("run", tiny_run, "--prior.network=auto", "--tokenizer.bottleneck=gaussian", "--sample.reject=2")
    assert code == 2 and "sample.classes and reject need a prior that knows classes, which normal does not" in said
    code, said = smalti("run", tiny_run, "--tokenizer.bottleneck=gaussian")
    assert (
        code == 2
        and "prior.network must be normal, mixture or flow where level 0 holds numbers, got transformer" in said
    )
    code, said = smalti("run", tiny_run, "--prior.network=pixelsnail", "--prior.transformer.width=8")
    assert code == 2 and "--prior.transformer.width would change nothing: prior.network is pixelsnail" in said


@pytest.mark.parametrize(
    ("network", "setting"),
    [
        ("normal", "training.steps=3"),
        ("auto", "dropout=0.2"),
        ("normal", "class_dropout=0.2"),
        ("auto", "pixelsnail.width=8"),
    ],
)
def test_settings_that_a_fixed_prior_does_not_read_are_refused_on_the_command_line(
    network: str, setting: str, tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    """The file holds such settings too, and may."""
    file = {"tokenizer": {"bottleneck": "gaussian"}, "prior": {"network": network}}
    name = setting.partition("=")[0]
    with pytest.raises(ConfigError, match=f"--prior.{name} would change nothing: prior.network is normal"):
        load_config(write_config(tmp_path, file), [f"--prior.{setting}"])


@pytest.mark.parametrize(
    ("section", "name", "kind", "default", "settings"),
    [
        ("tokenizer", "bottleneck", "fsq", "ema", {"levels": [5, 5]}),
        ("prior", "network", "pixelsnail", "auto", {"width": 8}),
    ],
)
def test_a_file_that_holds_settings_of_a_kind_names_one(
    section: str, name: str, kind: str, default: str, settings: dict, tmp_path: Path
) -> None:
    file = {"run_dir": str(tmp_path), section: {kind: settings}}
    with pytest.raises(
        ConfigError, match=rf"{section}.{kind} would change nothing: {section}.{name} is {default}; add"
    ):
        load_config(file)
    load_config(file, [f"--{section}.{name}={kind}"])
    load_config(file | {section: {kind: settings, name: default}})
    default = {"auto": "transformer"}.get(default, default)
    load_config({"run_dir": str(tmp_path), section: {default: {}}}, [f"--{section}.{name}={kind}"])


def test_a_loss_of_the_whole_batch_refuses_parts_of_it_before_anything_is_done(
    tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti
) -> None:
    config = write_config(tmp_path, {"prior": {"network": "auto"}, "tokenizer": {"training": {"micro_batches": 2}}})
    code, said = smalti("run", config, "--tokenizer.bottleneck=sparse")
    assert code == 2 and not (tmp_path / "run").exists()
    assert "tokenizer.training.micro_batches must be 1 with bottleneck sparse, whose loss is of the whole batch" in said
    load_config(config, ["--tokenizer.bottleneck=sparse", "--tokenizer.sparse.penalty=l1"])


def test_old_names_of_settings_read_on(
    tiny_run: Path, smalti: Smalti, tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    config = write_config(tmp_path, {"tokenizer": {"codebook": {"ema_decay": 0.5, "kmeans_iterations": 3}}})
    assert (found := load_config(config).tokenizer.ema).decay == 0.5 and found.kmeans_iterations == 3
    code, said = smalti("train-tokenizer", tiny_run, "--tokenizer.codebook.ema_decay=0.5")
    assert code == 1 and "tokenizer.ema.decay: 0.99 -> 0.5" in said


def stored(codes: Path, split: str, name: str) -> np.ndarray:
    """What members of a name hold in a split, by sample."""
    found = []
    for shard in sorted(codes.glob(f"{split}-*.tar")):
        with shard.open("rb") as file:
            found += [read_member(file, sample.members[name]) for sample in index_shard(shard)]
    return np.stack([np.load(io.BytesIO(data)) if name.endswith("npy") else int(data) for data in found])


@pytest.fixture(scope="module")
def at_images(numbers_run: Path, tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path]) -> Path:
    """A run of priors at 40 encoded images of the run of numbers, and its figures."""
    from pipelines.cli import main

    run = numbers_run.parent / "run"
    changes = {
        "images": {"from": load_config(numbers_run).images.from_},
        "tokenizer": {"from": str(run / "tokenizer")},
        "codes": {"from": str(run / "codes")},
        "prior": {"network": "mixture", "mixture": {"at": "images", "components": 40}},
        "evaluate": {"skip": ["classification", "reconstructions", "importance"]},
    }
    config = write_config(tmp_path_factory.mktemp("at images"), changes)
    assert main(["train-prior", str(config)]) == main(["evaluate", str(config)]) == 0
    return config


def test_components_at_images_are_their_posteriors_and_their_mixture_the_aggregated_one(
    numbers_run: Path, at_images: Path
) -> None:
    codes = numbers_run.parent / "run" / "codes"
    means, log_variances = np.split(stored(codes, "train", "level1.posterior.npy").reshape(-1, 256), 2, 1)
    mixture = LevelPrior.from_pretrained(at_images.parent / "run" / "prior" / "level1").network
    assert isinstance(mixture, Mixture) and len(mixture.means) == 40
    rows = [int(np.abs(means - one.numpy()).sum(1).argmin()) for one in mixture.means]
    assert len(set(rows)) == 40 and np.array_equal(mixture.means.numpy(), means[rows])
    assert np.allclose(mixture.scales.numpy(), np.exp(0.5 * log_variances[rows]), rtol=1e-5)
    own = torch.from_numpy(stored(codes, "train", "cls")[rows] == 3).float()
    assert torch.allclose(mixture.weights[3], own / own.sum())
    assert torch.allclose(mixture.weights[-1], torch.tensor(1 / 40))


def test_the_bound_of_numbers_under_a_learned_prior_is_of_the_draw_that_is_stored(
    numbers_run: Path, at_images: Path
) -> None:
    """log q(z | x) - log p(z), q as it is stored beside z."""
    codes, rates = numbers_run.parent / "run" / "codes", torch.zeros(2, dtype=torch.float64)
    prior = HierarchicalPrior.from_pretrained(at_images.parent / "run" / "prior")
    values = [torch.from_numpy(stored(codes, "val", f"level{level}.npy")) for level in (0, 1)]
    for level, own in enumerate(values):
        mean, log_variance = torch.from_numpy(stored(codes, "val", f"level{level}.posterior.npy")).double().chunk(2, 1)
        q = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
        assert float(((own - mean) / q.scale).std()) == pytest.approx(1, abs=0.02)
        rates += q.log_prob(own.double()).flatten(1).sum(1).mean()
    classes = stored(codes, "val", "cls")
    rates += torch.stack([prior.nll(values, given).mean() for given in (classes, None)])
    figures = json.loads((at_images.parent / "run" / "metrics.json").read_text())
    found = figures["bound"]["rate_bits_per_dim"]
    assert [found[name] * 256 * math.log(2) for name in ("given_class", "without_class")] == pytest.approx(
        rates.tolist(), rel=1e-4
    )
    each = figures["prior"]["level1"]["nats_per_value"]
    saved = json.loads((at_images.parent / "run" / "prior" / "level1" / "metrics.json").read_text())
    assert each["given_class"] == pytest.approx(saved["val_nats_per_value"], rel=1e-6)


def test_q_of_images_is_stored_where_it_is_asked_for_and_can_be(
    tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti
) -> None:
    mixture = ["--prior.network=mixture", "--prior.mixture.at=images"]
    code, said = smalti("run", tiny_run, "--tokenizer.bottleneck=gaussian", *mixture, f"--run_dir={tmp_path}")
    assert code == 2 and "prior.mixture.at images needs q(z | x) beside the codes; set encode.posterior to true" in said
    code, said = smalti("run", tiny_run, "--encode.posterior=true", f"--run_dir={tmp_path}")
    assert code == 2 and "encode.posterior is of levels that hold draws of numbers" in said


def test_a_prior_that_cannot_be_takes_no_finished_one_along(at_images: Path, smalti: Smalti) -> None:
    prior = at_images.parent / "run" / "prior" / "level1" / "model.safetensors"
    many = ["--prior.mixture.at=clusters", "--prior.mixture.components=5000"]
    code, said = smalti("train-prior", at_images, "--redo=train-prior", *many)
    assert code == 2 and "prior.mixture.components must be at most as many as the samples" in said and prior.exists()


def test_full_covariances_of_too_many_numbers_are_refused_before_anything_is_packed(
    tiny_run: Path, tmp_path: Path, smalti: Smalti
) -> None:
    full = ["--prior.network=mixture", "--prior.mixture.covariance=full", "--tokenizer.model.code_dim=[8,64]"]
    code, said = smalti("run", tiny_run, "--tokenizer.bottleneck=gaussian", *full, f"--run_dir={tmp_path}/run")
    assert code == 2 and "and level 1 holds 1024; set prior.mixture.covariance to diagonal" in said
    assert "covariance full is for at most 512 numbers per level" in said and not (tmp_path / "run").exists()
