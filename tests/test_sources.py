import hashlib
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from pipelines.compute.devices import ComputeConfig
from pipelines.errors import ConfigError, StageError
from pipelines.sources.folder import open_folder
from pipelines.sources.open import open_source
from pipelines.sources.source import described, described_beside
from pipelines.storage.receipts import write_shard
from tests.test_pictures import data_of, noise

CACHE = ComputeConfig().cache


def picture(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)).save(path)


def test_the_digits_are_the_real_ones() -> None:
    source = open_source("digits", CACHE)
    assert len(source.splits["train"]) == 1797
    assert source.class_names == [str(digit) for digit in range(10)]
    assert source.splits["train"].read(3).label == 3


def test_a_folder_takes_its_classes_from_the_first_level(tmp_path: Path) -> None:
    for name in ("cat/a.png", "cat/deep/b.jpg", "dog/c.png"):
        picture(tmp_path / name)
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    source = open_source(f"folder:{tmp_path}", CACHE)
    split = source.splits["train"]
    assert source.class_names == ["cat", "dog"]
    assert [(split.read(i).key, split.read(i).label) for i in range(3)] == [
        ("cat/a", 0),
        ("cat/deep/b", 0),
        ("dog/c", 1),
    ]
    assert open_source(f"folder:{tmp_path}", CACHE, classes=False).class_names == []


def test_a_folder_without_subfolders_has_no_classes(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    source = open_source(f"folder:{tmp_path}", CACHE)
    assert source.class_names == []
    assert source.splits["train"].read(0).label is None


def test_a_folder_with_train_and_val_has_both_splits(tmp_path: Path) -> None:
    for name in ("train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "val/dog/d.png"):
        picture(tmp_path / name)
    source = open_source(f"folder:{tmp_path}", CACHE)
    assert {split: len(images) for split, images in source.splits.items()} == {"train": 2, "val": 2}
    assert source.class_names == ["cat", "dog"]


@pytest.mark.parametrize(
    ("train", "held_out"),
    [("Train", "Test"), ("training", "testing"), ("TRAIN", "valid"), ("train", "Validation"), ("train_set", "eval")],
)
def test_split_folders_go_by_their_usual_names(train: str, held_out: str, tmp_path: Path) -> None:
    for name in (f"{train}/cat/a.png", f"{train}/dog/b.png", f"{held_out}/cat/c.png", f"{held_out}/dog/d.png"):
        picture(tmp_path / name)
    source = open_source(f"folder:{tmp_path}", CACHE)
    assert {split: len(images) for split, images in source.splits.items()} == {"train": 2, "val": 2}
    assert source.class_names == ["cat", "dog"]
    assert source.splits["val"].read(0)[::2] == ("cat/c", 0)


def test_a_split_beside_classes_is_refused_and_a_train_among_vehicles_is_one(tmp_path: Path) -> None:
    for name in ("car/a.png", "train/b.png"):
        picture(tmp_path / name)
    assert open_source(f"folder:{tmp_path}", CACHE).class_names == ["car", "train"]
    (tmp_path / "train").rename(tmp_path / "Test")
    for classes in (True, False):
        with pytest.raises(StageError, match=r"holds Test/, which is named after a split, beside car/; move"):
            open_source(f"folder:{tmp_path}", CACHE, classes)


def test_splits_below_another_folder_are_not_mixed(tmp_path: Path) -> None:
    for folder in ("images/train/cat", "images/val/cat"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / folder / "0.png")
    with pytest.raises(StageError, match=r"must hold its splits first, but images/ has .*; name folder:.*/images, or"):
        open_folder(str(tmp_path), True)
    assert set(open_folder(str(tmp_path / "images"), True).splits) == {"train", "val"}
    (tmp_path / "images" / "val").rename(tmp_path / "images" / "tram")
    assert open_folder(str(tmp_path), True).class_names == ["images"]


def test_a_lone_split_folder_trains(tmp_path: Path) -> None:
    for name in ("Test/cat/a.png", "Test/dog/b.png"):
        picture(tmp_path / name)
    source = open_source(f"folder:{tmp_path}", CACHE)
    assert list(source.splits) == ["train"]
    assert source.class_names == ["cat", "dog"]


def test_a_source_tells_how_it_was_understood(tmp_path: Path) -> None:
    names = ["Train/cat/a.png", "Train/cat/b.png", "valid/cat/c.png", "test/cat/d.png", "loose.png"]
    for name in names:
        picture(tmp_path / name)
    assert described("birds", open_source(f"folder:{tmp_path}", CACHE)) == (
        "birds: train 2 images (Train/) and val 1 image (valid/); 1 class: cat; left out: loose.png, test/"
    )
    assert described("digits", open_source("digits", CACHE)) == (
        "digits: train 1,797 images, of which some are set aside for val; 10 classes: 0, 1, 2, 3, 4, …"
    )
    assert described("digits", open_source("digits", CACHE, classes=False)).endswith("for val; no classes")


@pytest.mark.parametrize(
    ("names", "identity"),
    [
        (["cat/a.png", "dog/b.png"], "74bf0fb25551"),
        (["train/cat/a.png", "test/cat/b.png", "extra/c.png"], "be231847f66f"),
        (["train/cat/a.png"], "a7d3a399fca2"),
        (["train/a.png", "val/b.png", "test/c.png"], "1d491c07e55b"),
        (["car/a.png", "train/b.png"], "614d438d6478"),
    ],
)
def test_the_identity_of_a_folder_stays_what_it_was_in_format_1(
    names: list[str], identity: str, tmp_path: Path
) -> None:
    for name in names:
        picture(tmp_path / name)
    assert open_source(f"folder:{tmp_path}", CACHE).identity[:12] == identity


def test_folders_that_promise_what_they_do_not_hold_are_named(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="must be a folder that exists"):
        open_source(f"folder:{tmp_path}/nowhere", CACHE)
    with pytest.raises(StageError, match="holds no images"):
        open_source(f"folder:{tmp_path}", CACHE)
    picture(tmp_path / "cat" / "a.png")
    (tmp_path / "dog").mkdir()
    with pytest.raises(StageError, match=r"class folder .*dog holds no images"):
        open_source(f"folder:{tmp_path}", CACHE)
    picture(tmp_path / "dog" / "b.png")
    picture(tmp_path / "loose.png")
    with pytest.raises(StageError, match=r"loose\.png lies beside class folders"):
        open_source(f"folder:{tmp_path}", CACHE)


def test_folders_are_listed_as_people_expect(tmp_path: Path) -> None:
    """Links are followed, hidden folders are not, odd names are names, and a lone train folder is no class."""
    picture(tmp_path / "elsewhere" / "a.png")
    for name in ("set/train/dog/b.png", "set/train/.ipynb_checkpoints/c.png", "set/train/dog/名前.png"):
        picture(tmp_path / name)
    (tmp_path / "set" / "train" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "train" / "dog" / b"\xe9.png".decode("utf-8", "surrogateescape")).write_bytes(b"")
    source = open_source(f"folder:{tmp_path}/set", CACHE)
    assert source.class_names == ["cat", "dog"]
    split = source.splits["train"]
    assert len(split) == 4
    assert {split.key(index) for index in range(4)} >= {"cat/a", "dog/b", "dog/名前"}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, None, 2], "must hold a whole number or a name for every image"),
        (["a", None, "b"], "must hold a whole number or a name for every image"),
        ([[1], [2], [3]], "must hold a whole number or a name for every image"),
        ([0.5, 1.0, 2.0], "must hold a whole number or a name for every image"),
    ],
)
def test_labels_that_are_none_are_refused(
    labels: list, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = data_of(Image.fromarray(noise(8, 8)))
    datasets.Dataset.from_dict({"image": [data] * 3, "label": labels}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(StageError, match=message):
        open_source(f"parquet:{tmp_path}/a.parquet", CACHE)
    assert open_source(f"parquet:{tmp_path}/a.parquet", CACHE, classes=False).class_names == []


def test_an_unlabelled_split_is_refused_and_names_make_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({"image": datasets.Value("binary"), "label": datasets.ClassLabel(names=["x", "y"])})
    rows = {"image": [data_of(Image.fromarray(noise(8, 8)))] * 3}
    datasets.Dataset.from_dict(rows | {"label": [0, -1, 1]}, features=features).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(StageError, match=r"leaves images unlabelled \(-1\)"):
        open_source(f"parquet:{tmp_path}/a.parquet", CACHE)
    datasets.Dataset.from_dict(rows | {"label": ["b", "a", "b"]}).to_parquet(tmp_path / "b.parquet")
    source = open_source(f"parquet:{tmp_path}/b.parquet", CACHE)
    assert source.class_names == ["a", "b"]
    assert [source.splits["train"].read(index).label for index in range(3)] == [1, 0, 1]


def test_a_parquet_file_cannot_name_files_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    picture(tmp_path / "secret.png")
    rows = {"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}] * 2}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    assert open_source(f"parquet:{tmp_path}/a.parquet", CACHE).splits["train"].read(0).data == b""


@pytest.fixture
def hub_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    repository = tmp_path / "repository"
    repository.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    for split, count in (("train", 6), ("test", 2)):
        rows = {
            "img": [{"bytes": data_of(Image.fromarray(noise(8, 8))), "path": None}] * count,
            "label": [number % 2 for number in range(count)],
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(repository / f"{split}.parquet")
    return repository


def test_parquet_in_hub_layout_brings_splits_and_class_names(hub_like: Path) -> None:
    source = open_source(f"parquet:{hub_like}/*.parquet", CACHE)
    assert source.class_names == ["cat", "dog"]
    assert {split: len(rows) for split, rows in source.splits.items()} == {"train": 6, "val": 2}
    raw = source.splits["train"].read(1)
    assert (raw.key, raw.label, raw.data) == ("00000001", 1, data_of(Image.fromarray(noise(8, 8))))


def test_parquet_files_are_splits_by_any_word_of_their_names(hub_like: Path) -> None:
    (hub_like / "train.parquet").rename(hub_like / "pets-Training-0.parquet")
    (hub_like / "test.parquet").rename(hub_like / "pets-Dev-0.parquet")
    shutil.copy(hub_like / "pets-Dev-0.parquet", hub_like / "pets-test-0.parquet")
    (hub_like / "loop").symlink_to(".")
    source = open_source(f"parquet:{hub_like}/**/*.parquet", CACHE)
    assert described("pets", source) == (
        "pets: train 6 images (pets-Training-0.parquet) and val 2 images (pets-Dev-0.parquet); 2 classes: cat, dog; "
        "left out: pets-test-0.parquet"
    )


def test_the_hub_loader_reads_a_repository_folder(hub_like: Path) -> None:
    """`hf:` takes what `datasets.load_dataset` takes, a local repository too."""
    source = open_source(f"hf:{hub_like}", CACHE)
    assert len(source.splits["train"]) == 6
    assert len(open_source(f"hf:{hub_like}:test", CACHE).splits["train"]) == 2


def test_parquet_without_images_or_files_is_refused(hub_like: Path) -> None:
    with pytest.raises(StageError, match="matches no file"):
        open_source(f"parquet:{hub_like}/nothing*.parquet", CACHE)
    with pytest.raises(StageError, match="must have an image column"):
        open_source(f"parquet:{hub_like}/*.parquet", CACHE, image_column="nope")
    with pytest.raises(StageError, match="label_column nope is not among"):
        open_source(f"parquet:{hub_like}/*.parquet", CACHE, label_column="nope")
    (hub_like / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(StageError, match="cannot be loaded"):
        open_source(f"parquet:{hub_like}/bad.parquet", CACHE)


def test_somebody_elses_webdataset_is_read_by_brace_expansion(tmp_path: Path) -> None:
    data = data_of(Image.fromarray(noise(8, 8)))
    for number in range(2):
        samples = [(f"{number}{n}", {"png": data, "cls": str(n).encode(), "json": b"{}"}) for n in range(3)]
        write_shard(tmp_path / f"x-{number}.tar", samples, {})
    write_shard(tmp_path / "val-0.tar", [("v", {"png": data, "cls": b"2"})], {})
    source = open_source(f"shards:{tmp_path}/{{x-{{0..1}},val-0}}.tar", CACHE)
    assert {split: len(rows) for split, rows in source.splits.items()} == {"train": 6, "val": 1}
    assert source.class_names == ["0", "1", "2"]
    assert source.splits["train"].read(5) == ("12", data, 2)


def tars(folder: Path, *names: str) -> str:
    for name in names:
        write_shard(folder / name, [(name.partition(".")[0], {"png": b"x"})], {})
    return f"shards:{folder}/*.tar"


def test_of_val_and_test_tars_only_val_is_taken(tmp_path: Path) -> None:
    source = open_source(tars(tmp_path, "a-test-0.tar", "a-train-0.tar", "a-train-1.tar", "a-val-0.tar"), CACHE)
    assert [source.splits["train"].key(index) for index in range(2)] == ["a-train-0", "a-train-1"]
    assert [source.splits["val"].key(index) for index in range(len(source.splits["val"]))] == ["a-val-0"]
    assert described("tars", source) == (
        "tars: train 2 images (a-train-0.tar to a-train-1.tar) and val 1 image (a-val-0.tar); no classes; "
        "left out: a-test-0.tar"
    )


def test_the_identity_of_tars_stays_what_it_was_in_format_1_unless_that_took_a_split_for_another(
    tmp_path: Path,
) -> None:
    def before() -> str:
        listed = [f"{path} {path.stat().st_size}" for path in sorted(tmp_path.glob("*.tar"))]
        return hashlib.sha256("\n".join(listed).encode()).hexdigest()

    assert open_source(tars(tmp_path, "test-0.tar", "train-0.tar", "x.tar"), CACHE).identity == before()
    assert open_source(tars(tmp_path, "a-test-0.tar"), CACHE).identity != before()


@pytest.mark.parametrize("url", ["pipe:cat /etc/passwd", "ftp://host/a.tar", "s3x://a/b.tar"])
def test_schemes_that_are_not_allowed_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="must be a local path or a URL of s3://, gs://, https://"):
        open_source(f"shards:{url}", CACHE)


def test_a_class_out_of_all_bounds_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [("a", {"png": b"x", "cls": b"9" * 30})], {})
    with pytest.raises(StageError, match=r"sample a of .*a\.tar has class 9+; classes must lie below"):
        open_source(f"shards:{tmp_path}/a.tar", CACHE)


def test_missing_shards_and_half_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"there is no .*nowhere\.tar"):
        open_source(f"shards:{tmp_path}/nowhere.tar", CACHE)
    write_shard(tmp_path / "a.tar", [("a", {"png": b"x", "cls": b"0"}), ("b", {"png": b"x"})], {})
    with pytest.raises(StageError, match=r"some samples have a \.cls and some not"):
        open_source(f"shards:{tmp_path}/a.tar", CACHE)


@pytest.mark.parametrize("value", [b"cat", b"-1", b"", b"3.0"])
def test_a_class_that_is_no_number_is_refused(value: bytes, tmp_path: Path) -> None:
    samples = [("a", {"png": b"x", "cls": b"0\n"}), ("b", {"png": b"x", "cls": value})]
    write_shard(tmp_path / "a.tar", samples, {})
    message = rf"sample b of .*a\.tar has the class '{value.decode()}' .* whole number; .* images\.classes: false"
    with pytest.raises(StageError, match=message):
        open_source(f"shards:{tmp_path}/a.tar", CACHE)
    assert open_source(f"shards:{tmp_path}/a.tar", CACHE, classes=False).class_names == []


def test_members_of_a_key_are_one_sample_wherever_they_lie_in_the_tar(tmp_path: Path) -> None:
    """As `tar cf x.tar *.png *.txt *.cls` lays them; of a key that has no image, the log tells."""
    members = [
        ("a", "png"),
        ("b", "png"),
        ("b", "txt"),
        ("a", "txt"),
        ("c", "txt"),
        ("d", "txt"),
        ("a", "cls"),
        ("b", "cls"),
    ]
    contents = {"png": b"x", "txt": b"a caption", "cls": b"1"}
    write_shard(tmp_path / "x.tar", [(key, {name: contents[name]}) for key, name in members], {})
    source = open_source(f"shards:{tmp_path}/x.tar", CACHE)
    split = source.splits["train"]
    assert [split.read(index) for index in range(len(split))] == [("a", b"x", 1), ("b", b"x", 1)]
    assert split.beside(0, ["txt"]) == {"txt": b"a caption"}
    assert described_beside(source, ["txt"]) == "beside the images: kept txt; dropped 2 samples of no image (c)"


@pytest.mark.parametrize("kind", ["shards", "parquet"])
def test_a_folder_that_should_be_files_is_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=f"must name files, but {tmp_path} is a folder; name what lies in it"):
        open_source(f"{kind}:{tmp_path}", CACHE)


def test_a_parquet_file_without_rows_is_named(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"image": [], "label": []}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(StageError, match=r"cannot be loaded: .*x\.parquet has no rows; leave it out"):
        open_source(f"parquet:{tmp_path}/*.parquet", CACHE)


def test_tars_that_share_a_key_are_named(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar", "val-0.tar"):
        write_shard(tmp_path / name, [("x", {"png": b"x"})], {})
    with pytest.raises(
        StageError, match=r"but x of train lies in .*/a\.tar and in .*/b\.tar; leave one of the tars out"
    ):
        open_source(f"shards:{tmp_path}/*.tar", CACHE)
    assert len(open_source(f"shards:{tmp_path}/{{a,val-0}}.tar", CACHE).splits) == 2


def test_a_file_that_comes_twice_in_a_tar_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.tar", [("a", {"png": b"x"}), ("b", {"png": b"x"}), ("a", {"png": b"y"})], {})
    with pytest.raises(StageError, match=r"names of their own, but a\.png comes twice in .*x\.tar"):
        open_source(f"shards:{tmp_path}/x.tar", CACHE)


@pytest.mark.parametrize("name", ["digitz", "folder:", "parquet", ""])
def test_an_unknown_source_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"images\.source must be digits, folder:PATH"):
        open_source(name, CACHE)


def test_files_beside_pictures_are_members_and_change_no_identity(tmp_path: Path) -> None:
    for name in ("train/cat/a.png", "train/dog/b.v2.jpg", "val/cat/c.png", "val/dog/d.png"):
        picture(tmp_path / name)
    folder = f"folder:{tmp_path}"
    bare = open_source(folder, CACHE)
    for name, text in (("train/cat/a.txt", "a cat\n"), ("train/dog/b.v2.json", '{"b": 2}'), ("val/cat/c.txt", "")):
        (tmp_path / name).write_text(text)
    source = open_source(folder, CACHE)
    train = source.splits["train"]
    assert [train.beside(index, ["txt", "json"]) for index in range(2)] == [{"txt": b"a cat\n"}, {"json": b'{"b": 2}'}]
    assert train.beside(0, ["json"]) == {}
    assert (source.identity, source.dropped, bare.beside) == (bare.identity, (), {})
    (tmp_path / "val/dog/d.txt").write_text("a dog")
    more = open_source(folder, CACHE)
    assert {name for name in source.beside if source.beside[name] != more.beside[name]} == {"txt"}
    for name in ("train/cat/a.npz", "train/notes.txt", "metadata.csv", "LICENSE"):
        (tmp_path / name).write_text("")
    said = described_beside(open_source(folder, CACHE), ["txt"])
    assert said == "beside the images: kept txt; dropped json, *.csv, *.npz, *.txt of no image, LICENSE"
    assert described_beside(bare, []) == ""


def test_members_of_a_tar_are_read_and_named(tmp_path: Path) -> None:
    """As LAION's and img2dataset's shards are laid out."""
    data = data_of(Image.fromarray(noise(8, 8)))
    samples = [
        ("0", {"jpg": data, "json": b'{"url": 1}', "txt": b"one"}),
        ("1", {"jpg": data, "npy": b"", "cls": b"3"}),
    ]
    write_shard(tmp_path / "00000.tar", samples, {})
    source = open_source(f"shards:{tmp_path}/*.tar", CACHE, classes=False)
    assert [source.splits["train"].beside(index, ["txt", "json"]) for index in range(2)] == [
        {"txt": b"one", "json": b'{"url": 1}'},
        {},
    ]
    assert list(source.beside) == ["txt", "json"]
    assert described_beside(source, ["txt", "json"]) == "beside the images: kept txt, json; dropped npy"


@pytest.mark.parametrize("kind", ["parquet", "hf"])
def test_a_column_holds_the_captions(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = data_of(Image.fromarray(noise(8, 8)))
    rows = {"image": [data] * 3, "text": ["a cat", None, "una città"], "url": [1, 2, 3]}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "set" / "a.parquet")
    name = f"parquet:{tmp_path}/set/a.parquet" if kind == "parquet" else f"hf:{tmp_path}/set"
    source = open_source(name, CACHE, caption_column="text")
    split = source.splits["train"]
    captions = [{"txt": b"a cat"}, {}, {"txt": "una città".encode()}]
    assert [split.beside(index, ["txt"]) for index in range(3)] == captions
    assert split.beside(0, ["json"]) == {}
    assert described_beside(source, ["txt"]) == "beside the images: kept txt; dropped url"
    assert described_beside(open_source(name, CACHE), []) == "beside the images: dropped text, url"
    with pytest.raises(StageError, match=r"caption_column url must hold text, but holds .*int64.*; choose another"):
        open_source(name, CACHE, caption_column="url")
    with pytest.raises(StageError, match="caption_column nope is not among the columns"):
        open_source(name, CACHE, caption_column="nope")


@pytest.mark.parametrize("column", ["image_column", "label_column", "caption_column"])
def test_columns_of_a_source_that_has_none_are_refused(column: str) -> None:
    with pytest.raises(ConfigError, match=rf"images\.{column} is of parquet: and hf: sources, but"):
        open_source("digits", CACHE, **{column: "x"})
