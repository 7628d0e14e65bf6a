"""Command decode: token files, whoever drew them, become pictures.

N tokens of a record.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.compute.devices import ComputeConfig, inference_device
from pipelines.data.images import to_uint8
from pipelines.data.pictures import encode_image, picture_grid, to_picture
from pipelines.errors import CommandParser, StageError, told_to_user
from pipelines.progress import counted, progress_bar
from pipelines.storage.fingerprint import digest, tokenizer_fingerprint
from pipelines.storage.folders import is_complete
from pipelines.storage.paths import exists, is_local, make_folder, place, read_bytes, whole, write_text
from pipelines.tokens.layout import TokenLayout
from pipelines.tokens.records import megatron_index
from tokenizer import HierarchicalVQVAE

logger = logging.getLogger(__name__)

BATCH = 64
# Images in grid.png: at most ten rows of ten.
GRID_SIDE = 10
RECEIPT = "decoded.json"


def command(arguments: Sequence[str]) -> None:
    """Do what `smalti decode` is asked for.

    Raises:
        ConfigError: wrong usage.
    """
    about = "Make pictures, 00000000.png and so on in the order of the records, and grid.png."
    parser = CommandParser("smalti decode", about)
    parser.add_argument("tokens", metavar="TOKENS", help="npy (records, N); bin; jsonl; parquet with input_ids")
    parser.add_argument("--layout", required=True, help="the layout.json that was exported, or its folder")
    parser.add_argument("--out", required=True, help="folder for the pictures")
    parser.add_argument("--tokenizer", default="", help="folder or hub id; if not given, that of the layout's run")
    if {"-h", "--help"} & set(arguments):
        print(parser.format_help())
        return
    found = parser.parse_args(arguments)
    decode(place(found.tokens), place(found.layout), place(found.out, writable=True), found.tokenizer)


def decode(tokens: Path, layout: Path, out: Path, tokenizer: str = "") -> None:
    """Write a picture of each record of a token file, grid.png, and decoded.json, which says what they are of.

    Nothing is written unless every record can be decoded.

    Args:
        tokens: .npy (records, N), .bin as exported, .jsonl with a list of ids or an object with input_ids a line, or
            .parquet with a column input_ids.
        layout: layout.json or its folder.
        out: folder of the pictures.
        tokenizer: folder or hub id; empty for that of the run in whose folder the layout lies.

    Raises:
        StageError: layout, tokens and tokenizer do not belong together, a record cannot be, or something else lies
            where a picture would be written.
    """
    folder = layout.parent if layout.name == "layout.json" else layout
    known = TokenLayout.load(folder)
    _check_beside(tokens, known)
    model = _load_tokenizer(tokenizer, folder)
    known.check_tokenizer(model)
    count = 0
    for first, records in batches(tokens, known):
        try:
            known.decode(records, first)
        except StageError as error:
            raise StageError(f"{tokens}: {error}") from error
        count += len(records)
    if not count:
        raise StageError(f"{tokens} must hold at least one record, holds none")
    _open(out, count, _receipt(tokens, known, model))
    _write(tokens, known, model.to(inference_device(ComputeConfig())), out, count)
    logger.info("decode: %s -> %s (%s images)", tokens, out, f"{count:,}")


def _check_beside(tokens: Path, layout: TokenLayout) -> None:
    """Refuse exported tokens that lie beside another layout."""
    if not exists(tokens.parent / "layout.json"):
        return
    theirs, given = TokenLayout.load(tokens.parent).describe(), layout.describe()
    differs = [name for name in given if theirs[name] != given[name]]
    if differs:
        raise StageError(
            f"{tokens} lies beside a layout with another {differs[0]} than that of --layout; name the one beside it"
        )


def _load_tokenizer(name: str, layout: Path) -> HierarchicalVQVAE:
    around = (one / "tokenizer" for one in layout.absolute().parents if is_complete(one / "tokenizer"))
    found = name or next(around, None)
    if not found:
        raise StageError(f"{layout} lies in no run that has a tokenizer; name its folder or hub id by --tokenizer")
    with told_to_user():
        return HierarchicalVQVAE.from_pretrained(found).eval()


def _receipt(tokens: Path, layout: TokenLayout, model: HierarchicalVQVAE) -> str:
    with tokens.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    made_of = {"tokens": sha256, "layout": digest(layout.describe()), "tokenizer": tokenizer_fingerprint(model)}
    return json.dumps(made_of, indent=1) + "\n"


def _open(out: Path, count: int, receipt: str) -> None:
    """Make the folder ready; what the same command has left there is written again."""
    make_folder(out)
    names = [RECEIPT, "grid.png", *(f"{number:08d}.png" for number in range(count))]
    taken = next((name for name in names if exists(out / name)), None)
    if taken and not (taken == RECEIPT and read_bytes(out / RECEIPT) == receipt.encode()):
        raise StageError(f"{out / taken} must not be overwritten, for it is not of these tokens; choose another --out")
    write_text(out / RECEIPT, receipt)


def _write(tokens: Path, layout: TokenLayout, model: HierarchicalVQVAE, out: Path, count: int) -> None:
    shown: list[np.ndarray] = []
    with progress_bar(count, "decode", "images") as bar:
        for first, records in batches(tokens, layout):
            for number, pixels in enumerate(to_uint8(layout.images(records, model)), first):
                with whole(out / f"{number:08d}.png") as temporary:
                    temporary.write_bytes(encode_image(to_picture(pixels), "png"))
                if number < GRID_SIDE**2:
                    shown.append(pixels)
            bar.update(len(records))
    rows = [shown[start : start + GRID_SIDE] for start in range(0, len(shown), GRID_SIDE)]
    with whole(out / "grid.png") as temporary:
        picture_grid(rows).save(temporary, "PNG")


def batches(tokens: Path, layout: TokenLayout) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Yield the number of the first record, and some records of a token file.

    Raises:
        StageError: the file is none of tokens, or a record is not as long as the layout's; names both.
    """
    read = READERS.get(tokens.suffix)
    if read is None or not is_local(tokens):
        raise StageError(f"tokens must be a local file, {', '.join(READERS)}; got {tokens}")
    done = 0

    def checked() -> Iterator[np.ndarray]:
        nonlocal done
        for record in map(np.asarray, read(tokens, layout)):
            _check_record(record, done, layout.length)
            done += 1
            yield record

    try:
        records = checked()
        while batch := list(islice(records, BATCH)):
            yield done - len(batch), batch
    except OSError as error:
        raise StageError(f"cannot read {error.filename or tokens}: {error.strerror or error}") from error
    except Exception as error:  # parsers raise many kinds on bytes that lie
        raise StageError(f"{tokens} cannot be decoded after {counted(done, 'record')}: {error}") from error


def _check_record(record: np.ndarray, number: int, length: int | None) -> None:
    if record.ndim != 1 or (record.dtype.kind not in "iu" and record.size):
        raise StageError(f"record {number} must be a list of integers, is {record.dtype} of {record.shape}")
    if length and len(record) != length:
        raise StageError(f"record {number} must have {length} tokens, has {len(record)}; is it of another layout?")


def _npy(path: Path, layout: TokenLayout) -> Iterator[np.ndarray]:
    array = np.lib.format.open_memmap(path, mode="r")  # refuses objects
    if array.ndim != 2:
        raise ValueError(f"it must be an array of (records, tokens), is {array.shape}")
    yield from array


def _bin(path: Path, layout: TokenLayout) -> Iterator[np.ndarray]:
    """Read records of one length, or those that NAME.idx tells of."""
    itemsize, size = layout.dtype.itemsize, path.stat().st_size
    if layout.length:
        ends = np.arange(layout.length, size // itemsize + layout.length, layout.length)
    else:
        ends = megatron_index(np.fromfile(path.with_suffix(".idx"), np.uint8))[0].cumsum(dtype=np.int64)
    if size % itemsize or not len(ends) or ends[-1] * itemsize != size or (np.diff(ends, prepend=0) < 0).any():
        what = f"{layout.length} tokens each" if layout.length else "the lengths that its .idx tells"
        raise ValueError(f"it must be whole records of {what} in {layout.dtype}, has {size} bytes")
    tokens = np.memmap(path, layout.dtype.newbyteorder("<"), "r")
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        yield tokens[start:end]


def _jsonl(path: Path, layout: TokenLayout) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        blank = 0
        for number, line in enumerate(file, 1):
            if not line.strip():  # at the end, that is
                blank = blank or number
                continue
            if blank:
                raise ValueError(f"line {blank} is blank")
            try:
                found = json.loads(line.rstrip())
                yield found["input_ids"] if isinstance(found, dict) else found
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON: {error.msg} at character {error.colno}") from error
            except KeyError as error:
                raise ValueError(f"line {number} has no input_ids") from error


def _parquet(path: Path, layout: TokenLayout) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        if "input_ids" not in file.schema_arrow.names:
            raise ValueError(f"it must have a column input_ids, has {', '.join(file.schema_arrow.names)}")
        for batch in file.iter_batches(BATCH, columns=["input_ids"]):
            yield from batch.column(0).to_pylist()


READERS: dict[str, Callable[[Path, TokenLayout], Iterator[Any]]] = {
    ".npy": _npy,
    ".bin": _bin,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
