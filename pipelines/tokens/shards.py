"""The files of exported tokens: those of a shard, format by format, and those that go with all shards.

They lie beside one another, but datatrove's, litdata's and MosaicML's, whose readers take a folder for a split.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.storage.paths import make_folder
from pipelines.tokens.layout import TokenLayout
from pipelines.tokens.layout_file import TEXT_TOKENIZER, write_vocabulary
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

# The receipt of what goes with all shards, written by whoever finds them all.
ALL = "all"
FORMATS = {
    "bin": (
        *("{name}.bin", "{name}.idx", "{name}.keys", "{name}.captions"),
        *("datatrove/{split}/{name}.ds.index", "datatrove/{split}/{name}.ds.metadata"),
    ),
    "parquet": ("{name}.parquet",),
    "litdata": ("litdata/{split}/{name}.bin",),
    "mds": ("mds/{split}/{name}.mds",),
    "webdataset": ("{name}.tar",),
}


def files_of_shard(formats: Sequence[str], split: str, name: str) -> list[str]:
    """Return the files that a token shard may have, relative to the folder; captions are not always there."""
    return [file.format(split=split, name=name) for one in FORMATS if one in formats for file in FORMATS[one]]


def write_files_of_shard(
    folder: Path, formats: Sequence[str], split: str, name: str, records: Records, layout: TokenLayout
) -> tuple[list[str], dict[str, Any]]:
    """Write the files of a token shard; return their names, and what its receipt says of the records.

    Raises:
        StageError: a format cannot hold so many.
    """
    longest = layout.stated.max_tokens
    padding = Padding(longest, layout.pad) if layout.pad is not None and longest else None
    names = files_of_shard(formats, split, name)
    index: dict[str, dict] = {}
    if "bin" in formats:
        write_bin(folder, name, records)
        make_folder(folder / "datatrove" / split)
        tokenizer = f"smalti-{layout.stated.tokenizer[:12]}"
        write_datatrove(folder / "datatrove" / split / f"{name}.ds", records, tokenizer, folder / f"{name}.bin")
        names = [file for file in names if records.captions is not None or not file.endswith(".captions")]
    if "parquet" in formats:
        write_parquet(folder / f"{name}.parquet", records, padding)
    if "webdataset" in formats:
        write_webdataset(folder / f"{name}.tar", records)
    if "litdata" in formats:
        make_folder(folder / "litdata" / split)
        index["litdata"] = write_litdata(folder / "litdata" / split / f"{name}.bin", records, padding)
    if "mds" in formats:
        make_folder(folder / "mds" / split)
        index["mds"] = write_mds(folder / "mds" / split / f"{name}.mds", records)
    count = len(records.lengths)
    told = {
        "index": index,
        "samples": count,
        "tokens": len(records.ids),
        "images": len(set(records.source_keys)),
        "classes": len(set(records.classes or [])),
        "repeated": count - len({ids.tobytes() for ids in records.each()}),
    }
    return names, told


def files_of_all(formats: Sequence[str], splits: Sequence[str], single: bool, layout: TokenLayout) -> list[str]:
    """Return the files that go with all shards, but layout.json."""
    files = ["tokenizer.json", "added_tokens.txt", *([TEXT_TOKENIZER] if layout.text else [])]
    files += [f"{one}/{split}/index.json" for one in ("litdata", "mds") if one in formats for split in splits]
    return files + ([*(f"{split}.bin" for split in splits), "meta.pkl"] if single else [])


def write_files_of_all(
    folder: Path, formats: Sequence[str], receipts: Mapping[str, list[dict]], single: bool, layout: TokenLayout
) -> list[str]:
    """Write them.

    Args:
        folder: of the tokens.
        formats: of the shards.
        receipts: of the shards of each split.
        single: whether to join the shards of each split.
        layout: of the tokens.

    Returns:
        Their names.
    """
    write_vocabulary(folder, layout.vocabulary)
    receipts = {split: told for split, told in receipts.items() if told}
    for split, told in receipts.items():
        if "litdata" in formats:
            write_litdata_index(folder / "litdata" / split, [one["index"]["litdata"] for one in told], layout.dtype)
        if "mds" in formats:
            write_mds_index(folder / "mds" / split, [one["index"]["mds"] for one in told])
    if single:
        shards: dict[str, Sequence[str]] = {split: [one["shard"] for one in told] for split, told in receipts.items()}
        write_single(folder, shards, layout.vocabulary.names(), layout.vocabulary.rows)
    return files_of_all(formats, list(receipts), single, layout)
