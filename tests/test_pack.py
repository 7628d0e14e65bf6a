import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from pipelines.begun import settle_source
from pipelines.compute.devices import ComputeConfig
from pipelines.config import Config, load_config
from pipelines.data.images import ImageShards
from pipelines.errors import ConfigError, StageError
from pipelines.run import Run
from pipelines.sources.splits import stratified_fraction
from pipelines.stages.pack import ImagesConfig, pack
from pipelines.storage.cache import Cache
from pipelines.storage.shards import index_shard, read_member

COMPUTE = ComputeConfig(num_workers=0)


def config_of(folder: Path, **changes: object) -> ImagesConfig:
    return ImagesConfig(**{"source": f"folder:{folder}", "size": 16, "shard_size": 10} | changes)  # type: ignore[arg-type]


def test_packing_keeps_classes_and_keys_and_splits_by_class(picture_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"
    out.mkdir()
    pack(config_of(picture_folder), 0, COMPUTE, out)
    train, val = (ImageShards(out, split, COMPUTE.cache) for split in ("train", "val"))
    assert (len(train), len(val)) == (36, 4)
    assert train.class_names == ["cat", "dog"]
    assert train.pixels(35).shape == (3, 16, 16)
    keys = [s.key for receipt in val.receipts for s in index_shard(out / receipt["shard"])]
    assert Counter(key.split("/")[0] for key in keys) == {"cat": 2, "dog": 2}


def test_packing_says_once_how_the_source_was_understood(
    picture_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "images").mkdir()
    with caplog.at_level("INFO"):
        pack(config_of(picture_folder), 0, COMPUTE, tmp_path / "images")
    said = f"pack: folder:{picture_folder}: train 40 images, of which some are set aside for val; 2 classes: cat, dog"
    assert caplog.messages == [said]


def test_the_fraction_is_stratified_and_seeded() -> None:
    labels = np.array([0] * 50 + [1] * 20 + [2] * 3 + [3])
    drawn = stratified_fraction(labels, 74, 0.1, 0)
    assert Counter(labels[drawn].tolist()) == {0: 5, 1: 2, 2: 1}
    assert np.array_equal(drawn, stratified_fraction(labels, 74, 0.1, 0))
    assert not np.array_equal(drawn, stratified_fraction(labels, 74, 0.1, 1))


def test_packing_twice_writes_nothing_new_and_processes_do_not_matter(picture_folder: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for out, workers in ((one, 0), (two, 2)):
        out.mkdir()
        pack(config_of(picture_folder), 0, ComputeConfig(num_workers=workers), out)
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}
    before = {p.name: p.stat().st_mtime_ns for p in one.glob("*.tar")}
    pack(config_of(picture_folder), 0, COMPUTE, one)
    assert {p.name: p.stat().st_mtime_ns for p in one.glob("*.tar")} == before


def test_bad_images_are_skipped_named_and_counted(picture_folder: Path, tmp_path: Path) -> None:
    (picture_folder / "cat" / "bad.png").write_bytes(b"")
    Image.new("RGB", (8, 8)).save(picture_folder / "dog" / "small.png")
    out = tmp_path / "images"
    out.mkdir()
    pack(config_of(picture_folder, max_bad=0.1), 0, COMPUTE, out)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["skipped"] == 2
    report = (out / "skipped.txt").read_text()
    assert "cat/bad\tempty file" in report
    assert "dog/small\t8x8 pixels are fewer than 16" in report


def test_links_that_lead_nowhere_are_skipped_and_counted(picture_folder: Path, tmp_path: Path) -> None:
    for name in ("cat/lost.png", "dog/00.txt"):
        (picture_folder / name).symlink_to(tmp_path / "nowhere")
    (picture_folder / "cat" / "loop.png").symlink_to("loop.png")
    out = tmp_path / "images"
    out.mkdir()
    with pytest.raises(StageError, match=r"images.max_bad .*cat/lo.*: cannot be read: "):
        pack(config_of(picture_folder, max_bad=0.01), 0, COMPUTE, out)
    pack(config_of(picture_folder, max_bad=0.1), 0, COMPUTE, out)
    report = (out / "skipped.txt").read_text()
    for line in (
        "cat/lost\tcannot be read: No such file",
        "cat/loop\tcannot be read: Too many",
        "dog/00\tcannot be read",
    ):
        assert line in report, report


@pytest.mark.parametrize("workers", [0, 2])
def test_captions_that_should_be_json_and_are_not_are_told_of_once(
    workers: int, picture_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, text in (("cat/01", "{not json"), ("dog/02", ""), ("dog/04", '{"fine": 1}')):
        (picture_folder / f"{name}.json").write_text(text)
    pack(config_of(picture_folder, shuffle=False), 0, ComputeConfig(num_workers=workers), tmp_path)
    told = [record.getMessage() for record in caplog.records if "should be JSON" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("2 json members that should be JSON") and told[0].endswith("the first is of cat/01")


def test_too_many_bad_images_are_an_error(picture_folder: Path, tmp_path: Path) -> None:
    (picture_folder / "cat" / "bad.png").write_bytes(b"")
    out = tmp_path / "images"
    out.mkdir()
    with pytest.raises(
        StageError, match=r"1 images cannot be used, more than images.max_bad .0\.10%. .*cat/bad: empty"
    ):
        pack(config_of(picture_folder), 0, COMPUTE, out)
    assert not (out / "manifest.json").exists()


def test_duplicate_keys_are_an_error(picture_folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(picture_folder / "cat" / "01.jpg")
    with pytest.raises(StageError, match="keys must be unique, but cat/01 comes twice"):
        pack(config_of(picture_folder, val_fraction=0.01), 0, COMPUTE, tmp_path)


def test_too_few_images_for_a_split_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "one" / "a.png")
    with pytest.raises(StageError, match="too few for a val split"):
        pack(config_of(tmp_path / "one"), 0, COMPUTE, tmp_path)


@pytest.mark.parametrize("wanted", ["dog", 1])
def test_a_class_that_is_left_out_is_in_val_alone_and_takes_nothing_else_along(
    wanted: str | int, picture_folder: Path, tmp_path: Path, cache: Cache
) -> None:
    for name, changes in (("all", {}), ("some", {"leave_out": [wanted]})):
        (tmp_path / name).mkdir()
        pack(config_of(picture_folder, **changes), 0, COMPUTE, tmp_path / name)

    def labels(name: str, split: str) -> dict[str, int]:
        shards = ImageShards(tmp_path / name, split, cache)
        return {shards.key(index): shards.read(index).label for index in range(len(shards))}

    assert labels("some", "val") == labels("all", "val")
    kept = {key: label for key, label in labels("all", "train").items() if label != 1}
    assert labels("some", "train") == kept and 0 < len(kept) < len(labels("all", "train"))
    with pytest.raises(StageError, match=r"images\.leave_out names 'bird', which is none of the 2 classes: cat, dog"):
        pack(config_of(picture_folder, leave_out=["bird"]), 0, COMPUTE, tmp_path / "none")
    with pytest.raises(StageError, match="too few for a train split"):
        pack(config_of(picture_folder, leave_out=[0, 1]), 0, COMPUTE, tmp_path / "none")


def test_classes_of_one_image_each_still_make_a_val_split() -> None:
    assert len(stratified_fraction(np.arange(20), 20, 0.1, 0)) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 1}, "images.size must be at least 2"),
        ({"channels": 4}, "images.channels must be 1"),
        ({"val_fraction": 1.0}, "images.val_fraction must lie between"),
        ({"max_bad": 2.0}, "images.max_bad must lie in"),
        ({"shard_size": 0}, "images.shard_size must be at least 1"),
        ({"keep": ["png"]}, r"images.keep must be auto or a list of txt and json, got \['png'\]"),
        ({"keep": "txt"}, "images.keep must be auto or a list"),
        ({"leave_out": ["cat"], "classes": False}, "images.leave_out names classes and images.classes is false"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImagesConfig(**changes)


def test_memory_holds_one_image_at_a_time(
    picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard is written while it is read: never more than one decoded image waits."""
    from pipelines.stages import pack as module

    waiting: list[int] = []
    honest: Callable = module.fit

    def counting(*arguments: object) -> object:
        waiting.append(len(list((tmp_path / "images").glob(".*.tmp"))))
        return honest(*arguments)

    monkeypatch.setattr(module, "fit", counting)
    (tmp_path / "images").mkdir()
    pack(config_of(picture_folder), 0, COMPUTE, tmp_path / "images")
    assert waiting == [1] * 40


def test_an_unfinished_folder_takes_no_shard_of_another_source_whose_files_have_the_same_names(
    picture_folder: Path, tmp_path: Path
) -> None:
    other, mixed, right = tmp_path / "other", tmp_path / "mixed", tmp_path / "right"
    for path in picture_folder.rglob("*.png"):
        target = other / path.relative_to(picture_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).rotate(180).save(target)
    for folder, sources in ((mixed, (picture_folder, other)), (right, (other,))):
        for source in sources:
            (folder / "images" / "manifest.json").unlink(missing_ok=True)  # as if stopped before it was done
            Run(Config(run_dir=str(folder), images=config_of(source), compute=COMPUTE)).stage("pack")
    for path in (right / "images").glob("*.tar"):
        assert (mixed / "images" / path.name).read_bytes() == path.read_bytes(), path.name


def test_parquet_files_in_the_folder_are_refused_too(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("")
    with pytest.raises(ConfigError, match=r"images\.source must lie outside .* but .*a\.parquet lies in it"):
        settle_source(f"parquet:{tmp_path}/*.parquet", tmp_path)
    settle_source("hf:somebody/pictures:train", tmp_path)


@pytest.fixture
def captioned(picture_folder: Path) -> Path:
    """The pictures, all but two of them with a caption, one with more to say."""
    for path in sorted(picture_folder.rglob("*.png"))[2:]:
        path.with_suffix(".txt").write_bytes(f"picture {path.stem}\r\n".encode())
    path.with_suffix(".json").write_text('{"stars":  5}')
    return picture_folder


def packed(folder: Path, out: Path, seed: int = 0, **changes: object) -> dict[str, dict[str, bytes]]:
    """What each key has beside its image, in order."""
    out.mkdir()
    pack(config_of(folder, **changes), seed, COMPUTE, out)
    found = {}
    for shard in sorted(out.glob("*.tar")):
        with shard.open("rb") as file:
            for sample in index_shard(shard):
                beside = {
                    name: read_member(file, m) for name, m in sample.members.items() if name not in ("png", "cls")
                }
                found[sample.key] = beside
    return found


def test_captions_come_along_byte_for_byte_and_absent_ones_are_empty(
    captioned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (captioned / "cat" / "01.npz").write_text("")
    with caplog.at_level("INFO"):
        found = packed(captioned, tmp_path / "images")
    assert caplog.messages[1:] == ["pack: beside the images: kept txt, json; dropped *.npz"]
    for path in captioned.rglob("*.png"):
        kept = {"txt": b"", "json": b"{}"} | {
            beside.suffix[1:]: beside.read_bytes()
            for beside in (path.with_suffix(".txt"), path.with_suffix(".json"))
            if beside.exists()
        }
        assert found[str(path.relative_to(captioned).with_suffix(""))] == kept
    assert packed(captioned, tmp_path / "one", keep=["txt"])["dog/38"] == {"txt": b"picture 38\r\n"}
    assert not any(packed(captioned, tmp_path / "none", keep=[]).values())


def test_the_readers_of_hugging_face_take_shards_of_which_some_have_captions(
    captioned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found = packed(captioned, tmp_path / "images", shuffle=False)
    files = str(tmp_path / "images" / "*.tar")
    rows = datasets.load_dataset("webdataset", data_files=files, split="train").select_columns(["__key__", "txt"])
    assert {row["__key__"]: row["txt"].encode() for row in rows} == {key: one["txt"] for key, one in found.items()}


def test_class_folders_are_mixed_over_shards_by_the_seed_and_other_sources_only_if_asked(
    picture_folder: Path, tmp_path: Path
) -> None:
    mixed, laid = packed(picture_folder, tmp_path / "mixed"), packed(picture_folder, tmp_path / "laid", shuffle=False)
    assert set(mixed) == set(laid) and list(mixed) != list(laid)
    assert list(laid)[:36] == sorted(list(laid)[:36])
    assert [{key[:3] for key in list(mixed)[start : start + 10]} for start in (0, 10, 20)] == [{"cat", "dog"}] * 3
    assert list(packed(picture_folder, tmp_path / "again")) == list(mixed)
    assert list(packed(picture_folder, tmp_path / "seed", seed=1)) != list(mixed)
    flat = packed(picture_folder / "cat", tmp_path / "flat")
    assert list(flat) == list(packed(picture_folder / "cat", tmp_path / "unasked", shuffle=False))
    assert list(flat) != list(packed(picture_folder / "cat", tmp_path / "asked", shuffle=True))


def run_of(folder: Path, source: Path, *redo: str, **changes: object) -> bool:
    return Run(Config(run_dir=str(folder), images=config_of(source, **changes), compute=COMPUTE), redo).stage("pack")


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "images").glob("*.tar")}


# What an earlier version did with any settings, and what it kept of them.
BEFORE = {"keep": [], "shuffle": False}


def test_a_folder_of_before_there_were_captions_is_whole_and_goes_on_as_it_was_begun(
    captioned: Path, tmp_path: Path
) -> None:
    assert run_of(tmp_path, captioned, **BEFORE)
    images, whole = tmp_path / "images", stamps(tmp_path)
    kept, first = (images / "config.yaml").read_bytes(), images / "train-000000.tar"
    assert not {"keep", "shuffle", "caption_column"} & set(yaml.safe_load(kept)["images"])
    assert not run_of(tmp_path, captioned)
    wanted = first.read_bytes()
    for gone in ([first], [first, images / "manifest.json"]):
        for path in gone:
            path.unlink()
        assert run_of(tmp_path, captioned)
        assert first.read_bytes() == wanted and (images / "config.yaml").read_bytes() == kept
        assert {name for name, stamp in stamps(tmp_path).items() if stamp != whole[name]} == {first.name}
    with pytest.raises(StageError, match=r"other settings \(images\.keep: \[\] -> \['txt'\]\)"):
        run_of(tmp_path, captioned, keep=["txt"])
    assert run_of(tmp_path, captioned, "pack")
    assert "txt" in index_shard(first)[0].members and first.read_bytes() != wanted


def test_a_folder_that_was_begun_otherwise_is_begun_anew(captioned: Path, tmp_path: Path) -> None:
    run_of(tmp_path, captioned, **BEFORE)
    (tmp_path / "images" / "manifest.json").unlink()
    assert run_of(tmp_path, captioned, shard_size=20)
    assert all("txt" in sample.members for sample in index_shard(tmp_path / "images" / "train-000000.tar"))


def test_what_a_new_folder_was_begun_with_stays(captioned: Path, tmp_path: Path) -> None:
    run_of(tmp_path, captioned)
    before = stamps(tmp_path)
    assert not run_of(tmp_path, captioned)
    (tmp_path / "images" / "manifest.json").unlink()
    assert run_of(tmp_path, captioned)
    assert stamps(tmp_path) == before


def test_what_to_keep_is_said_in_yaml_and_on_the_command_line() -> None:
    images = load_config({"run_dir": "x", "images": {"keep": ["txt"], "shuffle": True}}).images
    assert (images.keep, images.shuffle) == (["txt"], True)
    images = load_config({"run_dir": "x"}, ["--images.keep=[]", "--images.shuffle=false"]).images
    assert (images.keep, images.shuffle) == ([], False)
    images = load_config({"run_dir": "x"}).images
    assert (images.keep, images.shuffle) == ("auto", "auto")


def test_a_source_that_changed_after_it_was_packed_is_told_of_and_one_that_is_gone_is_not(
    picture_folder: Path, tmp_path: Path, write_config: Callable[..., Path], smalti: Callable[..., tuple[int, str]]
) -> None:
    images = {"source": f"folder:{picture_folder}", "size": 16, "channels": 1}
    config = write_config(tmp_path / "job", {"images": images})
    assert smalti("pack", config)[0] == 0
    assert "does not list" not in smalti("pack", config)[1]
    before = (tmp_path / "job" / "run" / "images" / "manifest.json").read_bytes()
    (picture_folder / "cat" / "more.png").write_bytes((picture_folder / "cat" / "01.png").read_bytes())
    code, said = smalti("pack", config)
    assert code == 0 and said.count("does not list what") == 1 and "--redo pack" in said and "skipped" in said
    assert (tmp_path / "job" / "run" / "images" / "manifest.json").read_bytes() == before
    picture_folder.rename(tmp_path / "elsewhere")
    code, said = smalti("pack", config)
    assert code == 0 and "does not list" not in said


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("folder:{}/nowhere", "must be a folder that exists"),
        ("parquet:{}/*.parquet", "matches no file"),
        ("shards:{}/a.tar", "must name tars that exist"),
    ],
)
def test_a_source_that_is_not_there_leaves_no_folder(
    source: str, said: str, tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    config = write_config(tmp_path, {"images": {"source": source.format(tmp_path)}})
    with pytest.raises(StageError, match=said):
        Run(load_config(config)).stage("pack")
    assert not (tmp_path / "run" / "images").exists()
