"""Token shards: records as the files that trainers read, each whole or not there.

R records, N tokens of one where all have the same number.
"""

import json
import os
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipelines.errors import ConfigError, StageError
from pipelines.storage.paths import is_local, whole, write_json
from pipelines.storage.shards import array_bytes, write_tar

# Of the files that hold where things lie: litdata and mds in uint32 bytes, parquet in int32 tokens.
MAX_CHUNK_BYTES, MAX_LIST = 2**32, 2**31
# Tokens of 2 and 4 bytes as the formats number them. Megatron knows no uint32: below 2**31 the bytes are int32's.
MEGATRON, MEGATRON_DTYPE = b"MMIDIDX\x00\x00", {2: 8, 4: 4}
LITDATA_DTYPE = {2: 5, 4: 6}
IGNORED = -100  # what the losses of transformers leave out
ROW_GROUP = 4096


class Padding(NamedTuple):
    """To which length records are filled up, and the id of <pad>."""

    length: int
    pad: int


class Records(NamedTuple):
    """The records of a shard.

    Attributes:
        ids: uint16 or uint32 (tokens,), record after record.
        lengths: int64 (R,).
        prompts: int64 (R,), tokens at the beginning of each that are given, not learned.
        keys: of each, that of the code sample.
        source_keys: of the image.
        views: number of each one's view.
        classes: index of each one's class, where there are classes.
        captions: where there are captions.
        members: other files of each sample by extension ("txt", "json", "cls"), as the source has them.
    """

    ids: np.ndarray
    lengths: np.ndarray
    prompts: np.ndarray
    keys: Sequence[str]
    source_keys: Sequence[str]
    views: Sequence[int]
    classes: Sequence[int] | None = None
    captions: Sequence[str] | None = None
    members: Sequence[dict[str, bytes]] | None = None

    @property
    def ends(self) -> np.ndarray:
        """Token after the last of each record, int64 (R,)."""
        return np.cumsum(self.lengths)

    @property
    def same_length(self) -> int | None:
        """N, where all records have that many tokens."""
        return int(self.lengths[0]) if len(self.lengths) and (self.lengths == self.lengths[0]).all() else None

    def each(self) -> list[np.ndarray]:
        """Return the ids of each record."""
        return np.split(self.ids, self.ends)[:-1]


def write_bin(folder: Path, name: str, records: Records) -> list[str]:
    """Write NAME.bin, the tokens and nothing else, NAME.idx for Megatron, keys, and captions as JSON, one per line.

    Args:
        folder: of the token shards.
        name: without extension.
        records: of the shard.

    Returns:
        The names of the files.
    """
    contents = {
        f"{name}.bin": _bytes(records.ids),
        f"{name}.idx": _megatron_index(records),
        f"{name}.keys": "".join(f"{key}\n" for key in records.keys).encode(),
    }
    if records.captions is not None:
        contents[f"{name}.captions"] = "".join(f"{json.dumps(caption)}\n" for caption in records.captions).encode()
    for file, data in contents.items():
        _write(folder / file, data)
    return list(contents)


def _megatron_index(records: Records) -> bytes:
    size = records.ids.dtype.itemsize
    counts = np.array([len(records.lengths), len(records.lengths) + 1], "<u8")
    return b"".join(
        [
            MEGATRON,
            np.uint64(1).tobytes(),
            np.uint8(MEGATRON_DTYPE[size]).tobytes(),
            counts.tobytes(),
            records.lengths.astype("<i4").tobytes(),
            ((records.ends - records.lengths) * size).astype("<i8").tobytes(),
            np.arange(len(records.lengths) + 1, dtype="<i8").tobytes(),  # each record is a document
        ]
    )


def megatron_index(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the length of each record and its first byte in the .bin, int32 and int64 (R,), of an .idx as uint8.

    Raises:
        ValueError: it is none.
    """
    count = int(index[18:26].view("<u8")[0]) if index[:9].tobytes() == MEGATRON and len(index) >= 42 else 0
    if len(index) != 42 + 20 * count:
        raise ValueError(f"an .idx of {count} records must have {42 + 20 * count} bytes, has {len(index)}")
    return index[34 : 34 + 4 * count].view("<i4"), index[34 + 4 * count : 34 + 12 * count].view("<i8")


def write_datatrove(path: Path, records: Records, tokenizer: str, tokens: Path) -> None:
    """Write what datatrove and nanotron read: NAME.ds.index, NAME.ds.metadata and, where there are links, NAME.ds.

    Args:
        path: NAME.ds.
        records: of the shard.
        tokenizer: what the tokens are of.
        tokens: NAME.bin.
    """
    count = len(records.ids)
    _write(path.with_suffix(".ds.index"), _bytes(records.ends.astype(np.uint64)))
    metadata = f"{tokenizer}|{records.ids.dtype.itemsize}\n{count}\n{count} tokens"
    _write(path.with_suffix(".ds.metadata"), metadata.encode())
    if is_local(path):
        with whole(path) as temporary:
            temporary.symlink_to(os.path.relpath(tokens, path.parent))


def write_parquet(path: Path, records: Records, padding: Padding | None = None) -> None:
    """Write a table of __key__, input_ids, labels, class, caption, source_key and view.

    Labels are the ids, but what losses leave out on prompt and padding.

    Raises:
        StageError: more tokens than its offsets hold.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = records.ids.astype(np.int32)
    places = np.arange(len(ids)) - np.repeat(records.ends - records.lengths, records.lengths)
    labels = np.where(places < np.repeat(records.prompts, records.lengths), np.int32(IGNORED), ids)
    if padding:
        ids = _padded(ids, records.lengths, padding)
        labels = _padded(labels, records.lengths, padding._replace(pad=IGNORED))
    if len(ids) >= MAX_LIST:
        raise _too_large(path, len(ids), MAX_LIST, "tokens")
    lengths = np.full_like(records.lengths, padding.length) if padding else records.lengths
    offsets = pa.array(np.append(0, np.cumsum(lengths)).astype(np.int32))
    columns = {
        "__key__": pa.array(records.keys, pa.string()),
        "input_ids": pa.ListArray.from_arrays(offsets, pa.array(ids)),
        "labels": pa.ListArray.from_arrays(offsets, pa.array(labels)),
        "class": pa.array(_or_none(records.classes, records), pa.int64()),
        "caption": pa.array(_or_none(records.captions, records), pa.string()),
        "source_key": pa.array(records.source_keys, pa.string()),
        "view": pa.array(records.views, pa.int32()),
    }
    with whole(path) as temporary:
        pq.write_table(pa.table(columns), temporary, row_group_size=ROW_GROUP)


def _or_none(values: Sequence[Any] | None, records: Records) -> Sequence[Any]:
    return [None] * len(records.lengths) if values is None else values


def _padded(values: np.ndarray, lengths: np.ndarray, padding: Padding) -> np.ndarray:
    """Return what belongs to records of these lengths (tokens,), each filled up."""
    inside = np.arange(padding.length) < lengths[:, None]
    filled = np.full(inside.shape, padding.pad, values.dtype)
    filled[inside] = values
    return filled.reshape(-1)


def write_litdata(path: Path, records: Records, padding: Padding | None = None) -> dict[str, Any]:
    """Write a chunk for litdata's TokensLoader; return what its index says of it.

    Raises:
        StageError: more bytes than its offsets hold.
    """
    ids = _padded(records.ids, records.lengths, padding) if padding else records.ids
    lengths = np.full_like(records.lengths, padding.length) if padding else records.lengths
    data = _chunk(path, b"", _bytes(ids), lengths * ids.dtype.itemsize)
    _write(path, data)
    return {"chunk_bytes": len(data), "chunk_size": len(lengths), "dim": len(ids), "filename": path.name}


def write_litdata_index(folder: Path, chunks: Sequence[dict[str, Any]], dtype: np.dtype) -> None:
    """Write the index.json of a folder of chunks, those without records left out."""
    config = {
        "chunk_bytes": max(chunk["chunk_bytes"] for chunk in chunks),
        "chunk_size": None,
        "compression": None,
        "data_format": [f"no_header_numpy:{LITDATA_DTYPE[dtype.itemsize]}"],
        "data_spec": json.dumps([1, {"type": None, "context": None, "children_spec": []}]),  # torch's for a leaf
        "encryption": None,
        "item_loader": "TokensLoader",
    }
    write_json(folder / "index.json", {"chunks": [one for one in chunks if one["chunk_size"]], "config": config})


def write_mds(path: Path, records: Records) -> dict[str, Any]:
    """Write a shard of MosaicML streaming's format 2, column "tokens"; return what its index says of it.

    Raises:
        StageError: more bytes than its offsets hold.
    """
    dtype, length = records.ids.dtype, records.same_length
    info: dict[str, Any] = {
        "version": 2,
        "format": "mds",
        "compression": None,
        "hashes": [],
        "size_limit": None,
        "column_names": ["tokens"],
        "column_encodings": [f"ndarray:{dtype.name}:{length}" if length else f"ndarray:{dtype.name}"],
        "column_sizes": [length * dtype.itemsize if length else None],
    }
    header = json.dumps(info, sort_keys=True).encode()
    if length:
        data = _chunk(path, header, _bytes(records.ids), records.lengths * dtype.itemsize)
    else:
        samples = [_mds_sample(ids) for ids in records.each()]
        data = _chunk(path, header, b"".join(samples), np.array([len(sample) for sample in samples], np.int64))
    _write(path, data)
    raw = {"basename": path.name, "bytes": len(data), "hashes": {}}
    return {**info, "samples": len(records.lengths), "raw_data": raw, "zip_data": None}


def _mds_sample(ids: np.ndarray) -> bytes:
    """Return an array of any length: bytes, dimensions and width of the lengths, length, values."""
    width = np.min_scalar_type(len(ids))
    shape = bytes([1 << 2 | width.itemsize.bit_length() - 1]) + np.array([len(ids)], width).tobytes()
    data = shape + _bytes(ids)
    return np.uint32(len(data)).tobytes() + data


def write_mds_index(folder: Path, shards: Sequence[dict[str, Any]]) -> None:
    """Write the index.json of a folder of shards, those without records left out."""
    write_json(folder / "index.json", {"version": 2, "shards": [shard for shard in shards if shard["samples"]]})


def _chunk(path: Path, header: bytes, data: bytes, sizes: np.ndarray) -> bytes:
    """Return count, absolute offsets, header and data, as litdata and mds both have them."""
    first = 4 * (len(sizes) + 2) + len(header)
    offsets = first + np.append(0, np.cumsum(sizes))
    if offsets[-1] >= MAX_CHUNK_BYTES:
        raise _too_large(path, int(offsets[-1]), MAX_CHUNK_BYTES, "bytes")
    return np.uint32(len(sizes)).tobytes() + offsets.astype("<u4").tobytes() + header + data


def write_webdataset(path: Path, records: Records) -> None:
    """Write a tar of KEY.tokens.npy and what the source has beside it: the same files for every record."""
    members = records.members or [{}] * len(records.lengths)
    # Hugging Face's reader refuses samples that differ in this.
    absent = {name: b"{}" if name == "json" else b"" for name in sorted({name for one in members for name in one})}
    samples = (
        (key, {"tokens.npy": array_bytes(ids), **absent, **beside})
        for key, ids, beside in zip(records.keys, records.each(), members, strict=True)
    )
    with whole(path) as temporary:
        write_tar(temporary, samples)


def write_single(folder: Path, shards: dict[str, Sequence[str]], names: dict[int, str], rows: int) -> list[str]:
    """Join bin shards into SPLIT.bin files and write meta.pkl, as nanoGPT has them; return the files' names.

    Args:
        folder: of the shards.
        shards: split -> names of its shards, without extension.
        names: of tokens by id.
        rows: size of the vocabulary.

    Raises:
        ConfigError: ids beyond uint16, which nanoGPT reads.
    """
    if rows > 2**16:
        raise ConfigError(f"single is for nanoGPT, which reads uint16, but ids go up to {rows - 1}; turn single off")
    for split, found in shards.items():
        with whole(folder / f"{split}.bin") as temporary, temporary.open("wb") as joined:
            for name in found:
                with (folder / f"{name}.bin").open("rb") as file:
                    shutil.copyfileobj(file, joined, 2**20)
    meta = {"vocab_size": rows, "itos": names, "stoi": {name: number for number, name in names.items()}}
    _write(folder / "meta.pkl", pickle.dumps(meta, protocol=4))
    return [*(f"{split}.bin" for split in shards), "meta.pkl"]


def _bytes(array: np.ndarray) -> bytes:
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _write(path: Path, data: bytes) -> None:
    with whole(path) as temporary:
        temporary.write_bytes(data)


def _too_large(path: Path, found: int, most: int, what: str) -> StageError:
    return StageError(
        f"{path} would have {found} {what}, but its format holds fewer than {most}; "
        "pack smaller shards (images.shard_size), or leave this format out"
    )
