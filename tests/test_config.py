import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.config import load_config, make_parser
from pipelines.errors import ConfigError
from pipelines.training.sections import PriorConfig, at_level
from prior import TransformerConfig


def test_overrides_win_over_the_file(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    path = write_config(tmp_path)
    one_level = ["--tokenizer.model.strides=[4]", "--tokenizer.model.codebook_size=9", "--prior.network", "transformer"]
    config = load_config(path, ["--seed", "3", *one_level])
    assert config.seed == 3
    assert config.tokenizer.model.strides == [4]
    assert config.tokenizer.model.codebook_sizes == [9]
    assert config.images.size == 16


def test_only_the_whole_name_picks_a_shipped_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("digits") == load_config("digits.yaml")
    for name in ("digits.v2", "digits.yml", "digits.yaml.old", "digits.", "elsewhere/digits"):
        with pytest.raises(ConfigError, match=f"cannot read the config {name}: No such file"):
            load_config(name)


def test_a_file_holds_where_the_one_that_stands_on_it_says_nothing_else(
    tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    below = write_config(tmp_path / "below", {"tokenizer": {"codebook": {"ema_decay": 0.5}}})
    path = tmp_path / "above.yaml"
    path.write_text(f"base: below/{below.name}\ntokenizer:\n  model: {{codebook_size: 9}}\n  from: a\n")
    config, alone = load_config(path, ["--seed", "3"]), load_config(below)
    assert (config.seed, config.tokenizer.from_, config.tokenizer.model.codebook_sizes) == (3, "a", [9, 9])
    assert (config.tokenizer.ema.decay, config.tokenizer.model.width) == (0.5, alone.tokenizer.model.width)
    assert config.images == alone.images
    wrong = {"above.yaml": "stands on more than 8 files", "gone.yaml": "gone.yaml", "[1]": "base of"}
    for base, message in wrong.items():
        path.write_text(f"base: {base}\n")
        with pytest.raises(ConfigError, match=message):
            load_config(path)


def test_a_section_that_stands_twice_loses_nothing_without_a_word(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    for text, name in (
        ("images: {size: 8}\nseed: 1\nimages: {channels: 1}", "images"),
        ("images: {size: 8, size: 9}", "size"),
    ):
        path.write_text(f"run_dir: a\n{text}\n")
        with pytest.raises(ConfigError, match=f"{name} stands twice"):
            load_config(path)


def test_from_is_a_key_like_any_other(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    path = write_config(tmp_path, {"images": {"from": "a"}})
    config = load_config(path, ["--tokenizer.from", "b", "--codes.from=c"])
    assert (config.images.from_, config.tokenizer.from_, config.codes.from_) == ("a", "b", "c")
    help_text = make_parser().format_help()
    assert "--images.from " in help_text
    assert "from_" not in help_text
    with pytest.raises(ConfigError, match="/data/from_web"):
        load_config(path, ["--images.size=/data/from_web"])
    with pytest.raises(ConfigError, match="got /data/from_/web"):
        load_config(path, ["--images.size=/data/from_/web"])
    with pytest.raises(ConfigError, match=r"^images\.from takes a text"):
        load_config(write_config(tmp_path / "wrong", {"images": {"from": [1]}}))
    with pytest.raises(ConfigError, match=r"images\.from\b"):
        load_config(path, ["--images.from=[1]", "--images.from.x=1"])


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({"imagse": {"size": 3}}, [], "imagse"),
        ({"images": {"sise": 3}}, [], "images.*sise"),
        ({"images": {"size": "big"}}, [], "images.size.*big"),
        ({}, ["--images.size", "big"], "images.size"),
        ({}, ["--images.sise", "3"], "images.sise"),
        ({}, ["--sample.top_p", "1.5"], r"sample.top_p must lie in \(0, 1\], got 1.5"),
        ({}, ["--sample.temperature=[1,0]"], "temperature must be above 0"),
        ({}, ["--images.size", "20"], "8 does not divide 20"),
        (
            {},
            ["--prior.network", "lstm"],
            "transformer, pixelsnail, normal, mixture, flow, got lstm",
        ),
        ({}, ["--images.keep", "txt"], "^images.keep takes a list of texts or 'auto', got txt$"),
        ({}, ["--images.shuffle", "maybe"], "^images.shuffle takes true or false or 'auto', got maybe$"),
        ({}, ["--images.size", "big"], "^images.size takes a whole number, got big$"),
        ({}, ["--sample.temperature", "hot"], "^sample.temperature takes a number or a list of numbers, got hot$"),
        ({}, ["--sample.classes", "[null]"], r"^sample.classes takes a list of names and whole numbers, got \[null\]$"),
        ({}, ["--sample.classes=[true]"], r"^sample.classes takes a list of names and whole numbers, got \[true\]$"),
        ({"sample": {"classes": [None]}}, [], "^sample.classes takes a text or a whole number, got None$"),
        ({"images": {"format": "bmp"}}, [], "^images.format takes 'png', 'jpg', 'webp', got bmp$"),
        ({}, ["--tokenizer.training.steps", "0"], "steps must be at least 1"),
        ({}, ["--tokenizer.training.steps", "7"], r"steps must be a multiple of val_every \(3\), got 7"),
        ({}, ["--encode.views=[upside-down]"], "encode.views must name one or more of image, flip"),
        ({}, ["--compute.logger", "paper"], "^compute.logger takes 'csv', 'wandb', 'tensorboard', got paper$"),
        ({}, ["--encode.compile=maybe"], "^encode.compile takes true or false or 'auto', got maybe$"),
        ({}, ["--encode.precision=half"], "^encode.precision takes 'float32', 'bfloat16', got half$"),
        ({}, ["--prior.training.compile=maybe"], "^prior.training.compile takes true or false or 'auto', got maybe$"),
        ({}, ["--images.shuffle=maybe"], "^images.shuffle takes true or false or 'auto', got maybe$"),
        ({}, ["--sample.folder", "../elsewhere"], "sample.folder must name a folder of its own inside"),
        ({"tokenizer": {"class_path": "os.system"}}, [], "class_path is not allowed"),
        ({"prior": {"training": {"init_args": {}}}}, [], "init_args is not allowed"),
        ({}, ["--tokenizer.model.class_path=os.system"], "class_path is not allowed"),
        ({"images": "{class_path: trap.Anything}"}, [], "images must hold settings as"),
        ({"tokenizer": 5}, [], "tokenizer must hold settings as .*, got 5"),
        ({"images": None}, [], "images must hold settings as .*, got None"),
        ({"prior": {"training": [1]}}, [], "prior.training must hold settings as"),
        ({}, ["--images={source: digits}"], "--images is a section; override its settings one by one"),
        ({}, ["--prior.dropout=[0.1]"], r"dropout must be one value or a list of 2, one per level, got \[0.1\]"),
        ({}, ["--sample.temperature=[1,1,1]"], "sample.temperature must be one value or a list of 2"),
        ({}, ["--prior.transformer.heads=0"], "heads must be at least 1, got 0"),
        ({}, ["--prior.transformer.depth=[1,0]"], "depth must be at least 1, got 0"),
        ({}, ["--prior.pixelsnail.heads=3"], "attention_width must be a multiple of heads, got 8 with 3"),
        ({}, ["--prior.pixelsnail.conditioning_blocks=-1"], "conditioning_blocks must be at least 0, got -1"),
        (
            {"tokenizer": {"bottleneck": "gaussian"}},
            ["--tokenizer.gaussian.beta=-1"],
            "^tokenizer.gaussian.beta must not",
        ),
        (
            {"tokenizer": {"bottleneck": "gumbel"}},
            ["--tokenizer.gumbel.temperature=0"],
            "^tokenizer.gumbel.temperature must be above 0, got 0",
        ),
        ({}, ["--tokenizer.augment.shift=-1"], "augment.shift must not be negative"),
        ({}, ["--prior.training.beta2=1.5"], r"beta2 must lie in \[0, 1\), got 1.5"),
        ({}, ["--prior.class_dropout=0", "--sample.guidance=2"], "sample.guidance needs a prior that knows no class"),
        ({}, ["--sample.folder=."], "sample.folder must name a folder of its own"),
        ({}, ["--sample.folder=images/x"], "sample.folder must name a folder of its own"),
        ({"seed": -1}, [], "seed must lie in"),
        (
            {},
            ["--prior.transformer.width=[16,18]"],
            r"prior.transformer.level 1: width must be a multiple of 4 \* heads",
        ),
        (
            {},
            ["--prior.pixelsnail.heads=[2,3]"],
            "prior.pixelsnail.level 1: attention_width must be a multiple of heads",
        ),
        ({}, ["--tokenizer.training.steps=[6,6]"], "tokenizer.training.steps must be one value or a list of 1"),
        (
            {},
            ["--images.classes=false", "--sample.guidance=2"],
            "sample.classes, guidance and reject need classes; images.classes is false",
        ),
        ({}, ["--images.classes=false", "--sample.classes=[1]"], "sample.classes, guidance and reject need classes"),
        ({}, ["--prior.training.precision=16-mixed"], "prior.training.precision.*'auto', *'32-true', *'bf16-mixed'"),
        ({"tokenizer": {"training": {"precision": "64-true"}}}, [], "tokenizer.training.precision.*'32-true'.*64-true"),
    ],
)
def test_what_cannot_be_is_an_error_that_names_the_key(
    tmp_path: Path, write_config: Callable[..., Path], changes: dict, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as found:
        load_config(write_config(tmp_path, changes), overrides)
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 400


def test_files_that_are_no_config_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the config"):
        load_config(tmp_path / "nowhere.yaml")
    for text, message in (("a: [", "is not YAML"), ("- a", "must hold settings"), ("", "must hold settings")):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("seed: 1")
    with pytest.raises(ConfigError, match="run_dir"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    "text",
    ["{class_path: trap.Anything}", "'{class_path: trap.Anything}'", '"{class\\u005fpath: trap.Anything}"'],
)
@pytest.mark.parametrize("key", ["tokenizer", "images", "compute"])
def test_a_class_path_imports_nothing(text: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a.yaml").write_text(f"run_dir: x\n{key}: {text}")
    with pytest.raises(ConfigError, match=r"is not allowed|must hold settings"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("run_dir: x")
    with pytest.raises(ConfigError, match="is a section"):
        load_config(tmp_path / "a.yaml", [f"--{key}={text}"])
    assert "trap" not in sys.modules


def test_a_run_dir_may_be_called_anything(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    assert load_config(write_config(tmp_path), ["--run_dir=my_class_path_runs"]).run_dir == "my_class_path_runs"


def test_lists_are_one_value_a_level() -> None:
    section = TransformerConfig(width=[8, 16], depth=3, heads=2)
    assert at_level(section, 1, 2).width == 16
    assert at_level(section, 1, 2).depth == 3
    with pytest.raises(ConfigError, match="width must be one value or a list of 3"):
        at_level(section, 0, 3)
    assert at_level(PriorConfig(network=["transformer", "pixelsnail"]), 1, 2).network == "pixelsnail"
