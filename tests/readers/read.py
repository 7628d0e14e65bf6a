"""Read exported tokens with litdata and MosaicML streaming, whose packages do not go with those of the tests.

python -m tests.readers.read           # of shards made up here
python -m tests.readers.read TOKENS    # of a folder of tokens with bin, and litdata or mds, among its formats
"""

import hashlib
import importlib.util
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np

from pipelines.tokens.dataset import TokenDataset
from pipelines.tokens.layout import TokenLayout
from pipelines.tokens.records import Padding, write_bin, write_litdata, write_litdata_index, write_mds, write_mds_index
from pipelines.tokens.vocabulary import TextConfig, VocabConfig
from tests.layouts import CAPTION, SMALL, layout, manifest, shard, text_tokenizer


def litdata_records(folder: Path, length: int) -> Iterator[list[int]]:
    """The blocks that litdata reads."""
    from litdata import StreamingDataset, TokensLoader

    for block in StreamingDataset(str(folder), item_loader=TokensLoader(block_size=length), shuffle=False):
        yield np.asarray(block).tolist()


def mds_records(folder: Path) -> Iterator[list[int]]:
    """The samples that MosaicML streaming reads, from local files and as its streaming data set does."""
    if "streaming" not in sys.modules:
        # Its front page imports data sets of pictures, and with them torchvision, which LocalDataset does not need.
        spec = importlib.util.find_spec("streaming")
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError("streaming")
        front = ModuleType("streaming")
        front.__path__ = list(spec.submodule_search_locations)
        sys.modules["streaming"] = front
    from streaming.base.local import LocalDataset

    found = LocalDataset(str(folder))
    for number in range(len(found)):
        yield found[number]["tokens"].tolist()


def check(folder: Path) -> None:
    """Compare what each library reads of each split with what TokenDataset does.

    Raises:
        AssertionError: they differ.
    """
    config = TokenLayout.load(folder)
    for split in config.shards:
        data = TokenDataset(folder, split)
        wanted = [data[number].tolist() for number in range(len(data))]
        if (folder / "litdata" / split).exists():
            length = config.length or config.stated.max_tokens
            filled = [record + [config.pad] * (length - len(record)) for record in wanted]
            assert list(litdata_records(folder / "litdata" / split, length)) == filled
            tell("litdata", "TokensLoader", split, filled)
        if (folder / "mds" / split).exists():
            assert list(mds_records(folder / "mds" / split)) == wanted
            tell("mosaicml-streaming", "LocalDataset", split, wanted)


def tell(package: str, reader: str, split: str, records: list[list[int]]) -> None:
    """Say what was read."""
    lengths = sorted({len(record) for record in records})
    print(f"{package} {version(package)} {reader}: {split}, {len(records)} records of {lengths} tokens, ids equal")


def make_up(folder: Path, config: TokenLayout, codes: dict, captions: list[str] | None) -> Path:
    """Write shards as the stage does, in every format that is read here."""
    for name in ("litdata", "mds"):
        (folder / name / "train").mkdir(parents=True)
    padding = None if config.length else Padding(config.stated.max_tokens, config.pad or 0)
    shards, chunks, parts = [], [], []
    for number, (first, stop) in enumerate(pairwise([0, 5, 12, 13])):
        name = f"train-{number:06d}"
        made = shard(config, codes, stop - first, captions and captions[first:stop], seed=number)
        sums = {
            file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in write_bin(folder, name, made)
        }
        shards.append({"shard": name, "records": stop - first, "tokens": len(made.ids), "sha256": sums})
        chunks.append(write_litdata(folder / "litdata" / "train" / f"{name}.bin", made, padding))
        parts.append(write_mds(folder / "mds" / "train" / f"{name}.mds", made))
    write_litdata_index(folder / "litdata" / "train", chunks, config.dtype)
    write_mds_index(folder / "mds" / "train", parts)
    config.save(folder, {"train": shards})
    return folder


def main() -> None:
    """Check a folder, or three that are made up: uint16, uint32, and records of any length."""
    warnings.simplefilter("ignore")
    if len(sys.argv) > 1:
        check(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        large = manifest([(2, 2), (4, 4)], [300, 70_000])
        check(make_up(folder / "uint16", layout(), SMALL, None))
        check(make_up(folder / "uint32", layout(large), large, None))
        text = TextConfig(tokenizer=str(text_tokenizer(folder / "text")))
        config = layout(template=CAPTION, text=text, vocab=VocabConfig(base=33), max_tokens=300)
        check(make_up(folder / "captions", config, SMALL, ["ab" * 200, "", "abc", *"defghijklm"]))


if __name__ == "__main__":
    main()
