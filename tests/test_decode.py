"""Tokens become pictures, on the tokenizer of the run of format 1: two levels, classes "0", "1" and "7"."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipelines.errors import StageError
from pipelines.stages.decode import batches
from pipelines.storage.manifest import read_manifest
from pipelines.tokens.layout import TokenLayout
from pipelines.tokens.records import Records, write_bin, write_parquet
from pipelines.tokens.vocabulary import TextConfig, VocabConfig
from tests.layouts import CAPTION, layout, shard, text_tokenizer
from tokenizer import HierarchicalVQVAE

Smalti = Callable[..., tuple[int, str]]
FORMAT1 = Path(__file__).parent / "data" / "format1" / "run"
CODES = read_manifest(FORMAT1 / "codes", "codes", "encode")
COUNT = 3

RECORD = f"{[0] * layout(CODES).length}\n".encode()  # type: ignore[operator]


def run_with(folder: Path, made: TokenLayout) -> tuple[Path, Records]:
    """A run with a tokenizer and exported tokens; those, and the records."""
    shutil.copytree(FORMAT1 / "tokenizer", folder / "tokenizer")
    tokens = folder / "tokens"
    tokens.mkdir()
    records = shard(made, CODES, COUNT, ["a", "", "ab"] if made.text else None)
    write_bin(tokens, "train-000000", records)
    made.save(tokens, {})
    return tokens, records


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """Exported tokens: layout.json and train-000000.bin."""
    return run_with(tmp_path / "run", layout(CODES))[0]


def ids_of(tokens: Path) -> np.ndarray:
    return np.fromfile(tokens / "train-000000.bin", np.uint16).reshape(COUNT, -1)


def written(path: Path, records: list[list[int]]) -> Path:
    """Records as a file of the format that its name says."""
    if path.suffix == ".npy":
        np.save(path, np.array(records))
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(one)}\n" for one in records))
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"input_ids": records}), path)
    else:
        np.array(records, np.uint16).tofile(path)
    return path


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_every_kind_of_file_becomes_the_same_pictures(tokens: Path, tmp_path: Path, smalti: Smalti) -> None:
    ids = ids_of(tokens)
    files = [written(tmp_path / f"drawn{suffix}", ids.tolist()) for suffix in (".npy", ".jsonl", ".parquet", ".bin")]
    files[1].write_text("".join(json.dumps({"input_ids": one}) + "\n" for one in ids.tolist()))
    drawn = []
    for file in [tokens / "train-000000.bin", *files]:
        out = tmp_path / f"out of {file.name}"
        assert smalti("decode", file, "--layout", tokens / "layout.json", "--out", out)[0] == 0
        names = [f"{number:08d}.png" for number in range(COUNT)]
        assert sorted(contents(out)) == [*names, "decoded.json", "grid.png"]
        drawn.append([np.asarray(Image.open(out / name)) for name in names])
    model = HierarchicalVQVAE.from_pretrained(FORMAT1 / "tokenizer")
    expected = (layout(CODES).images(ids, model)[:, 0] + 1) * 127.5
    assert np.array_equal(drawn[0], expected.round().to(torch.uint8).numpy())
    assert all(np.array_equal(drawn[0], other) for other in drawn[1:])


def test_captions_are_passed_over(tmp_path: Path, smalti: Smalti) -> None:
    text = TextConfig(tokenizer=str(text_tokenizer(tmp_path / "text")))
    made = layout(CODES, template=CAPTION, text=text, vocab=VocabConfig(base=40))
    tokens, records = run_with(tmp_path / "run", made)
    assert len(set(records.lengths.tolist())) > 1
    write_parquet(tmp_path / "drawn.parquet", records)
    outs = []
    for file in (tokens / "train-000000.bin", tmp_path / "drawn.parquet"):
        outs.append(tmp_path / f"out{file.suffix}")
        assert smalti("decode", file, "--layout", tokens, "--out", outs[-1])[0] == 0
    assert all((outs[0] / f"{n:08d}.png").read_bytes() == (outs[1] / f"{n:08d}.png").read_bytes() for n in range(COUNT))
    index = (tokens / "train-000000.idx").read_bytes()
    for damaged in (index[:-1], b"x" * 40, b""):
        (tokens / "train-000000.idx").write_bytes(damaged)
        code, said = smalti("decode", tokens / "train-000000.bin", "--layout", tokens, "--out", tmp_path / "none")
        assert code == 1
        assert "an .idx of" in said and "train-000000.bin cannot be decoded" in said
    (tokens / "train-000000.idx").unlink()
    code, said = smalti("decode", tokens / "train-000000.bin", "--layout", tokens, "--out", tmp_path / "none")
    assert code == 1
    assert "train-000000.idx" in said


def test_records_that_cannot_be_are_named_and_nothing_is_written(tokens: Path, tmp_path: Path, smalti: Smalti) -> None:
    ids = ids_of(tokens).tolist()
    long = ids * 30
    long[70] = [*long[70][:5], 0, *long[70][6:]]
    for name, records, message in [
        ("short.jsonl", [ids[0], ids[1][:-1]], f"record 1 must have {len(ids[0])} tokens, has {len(ids[0]) - 1}"),
        ("short.npy", [one[1:] for one in ids], f"record 0 must have {len(ids[0])} tokens"),
        ("short.bin", [one[1:] for one in ids], f"it must be whole records of {len(ids[0])} tokens each in uint16"),
        ("wrong.npy", long, "record 70 has token 0 at position 5, where a code of level 0 must stand"),
        ("wrong.parquet", long, "record 70 has token 0 at position 5"),
        ("half.jsonl", [ids[0], [0.5] * len(ids[0])], "record 1 must be a list of integers, is float64"),
        ("none.jsonl", [], "must hold at least one record"),
        ("pictures.txt", ids, "tokens must be a local file, .npy, .bin, .jsonl, .parquet"),
    ]:
        file = written(tmp_path / name, records)
        code, said = smalti("decode", file, "--layout", tokens, "--out", tmp_path / "out")
        assert code == 1
        assert message in said and name in said
        assert len(said.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.npy", b"no array", "cannot be decoded after 0 records"),
        ("x.jsonl", RECORD * 70 + b'{"ids": [1]}\n', "cannot be decoded after 70 records: line 71 has no input_ids"),
        ("x.jsonl", RECORD + b"\n" + RECORD, "cannot be decoded after 1 record: line 2 is blank"),
        ("x.jsonl", RECORD + b"[1,\n", "cannot be decoded after 1 record: line 2 is not JSON: .* at character 4"),
        ("x.jsonl", b"[1, [2]]\n", "cannot be decoded"),
        ("x.parquet", b"PAR1", "cannot be decoded"),
        ("x.bin", b"", "must be whole records"),
        ("y.npy", None, "cannot read .*y.npy: No such file"),
    ],
)
def test_files_that_hold_no_tokens_are_told_in_a_line(
    name: str, data: bytes | None, message: str, tmp_path: Path
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(StageError, match=message):
        list(batches(tmp_path / name, layout(CODES)))


def test_blank_lines_at_the_end_are_no_records(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(RECORD * 65 + b"\n  \n")
    assert [(first, len(batch)) for first, batch in batches(tmp_path / "x.jsonl", layout(CODES))] == [(0, 64), (64, 1)]


def test_objects_are_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{}, {}], object), allow_pickle=True)
    with pytest.raises(StageError, match="cannot be decoded after 0 records"):
        list(batches(tmp_path / "x.npy", layout(CODES)))


def test_another_tokenizer_is_refused(tokens: Path, tmp_path: Path, smalti: Smalti) -> None:
    other = HierarchicalVQVAE.from_pretrained(FORMAT1 / "tokenizer")
    other.bottlenecks[0].vectors[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    command = ["decode", tokens / "train-000000.bin", "--layout", tokens, "--out", tmp_path / "out"]
    code, said = smalti(*command, "--tokenizer", tmp_path / "other")
    assert code == 1
    assert "these tokens are of tokenizer" in said and "but this one is" in said
    shutil.copytree(tmp_path / "other", tokens.parent / "tokenizer", dirs_exist_ok=True)
    assert "but this one is" in smalti(*command)[1]
    shutil.rmtree(tokens.parent / "tokenizer")
    assert "lies in no run that has a tokenizer; name its folder or hub id by --tokenizer" in smalti(*command)[1]
    assert not (tmp_path / "out").exists()
    assert smalti(*command, "--tokenizer", FORMAT1 / "tokenizer")[0] == 0


def test_another_layout_or_order_is_refused(tokens: Path, tmp_path: Path, smalti: Smalti) -> None:
    for name, made, differs in [
        ("order", layout(CODES, order="nested"), "order"),
        ("base", layout(CODES, vocab=VocabConfig(base=7)), "vocabulary"),
        ("codes", TokenLayout(replace(layout(CODES).stated, codes="b" * 64)), "codes"),
    ]:
        (tmp_path / name).mkdir()
        made.save(tmp_path / name, {})
        code, said = smalti(
            "decode", tokens / "train-000000.bin", "--layout", tmp_path / name, "--out", tmp_path / "out"
        )
        assert code == 1
        assert f"lies beside a layout with another {differs} than that of --layout" in said
    assert not (tmp_path / "out").exists()


def test_what_is_not_of_these_tokens_is_not_overwritten(tokens: Path, tmp_path: Path, smalti: Smalti) -> None:
    out = tmp_path / "out"
    command = ["decode", tokens / "train-000000.bin", "--layout", tokens, "--out", out]
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "00000002.png").write_text("mine")
    code, said = smalti(*command)
    assert code == 1
    assert "00000002.png must not be overwritten, for it is not of these tokens; choose another --out" in said
    assert sorted(contents(out)) == ["00000002.png", "notes.txt"]
    (out / "00000002.png").unlink()
    assert smalti(*command)[0] == 0
    complete = contents(out)
    (out / "00000001.png").unlink()  # as if it had been stopped
    assert smalti(*command)[0] == 0
    assert contents(out) == complete
    other = written(tmp_path / "other.npy", ids_of(tokens)[::-1].tolist())
    assert smalti("decode", other, *command[2:])[0] == 1
    assert contents(out) == complete


def test_wrong_usage_is_one_line_and_help_is_help(tokens: Path, smalti: Smalti) -> None:
    code, said = smalti("decode", tokens / "train-000000.bin", "--layout", tokens)
    assert code == 2
    assert "the following arguments are required: --out" in said
    assert len(said.strip().splitlines()) == 1
    assert smalti("decode", "x.npy", "--layout", tokens, "--out", "x", "--order", "nested")[0] == 2
    code, said = smalti("decode", "--help")
    assert code == 0
    assert "--tokenizer" in said and "TOKENS" in said
