import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.config import load_config
from pipelines.data.batches import epoch_permutation
from pipelines.data.images import ImageShards
from pipelines.metrics import METRICS
from pipelines.metrics.bound import fitted_scales
from pipelines.metrics.opening import EvaluateConfig, Folders, Models, open_subject
from pipelines.run import Run
from pipelines.stages.evaluate import evaluate, table
from pipelines.storage.cache import Cache
from pipelines.storage.shards import index_shard, read_member
from prior import HierarchicalPrior
from tests.jobs import ranks
from tokenizer import HierarchicalVQVAE

Smalti = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path]) -> Path:
    """A copy of the tiny run's folder, `config.yaml` beside it."""
    write_config(tmp_path)
    shutil.copytree(tiny_run.parent / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def from_elsewhere(run: Path, tmp_path: Path, write_config: Callable[..., Path]) -> Callable[..., Path]:
    """A config of a run of its own that takes folders of the copy."""

    def write(*sections: str) -> Path:
        folders = {"images": "images", "tokenizer": "tokenizer", "codes": "codes"}
        return write_config(tmp_path / "other", {name: {"from": str(run / folders[name])} for name in sections})

    return write


def figures_of(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


def split_anew(images: Path) -> None:
    """Another split of the same images: a train shard becomes the val split."""
    manifest = json.loads((images / "manifest.json").read_text())
    *train, last = manifest["splits"]["train"]
    manifest["splits"] = {"train": train + manifest["splits"]["val"], "val": [last]}
    (images / "manifest.json").write_text(json.dumps(manifest))


def codes_of(run: Path, split: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    arrays = sorted((run / "prior" / "codes").glob(f"{split}-*.npy"))
    classes, level0, level1 = (torch.from_numpy(np.load(path).astype(np.int64)) for path in arrays)
    return classes, [level0, level1]


def test_evaluate_reports_exact_likelihoods_beside_what_context_is_worth(tiny_run: Path) -> None:
    run = tiny_run.parent / "run"
    found = figures_of(run)["prior"]
    prior = HierarchicalPrior.from_pretrained(run / "prior")
    classes, codes = codes_of(run, "val")
    for name, given in (("given_class", classes), ("without_class", None)):
        with torch.no_grad():
            nats = float(prior.nll(codes, given).sum())
        per_code = [found[f"level{n}"]["nats_per_code"][name] * count for n, count in ((0, 4), (1, 16))]
        assert sum(per_code) * len(classes) == pytest.approx(nats, rel=1e-5)
        rate = found["rate_bits_per_dim"][name]
        assert rate == pytest.approx(nats / len(classes) / np.log(2) / 256, rel=1e-5)
    shares = np.bincount(codes[1].flatten()) / codes[1].numel()
    entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
    assert found["level1"]["histogram_nats"] == pytest.approx(entropy)
    assert found["level1"]["uniform_bits"] == 5
    saved = json.loads((run / "prior" / "level1" / "metrics.json").read_text())
    assert saved["val_nats_per_code"] == pytest.approx(found["level1"]["nats_per_code"]["given_class"], rel=1e-5)
    assert found["held_out"] is figures_of(run)["tokenizer"]["held_out"] is True


def test_as_many_training_images_are_judged_and_what_is_likeliest_is_looked_up(tiny_run: Path) -> None:
    run = tiny_run.parent / "run"
    found, prior = figures_of(run)["prior"], HierarchicalPrior.from_pretrained(run / "prior")
    (classes, codes), (val_classes, val) = codes_of(run, "train"), codes_of(run, "val")
    chosen = epoch_permutation(0, 0, (len(classes),))[: len(val_classes)]
    with torch.no_grad():
        nats = prior.levels[1].nll(codes[1][chosen], [codes[0][chosen]], classes[chosen])
        guesses = prior.levels[1].logits(val[1], [val[0]], val_classes).argmax(-1)
    own = found["level1"]
    assert found["train_images"] == 179
    assert own["train_bits_per_code"]["given_class"] == pytest.approx(float(nats.mean()) / 16 / math.log(2), rel=1e-5)
    assert own["right"]["given_class"] == pytest.approx(float((guesses == val[1]).double().mean()))
    assert sum(count for count, _, _ in own["reliability"]["given_class"]) == 179 * 16


def test_the_bound_is_that_which_is_summed_by_hand(tiny_run: Path, cache: Cache) -> None:
    """Over 179 images, no multiple of a batch."""
    run = tiny_run.parent / "run"
    found = figures_of(run)["bound"]
    tokenizer = HierarchicalVQVAE.from_pretrained(run / "tokenizer")
    prior = HierarchicalPrior.from_pretrained(run / "prior")
    train, val = (ImageShards(run / "images", split, cache) for split in ("train", "val"))
    assert found["scales_grey_levels"] == fitted_scales(tokenizer, train, seed=0).tolist()
    (scale,) = found["scales_grey_levels"]
    classes, codes = codes_of(run, "val")
    pixels = np.stack([val.pixels(row) for row in range(len(val))]).astype(np.float64)
    means = (tokenizer.decode(codes).double().numpy() + 1) * 127.5

    def up_to(edges: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp((means - edges) / scale))

    likelihood = np.where(pixels == 255, 1, up_to(pixels + 0.5)) - np.where(pixels == 0, 0, up_to(pixels - 0.5))
    distortion = -np.log2(likelihood).sum((1, 2, 3)) / 256  # (N,)
    assert found["images"] == len(val) == 179
    for name, given in (("given_class", classes), ("without_class", None)):
        with torch.no_grad():
            rate = prior.nll(codes, given).numpy() / math.log(2) / 256
        bits, half = rate + distortion, 1.96 * np.std(rate + distortion, ddof=1) / math.sqrt(179)
        assert found["bits_per_dim"][name] == pytest.approx(bits.mean(), rel=1e-5)
        assert found["bits_per_dim_interval95"][name] == pytest.approx(
            [bits.mean() - half, bits.mean() + half], rel=1e-5
        )
        assert found["rate_bits_per_dim"][name] == pytest.approx(figures_of(run)["prior"]["rate_bits_per_dim"][name])
    assert found["held_out"] is True


@pytest.mark.parametrize("hides_classes", [True, False])
def test_priors_are_asked_without_class_only_where_training_hid_classes(run: Path, hides_classes: bool) -> None:
    prior = HierarchicalPrior.from_pretrained(run / "prior")
    for level in prior.levels:
        object.__setattr__(level.config, "unconditional", hides_classes)
    compute = load_config(run.parent / "config.yaml").compute
    there = Folders(None, run / "codes", run / "prior" / "codes", None)
    subject = open_subject(EvaluateConfig(), 0, compute, Models(None, prior), there)
    figures = evaluate(subject, {"prior": True})["prior"]
    wanted = ["given_class", "without_class"] if hides_classes else ["given_class"]
    assert list(figures["level1"]["nats_per_code"]) == list(figures["rate_bits_per_dim"]) == wanted


def test_tables_fit_a_terminal_and_call_things_what_they_are(tiny_run: Path) -> None:
    figures = figures_of(tiny_run.parent / "run")
    text = table(figures)
    assert max(map(len, text.splitlines())) <= 80
    for words in (
        "PSNR",
        "SSIM",
        "perplexity",
        "usage",
        "val histogram, no class, no context",
        "prior given the class",
        "prior without class",
        "rate of the codes of all levels, in bits per image dimension",
        "95% interval over images",
        "surgery of the bound",
        "KL(q_agg || p)",
    ):
        assert words in text
    assert "may have been trained on" not in text
    figures["tokenizer"]["held_out"] = None
    assert "tokenizer: val split of 179 images, which may have been trained on" in table(figures)


def test_nothing_is_saved_of_a_histogram_of_one_code(tiny_run: Path) -> None:
    figures = {"prior": figures_of(tiny_run.parent / "run")["prior"]}
    for level in ("level0", "level1"):
        figures["prior"][level] |= {"histogram_nats": 0.0, "histogram_bits": 0.0}
    assert "%" not in table(figures)
    assert sum(line.endswith(" -") for line in table(figures).splitlines()) == 4


def test_what_codes_tell_of_images_lies_between_their_own_histogram_and_the_best_prior(tiny_run: Path) -> None:
    found, (_, codes) = figures_of(tiny_run.parent / "run"), codes_of(tiny_run.parent / "run", "val")
    parts, unit = found["surgery"], math.log(2) * 256
    grids = torch.cat([grid.flatten(1) for grid in codes], 1)
    shares = grids.unique(dim=0, return_counts=True)[1] / 179
    least = float(-(shares * shares.log()).sum()) / unit
    assert parts["mutual_information_at_least_bits_per_dim"]["without_class"] == pytest.approx(least, rel=1e-5)
    assert parts["log_images_bits_per_dim"]["without_class"] == pytest.approx(math.log(179) / unit)
    uniform = (4 * math.log2(16) + 16 * math.log2(32)) / 256
    assert parts["under_uniform"]["rate_bits_per_dim"]["without_class"] == pytest.approx(uniform)
    rate = found["bound"]["rate_bits_per_dim"]
    for given in ("given_class", "without_class"):
        best = min(uniform, rate["without_class"], rate[given])
        assert parts["mutual_information_at_most_bits_per_dim"][given] == pytest.approx(best)
        assert parts["marginal_kl_at_least_bits_per_dim"][given] == pytest.approx(rate[given] - best)
        assert parts["under_uniform"]["marginal_kl_at_least_bits_per_dim"][given] == pytest.approx(uniform - best)
    within = parts["mutual_information_at_least_bits_per_dim"]["given_class"]
    assert within <= parts["log_images_bits_per_dim"]["given_class"] < parts["log_images_bits_per_dim"]["without_class"]


def test_training_images_are_never_called_val(run: Path, smalti: Smalti) -> None:
    split_anew(run / "images")
    for command in ("evaluate", "verify"):
        code, text = smalti(command, run.parent / "config.yaml")
        assert code == 1
        assert "tokenizer was trained on images" in text
        assert "whose val split may hold what it was trained on" in text


def test_who_encodes_other_images_than_the_tokenizer_was_trained_on_is_warned(
    run: Path, smalti: Smalti, caplog: pytest.LogCaptureFixture
) -> None:
    config, doubt = run.parent / "config.yaml", "is not known to be held out from the training of"
    assert smalti("encode", config, "--redo=encode")[0] == 0
    assert doubt not in caplog.text
    split_anew(run / "images")
    assert smalti("encode", config)[0] == 0
    assert caplog.text.count(f"the val split of {run}/images {doubt} {run}/tokenizer") == 1


def test_a_tokenizer_from_elsewhere_is_not_known_to_have_seen_another_split(
    run: Path, from_elsewhere: Callable[..., Path], smalti: Smalti, caplog: pytest.LogCaptureFixture
) -> None:
    config = from_elsewhere("images", "tokenizer")
    split_anew(run / "images")
    code, text = smalti("evaluate", config)
    assert code == 0
    assert "which may have been trained on" in text
    assert caplog.text.count("is not known to be held out from the training of") == 1
    assert figures_of(config.parent / "run")["tokenizer"]["held_out"] is None


def test_codes_of_other_images_are_not_evaluated_with_these(
    run: Path, from_elsewhere: Callable[..., Path], smalti: Smalti
) -> None:
    config = from_elsewhere("images", "tokenizer", "codes")
    shutil.copytree(run / "prior", config.parent / "run" / "prior")
    split_anew(run / "images")
    code, text = smalti("evaluate", config)
    assert code == 1
    assert f"{run}/codes was made from images" in text
    assert f"but {run}/images holds images" in text


def test_priors_are_judged_where_there_are_no_images(
    run: Path, from_elsewhere: Callable[..., Path], smalti: Smalti
) -> None:
    config = from_elsewhere("tokenizer", "codes")
    shutil.copytree(run / "prior", config.parent / "run" / "prior")
    assert smalti("evaluate", config)[0] == 0
    found = figures_of(config.parent / "run")
    assert list(found) == ["prior"]
    assert found["prior"] == figures_of(run)["prior"]


def test_a_run_with_anothers_tokenizer_and_codes_packs_nothing(
    run: Path, from_elsewhere: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    config = from_elsewhere("tokenizer", "codes")
    with caplog.at_level("INFO"):
        assert Run(load_config(config)).stage("pack") is False
    assert "pack: skipped, tokenizer and codes come from elsewhere, so no images are needed" in caplog.text
    assert not (config.parent / "run" / "images").exists()


def test_a_run_of_which_nothing_is_its_own_is_evaluated_into_a_new_folder(
    run: Path, from_elsewhere: Callable[..., Path], smalti: Smalti
) -> None:
    config = from_elsewhere("images", "tokenizer", "codes")
    assert smalti("evaluate", config)[0] == 0
    assert figures_of(config.parent / "run")["tokenizer"] == figures_of(run)["tokenizer"]


def test_a_folder_that_cannot_be_made_is_told_before_the_work(
    from_elsewhere: Callable[..., Path], tmp_path: Path, smalti: Smalti
) -> None:
    (tmp_path / "file").write_text("")
    code, text = smalti("evaluate", from_elsewhere("images", "tokenizer"), f"--run_dir={tmp_path}/file/run")
    assert code == 1
    assert "cannot write" in text
    assert "PSNR" not in text


@pytest.mark.parametrize("section", ["images", "codes"])
def test_what_is_named_is_not_passed_over(run: Path, section: str, tmp_path: Path, smalti: Smalti) -> None:
    (tmp_path / "empty").mkdir()
    code, text = smalti("evaluate", run.parent / "config.yaml", f"--{section}.from={tmp_path}/empty")
    assert code == 1
    assert f"empty holds no finished {section}" in text


def test_where_there_is_nothing_to_evaluate_that_is_an_error(
    tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti
) -> None:
    code, text = smalti("evaluate", write_config(tmp_path))
    assert code == 1
    assert "must hold a tokenizer and images, or priors and codes, to be evaluated" in text


def test_samples_of_other_models_are_not_judged_as_these(run: Path, smalti: Smalti) -> None:
    path = run / "samples" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["fingerprints"]["prior0"] = "0" * 64
    path.write_text(json.dumps(manifest))
    code, text = smalti("evaluate", run.parent / "config.yaml")
    assert code == 1
    assert "samples is damaged or was drawn by other models; run `smalti sample` first" in text


@pytest.mark.parametrize("setting", ["features=nowhere.pt", "reference=nowhere.npz"])
def test_what_evaluate_cannot_have_is_told_before_the_first_stage(
    setting: str, tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti
) -> None:
    code, text = smalti("run", write_config(tmp_path), f"--evaluate.{setting}")
    assert code > 0 and "must name a file that exists, there is no nowhere" in text
    assert not (tmp_path / "run" / "images").exists()


def test_three_processes_find_the_figures_of_one(copy_of: Callable[..., Path]) -> None:
    """To the last bit; 179 images are three batches, and 1,618 training images more than a part each."""
    config = copy_of()
    alone = (config.parent / "run" / "metrics.json").read_bytes()
    (config.parent / "run" / "metrics.json").unlink()
    cache = config.parent / "empty cache"  # where no features of real images are kept
    jobs = ranks(3, "pipelines.cli", "evaluate", config, f"--compute.cache_dir={cache}", folder=config.parent)
    assert [job.wait() for job in jobs] == [0, 0, 0], "\n".join(job.errors for job in jobs)
    assert (config.parent / "run" / "metrics.json").read_bytes() == alone
    assert [bool(job.out) for job in jobs] == [True, False, False]


def test_three_processes_find_the_parts_of_the_bound_that_one_does(
    tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti
) -> None:
    """Of levels whose draws depend on one another: which process sees an image must not matter to its pairs."""
    few = {"training": {"steps": 1, "val_every": 1, "checkpoint_every": 1}}
    parts = ("bound", "surgery", "importance")
    changes = {
        "images": {"from": str(tiny_run.parent / "run" / "images")},
        "tokenizer": {"bottleneck": "gaussian", **few},
        "prior": {"network": "auto"},
        "evaluate": {"skip": [kind.name for kind in METRICS if kind.name not in parts]},
    }
    config = write_config(tmp_path, changes)
    for stage in ("train-tokenizer", "encode", "train-prior", "evaluate"):
        assert smalti(stage, config)[0] == 0
    alone = (tmp_path / "run" / "metrics.json").read_bytes()
    (tmp_path / "run" / "metrics.json").unlink()
    jobs = ranks(3, "pipelines.cli", "evaluate", config, folder=tmp_path)
    assert [job.wait() for job in jobs] == [0, 0, 0], "\n".join(job.errors for job in jobs)
    assert (tmp_path / "run" / "metrics.json").read_bytes() == alone
    assert json.loads(alone).keys() == set(parts)


def test_codes_of_samples_are_held_against_those_of_the_val_split(tiny_run: Path) -> None:
    found, run = figures_of(tiny_run.parent / "run")["codes"], tiny_run.parent / "run"
    _, levels = codes_of(run, "val")
    drawn: list[list[np.ndarray]] = [[], []]
    for path in sorted((run / "samples").glob("*.tar")):
        with path.open("rb") as file:
            for sample in index_shard(path):
                for level in (0, 1):
                    drawn[level].append(np.load(io.BytesIO(read_member(file, sample.members[f"level{level}.npy"]))))
    for level, size in ((0, 16), (1, 32)):
        counts = [torch.bincount(torch.as_tensor(np.stack(drawn[level])).long().flatten(), minlength=size)]
        counts += [torch.bincount(levels[level][first::2].flatten(), minlength=size) for first in (0, 1)]
        shares = [count / count.sum() for count in (*counts, counts[1] + counts[2])]
        own = found[f"level{level}"]
        assert own["total_variation"] == pytest.approx(float((shares[0] - shares[3]).abs().sum() / 2), rel=1e-5)
        assert own["total_variation_of_halves"] == pytest.approx(
            float((shares[1] - shares[2]).abs().sum() / 2), rel=1e-5
        )
    assert (found["samples"], found["images"]) == (7, 179)
    assert found["made"]["splits"]["samples"]["settings"]["temperature"] == 1.0
