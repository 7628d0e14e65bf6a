import pytest

from pipelines.errors import StageError
from pipelines.sources.splits import SPLIT_NAMES, chosen_splits, split_mark, split_named, split_of


@pytest.mark.parametrize(("split", "name"), [(split, name) for split, names in SPLIT_NAMES.items() for name in names])
def test_the_usual_names_are_splits_in_any_case(split: str, name: str) -> None:
    for form in (
        name,
        name.title(),
        name.upper(),
        f"{name}_set",
        f"{name}Set",
        f"{name}2017",
        f"{name.title()} Images",
    ):
        assert split_named(form) == split, form
        assert split_of(f"birds-{form}-000.tar") == split, form


@pytest.mark.parametrize(
    "name", ["cat", "bullet-train", "test tube", "testimonials", "valley", "data_batch_1", "", "тест"]
)
def test_other_names_are_no_splits(name: str) -> None:
    assert split_named(name) is None


@pytest.mark.parametrize("name", ["valley-0.tar", "devices.parquet", "0001.tar", "trained-birds.tar", "contest.tar"])
def test_files_that_are_named_after_no_split_are_for_training(name: str) -> None:
    assert split_of(name) == "train"


def test_val_goes_before_test_and_what_is_left_trains() -> None:
    assert chosen_splits("s", ["test", "Valid", "training"]) == {"train": "training", "val": "Valid"}
    assert chosen_splits("s", ["train", "Test"]) == {"train": "train", "val": "Test"}
    assert chosen_splits("s", ["test", "all"]) == {"train": "all", "val": "test"}
    assert chosen_splits("s", ["test"]) == {"train": "test"}
    assert chosen_splits("s", ["a", "b"]) == {"train": "a"}


def test_two_folders_of_one_split_are_refused() -> None:
    with pytest.raises(StageError, match="s must have one train split, but has Train and train2017; leave one of them"):
        chosen_splits("s", ["Train", "train2017", "val"])
    with pytest.raises(StageError, match="must have one val split"):
        chosen_splits("s", ["train", "val", "valid"])
    assert chosen_splits("s", ["train", "val", "test", "testing"])["val"] == "val"


def test_only_files_that_were_understood_otherwise_change_an_identity() -> None:
    for name in ("train-0.tar", "validation-0.tar", "VAL-0.tar", "test.parquet", "0001.tar"):
        assert split_mark(name) == "", name
    for name in ("birds-val-0.tar", "dev-0.tar", "valley-0.tar"):
        assert split_mark(name) == f" {split_of(name)}", name
