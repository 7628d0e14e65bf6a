import io
import json
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import ConfigError, StageError
from pipelines.storage.shards import index_shard
from pipelines.tokens import records
from pipelines.tokens.layout import TokenLayout
from pipelines.tokens.records import (
    Padding,
    Records,
    write_bin,
    write_datatrove,
    write_litdata,
    write_litdata_index,
    write_mds,
    write_mds_index,
    write_parquet,
    write_single,
    write_webdataset,
)
from pipelines.tokens.vocabulary import TextConfig, VocabConfig
from tests.layouts import CAPTION, SMALL, layout, manifest, shard, text_tokenizer

CAPTIONS = ["a cab", "", "abab", "bee\nand\r \u2028é", "c"]
LARGE = manifest([(2, 2), (4, 4)], [300, 70_000])


def ids_of(made: Records) -> list[list[int]]:
    """The ids of each record."""
    return [part.tolist() for part in made.each()]


def captioned(folder: Path, **settings: object) -> tuple[TokenLayout, Records]:
    text = TextConfig(tokenizer=str(text_tokenizer(folder / "text")))
    made = layout(template=CAPTION, text=text, vocab=VocabConfig(base=33), **settings)
    return made, shard(made, SMALL, 5, CAPTIONS)


@pytest.mark.parametrize(("codes", "dtype", "number"), [(SMALL, "<u2", 8), (LARGE, "<u4", 4)])
def test_bin_shards_hold_tokens_and_nothing_else(codes: dict, dtype: str, number: int, tmp_path: Path) -> None:
    made = shard(layout(codes), codes, 3)
    names = write_bin(tmp_path, "train-000000", made)
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())
    tokens = np.fromfile(tmp_path / "train-000000.bin", dtype).reshape(3, 25)
    assert tokens.tolist() == ids_of(made)
    index = (tmp_path / "train-000000.idx").read_bytes()
    assert index[:34] == b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, number, 3, 4)
    size = tokens.itemsize
    assert index[34:] == struct.pack("<3i3q4q", 25, 25, 25, 0, 25 * size, 50 * size, 0, 1, 2, 3)
    (tmp_path / "datatrove").mkdir()
    link = tmp_path / "datatrove" / "train-000000.ds"
    write_datatrove(link, made, "smalti", tmp_path / "train-000000.bin")
    assert link.with_suffix(".ds.index").read_bytes() == struct.pack("<3Q", 25, 50, 75)
    assert link.with_suffix(".ds.metadata").read_text() == f"smalti|{size}\n75\n75 tokens"
    assert link.readlink() == Path("../train-000000.bin")
    assert link.read_bytes() == (tmp_path / "train-000000.bin").read_bytes()
    assert (tmp_path / "train-000000.keys").read_text().splitlines() == list(made.keys)


def test_bytes_repeat_whoever_writes_them(tmp_path: Path) -> None:
    made = shard(layout(), SMALL, 4)
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        write_bin(folder, "x", made)
        write_parquet(folder / "x.parquet", made)
        write_litdata(folder / "x.lit", made)
        write_mds(folder / "x.mds", made)
        write_webdataset(folder / "x.tar", made)
    found = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert found[0] == found[1]


@pytest.mark.parametrize("write", [write_parquet, write_litdata, write_mds, write_webdataset])
def test_a_shard_that_fails_leaves_nothing_behind(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "x", shard(layout(), SMALL, 2))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [write_litdata, write_mds])
def test_a_shard_beyond_the_offsets_of_its_format_is_refused(
    write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = shard(layout(), SMALL, 2)
    whole = write(tmp_path / "x", made)
    size = (tmp_path / "x").stat().st_size
    assert size in (whole.get("chunk_bytes"), whole.get("raw_data", {}).get("bytes"))
    monkeypatch.setattr(records, "MAX_CHUNK_BYTES", size)
    with pytest.raises(StageError, match=rf"x would have {size} bytes, but its format holds fewer than {size}; pack"):
        write(tmp_path / "x", made)
    monkeypatch.setattr(records, "MAX_LIST", 50)
    with pytest.raises(StageError, match=r"x would have 50 tokens, but its format holds fewer than 50; pack"):
        write_parquet(tmp_path / "x", made)


def test_a_shard_may_be_empty(tmp_path: Path) -> None:
    """Pack leaves one where no image of it can be used."""
    nothing = np.zeros(0, np.int64)
    made = Records(np.zeros(0, np.uint16), nothing, nothing, [], [], [])
    write_bin(tmp_path, "x", made)
    write_parquet(tmp_path / "x.parquet", made)
    write_webdataset(tmp_path / "x.tar", made)
    assert index_shard(tmp_path / "x.tar") == []
    write_indexed(tmp_path, [shard(layout(), SMALL, 2), made], np.dtype(np.uint16))
    assert len(json.loads((tmp_path / "litdata/index.json").read_text())["chunks"]) == 1
    assert len(json.loads((tmp_path / "mds/index.json").read_text())["shards"]) == 1
    assert (tmp_path / "mds" / "train-000001.mds").read_bytes()[:4] == bytes(4)


def test_offsets_are_counted_in_64_bits() -> None:
    sizes = np.full(3, 2**31, np.int64)
    with pytest.raises(StageError, match="x would have 6442450964 bytes"):
        records._chunk(Path("x"), b"", b"", sizes)


def test_parquet_is_read_by_datasets(tmp_path: Path) -> None:
    import datasets

    made = shard(layout(), SMALL, 5)
    write_parquet(tmp_path / "train-000000.parquet", made)
    write_parquet(tmp_path / "train-000001.parquet", shard(layout(SMALL), SMALL, 3, seed=1))
    files = {"train": str(tmp_path / "train-*.parquet")}
    found = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))["train"]
    assert found.column_names == ["__key__", "input_ids", "labels", "class", "caption", "source_key", "view"]
    assert found.features["input_ids"] == datasets.List(datasets.Value("int32"))
    first = found[:5]
    assert first["input_ids"] == ids_of(made)
    assert first["labels"] == [[-100] * 3 + ids[3:] for ids in ids_of(made)]
    assert (first["__key__"], first["class"], first["view"]) == (made.keys, made.classes, made.views)
    assert first["source_key"] == made.source_keys
    assert first["caption"] == [None] * 5
    assert len(found) == 8


def test_records_with_captions_are_filled_up_where_asked(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    config, made = captioned(tmp_path, max_tokens=40)
    write_parquet(tmp_path / "a.parquet", made)
    write_parquet(tmp_path / "b.parquet", made, Padding(40, config.pad))
    plain, filled = (pq.read_table(tmp_path / name).to_pydict() for name in ("a.parquet", "b.parquet"))
    assert plain["input_ids"] == ids_of(made)
    assert plain["caption"] == filled["caption"] == CAPTIONS
    for ids, prompt, long, labels, short in zip(
        ids_of(made), made.prompts.tolist(), filled["input_ids"], filled["labels"], plain["labels"], strict=True
    ):
        assert long == ids + [config.pad] * (40 - len(ids))
        assert short == [-100] * prompt + ids[prompt:]
        assert labels == short + [-100] * (40 - len(ids))


@pytest.mark.parametrize("large", [False, True])
def test_webdataset_is_read_by_datasets(large: bool, tmp_path: Path) -> None:
    import datasets

    made = shard(layout(LARGE), LARGE, 4) if large else captioned(tmp_path)[1]
    write_webdataset(tmp_path / "x.tar", made)
    found = datasets.load_dataset(
        "webdataset", data_files=str(tmp_path / "x.tar"), cache_dir=str(tmp_path / "cache"), split="train"
    )
    assert found["tokens.npy"][:] == ids_of(made)
    assert found["__key__"][:] == list(made.keys)
    if not large:
        assert found["txt"][:] == CAPTIONS
        assert found["json"][0] == {"width": 16}


def test_webdataset_samples_have_the_same_files(tmp_path: Path) -> None:
    made = captioned(tmp_path)[1]
    write_webdataset(tmp_path / "x.tar", made)
    assert {tuple(sorted(sample.members)) for sample in index_shard(tmp_path / "x.tar")} == {
        ("json", "tokens.npy", "txt")
    }


def write_indexed(folder: Path, made: Sequence[Records], dtype: np.dtype) -> None:
    """Write shards as litdata and as mds, with their indices."""
    for name in ("litdata", "mds"):
        (folder / name).mkdir(parents=True)
    names = [f"train-{number:06d}" for number in range(len(made))]
    chunks = [write_litdata(folder / "litdata" / f"{n}.bin", one) for n, one in zip(names, made, strict=True)]
    write_litdata_index(folder / "litdata", chunks, dtype)
    write_mds_index(
        folder / "mds", [write_mds(folder / "mds" / f"{n}.mds", one) for n, one in zip(names, made, strict=True)]
    )


@pytest.mark.parametrize("codes", [SMALL, LARGE])
def test_litdata_and_mds_lay_records_behind_absolute_offsets(codes: dict, tmp_path: Path) -> None:
    config = layout(codes)
    made = [shard(config, codes, 3), shard(config, codes, 2, seed=1)]
    write_indexed(tmp_path, made, config.dtype)
    for name in ("litdata/train-000001.bin", "mds/train-000001.mds"):
        data = (tmp_path / name).read_bytes()
        assert struct.unpack("<I", data[:4]) == (2,)
        first, second, end = struct.unpack("<3I", data[4:16])
        assert end == len(data)
        assert [np.frombuffer(part, config.dtype).tolist() for part in (data[first:second], data[second:end])] == (
            ids_of(made[1])
        )
    litdata = json.loads((tmp_path / "litdata/index.json").read_text())
    number = 5 if config.dtype == np.uint16 else 6
    assert litdata["config"]["data_format"] == [f"no_header_numpy:{number}"]
    assert [chunk["dim"] for chunk in litdata["chunks"]] == [75, 50]
    mds = json.loads((tmp_path / "mds/index.json").read_text())
    assert [one["column_encodings"] for one in mds["shards"]] == [[f"ndarray:{config.dtype.name}:25"]] * 2


def test_single_is_what_nanogpt_reads(tmp_path: Path) -> None:
    config = layout()
    for name, seed in (("train-000000", 0), ("train-000001", 1), ("val-000000", 2)):
        write_bin(tmp_path, name, shard(config, SMALL, 4, seed=seed))
    shards = {"train": ["train-000000", "train-000001"], "val": ["val-000000"]}
    names = config.vocabulary.names()
    files = write_single(tmp_path, shards, names, config.vocabulary.rows)
    assert files == ["train.bin", "val.bin", "meta.pkl"]
    data = np.memmap(tmp_path / "train.bin", np.uint16, "r")
    assert data.tolist() == np.concatenate([shard(config, SMALL, 4, seed=seed).ids for seed in (0, 1)]).tolist()
    block = config.describe()["sequence_length"]["nanogpt"]
    for start in range(0, len(data) - block, block + 1):  # its windows: x, and y one token later
        assert names[int(data[start])] == "<bos>"
        assert names[int(data[start + 1 : start + 1 + block][-1])] == "<eos>"
    meta = pickle.load(io.BytesIO((tmp_path / "meta.pkl").read_bytes()))
    assert meta["vocab_size"] == 563
    assert meta["itos"][meta["stoi"]["<|image:1:00007|>"]] == "<|image:1:00007|>"


def test_single_is_refused_beyond_uint16(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nanoGPT, which reads uint16, but ids go up to 70306"):
        write_single(tmp_path, {}, {}, layout(LARGE).vocabulary.rows)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("codes", [SMALL, LARGE])
def test_datatrove_reads_a_record_at_a_time(codes: dict, tmp_path: Path) -> None:
    from datatrove.utils.dataset import DatatroveFolderDataset

    config = layout(codes)
    made = [shard(config, codes, 5), shard(config, codes, 3, seed=1)]
    (tmp_path / "train").mkdir()
    for number, one in enumerate(made):
        write_bin(tmp_path, f"train-{number:06d}", one)
        name = f"train-{number:06d}"
        write_datatrove(tmp_path / "train" / f"{name}.ds", one, "smalti", tmp_path / f"{name}.bin")
    length = config.describe()["sequence_length"]["datatrove"]
    wanted = [ids for one in made for ids in ids_of(one)]
    for positions in (True, False):
        size = config.dtype.itemsize
        found = DatatroveFolderDataset(str(tmp_path / "train"), length, token_size=size, return_positions=positions)
        assert [found[n]["input_ids"].tolist() for n in range(len(found))] == wanted
    assert found[1].keys() == {"input_ids"}


class Words:
    """What Megatron asks of a tokenizer."""

    def __init__(self, layout: TokenLayout) -> None:
        specials = layout.describe()["specials"]
        self.vocab_size, self.eod, self.pad = layout.vocabulary.rows, specials["<eos>"], -1
        self.unique_identifiers = {"layout": layout.stated.codes}


def gpt_dataset(config: TokenLayout, prefix: Path, length: int) -> object:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    settings = GPTDatasetConfig(
        random_seed=0,
        sequence_length=length,
        blend=None,
        split="1,0,0",
        path_to_cache=str(prefix.parent / f"cache {length}"),
        tokenizer=Words(config),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    indexed = IndexedDataset(str(prefix))
    count = len(indexed.sequence_lengths)
    return GPTDataset(indexed, str(prefix), np.arange(count, dtype=np.int32), None, Split.train, settings)


@pytest.mark.filterwarnings("ignore::UserWarning")  # what Megatron's other parts would like to have
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("codes", [SMALL, LARGE])
def test_megatron_starts_every_sample_at_a_record(codes: dict, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    config = layout(codes)
    made = shard(config, codes, 60)
    write_bin(tmp_path, "train-000000", made)
    indexed = IndexedDataset(str(tmp_path / "train-000000"))
    assert [indexed[number].tolist() for number in range(60)] == ids_of(made)
    assert indexed.document_indices.tolist() == list(range(61))
    bos = config.describe()["specials"]["<bos>"]
    length = config.describe()["sequence_length"]["megatron"]
    starts = {}
    for given in (length, length - 1):
        found = gpt_dataset(config, tmp_path / "train-000000", given)
        starts[given] = [int(found[number]["tokens"][0]) == bos for number in range(len(found))]
    assert len(starts[length]) == 59  # of the last sample Megatron would read one token more
    assert all(starts[length])
    assert sum(starts[length - 1]) < 10
    found = gpt_dataset(config, tmp_path / "train-000000", length)
    seen = sorted(found[number]["tokens"].tolist() for number in range(59))
    assert all(ids in ids_of(made) for ids in seen)
    assert len({tuple(ids) for ids in seen}) == 59


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_megatron_reads_records_of_any_length(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    made = captioned(tmp_path)[1]
    write_bin(tmp_path, "x", made)
    indexed = IndexedDataset(str(tmp_path / "x"))
    assert [indexed[number].tolist() for number in range(5)] == ids_of(made)
