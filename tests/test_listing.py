import logging
from pathlib import Path

import pytest

from pipelines.sources.listing import files_of, pictures_below


def write(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.fixture
def two_classes(tmp_path: Path) -> Path:
    write(tmp_path / "set" / "cat" / "a.png", tmp_path / "set" / "dog" / "deep" / "b.png")
    return tmp_path / "set"


@pytest.mark.parametrize(
    "links",
    [
        {"cat/up": ".."},
        {"cat/itself": "."},
        {"again": "."},
        {"dog/deep/far": "../../.."},
        {"dog/deep/slash": "/"},
        {"cat/friend": "../dog", "dog/friend": "../cat"},
        {"cat/friend": "../dog", "dog/deep/friend": "../../cat", "cat/top": "..", "dog/top": ".."},
    ],
)
def test_loops_of_links_end_and_give_every_picture_once(
    links: dict[str, str], two_classes: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for link, target in links.items():
        (two_classes / link).symlink_to(target)
    with caplog.at_level(logging.WARNING):
        found, folders, _ = pictures_below(two_classes)
    assert sorted(found) == ["cat/a.png", "dog/deep/b.png"]
    assert folders == {"cat/", "dog/", "dog/deep/"}
    assert all(link in caplog.text for link in links)


def test_links_that_are_no_loops_are_followed(two_classes: Path) -> None:
    """Splits that are made of links to one store, a class that is elsewhere, a class that is shown under two names."""
    write(two_classes.parent / "elsewhere" / "c.png")
    (two_classes / "cow").symlink_to("../elsewhere")
    (two_classes / "kine").symlink_to("../elsewhere")
    (two_classes / "hound").symlink_to("dog")
    found, folders, _ = pictures_below(two_classes)
    assert sorted(found) == ["cat/a.png", "cow/c.png", "dog/deep/b.png", "hound/deep/b.png", "kine/c.png"]
    assert {"cow/", "kine/", "hound/", "hound/deep/"} <= folders


def test_a_pattern_gives_every_file_once(two_classes: Path) -> None:
    (two_classes / "cat" / "up").symlink_to("..")
    assert files_of(f"{two_classes}/**/*.png") == [two_classes / "cat/a.png", two_classes / "dog/deep/b.png"]
