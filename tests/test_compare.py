import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.compare import Scoreboard, as_csv, as_text, scoreboard
from pipelines.compared import Compared, as_compared
from pipelines.config import load_config
from pipelines.finished import Finished

Smalti = Callable[..., tuple[int, str]]


def figures(
    images: str = "a", seed: int = 0, space: str = "pixels", samples: int = 100, **values: float
) -> dict[str, Any]:
    made = {"splits": {"val": {"count": 50, "images": images}}, "models": {}, "seed": seed}
    drawn = {"splits": {"samples": {"count": samples}}, "features": {"features": space}, "seed": seed}
    return {
        "tokenizer": {"mse": values.get("mse", 0.5), "made": made},
        "prior": {"rate_bits_per_image": {"given_class": values.get("bits", 90.0)}, "made": made},
        "samples": {"kid": values.get("kid", 0.25), "made": drawn},
    }


def run(name: str, found: dict[str, Any], seconds: float | None = None, **settings: Any) -> Compared:
    config = load_config({"run_dir": name, **settings})
    return Compared(config, found, {"seconds": seconds, "parameters": 2e6})


@pytest.fixture
def board() -> Scoreboard:
    """Two seeds of one setting, which have split their images otherwise, and a run of another."""
    wide = {"tokenizer": {"model": {"width": 64}}}
    runs = [
        run("one", figures(mse=0.5), seed=0),
        run("two", figures("b", 1, mse=0.7), seed=1),
        run("wide", figures(mse=0.4, bits=80.0), **wide),
    ]
    return scoreboard(runs)


def test_runs_that_differ_in_their_seed_are_one_row_of_means_and_deviations(board: Scoreboard) -> None:
    several, wide = board.rows
    assert (several.runs, several.seeds, wide.runs) == (["one", "two"], [0, 1], ["wide"])
    assert several.scores["MSE"] == (pytest.approx(0.6), pytest.approx(0.02**0.5))
    assert wide.scores["MSE"] == (0.4, None)
    assert wide.scores["bits/image"] == (80, None) and wide.scores["bound"] is None
    assert not board.notes


def test_settings_that_differ_come_first_and_no_others(board: Scoreboard) -> None:
    assert [row.settings for row in board.rows] == [
        {"tokenizer.model.width": "128"},
        {"tokenizer.model.width": "64"},
    ]
    head, first, second = as_text(board).splitlines()[:3]
    assert head.split() == ["run", "seeds", "width", "bits/image", "MSE", "KID", "parameters"]
    assert "0.60000 +- 0.14142" in first and "250.000 +- 0.000" in first and "0.40000" in second
    assert "KID: x 1000" in as_text(board) and "less is better; in features of pixels" in as_text(board)


def test_the_csv_holds_what_metrics_hold(board: Scoreboard) -> None:
    several, wide = csv.DictReader(as_csv(board).splitlines())
    assert several["run"] == "one two" and several["seeds"] == "0 1"
    assert float(wide["KID"]) == 0.25 and wide["KID deviation"] == "" and wide["tokenizer.model.width"] == "64"


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (figures(space="inception"), "not made like those above (features.features: pixels -> inception)"),
        (figures(samples=99), "not made like those above (samples.count: 100 -> 99)"),
        ({"samples": {"kid": 1.0}}, "it does not say what it was made of; run `smalti evaluate` again"),
    ],
)
def test_figures_that_were_not_made_alike_are_left_out_with_a_sentence(other: dict, told: str) -> None:
    board = scoreboard([run("one", figures()), run("wide", other, tokenizer={"loss": "l1"})])
    assert board.rows[0].scores["KID"] == (0.25, None) and board.rows[1].scores["KID"] is None
    assert f"KID of wide is left out: {told}" in board.notes
    assert f"KID of wide is left out: {told}" in as_text(board)


def test_images_of_another_split_are_compared_between_seeds_alone() -> None:
    board = scoreboard([run("one", figures()), run("other", figures("b", 1), seed=1, tokenizer={"loss": "l1"})])
    assert board.rows[1].scores["MSE"] is None and board.rows[1].scores["KID"]
    assert board.rows[1].settings == {"tokenizer.loss": "l1"}
    assert "MSE of other is left out: not made like those above (val.images: a -> b)" in board.notes


def test_a_run_is_compared_by_what_its_folder_holds(
    copy_of: Callable[..., Path], tiny_run: Path, tmp_path: Path, smalti: Smalti
) -> None:
    other = copy_of({})
    encoded = other.parent / "run" / "codes" / "config.yaml"  # as an override on the command line leaves it
    encoded.write_text(encoded.read_text().replace("precision: float32", "precision: bfloat16"))
    for path in (other.parent / "run").glob(".made-*.yaml"):
        path.unlink()
    (other.parent / "run" / ".made-pack.yaml").write_text("seconds: 2.5\n")
    (other.parent / "run" / ".made-train-prior-level1.yaml").write_text("seconds: 4\n")
    for stage in ("export", "evaluate"):  # no part of what is compared
        (other.parent / "run" / f".made-{stage}.yaml").write_text("seconds: 100\n")
    code, text = smalti("compare", tiny_run, other, "--out", tmp_path / "board.csv")
    assert code == 0 and "precision" in text.splitlines()[0]
    first, second = csv.DictReader((tmp_path / "board.csv").read_text().splitlines())
    mse = json.loads((tiny_run.parent / "run" / "metrics.json").read_text())["tokenizer"]["mse"]
    assert float(first["MSE"]) == float(second["MSE"]) == mse
    assert float(first["seconds"]) > 0 and second["seconds"] == "6.5"
    assert smalti("compare", tiny_run, tiny_run)[0] == 2
    (other.parent / "run" / "metrics.json").unlink()
    code, text = smalti("compare", tiny_run, other)
    assert code == 1 and "has not been evaluated" in text


def test_runs_of_one_seed_are_never_taken_for_several(
    copy_of: Callable[..., Path], tiny_run: Path, tmp_path: Path, smalti: Smalti
) -> None:
    code, text = smalti("compare", tiny_run, copy_of({}), "--out", tmp_path / "board.csv")
    assert code == 0 and "standard deviation" not in text
    assert len((tmp_path / "board.csv").read_text().splitlines()) == 3


def test_the_table_is_not_written_over_a_config(tiny_run: Path, smalti: Smalti) -> None:
    before = tiny_run.read_bytes()
    code, text = smalti("compare", tiny_run, "--out", tiny_run)
    assert code == 2 and "is one of the configs" in text
    assert tiny_run.read_bytes() == before


def test_settings_of_samples_are_those_of_the_set_that_the_config_names(
    copy_of: Callable[..., Path], tiny_run: Path, smalti: Smalti
) -> None:
    other = copy_of({"sample": {"temperature": 0.5, "folder": "colder"}})
    assert smalti("sample", other)[0] == 0
    path = other.parent / "run" / "metrics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "samples": {}}))  # not measured yet
    code, text = smalti("compare", tiny_run, other)
    assert code == 0 and "temperature" in text.splitlines()[0] and " 0.5 " in text


def test_settings_that_one_run_has_alone_are_told_whichever_stands_first() -> None:
    flat, deep = (
        Compared(
            load_config({"run_dir": name}),
            figures(),
            {"seconds": None, "parameters": None},
            {"prior.level0.dropout": "0.1", **more},
        )
        for name, more in (("flat", {}), ("deep", {"prior.level1.dropout": "0.2"}))
    )
    for runs in ((flat, deep), (deep, flat)):
        told = {row.runs[0]: row.settings for row in scoreboard(runs).rows}
        assert told == {"flat": {"prior.level1.dropout": "–"}, "deep": {"prior.level1.dropout": "0.2"}}


def test_samples_are_told_by_the_settings_that_they_were_measured_with() -> None:
    measured = figures()
    measured["samples"]["made"]["splits"]["samples"]["settings"] = {"temperature": 0.8, "threads": 1}
    finished = Finished(load_config({"run_dir": "nowhere"}))
    assert as_compared(finished, measured, []).settings["sample.temperature"] == "0.8"
    assert as_compared(finished, figures(), []).settings["sample.temperature"] == "1.0"
