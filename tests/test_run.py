"""Stages one after the other, from the command line, on tiny data."""

import contextlib
import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import pipelines.run
import pipelines.stages.encode
from pipelines.config import load_config
from pipelines.run import Run
from pipelines.storage.fingerprint import tokenizer_fingerprint
from prior import HierarchicalPrior, LevelPrior
from tokenizer import HierarchicalVQVAE

Smalti = Callable[..., tuple[int, str]]


def run_of(config: Path) -> Path:
    return config.parent / "run"


def test_a_run_leaves_what_the_design_promises(tiny_run: Path) -> None:
    run = run_of(tiny_run)
    for name in [
        "images/train-000000.tar",
        "images/train-000000.json",
        "images/val-000000.tar",
        "images/manifest.json",
        "images/config.yaml",
        "tokenizer/model.safetensors",
        "tokenizer/config.json",
        "tokenizer/config.yaml",
        "tokenizer/checkpoints/last.ckpt",
        "tokenizer/metrics.csv",
        "tokenizer/metrics.json",
        "tokenizer/reconstructions.png",
        "codes/train-000002.tar",
        "codes/manifest.json",
        "codes/config.yaml",
        "prior/level0/model.safetensors",
        "prior/level1/config.json",
        "prior/level1/metrics.csv",
        "prior/level0/checkpoints/best.ckpt",
        "samples/grid.png",
        "samples/000001.tar",
        "samples/manifest.json",
        "samples/config.yaml",
        "metrics.json",
    ]:
        assert (run / name).exists(), name
    assert not list(run.rglob("*.tmp*"))


def test_code_shards_mirror_image_shards(tiny_run: Path) -> None:
    run = run_of(tiny_run)
    manifest = json.loads((run / "codes" / "manifest.json").read_text())
    assert manifest["levels"] == [{"grid": [2, 2], "codebook_size": 16}, {"grid": [4, 4], "codebook_size": 32}]
    tokenizer = HierarchicalVQVAE.from_pretrained(run / "tokenizer")
    assert manifest["tokenizer"] == tokenizer_fingerprint(tokenizer)
    for shard in (run / "images").glob("*.tar"):
        images, codes = (
            list(webdataset.WebDataset(str(run / kind / shard.name), shardshuffle=False))
            for kind in ("images", "codes")
        )
        assert [i["__key__"] for i in images] == [c["__key__"] for c in codes]
        assert [i["cls"] for i in images] == [c["cls"] for c in codes]
        pixels = webdataset.WebDataset(str(shard), shardshuffle=False).decode("torchl")
        first = next(iter(pixels))["png"].view(1, 1, 16, 16) * 2 - 1
        expected = tokenizer.encode(first)
        found = [np.load(io.BytesIO(codes[0][f"level{level}.npy"])) for level in (0, 1)]
        assert [array.dtype for array in found] == [np.dtype("uint8")] * 2
        assert all(np.array_equal(a, b[0].numpy()) for a, b in zip(found, expected, strict=True))


def test_a_sampling_job_lays_its_weights_out_once(
    copy_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    honest = LevelPrior.decoder

    def counting(level: LevelPrior, coarser: list, classes: object, batch_size: int, kept: dict) -> object:
        before = len(kept)
        decoder = honest(level, coarser, classes, batch_size, kept)
        made.extend([level] * (len(kept) - before))
        return decoder

    monkeypatch.setattr(LevelPrior, "decoder", counting)
    Run(load_config(copy_of(), ["--sample.folder=again"])).stage("sample")  # two batches of four
    assert len(made) == 2  # one per level


def test_samples_are_what_python_draws_with_the_same_seed(tiny_run: Path) -> None:
    run = run_of(tiny_run)
    samples = [
        s for n in (0, 1) for s in webdataset.WebDataset(str(run / "samples" / f"{n:06d}.tar"), shardshuffle=False)
    ]
    assert [s["__key__"] for s in samples] == [f"{n:08d}" for n in range(7)]
    assert [int(s["cls"]) for s in samples] == list(range(7))
    prior = HierarchicalPrior.from_pretrained(run / "prior")
    codes = prior.sample(list(range(7)), seed=0)
    drawn = [np.stack([np.load(io.BytesIO(s[f"level{level}.npy"])) for s in samples]) for level in (0, 1)]
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(drawn, codes, strict=True))
    image = HierarchicalVQVAE.from_pretrained(run / "tokenizer").decode(codes)[3]
    shown = next(
        iter(
            webdataset.WebDataset(str(run / "samples" / "000000.tar"), shardshuffle=False).decode("torchl").slice(3, 4)
        )
    )
    assert torch.allclose(shown["png"].view(1, 16, 16) * 2 - 1, image, atol=1 / 127)


def test_a_complete_run_is_skipped_and_says_why(
    tiny_run: Path, smalti: Smalti, caplog: pytest.LogCaptureFixture
) -> None:
    made_each_time = ("metrics.json", ".made-evaluate.yaml", "report.html")
    files = (path for path in run_of(tiny_run).rglob("*.*") if path.name not in made_each_time)
    before = {path: path.stat().st_mtime_ns for path in files}
    with caplog.at_level("INFO"):
        code, _ = smalti("run", tiny_run)
    assert code == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    for stage in ("pack", "train-tokenizer", "encode", "train-prior", "sample"):
        assert f"{stage}: skipped" in caplog.text


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("train-tokenizer", r"holds no finished images; run `smalti pack` first"),
        ("encode", r"holds no finished tokenizer; run `smalti train-tokenizer` first"),
        ("train-prior", r"holds no finished codes; run `smalti encode` first"),
        ("sample", r"holds no finished tokenizer; run `smalti train-tokenizer` first"),
    ],
)
def test_a_stage_before_the_one_it_needs_says_so(
    stage: str, message: str, tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti
) -> None:
    code, text = smalti(stage, write_config(tmp_path))
    assert code == 1
    assert message.replace("\\", "") in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("stage", "override"),
    [
        ("pack", "--images.val_fraction=0.2"),
        ("train-tokenizer", "--tokenizer.training.learning_rate=0.1"),
        ("encode", "--encode.views=[flip]"),
        ("train-prior", "--prior.dropout=0.5"),
        ("sample", "--sample.temperature=0.5"),
    ],
)
def test_a_changed_config_under_a_finished_stage_is_refused(
    stage: str, override: str, tiny_run: Path, smalti: Smalti
) -> None:
    code, text = smalti("run", tiny_run, override)
    assert code == 1
    assert "was made with other settings" in text
    assert f"--redo {stage}" in text
    name, value = override.removeprefix("--").split("=")
    assert name.split(".")[-1] in text
    assert value.strip("[]") in text


def test_where_it_runs_is_no_change_of_config(tiny_run: Path, smalti: Smalti) -> None:
    assert smalti("run", tiny_run, "--compute.num_workers=1")[0] == 0


def test_a_retrained_tokenizer_leaves_no_old_shard(copy_of: Callable[..., Path], smalti: Smalti) -> None:
    config = copy_of({"seed": 0})
    old = {p.name: p.read_bytes() for p in (run_of(config) / "codes").glob("*.tar")}
    change = "--tokenizer.training.learning_rate=0.002"
    assert smalti("train-tokenizer", config, change, "--redo", "train-tokenizer")[0] == 0
    code, text = smalti("sample", config, change)
    assert code == 1
    assert "the prior learned codes of tokenizer" in text
    code, text = smalti("train-prior", config, change)
    assert code == 1
    assert "was written with tokenizer" in text
    assert smalti("encode", config, change)[0] == 0
    new = {p.name: p.read_bytes() for p in (run_of(config) / "codes").glob("*.tar")}
    assert set(new) == set(old)
    assert all(new[name] != old[name] for name in old)
    code, text = smalti("train-prior", config, change)
    assert code == 1
    assert "--redo train-prior" in text
    assert smalti("run", config, change, "--redo", "train-prior")[0] == 0


def test_a_changed_seed_draws_all_samples_anew(copy_of: Callable[..., Path], smalti: Smalti) -> None:
    config = copy_of()
    old = {p.name: p.read_bytes() for p in (run_of(config) / "samples").glob("*.tar")}
    code, text = smalti("sample", config, "--seed=1")
    assert code == 1
    assert "seed: 0 -> 1" in text
    assert smalti("sample", config, "--seed=1", "--redo=sample")[0] == 0
    new = {p.name: p.read_bytes() for p in (run_of(config) / "samples").glob("*.tar")}
    assert all(new[name] != old[name] for name in old)


def test_a_lost_or_damaged_shard_is_made_again_to_the_byte(copy_of: Callable[..., Path], smalti: Smalti) -> None:
    config = copy_of()
    run = run_of(config)
    for stage, shard in (
        ("encode", "codes/train-000001.tar"),
        ("sample", "samples/000001.tar"),
        ("pack", "images/val-000000.tar"),
    ):
        before = (run / shard).read_bytes()
        (run / shard).write_bytes(before[:100])
        (run / shard).parent.joinpath("manifest.json").unlink()
        assert smalti(stage, config)[0] == 0
        assert (run / shard).read_bytes() == before


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_workers_share_shards_and_the_last_one_writes_the_same_manifest(
    order: tuple[int, ...],
    tiny_run: Path,
    tmp_path: Path,
    write_config: Callable[..., Path],
    smalti: Smalti,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three workers, as torchrun names them, whichever comes first: the bytes of one."""
    run = run_of(tiny_run)
    config = write_config(tmp_path, {"tokenizer": {"from": str(run / "tokenizer")}, "sample": {"shard_size": 4}})
    shutil.copytree(run / "prior", run_of(config) / "prior")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for stage, folder in (("pack", "images"), ("encode", "codes"), ("sample", "samples")):
        for rank in order:
            monkeypatch.setenv("RANK", str(rank))
            assert rank != order[0] or not (run_of(config) / folder / "manifest.json").exists()
            assert smalti(stage, config)[0] == 0
        for path in (run / folder).iterdir():
            if path.suffix in (".tar", ".json", ".png"):
                assert (run_of(config) / folder / path.name).read_bytes() == path.read_bytes(), path.name


def test_several_sets_of_samples_lie_side_by_side(copy_of: Callable[..., Path], smalti: Smalti) -> None:
    config = copy_of()
    arguments = ("--sample.folder=threes", "--sample.classes=['3']", "--sample.guidance=[2,1]", "--sample.count=3")
    assert smalti("sample", config, *arguments)[0] == 0
    found = list(webdataset.WebDataset(str(run_of(config) / "threes" / "000000.tar"), shardshuffle=False))
    assert [sample["cls"] for sample in found] == [b"3"] * 3
    assert (run_of(config) / "samples" / "manifest.json").exists()


def test_a_set_of_samples_is_not_begun_in_anothers_folder(copy_of: Callable[..., Path], smalti: Smalti) -> None:
    config = copy_of()
    code, text = smalti("sample", config, "--sample.folder=samples/hot")
    assert code == 2
    assert "sample.folder must not lie in another set's folder, got samples/hot, and samples holds a set" in text
    shutil.copytree(run_of(config) / "samples", run_of(config) / "samples" / "hot")  # begun by an earlier version
    kept = run_of(config) / "samples" / "hot" / "config.yaml"
    kept.write_text(kept.read_text().replace("folder: samples", "folder: samples/hot"))
    before = {path: path.read_bytes() for path in kept.parent.iterdir()}
    assert smalti("sample", config, "--redo=sample")[0] == 0
    assert {path: path.read_bytes() for path in before} == before
    assert smalti("sample", config, "--sample.folder=samples/hot")[0] == 0
    assert {path: path.read_bytes() for path in before} == before


def written(folder: Path) -> dict[Path, tuple[int, ...]]:
    """All that is below a folder, with what a change of it or of its name would change; reading changes none of it."""
    stats = {path: path.lstat() for path in folder.rglob("*")}
    return {
        path: (s.st_mode, s.st_ino, s.st_nlink, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in stats.items()
    }


@pytest.mark.parametrize("redo", [(), ("--redo", "pack")])
@pytest.mark.parametrize("source", ["shards:run/images/part-*.tar", "folder:link", "folder:run/codes/../images"])
def test_a_source_in_the_folder_it_would_be_packed_to_is_refused_before_anything_is_touched(
    source: str, redo: tuple, tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti
) -> None:
    images, config = (
        tmp_path / "run" / "images",
        write_config(tmp_path, {"run_dir": "run", "images": {"source": source}}),
    )
    images.mkdir(parents=True)
    (tmp_path / "link").symlink_to(images)
    for name in ("part-0.tar", "part-1.tar", "extra.tar", "a.png"):
        shutil.copyfile(run_of(tiny_run) / "images" / "val-000000.tar", images / name)
    before = written(tmp_path)
    with contextlib.chdir(tmp_path):
        code, text = smalti("pack", config, *redo)
    assert code == 2
    assert "images.source must lie outside run/images, which pack writes to, but" in text
    assert written(tmp_path) == before


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--sample.guidance=2", "sample.guidance needs classes, and these images have none"),
        ("--sample.reject=2", "sample.reject needs classes, and these images have none"),
        ("--sample.classes=[cat]", "sample.classes names ['cat'] but"),
    ],
)
@pytest.mark.parametrize("command", ["pack", "run"])
def test_classes_that_the_source_lacks_are_told_of_before_anything_is_packed(
    command: str, setting: str, message: str, tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti
) -> None:
    for number in range(3):
        Image.new("L", (16, 16)).save(tmp_path / f"{number}.png")
    config = write_config(tmp_path / "a", {"images": {"source": f"folder:{tmp_path}"}})
    code, text = smalti(command, config, setting)
    assert code and message in text
    assert [path.name for path in (tmp_path / "a" / "run").rglob("*") if path.is_file()] == ["config.yaml"]


def test_what_only_a_later_stage_would_miss_is_told_of_first(
    tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti
) -> None:
    tokenizer, codes = (run_of(tiny_run) / name for name in ("tokenizer", "codes"))
    for changes, message in (
        ({"evaluate": {"skip": ["colour"]}}, "evaluate.skip must name metrics, got colour; there are tokenizer, prior"),
        ({"tokenizer": {"from": str(tokenizer)}, "compute": {"strategy": "fsdp"}}, "strategy fsdp needs GPUs"),
        (
            {"tokenizer": {"from": str(tokenizer)}, "codes": {"from": str(codes)}, "sample": {"reject": 2}},
            "sample.reject needs the images that its classifier is trained on; name images.from too",
        ),
    ):
        code, text = smalti("run", write_config(tmp_path, changes))
        assert code and message in text
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("source", ["digitsx", "folder:", "folder", "ftp:x"])
def test_a_source_of_no_kind_leaves_no_folder(
    source: str, tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti
) -> None:
    code, text = smalti("pack", write_config(tmp_path, {"images": {"source": source}}))
    assert code == 2
    assert "images.source must be digits, folder:PATH" in text
    assert not (tmp_path / "run").exists()


def test_a_stage_that_ends_without_its_manifest_has_not_done_well(
    copy_of: Callable[..., Path], smalti: Smalti, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, honest = copy_of(), pipelines.stages.encode.write_shard

    def on_a_bad_disk(path: Path, *arguments: object) -> None:
        honest(path, *arguments)
        if path.name == "train-000001.tar":
            path.write_bytes(b"")

    with monkeypatch.context() as patch:
        patch.setattr(pipelines.stages.encode, "write_shard", on_a_bad_disk)
        code, text = smalti("encode", config, "--redo=encode")
    assert code == 1
    assert "encode has ended but" in text and "give the same command again" in text
    assert smalti("encode", config, "--redo=encode")[0] == 0
    assert (run_of(config) / "codes" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("stage", "made"),
    [
        ("pack", "images/manifest"),
        ("encode", "codes/manifest"),
        ("sample", "samples/manifest"),
        ("export", "tokens/layout"),
    ],
)
def test_what_a_command_of_other_settings_works_on_is_not_completed(
    stage: str, made: str, copy_of: Callable[..., Path], smalti: Smalti, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, honest = copy_of(), getattr(pipelines.run, stage)
    completing = run_of(config) / f"{made}.json"
    completing.unlink(missing_ok=True)

    def while_another_begins(*arguments: object) -> None:
        (completing.parent / "config.yaml").write_text("seed: 7")
        honest(*arguments)

    monkeypatch.setattr(pipelines.run, stage, while_another_begins)
    code, text = smalti(stage, config)
    assert code == 1
    assert f"another command works in {completing.parent} with other settings (seed: 0 -> 7" in text
    assert not completing.exists()


def test_a_class_that_does_not_exist_is_named(tiny_run: Path, smalti: Smalti) -> None:
    code, text = smalti("sample", tiny_run, "--sample.folder=other", "--sample.classes=[10]")
    assert code == 1
    assert "sample.classes names 10, which is none of the 10 classes: 0, 1, 2" in text


def test_views_are_written_one_after_the_other(copy_of: Callable[..., Path], smalti: Smalti) -> None:
    config = copy_of()
    arguments = ("--encode.views=[image,flip,crop]", "--redo=encode")
    plain = list(webdataset.WebDataset(str(run_of(config) / "codes" / "train-000000.tar"), shardshuffle=False))
    assert smalti("encode", config, *arguments)[0] == 0
    found = list(webdataset.WebDataset(str(run_of(config) / "codes" / "train-000000.tar"), shardshuffle=False))
    assert [s["__key__"] for s in found[:4]] == [f"{plain[0]['__key__']}-{v}" for v in range(3)] + [
        f"{plain[1]['__key__']}-0"
    ]
    assert found[3]["level1.npy"] == plain[1]["level1.npy"]
    assert len({sample["level1.npy"] for sample in found[:3]}) > 1
    val = list(webdataset.WebDataset(str(run_of(config) / "codes" / "val-000000.tar"), shardshuffle=False))
    assert not any(sample["__key__"].endswith("-0") for sample in val)


def test_a_run_starts_from_anothers_work(
    tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti
) -> None:
    run = run_of(tiny_run)
    config = write_config(
        tmp_path,
        {
            "images": {"from": str(run / "images")},
            "tokenizer": {"from": str(run / "tokenizer")},
            "codes": {"from": str(run / "codes")},
        },
    )
    assert smalti("run", config)[0] == 0
    found = sorted(path.name for path in run_of(config).glob("[!.]*"))
    assert found == ["metrics.json", "prior", "report.html", "samples"]
    code, text = smalti("pack", config, "--images.from=/nowhere/images")
    assert code == 1
    assert "images.from must name a stage folder that exists" in text


def test_codes_of_another_tokenizer_are_refused(copy_of: Callable[..., Path], smalti: Smalti) -> None:
    config = copy_of()
    model = run_of(config) / "tokenizer" / "model.safetensors"
    tensors = load_file(model)
    tensors["codebooks.0.vectors"] = tensors["codebooks.0.vectors"] * 1.01
    save_file(tensors, model)
    code, text = smalti("train-prior", config, "--redo=train-prior")
    assert code == 1
    assert "was written with tokenizer" in text
    assert "run `smalti encode` with this tokenizer" in text


def test_images_the_tokenizer_does_not_read_are_refused(
    tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti
) -> None:
    config = write_config(
        tmp_path, {"images": {"size": 32}, "tokenizer": {"from": str(run_of(tiny_run) / "tokenizer")}}
    )
    for stage in ("pack", "run", "encode"):
        code, text = smalti(stage, config)
        assert code == 2
        assert "the tokenizer reads images of 16 pixels and 1 channels but those of this run have 32 and 1" in text
    assert not run_of(config).exists()


def test_data_without_classes_makes_an_unconditional_prior(
    tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti
) -> None:
    config = write_config(tmp_path, {"images": {"classes": False}})
    assert smalti("run", config)[0] == 0
    assert HierarchicalPrior.from_pretrained(run_of(config) / "prior").class_names == []
    sample = next(iter(webdataset.WebDataset(str(run_of(config) / "samples" / "000000.tar"), shardshuffle=False)))
    assert "cls" not in sample
    code, text = smalti("sample", config, "--sample.folder=x", "--sample.classes=[1]")
    assert code == 2
    assert "images.classes is false" in text


def test_one_level_can_be_trained_alone(copy_of: Callable[..., Path], smalti: Smalti) -> None:
    config = copy_of()
    shutil.rmtree(run_of(config) / "prior")
    assert smalti("train-prior", config, "--level", "1")[0] == 0
    assert not (run_of(config) / "prior" / "level0").exists()
    code, text = smalti("sample", config, "--sample.folder=x")
    assert code == 1
    assert "level0 holds no finished prior" in text
    assert smalti("train-prior", config, "--level", "2")[0] == 2


def test_three_levels_go_through_every_stage(tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti) -> None:
    changes = {
        "images": {"size": 16},
        "tokenizer": {"model": {"strides": [8, 4, 2], "codebook_size": 16}},
        "prior": {"network": "pixelsnail"},
    }
    config = write_config(tmp_path, changes)
    assert smalti("run", config)[0] == 0
    assert len(HierarchicalPrior.from_pretrained(run_of(config) / "prior").levels) == 3


def test_a_tokenizer_of_fewer_levels_leaves_no_prior_of_the_old_ones_in_the_way(
    copy_of: Callable[..., Path], smalti: Smalti
) -> None:
    config = copy_of()
    arguments = ("--tokenizer.model.strides=[4]", "--tokenizer.model.codebook_size=16", "--prior.network=transformer")
    assert smalti("run", config, *arguments, "--redo=train-tokenizer")[0] == 0
    sample = next(iter(webdataset.WebDataset(str(run_of(config) / "samples" / "000000.tar"), shardshuffle=False)))
    assert "level1.npy" not in sample


def test_a_run_with_codes_from_elsewhere_needs_their_tokenizer(tiny_run: Path, smalti: Smalti) -> None:
    code, text = smalti("run", tiny_run, f"--codes.from={run_of(tiny_run) / 'codes'}")
    assert code == 2
    assert "codes.from goes with tokenizer.from" in text


def test_a_device_that_is_not_there_is_an_error_of_one_line(
    tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti
) -> None:
    config = write_config(tmp_path, {"images": {"from": str(run_of(tiny_run) / "images")}})
    code, text = smalti("train-tokenizer", config, "--compute.accelerator=gpu")
    assert code == 2
    assert "asks for a CUDA GPU and there is none here" in text


def test_images_too_small_for_ssim_are_evaluated_without_it(
    tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti
) -> None:
    config = write_config(tmp_path, {"images": {"size": 8}, "tokenizer": {"model": {"strides": [4, 2]}}})
    for stage in ("pack", "train-tokenizer"):
        assert smalti(stage, config)[0] == 0
    code, text = smalti("evaluate", config)
    assert code == 0
    assert "SSIM" not in text


def test_an_unwritable_folder_is_an_error_of_one_line(
    tmp_path: Path, write_config: Callable[..., Path], smalti: Smalti
) -> None:
    (tmp_path / "file").write_text("")
    code, text = smalti("pack", write_config(tmp_path, {"run_dir": str(tmp_path / "file" / "run")}))
    assert code == 1
    assert "cannot write" in text
    assert len(text.strip().splitlines()) == 1


def test_metrics_and_config_tell_what_was_done(tiny_run: Path) -> None:
    run = run_of(tiny_run)
    settings = yaml.safe_load((run / "tokenizer" / "config.yaml").read_text())
    assert settings["tokenizer"]["training"]["steps"] == 6
    assert "compute" not in settings
    with (run / "tokenizer" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in (
        "val_mse",
        "val_psnr",
        "level0_revived",
        "val_level0_commitment",
        "val_level1_perplexity",
        "val_level1_usage",
    ):
        assert sum(bool(row[name]) for row in rows) == 2, name
    metrics = json.loads((run / "tokenizer" / "metrics.json").read_text())
    assert metrics["val_psnr"] == pytest.approx(10 * np.log10(4 / metrics["val_mse"]))


def test_python_can_do_a_stage_too(tiny_run: Path) -> None:
    assert Run(load_config(tiny_run)).stage("encode") is False


def test_what_cannot_be_drawn_or_encoded_takes_no_finished_work_along(
    copy_of: Callable[..., Path], smalti: Smalti
) -> None:
    config = copy_of({"images": {"classes": True}})
    for stage, folder, setting, message in (
        ("sample", "samples", "--sample.classes=[nobody]", "sample.classes names"),
        ("encode", "codes", "--encode.posterior=true", "encode.posterior is of levels"),
    ):
        code, said = smalti(stage, config, "--redo", stage, setting)
        assert code and message in said and (run_of(config) / folder / "manifest.json").exists()
