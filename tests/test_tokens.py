import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pipelines.errors import StageError
from pipelines.tokens.dataset import TokenDataset
from pipelines.tokens.layout import TokenLayout
from pipelines.tokens.records import Records, write_bin
from pipelines.tokens.vocabulary import TextConfig, VocabConfig
from tests.layouts import CAPTION, SMALL, layout, shard, text_tokenizer

CAPTIONS = ["a cab", "", "abab", "bee\nand\r \u2028é", "c"]


def exported(folder: Path, config: TokenLayout, shards: list[Records]) -> Path:
    """A folder of bin shards."""
    folder.mkdir()
    listed = []
    for number, made in enumerate(shards):
        name = f"train-{number:06d}"
        files = write_bin(folder, name, made)
        sums = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in files}
        listed.append({"shard": name, "records": len(made.lengths), "tokens": len(made.ids), "sha256": sums})
    config.save(folder, {"train": listed})
    return folder


def none() -> Records:
    empty = np.zeros(0, np.int64)
    return Records(np.zeros(0, np.uint16), empty, empty, [], [], [])


def test_records_come_in_the_order_of_the_shards(tmp_path: Path) -> None:
    config = layout()
    shards = [shard(config, SMALL, 3), none(), shard(config, SMALL, 2, seed=1)._replace(keys=["a\rb", "é"])]
    found = TokenDataset(exported(tmp_path / "tokens", config, shards), "train")
    assert len(found) == 5
    wanted = torch.from_numpy(np.concatenate([made.ids for made in shards]).astype(np.int64)).view(5, 25)
    assert torch.equal(torch.stack([found[number] for number in range(5)]), wanted)
    assert found[0].dtype == torch.int64
    assert [found.key(number) for number in range(5)] == [*shards[0].keys, *shards[2].keys]
    assert found.caption(4) is None
    assert torch.equal(torch.cat(list(DataLoader(found, batch_size=2))), wanted)
    assert torch.equal(torch.stack([*found]), wanted)
    for number in (-1, 5):
        with pytest.raises(IndexError, match=f"records are numbered from 0 to 4, got {number}"):
            found[number]
    with pytest.raises(ValueError, match="records are numbered by integers, got True"):
        found[True]


def test_records_of_any_length_come_with_their_captions(tmp_path: Path) -> None:
    text = TextConfig(tokenizer=str(text_tokenizer(tmp_path / "text")))
    config = layout(template=CAPTION, text=text, vocab=VocabConfig(base=33))
    made = shard(config, SMALL, 5, CAPTIONS)
    found = TokenDataset(exported(tmp_path / "tokens", config, [made]), "train")
    wanted = np.split(made.ids, made.ends[:-1])
    assert [found[number].tolist() for number in range(5)] == [part.tolist() for part in wanted]
    assert [found.caption(number) for number in range(5)] == CAPTIONS


def test_tokens_are_mapped_not_read(tmp_path: Path) -> None:
    config = layout()
    found = TokenDataset(exported(tmp_path / "tokens", config, [shard(config, SMALL, 3)]), "train")
    assert len(found[1]) == 25
    assert len(pickle.dumps(found)) < 20_000 + len(pickle.dumps(found.layout))
    assert torch.equal(pickle.loads(pickle.dumps(found))[1], found[1])


def test_tokens_that_were_made_anew_are_seen(tmp_path: Path) -> None:
    config = layout()
    for seed in (0, 1):
        made = shard(config, SMALL, 3, seed=seed)
        folder = exported(tmp_path / f"tokens {seed}", config, [made])
        if seed:
            folder.rename(tmp_path / "x")
            (tmp_path / "tokens 0").rename(tmp_path / "old")
            (tmp_path / "x").rename(tmp_path / "tokens 0")
        found = TokenDataset(tmp_path / "tokens 0", "train")
        assert torch.equal(found[0], torch.from_numpy(made.ids[:25].astype(np.int64)))
        assert found.key(0) == f"{seed}-0000"


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    config = layout()
    folder = exported(tmp_path / "tokens", config, [shard(config, SMALL, 3)])
    with pytest.raises(StageError, match="must hold a split val, has train"):
        TokenDataset(folder, "val")
    with pytest.raises(StageError, match="tokens are mapped from local files"):
        TokenDataset("s3://bucket/tokens", "train")
    found = TokenDataset(folder, "train")
    (folder / "train-000000.keys").write_text("a\n")
    with pytest.raises(StageError, match=r"train-000000\.keys must have 3 lines, has 1"):
        found.key(0)
    (folder / "train-000000.bin").write_bytes(b"x" * 149)
    with pytest.raises(StageError, match=r"train-000000\.bin must have 150 bytes, has 149"):
        found[0]
    (folder / "train-000000.bin").unlink()
    with pytest.raises(StageError, match=r"cannot read .*train-000000\.bin: No such file.*; export with bin"):
        found[0]
