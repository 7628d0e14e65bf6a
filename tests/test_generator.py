"""The generator, on the run of format 1: two levels, classes "0", "1" and "7", six samples in batches of three."""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from torch import Tensor

from pipelines import Generator
from pipelines.card import _without_places, model_card
from pipelines.generator import names_models
from pipelines.storage.fingerprint import tokenizer_fingerprint
from pipelines.storage.manifest import all_receipts, read_manifest
from pipelines.storage.shards import index_shard, read_member
from prior import HierarchicalPrior, LevelConfig, LevelPrior
from prior.mixture import MixtureConfig
from prior.normal import NormalConfig
from tests.priors import SIZES
from tests.test_hierarchy import tiny
from tokenizer import HierarchicalVQVAE, TokenizerConfig
from tokenizer.bottlenecks.gaussian import GaussianConfig
from tokenizer.bottlenecks.identity import IdentityConfig

Smalti = Callable[..., tuple[int, str]]
FORMAT1 = Path(__file__).parent / "data" / "format1" / "run"
DRAWN_WITH = {"seed": 3, "temperature": 0.75, "top_p": [1.0, 0.95], "guidance": [1.5, 1.0]}


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator.from_pretrained(FORMAT1)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of its own."""
    return shutil.copytree(FORMAT1, tmp_path / "run")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Repositories in a folder instead of on the network; the current folder holds none of their names."""
    root = tmp_path / "hub"

    def create_repo(api: HfApi, repo_id: str, *, private: bool | None, exist_ok: bool) -> SimpleNamespace:
        (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(
        api: HfApi, *, repo_id: str, folder_path: str, commit_message: str, delete_patterns: list[str]
    ) -> SimpleNamespace:
        there = [str(path.relative_to(root / repo_id)) for path in (root / repo_id).rglob("*") if path.is_file()]
        for name in filter_repo_objects(there, allow_patterns=delete_patterns):
            (root / repo_id / name).unlink()
        shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub.example/{repo_id}/commit/1")

    def snapshot_download(repo_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        names = [str(path.relative_to(root / repo_id)) for path in (root / repo_id).rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (tmp_path / "snapshot" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / repo_id / name, tmp_path / "snapshot" / name)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr("tokenizer.hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return root


def shards_of(folder: Path) -> tuple[Tensor, list[Tensor]]:
    """Images in [-1, 1] and codes of a folder of samples."""
    images, levels = [], ([], [])
    for _, receipt in all_receipts(read_manifest(folder, "samples", "sample")):
        with (folder / receipt["shard"]).open("rb") as file:
            for sample in index_shard(folder / receipt["shard"]):
                members = {name: io.BytesIO(read_member(file, member)) for name, member in sample.members.items()}
                images.append(torch.from_numpy(np.array(Image.open(members["png"]))).float()[None] / 127.5 - 1)
                for number, level in enumerate(levels):
                    level.append(torch.from_numpy(np.load(members[f"level{number}.npy"]).astype(np.int64)))
    return torch.stack(images), [torch.stack(level) for level in levels]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("batch_size", [3, 4, None])
def test_the_generator_draws_what_the_stage_drew(generator: Generator, batch_size: int | None) -> None:
    """No uniform lies within 1e-4 of an edge of its distribution, so the codes are those of any batch size."""
    kept_images, kept_codes = shards_of(FORMAT1 / "samples")
    images, codes = generator.sample(count=6, batch_size=batch_size, **DRAWN_WITH)  # type: ignore[arg-type]
    assert same(codes, kept_codes)
    assert images.dtype == torch.float32 and images.shape == (6, 1, 16, 16)
    assert float(images.abs().max()) <= 1
    assert float((images - kept_images).abs().max()) <= 1 / 255 + 1e-6


def test_a_sample_is_the_same_whatever_else_is_asked_for(generator: Generator) -> None:
    images, codes = generator.sample(classes=[2, 2, 0, 1, 2], seed=7, batch_size=2)
    fewer = generator.sample(classes=[2, 2, 0], seed=7, batch_size=2)
    assert torch.equal(fewer.images, images[:3]) and same(fewer.codes, [level[:3] for level in codes])
    assert not torch.equal(codes[1][0], codes[1][1])  # its index picks its uniforms, not its class alone


def test_classes_are_indices_or_names_and_taken_in_turn(generator: Generator) -> None:
    wanted = generator.sample([2, 0], seed=1).codes
    for classes in (["7", "0"], ["7", 0], torch.tensor([2, 0]), np.array([2, 0])):
        assert same(generator.sample(classes, seed=1).codes, wanted)
    assert same(generator.sample(["7", "0"], seed=1, count=1).codes, generator.sample("7", seed=1).codes)
    in_turn = generator.sample([0, 1, 2, 0, 1], seed=1).codes
    assert same(generator.sample(seed=1, count=5).codes, in_turn)
    assert len(generator.sample().images) == 3  # one of each


@pytest.mark.parametrize("unknown", ["2", 3, -1, "cat", 1.0, True, None, torch.tensor(True), np.float32(1)])
def test_a_class_that_does_not_exist_is_named(generator: Generator, unknown: int | str) -> None:
    message = re.escape(f"classes must be names or indices of the 3 classes ('0', '1', '7'), got {unknown!r}")
    with pytest.raises(ValueError, match=message):
        generator.sample([0, unknown])
    if unknown is not None:
        with pytest.raises(ValueError, match=message):
            generator.sample(unknown)


def test_without_classes_there_is_a_count() -> None:
    model = tiny([4])
    generator = unconditional(model)
    images, codes = generator.sample(count=3, seed=2)
    assert images.shape == (3, 3, 16, 16)
    assert same(codes, generator.prior.sample(seed=2, indices=range(3)))
    with pytest.raises(ValueError, match="classes must be left out: there are none, got 0"):
        generator.sample([0])


def unconditional(model: HierarchicalVQVAE, grids: list[tuple[int, int]] | None = None) -> Generator:
    config = LevelConfig(
        level=0,
        grids=grids or model.grids[:1],
        codebook_sizes=[16],
        class_names=[],
        size=SIZES["transformer"],
        tokenizer=tokenizer_fingerprint(model),
    )
    return Generator(model, HierarchicalPrior([LevelPrior(config)]))


def test_settings_that_cannot_work_are_refused(generator: Generator) -> None:
    with pytest.raises(ValueError, match="temperature must be above 0"):
        generator.sample([0], temperature=0)
    with pytest.raises(ValueError, match=r"one value or one per level \(2\)"):
        generator.sample([0], guidance=[1.0])
    with pytest.raises(ValueError, match="precision must be float32 or bfloat16"):
        generator.sample([0], precision="float16")


def test_images_are_drawn_in_true_float32_and_the_process_left_as_it_was(generator: Generator) -> None:
    def flags() -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    seen, before = [], flags()
    hook = generator.tokenizer.decoder.register_forward_hook(lambda *_: seen.append(flags()))
    generator.sample([0])
    generator.sample([0], precision="bfloat16")
    hook.remove()
    assert seen == [(False, False), (True, True)]
    assert flags() == before


def test_models_that_do_not_belong_together_are_refused(generator: Generator, run: Path) -> None:
    other = tiny([8, 4], 1)
    with pytest.raises(ValueError, match=r"the prior learned codes of tokenizer [0-9a-f]{12} but this tokenizer is"):
        Generator(other, generator.prior)
    with pytest.raises(ValueError, match=r"has levels of \[\(2, 2\), \(4, 4\)\] .* but the priors draw \[\(2, 2\)\]"):
        Generator(generator.tokenizer, HierarchicalPrior([generator.prior.levels[0]]))
    with pytest.raises(ValueError, match=r"has levels of \[\(4, 4\)\] .* but the priors draw \[\(2, 2\)\]"):
        unconditional(tiny([4]), [(2, 2)])
    shutil.rmtree(run / "prior" / "level1")
    with pytest.raises(ValueError, match=r"level1 holds no readable prior .* run `smalti train-prior`"):
        Generator.from_pretrained(run)


def test_a_level_of_an_earlier_tokenizer_is_not_in_the_way(run: Path) -> None:
    shutil.copytree(run / "prior" / "level1", run / "prior" / "level2")
    assert len(Generator.from_pretrained(run).prior.levels) == 2


def test_a_run_with_a_tokenizer_from_elsewhere_is_told_where(run: Path, generator: Generator) -> None:
    shutil.move(run / "tokenizer", run.parent / "elsewhere")
    with pytest.raises(ValueError, match="no tokenizer at"):
        Generator.from_pretrained(run)
    found = Generator.from_pretrained(run, tokenizer=run.parent / "elsewhere")
    assert same(found.sample([1]).codes, generator.sample([1]).codes)


def test_a_published_folder_holds_models_figures_grid_and_card_and_nothing_else(
    generator: Generator, tmp_path: Path
) -> None:
    generator.save_pretrained(tmp_path / "published")
    files = {str(path.relative_to(tmp_path / "published")) for path in tmp_path.rglob("*") if path.is_file()}
    models = {"tokenizer", "prior/level0", "prior/level1"}
    kept = {"metrics.json", *(f"{model}/metrics.json" for model in models)}
    written = {f"{model}/{name}" for model in models for name in ("config.json", "model.safetensors")}
    assert files == kept | written | {"README.md", "grid.png", "tokenizer/README.md"}
    for name in kept:
        assert (tmp_path / "published" / name).read_bytes() == (FORMAT1 / name).read_bytes()
    assert (tmp_path / "published" / "grid.png").read_bytes() == (FORMAT1 / "samples" / "grid.png").read_bytes()


def test_saving_and_loading_gives_the_same_images_and_the_same_folder(generator: Generator, tmp_path: Path) -> None:
    generator.save_pretrained(tmp_path / "one")
    loaded = Generator.from_pretrained(tmp_path / "one")
    assert not loaded.training
    assert torch.equal(loaded.sample([0, 1]).images, generator.sample([0, 1]).images)
    loaded.save_pretrained(tmp_path / "two")
    first, second = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("one", "two")
    )
    assert first == second


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuses(generator: Generator, folder: Path) -> bool:
    before = contents(folder)
    with pytest.raises(ValueError, match="must be empty or hold a published generator, but holds other work; choose"):
        generator.save_pretrained(folder)
    return contents(folder) == before


def test_a_generator_is_not_saved_over_other_work(
    generator: Generator, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refuses(generator, run)
    (run / "README.md").write_text("my notes")
    assert refuses(generator, run)
    generator.tokenizer.save_pretrained(tmp_path / "model" / "tokenizer")
    assert refuses(generator, tmp_path / "model")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("my notes")
    assert refuses(generator, tmp_path / "notes")
    generator.save_pretrained(tmp_path / "published")
    (tmp_path / "published" / "tokenizer" / "notes.txt").write_text("mine")
    assert refuses(generator, tmp_path / "published")
    (tmp_path / "nowhere").mkdir()
    monkeypatch.chdir(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="folder must name a folder to publish in, got an empty name"):
        generator.save_pretrained("")
    assert not contents(tmp_path / "nowhere")


def test_a_published_generator_is_replaced_whole_and_what_lies_beside_it_stays(
    generator: Generator, hub: Path, tmp_path: Path
) -> None:
    other = unconditional(tiny([4]))
    other.save_pretrained(tmp_path / "fresh")
    generator.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "LICENSE").write_text("mine")
    other.save_pretrained(tmp_path / "model")
    assert contents(tmp_path / "model") == contents(tmp_path / "fresh") | {"LICENSE": b"mine"}
    assert not (tmp_path / "model" / "prior" / "level1").exists()
    generator.push_to_hub("me/model")
    other.push_to_hub("me/model")
    assert contents(hub / "me" / "model") == contents(tmp_path / "fresh")


def test_a_published_folder_with_a_level_of_another_is_refused(generator: Generator, tmp_path: Path) -> None:
    generator.save_pretrained(tmp_path / "model")
    shutil.copytree(tmp_path / "model" / "prior" / "level1", tmp_path / "model" / "prior" / "level2")
    for load in (HierarchicalPrior.from_pretrained, lambda prior: Generator.from_pretrained(prior.parent)):
        with pytest.raises(ValueError, match="level 2 must be there, but its place is taken by the prior of 1"):
            load(tmp_path / "model" / "prior")


def test_the_card_tells_what_it_draws_and_how_well(generator: Generator) -> None:
    card = generator.about["README.md"].decode()
    assert ModelCard(card).data.library_name == "smalti"
    assert ModelCard(card).data.license is None
    for line in (
        "Draws grey images of 16x16 pixels",
        "tags: [image-generation, image-tokenizer, vq-vae, autoregressive]",
        "![samples](grid.png)",
        "Drawn with seed 3, temperature 0.75, top_k 0, top_p [1.0, 0.95], guidance [1.5, 1.0].",
        "gen.sample(classes=['0', '1', '7'], seed=0)",
        "| 0 | 2x2 | 16 | transformer |",
        "| 1 | 4x4 | 300 | pixelsnail |",
        "3: `0`, `1`, `7`",
        "The priors learned codes of 24 images of `folder:digits`; 3 more are the validation split.",
        "| tokenizer | psnr | 18.9 |  |  |",
        "| tokenizer | usage |  | 0.5 | 0.1367 |",
        "| prior | bits_per_code |  | 1.796 | 8.626 |",
        "| prior | bits_per_dim | 0.5672 |  |  |",
        "## Licence\n\nNot stated.",
    ):
        assert line in card, line


def test_what_evaluate_has_not_measured_the_card_takes_from_training(run: Path) -> None:
    (run / "metrics.json").write_text(json.dumps({"tokenizer": {"held_out": True, "ssim": None, "psnr": 20.0}}))
    card = Generator.from_pretrained(run).about["README.md"].decode()
    assert "| tokenizer | held_out | yes |  |  |\n| tokenizer | psnr | 20 |  |  |\n| prior | bits_per_code |  |" in card
    for damaged in ("[1]", "no json", '{"tokenizer": [], "prior": {"level0": "x"}}'):
        (run / "metrics.json").write_text(damaged)
        assert "# A smalti generator" in Generator.from_pretrained(run).about["README.md"].decode()


def test_a_generator_made_by_hand_has_a_card_too(tmp_path: Path) -> None:
    unconditional(tiny([4])).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    for line in ("gen.sample(count=3, seed=0)", "## Classes\n\nNone.", "Not recorded. Say here", "None are recorded."):
        assert line in card, line
    assert "grid.png" not in card


@pytest.mark.parametrize(
    ("kind", "network", "named", "tags"),
    [
        (GaussianConfig(), MixtureConfig(components=2), "conditional VAE", ["vae", "gaussian-mixture"]),
        (IdentityConfig(), NormalConfig(), "conditional autoencoder", ["autoencoder"]),
    ],
)
def test_a_card_says_which_bottleneck_and_prior_it_is_and_what_matters_to_them(
    kind: Any, network: Any, named: str, tags: list[str]
) -> None:
    config = TokenizerConfig(strides=[16], code_dim=2, width=8, residual_width=4, residual_blocks=1, conditional=True)
    tokenizer = HierarchicalVQVAE(config, 16, 1, kind, 2)
    level = LevelConfig(
        level=0, grids=[(1, 1)], codebook_sizes=[None], class_names=["a", "b"], size=network, channels=[2]
    )
    figures = {"bound": {"rate_bits_per_dim": {"given_class": -3.8e-7}}}
    about = {"grid.png": b"", "metrics.json": json.dumps(figures).encode()}
    settings = {"seed": 0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "guidance": 1.0}
    card = model_card(tokenizer, HierarchicalPrior([LevelPrior(level)]), about, "", settings)
    assert ModelCard(card).data.tags == ["image-generation", "image-tokenizer", *tags]
    assert f"a tokenizer ({named}) decodes it" in card and "Drawn with seed 0, temperature 1.0.\n" in card
    assert "| bound | rate_bits_per_dim given_class | 0.0000 |" in card
    assert f"C{named[1:]}. Images of 16x16 pixels and 1 channel in" in tokenizer.generate_model_card().content
    assert tokenizer.generate_model_card().data.tags == ["image-tokenizer", tags[0]]


def test_a_grid_of_other_models_and_data_of_other_codes_are_left_out(run: Path) -> None:
    for name, changes in {
        "samples": {"fingerprints": {"tokenizer": 64 * "0"}},
        "codes": {"made_from": 64 * "0"},
    }.items():
        path = run / name / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (run / "README.md").write_text("my notes")
    about = Generator.from_pretrained(run).about
    assert "grid.png" not in about
    card = about["README.md"].decode()
    assert "grid.png" not in card and "digits" not in card and "my notes" not in card


def test_what_its_owner_wrote_into_a_card_stays(generator: Generator, tmp_path: Path) -> None:
    generator.save_pretrained(tmp_path / "one")
    card = (tmp_path / "one" / "README.md").read_text().replace("library_name", "license: mit\nlibrary_name")
    (tmp_path / "one" / "README.md").write_text(card)
    Generator.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert (tmp_path / "two" / "README.md").read_text() == card


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("digits", "digits"),
        ("hf:uoft-cs/cifar10", "hf:uoft-cs/cifar10"),
        ("folder:/home/me/birds/", "folder:birds"),
        ("shards:https://host/a/b.tar?signature=secret", "shards:b.tar"),
        ("parquet:s3://bucket/private/*.parquet", "parquet:*.parquet"),
    ],
)
def test_the_card_names_a_source_without_what_is_private(source: str, shown: str) -> None:
    assert _without_places(source) == shown


def test_a_generator_goes_to_the_hub_and_comes_back(generator: Generator, hub: Path) -> None:
    assert generator.push_to_hub("me/digits-model") == "https://hub.example/me/digits-model/commit/1"
    assert (hub / "me" / "digits-model" / "README.md").read_bytes() == generator.about["README.md"]
    (hub / "me" / "digits-model" / "more.bin").write_text("not ours")
    loaded = Generator.from_pretrained("me/digits-model")
    assert same(loaded.sample([2]).codes, generator.sample([2]).codes)
    assert loaded.about == generator.about
    assert not (hub.parent / "snapshot" / "more.bin").exists()


def test_what_can_be_a_folder_is_not_looked_up_on_the_hub(hub: Path) -> None:
    (hub.parent / "runs").mkdir()
    for name in ("runs/digitz", "./digits/model", "/nowhere", "a/b/c", "digits", "s3://bucket/model"):
        with pytest.raises(ValueError, match="there is no such folder"):
            Generator.from_pretrained(name)


def test_a_repository_that_cannot_be_had_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # HF_HUB_OFFLINE is set: nothing is asked
    with pytest.raises(OSError, match="no generator at me/nowhere: there is no such folder, and the hub gives none"):
        Generator.from_pretrained("me/nowhere")


def test_the_command_line_samples_from_a_folder_or_an_id(generator: Generator, hub: Path, smalti: Smalti) -> None:
    generator.push_to_hub("me/digits-model")
    more = (
        "--sample.count=4",
        "--sample.classes=['7']",
        "--sample.batch_size=2",
        "--seed=5",
        "--compute.accelerator=cpu",
    )
    for name, out in (("me/digits-model", "one"), (hub / "me" / "digits-model", "two"), (FORMAT1, "three")):
        code, said = smalti("sample", name, "--run_dir", out, *more)
        assert code == 0, said
        assert [path.name for path in Path(out).glob("[!.]*")] == ["samples"]
        images, codes = shards_of(Path(out) / "samples")
        drawn = generator.sample(["7"], seed=5, count=4, batch_size=2)
        assert same(codes, drawn.codes)
        assert float((images - drawn.images).abs().max()) <= 1 / 255 + 1e-6
    code, said = smalti("sample", "me/digits-model", "--run_dir", "one", *more)
    assert code == 0 and "skipped, one/samples is complete" in said


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["published"], 2, "run_dir must name a folder to write to; add --run_dir FOLDER"),
        (["empty", "--run_dir=x"], 1, "no tokenizer at empty/tokenizer: there is no such folder"),
        (["published", "--run_dir=x", "--sample.classes=[5]"], 1, "none of the 3 classes"),
        (["published", "--run_dir=x", "--sample.guidance=[2,1,1]"], 1, "one per level (2)"),
        (["nowhere.yaml"], 2, "cannot read the config nowhere.yaml"),
        (["me/nowhere.yaml"], 2, "cannot read the config me/nowhere.yaml"),
    ],
)
def test_sampling_without_a_config_says_what_is_wrong_in_one_line(
    arguments: list[str], exit_code: int, message: str, hub: Path, smalti: Smalti
) -> None:
    (hub.parent / "published").symlink_to(FORMAT1)
    (hub.parent / "empty").mkdir()
    code, said = smalti("sample", *arguments)
    assert code == exit_code and message in said
    assert [line.startswith("smalti: error: ") for line in said.splitlines()].count(True) == 1
    assert "Traceback" not in said


def test_configs_and_models_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine").write_text("run_dir: x")
    monkeypatch.chdir(tmp_path)
    assert [
        name
        for name in ("configs", "me/model", "configs/mine", "configs/x", "digits", "me/x.yaml")
        if names_models(name)
    ] == [
        "configs",
        "me/model",
    ]
