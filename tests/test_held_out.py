import logging
from pathlib import Path

import pytest
import yaml

from pipelines.data.held_out import held_out, trained_on
from pipelines.errors import StageError
from pipelines.storage.fingerprint import manifest_digest
from pipelines.storage.manifest import read_manifest


@pytest.fixture
def codes(tiny_run: Path) -> Path:
    return tiny_run.parent / "run" / "codes"


def level(folder: Path, made_from: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(made_from))
    return folder


def test_what_a_folder_does_not_tell_is_not_known(tmp_path: Path) -> None:
    assert trained_on(tmp_path / "org" / "repository", "images") is None
    for number, settings in enumerate([{}, None, [1], {"made_from": None}, {"made_from": {"images": 7}}, "*alias"]):
        assert trained_on(level(tmp_path / str(number), settings), "images") is None
    assert trained_on(level(tmp_path / "told", {"made_from": {"images": "abc"}}), "images") == "abc"


@pytest.mark.parametrize("own", [True, False])
def test_all_levels_must_have_been_trained_on_the_split(
    own: bool, tmp_path: Path, codes: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mark = manifest_digest(read_manifest(codes, "codes", "encode"))
    right = level(tmp_path / "level0", {"made_from": {"codes": mark}})
    silent = level(tmp_path / "level1", {})
    wrong = level(tmp_path / "level2", {"made_from": {"codes": "0" * 64}})
    with caplog.at_level(logging.WARNING):
        assert held_out([right, right], "codes", codes, own) is True
        assert not caplog.text
        assert held_out([right, silent], "codes", codes, own) is None
    assert f"the val split of {codes} is not known to be held out from the training of {silent}" in caplog.text
    if own:
        with pytest.raises(StageError, match=f"{wrong} was trained on codes 000000000000 but {codes} now holds codes"):
            held_out([right, silent, wrong], "codes", codes, own)
    else:
        assert held_out([right, silent, wrong], "codes", codes, own) is None
