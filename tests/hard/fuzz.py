"""Files from strangers: mutated files of every kind that smalti reads, each of which must do or be refused clearly.

    python tests/hard/fuzz.py [--each 2000] [--seed 0] [--kind shards] [--keep FOLDER]

Makes a tiny run in a temporary folder, then for each case a copy of it with one file damaged, lying or hostile, and
hands that to the product's own commands and readers. What vouches for a file (receipts, manifests, checksums of tar and
png) is mostly made to fit, so that parsers are reached. Accepted are success, and an error of one sentence. Findings
are other exceptions, more than ten seconds, a gigabyte of memory more, code that ran (a canary file appears), and
output of a command that failed. A case is a function of the seed, its kind and its number; `--keep` keeps what those
with findings were made of. The exit code is 1 if there are any.
"""

import argparse
import contextlib
import faulthandler
import hashlib
import io
import json
import logging
import os
import re
import resource
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, NoReturn

import huggingface_hub.constants
import torch
import yaml
from PIL import Image

from pipelines.cli import main as smalti
from pipelines.config import load_config
from pipelines.data.codes import Codes
from pipelines.data.images import ImageShards
from pipelines.run import Run
from pipelines.storage.cache import Cache
from pipelines.storage.receipts import read_receipt
from pipelines.storage.shards import index_shard
from pipelines.training.checkpoints import WholeCheckpoints
from prior import HierarchicalPrior
from tokenizer import HierarchicalVQVAE

HANG_S, DEAD_S, MEMORY_BYTES = 10, 60, 2**30
ROOT = Path(tempfile.mkdtemp(prefix="smalti-fuzz-"))
CANARY, BASE, CACHE = ROOT / "canary", ROOT / "config.yaml", Cache(ROOT / "cache", 2**30)
TRAINING = {"steps": 2, "batch_size": 4, "val_every": 2, "checkpoint_every": 2, "precision": "32-true"}
MODEL = {"strides": [4, 2], "codebook_size": [4, 300], "code_dim": 4, "width": 4, "residual_width": 4}
SNAIL = {"width": 4, "blocks": 1, "residual_blocks": 1, "heads": 1, "attention_width": 4, "conditioning_blocks": 1}
TRANSFORMER = {"width": 8, "depth": 1, "heads": 1, "conditioning_blocks": 1}
NETWORKS = {"network": ["transformer", "pixelsnail"], "transformer": TRANSFORMER, "pixelsnail": SNAIL}
CONFIG = {
    "run_dir": str(ROOT / "run"),
    "images": {"source": f"folder:{ROOT}/pictures", "size": 8, "channels": 3, "upscale": True, "shard_size": 4},
    "tokenizer": {"model": {**MODEL, "residual_blocks": 1}, "training": TRAINING},
    "prior": {**NETWORKS, "training": TRAINING},
    "sample": {"count": 3, "batch_size": 2, "shard_size": 2},
    "compute": {"accelerator": "cpu", "threads": 1, "num_workers": 0},
}
# What does not belong into settings, as JSON but for the last two, which are written out late.
NUMBERS = [0, 1, -1, 2, 3, 7, 1000, 2**16, 2**22, 2**31, 2**40, 2**48, 2**63, 2**64, 10**30, -(2**63), 0.5, 1e308]
SHELL = f"touch {CANARY}"
TEXTS = (
    f"|x|8|../x|/|..|.|~|train-000000.tar|../../x.tar|{'0' * 64}|\0|\ud800|ü|pipe:{SHELL}|shards:pipe:{SHELL}|a/b|auto"
)
TEXTS += (
    f"|!!python/object/apply:os.system ['{SHELL}']|{'a' * 100_000}|NaN|1e400|--5|null|folder:|file:x|x:y|@DEEP@|@HUGE@"
)
CODE: dict[str, Any] = {"class_path": "os.system", "init_args": {"command": SHELL}}
NESTED: list[Any] = [[], {}, [[]], [1, 2], [8, 4], {"": {}}, [None], ["x"], [-1], [1e400], {"a": [CODE]}, CODE]
ODD = [None, True, False, float("nan"), float("inf"), *NUMBERS, *TEXTS.split("|"), *NESTED]
PICKLE = (
    b"\x80\x02cbuiltins\nopen\nX" + struct.pack("<I", len(str(CANARY))) + str(CANARY).encode() + b"X\1\0\0\0w\x86R."
)
JUNK = [b"", b"\0" * 1024, b"{}", b"null", b"[", b"\x80\x02.", b"\xff\xfe{", b'"', b"\n", b"-1", b"\xff" * 9, PICKLE]
YAML = f"!!python/object/apply:os.system ['{SHELL}']|!!python/name:os.system|!!binary x|2001-01-01|&a [*a, *a]|*a|? [1]"
YAML += "|<<: {x: 1}|!!set {a}|!!int x|!!float []|!x y|1: 2|%YAML 9|---|1:60|!!timestamp x|!!int ''|!!omap x|!!bool x"
SHAPES = f"(2, 2)|(2, 2)|(4, 4)|(2, -2)|(4,)|()|(2**40, 4)|(1099511627776, 4)|(0, 0)|2|(2.0, 2)|(True, 4)|{'(' * 300}"
SHAPES += f"|__import__('os').system('{SHELL}')"
DESCRIPTIONS = (
    "'|u1';'|u1';'<u2';'>u2';'|O';'<f8';'|V8';[('a','|O')];'<U9';None;'M8[s]';__import__('os').system('false')"
)
TAR_FIELDS = {
    "name": (0, 100),
    "mode": (100, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "type": (156, 1),
    "magic": (257, 8),
}
TAR_NUMBERS = [b"%011o\0" % n for n in (0, 1, 511, 513, 10**6, 8**11 - 1)] + [b"\x80" + b"\xff" * 11, b"\xff" * 12]
NAMES = "../../x.png|/x.png|a.pyd|a.pickle||.|a/../b.level0.npy|x.tar|.png|a.PNG|a.cls|a.level0.npy|a.level9.npy|a.gif"
PAX_KEYS = "size|path|linkpath|GNU.sparse.major|GNU.sparse.map|GNU.sparse.size|GNU.sparse.name|mtime|hdrcharset"
PAX_VALUES = f"-1|99999999999|1|../../x||x|1e9|0,1,2|nan|{'9' * 5000}"
CLASSES = [b"", b"-1", b"9" * 40, b"\xb2", "²".encode(), b" 1 ", b"1\n", b"x", b"1e3", b"999999", b"0x1", b"\0"]
BITS = {"F16": 16, "BF16": 16, "F64": 64, "C64": 64, "U64": 64, "I64": 64, "BOOL": 8, "F4": 4, "I32": 32, "X": 32}
BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8}


class Broken(Exception):
    """What no file may bring about."""


class Hang(BaseException):
    """A case takes too long."""


class Payload:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> tuple:
        return open, (str(CANARY), "w")


class Case(NamedTuple):
    """What was done to a file, what reads it, and the folder that this writes, which has no results before."""

    what: str
    act: Callable[[], Any]
    output: Path | None = None


def places(tree: Any, depth: int = 20) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of everything in plain data; what an earlier mutation nested deeper is left alone."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree) if isinstance(tree, list) else 0):
        yield tree, key
        if depth:
            yield from places(tree[key], depth - 1)


def mutate_tree(rng: Random, tree: Any) -> str:
    """Change one to three things of plain data in place."""
    done = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if not (found := list(places(tree))):
            break
        (box, key), odd = rng.choice(found), deepcopy(rng.choice(ODD))
        value, kind = box[key], rng.choice(["replace"] * 4 + ["delete", "nest", "add", "near"])
        if kind == "delete":
            del box[key]
        elif kind == "nest":
            box[key] = rng.choice([[value], {"x": value}, [value, value], str(value)])
        elif kind == "add" and isinstance(box, dict):
            box[rng.choice(["class_path", "init_args", "x", "", "from", "__class__", "9", str(key).upper()])] = odd
        elif kind == "near" and isinstance(value, int | float):
            box[key] = rng.choice([value + 1, value - 1, value * 2, -value, value * 1000, float(value), bool(value)])
        else:
            box[key] = odd if kind == "replace" or not isinstance(value, str | list) else value * 2
        done.append(f"{kind} {key!s:.30} {odd!r:.40}")
    return "; ".join(done)


def dumped(tree: Any, depth: int = 100_000, as_yaml: bool = False) -> bytes:
    """Return plain data as JSON or YAML."""
    text = yaml.safe_dump(tree) if as_yaml else json.dumps(tree)
    text = re.sub("[\"']@DEEP@[\"']", lambda _: "[" * depth + "]" * depth, text)
    return re.sub("[\"']@HUGE@[\"']", "9" * 5000, text).encode()


def mutate_bytes(rng: Random, data: bytes, other: bytes = b"") -> tuple[str, bytes]:
    """Change bytes somewhere, more often near the beginning."""
    at = rng.randrange(len(data) + 1) if rng.random() < 0.5 else rng.randrange(min(len(data), 96) + 1)
    size, width, to = rng.choice([1, 2, 4, 16, 100, 512, 4096]), rng.choice([1, 2, 4, 8]), rng.randrange(len(data) + 1)
    number = rng.choice([*NUMBERS[:14], 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1, rng.getrandbits(32)])
    packed = (number % 256**width).to_bytes(width, rng.choice(["little", "big"]))  # type: ignore[operator]
    flipped = bytearray(data or b"\0")
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        flipped[rng.randrange(len(flipped)) if rng.random() < 0.7 else at % len(flipped)] ^= 1 << rng.randrange(8)
    choices = {
        "flip": bytes(flipped),
        "truncate": data[:to],
        "extend": data + rng.choice([data, rng.randbytes(700), *JUNK]),
        "delete": data[:at] + data[at + size :],
        "copy": data[:to] + data[at : at + size] + data[rng.choice([to, to + size]) :],
        "insert": data[:at] + rng.choice([packed, *JUNK]) + data[at:],
        "number": data[:at] + packed + data[at + width :],
        "splice": data[:at] + other[rng.randrange(len(other) + 1) :],
        "all": rng.choice([rng.randbytes(600), *JUNK]),
    }
    kind = rng.choice(["flip", "number", *choices])
    return f"{kind} at {at}", choices[kind]


def mutate_image(rng: Random, data: bytes) -> tuple[str, bytes]:
    """Change an image's bytes; a png's checksums are mostly made right again."""
    what, data = mutate_bytes(rng, data, rng.choice(PICTURES)[1])
    fixed, at = bytearray(data), 8
    while data[:4] == b"\x89PNG" and at + 12 <= len(fixed) and rng.random() < 0.95:
        end = at + 8 + int.from_bytes(fixed[at : at + 4], "big")
        if end + 4 <= len(fixed):
            fixed[end : end + 4] = zlib.crc32(fixed[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return what, bytes(fixed)


def lying_npy(rng: Random) -> bytes:
    """Return an npy file whose header is odd."""
    shape, descr = rng.choice(SHAPES.split("|")), rng.choice(DESCRIPTIONS.split(";"))
    text = f"{{'descr': {descr}, 'fortran_order': {rng.choice(['False', 'False', 'True', '[]'])}, 'shape': {shape}, }}"
    text = rng.choice([text] * 5 + [text[:-9], text + "x", "[" * 5000, "1", "{}", text + " " * 20_000]) + "\n"
    version, length = rng.choice([1, 1, 1, 2, 3, 9]), rng.choice([len(text), len(text), 0, 65535, len(text) + 1])
    size = struct.pack("<H" if version == 1 else "<I", min(length, 65535))
    return b"\x93NUMPY" + bytes([version, 0]) + size + text.encode() + rng.choice([b"\0" * 4, b"\1" * 32, *JUNK])


def header_edited(rng: Random, data: bytes) -> tuple[str, bytes]:
    """Change a field of a tar header and make its checksum right again."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        start = rng.choice(tar.getmembers()).offset
    field = rng.choice([*TAR_FIELDS, "size", "size", "type"])
    at, width = TAR_FIELDS[field]
    value = rng.choice(TAR_NUMBERS if width in (8, 12) else [name.encode() for name in NAMES.split("|")])
    value = rng.choice(b"0123456LKxgSDVMNXA\0").to_bytes(1, "big") if field == "type" else value
    header = bytearray(data[start : start + 512])
    header[at : at + width] = value[:width].ljust(width, b"\0")
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:]))
    return f"header {field} {value!r:.30}", data[:start] + bytes(header) + data[start + 512 :]


def mutate_tar(rng: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """Change a tar's bytes, a header, the contents or the names of its members, or which there are."""
    kind = rng.choice(["bytes", "header", "header", "content", "content", "content", "new", "drop", "order", "pax"])
    if kind in ("bytes", "header"):
        return mutate_bytes(rng, data, other) if kind == "bytes" else header_edited(rng, data)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = [(info.name, tar.extractfile(info).read(), {}) for info in tar]  # type: ignore[union-attr]
    at = rng.randrange(len(members))
    name, content, _ = members.pop(at)
    what = f"{kind} {name}"
    if kind == "content" and name.endswith(".npy"):
        members.insert(at, (name, rng.choice([lying_npy(rng), mutate_bytes(rng, content, lying_npy(rng))[1]]), {}))
    elif kind == "content":
        how, image = mutate_image(rng, content)
        what, content = f"{what} {how}", rng.choice(CLASSES) if name.endswith(".cls") else image
        members.insert(at, (name, content, {}))
    elif kind == "pax":
        extra = {rng.choice(PAX_KEYS.split("|")): rng.choice(PAX_VALUES.split("|")) for _ in range(2)}
        members.insert(at, (name, content, extra))
    elif kind == "new":
        renamed = rng.choice([*NAMES.split("|"), "../" + name, name.upper(), "\udcff" + name])
        members.insert(at, (renamed, rng.choice([content, content, PICKLE, b""]), {}))
    elif kind == "order":
        members = rng.choice([members * 2, members[::-1], [], rng.sample(members, len(members))])
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content, extra in members:
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(content), extra
            tar.addfile(info, io.BytesIO(content))
    return what, buffer.getvalue()


def mutate_tensors(rng: Random, data: bytes) -> tuple[str, bytes]:
    """Change a safetensors file: its bytes, its header, or its numbers."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    names = [name for name in header if name != "__metadata__"]
    kind = rng.choice(["bytes", "bytes", "tree", "dtype", "shape", "number", "drop", "swap"])
    entry = header[what := rng.choice(names)]
    start, end = entry["data_offsets"]
    if kind == "bytes":
        return mutate_bytes(rng, data, data[::-1])
    if kind == "tree":
        what = mutate_tree(rng, header)
    elif kind == "dtype":
        entry["dtype"] = rng.choice(list(BITS))
        wide = (end - start) // 4 * BITS[entry["dtype"]] // 8
        for offsets in (header[name]["data_offsets"] for name in names):
            offsets[:] = [place + (wide - end + start) * (place >= end) for place in offsets]
        body[start:end], what = rng.choice([b"\0" * wide, rng.randbytes(wide)]), f"{what} {entry['dtype']}"
    elif kind == "shape":
        shape = entry["shape"]
        entry["shape"] = rng.choice([shape[::-1], [*shape, 1], [1, *shape], [(end - start) // 4], [2**62, 4], [0], []])
    elif kind == "number":
        packed = struct.pack("<f", rng.choice([float("nan"), float("inf"), 3.4e38, -3.4e38, 1e-45, 1e20]))
        body[start:end] = rng.choice([packed * ((end - start) // 4), packed + body[start + 4 : end]])
    elif kind == "swap":
        second = header[rng.choice(names)]
        entry["data_offsets"], second["data_offsets"] = second["data_offsets"], entry["data_offsets"]
    else:
        del header[what]
    text = dumped(header)
    return f"{kind} {what}", len(text).to_bytes(8, "little") + text + bytes(body)


def mutate_checkpoint(rng: Random, data: bytes) -> tuple[str, bytes]:
    """Change a checkpoint: its bytes, a file in its zip, what it holds, or all of it."""
    kind, buffer = rng.choice(["bytes", "member", "member", "tree", "tree", "object"]), io.BytesIO()
    if kind == "bytes":
        return mutate_bytes(rng, data, PICKLE)
    if kind == "member":
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
            names = old.namelist()
            chosen = rng.choice([*names, *(name for name in names if name.endswith("data.pkl"))])
            for name in names:
                content = old.read(name)
                changed = rng.choice([PICKLE, mutate_bytes(rng, content, data)[1]]) if name == chosen else content
                new.writestr(name, changed)
        return f"member {chosen}", buffer.getvalue()
    tree: Any = torch.load(io.BytesIO(data), weights_only=True)
    what = mutate_tree(rng, tree) if kind == "tree" else kind
    others = [Payload(), None, [], {}, 3, "x", {"state_dict": None}, {"state_dict": {}}, torch.zeros(3)]
    torch.save(tree if kind == "tree" else rng.choice(others), buffer)
    return what, buffer.getvalue()


def pictures() -> Iterator[tuple[str, bytes]]:
    """Yield (extension, bytes) of small pictures in the formats and modes that sources hold."""
    base, exif = Image.effect_noise((12, 9), 80).convert("RGB"), Image.Exif()
    exif[0x0112] = 6
    more = {"save_all": True, "append_images": [base.rotate(90)]}
    modes = (
        "png RGB|png L|png RGBA|png LA|png 1|png I;16|png P|jpeg RGB|jpeg L|jpeg CMYK|webp RGB|webp RGBA|gif P|tiff F"
    )
    modes += "|tiff I|tiff CMYK|tiff 1|tiff P|bmp RGB|bmp P|bmp 1|bmp RGBA|ppm RGB|ppm L"
    wanted: list[tuple[str, str, dict]] = [(*text.split(" "), {}) for text in modes.split("|")]  # type: ignore[misc]
    wanted += [(name, "RGB", {"exif": exif}) for name in ("png", "jpeg", "webp", "tiff")]
    wanted += [("tiff", "RGB", {"compression": how}) for how in ("tiff_lzw", "jpeg", "tiff_deflate", "packbits")]
    wanted += [("gif", "P", {"transparency": 1, **more}), ("webp", "RGB", more), ("jpeg", "RGB", {"progressive": True})]
    wanted += [("png", "P", {"transparency": 3}), ("png", "RGB", {"icc_profile": b"\0" * 200, "dpi": (72, 72)})]
    for extension, mode, options in wanted:
        for size in ((12, 9), (8, 8))[: 1 if "save_all" in options else 2]:
            buffer = io.BytesIO()
            base.resize(size).convert(mode).save(buffer, extension, **options)
            yield extension, buffer.getvalue()


PICTURES = list(pictures())


def command(*arguments: str | Path) -> str:
    """Give a command; return the sentence with which it refuses, nothing if it does not."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = smalti([str(argument) for argument in arguments])
    said = [line for line in err.getvalue().splitlines() if line.startswith("smalti: error: ")]
    clear = len(said) == bool(code) and "Traceback" not in err.getvalue() and all(len(line) > 30 for line in said)
    if code not in (0, 1, 2) or not clear:
        raise Broken(f"exit code {code} with {len(said)} errors: {err.getvalue()[-500:]}")
    return said[0].removeprefix("smalti: error: ") if code else ""


def perform(rng: Random, stage: str, run: Path, **images: Any) -> Callable[[], Any]:
    """Return what does a stage in a run folder: now and then the command itself, whose parser takes its time."""
    if rng.random() < 0.1:
        options = [f"--images.{name}={value}" for name, value in images.items()]
        return partial(command, stage, BASE, "--run_dir", run, *options)
    config = load_config(BASE) if not CONFIGS else CONFIGS[0]
    CONFIGS[:] = [config]
    return partial(Run(replace(config, run_dir=str(run), images=replace(config.images, **images))).stage, stage)


CONFIGS: list[Any] = []


def copied(folder: Path, *without: str) -> Path:
    """Copy the tiny run, without some of its stages, to a case's folder; return the copy."""
    top = str(ROOT / "run")
    return Path(shutil.copytree(top, folder / "run", ignore=lambda at, _: without if at == top else ()))


def reseal(rng: Random, shard: Path) -> None:
    """Make receipt and manifest fit a changed shard, mostly with the number of its samples too."""
    path = shard.parent / "manifest.json"
    manifest = json.loads(path.read_text())
    receipt = next(r for part in manifest["splits"].values() for r in part if r["shard"] == shard.name)
    receipt |= {"sha256": hashlib.sha256(shard.read_bytes()).hexdigest(), "bytes": shard.stat().st_size}
    with contextlib.suppress(ValueError):
        receipt["samples"] = len(index_shard(shard)) if rng.random() < 0.8 else receipt["samples"]
    path.write_text(json.dumps(manifest))
    shard.with_suffix(".json").write_text(json.dumps(receipt))


def all_pixels(folder: Path, split: str) -> None:
    """Read the images of a split."""
    shards = ImageShards(folder, split, CACHE)
    for index in {*range(min(len(shards), 40)), len(shards) - 1}:
        shards.pixels(index)


def all_codes(folder: Path, split: str, unpacked: Path) -> None:
    """Unpack the codes of a split and read them."""
    codes = Codes(folder, split, unpacked, CACHE)
    codes.batch([-1, *range(min(len(codes), 40)), len(codes) - 1])


def read_by(rng: Random, way: str, what: str, run: Path, stage: str, split: str) -> Case:
    """Return the case that reads a stage's folder in a way."""
    if way == "read" and stage == "images":
        return Case(what, partial(all_pixels, run / "images", split))
    if way == "read":
        return Case(what, partial(all_codes, run / "codes", split, run / "unpacked"), run / "unpacked")
    if way == "source":
        options = {"source": f"shards:{run / stage}/*.tar", "max_bad": rng.choice([0.0, 1.0])}
        return Case(what, perform(rng, "pack", run / "new", **options), run / "new" / "images")
    return Case(what, perform(rng, way, run), run / "codes" if way == "encode" else None)


def shard_case(rng: Random, folder: Path) -> Case:
    """Damage an image or code shard, more rarely a sample shard."""
    ways = "read images|read images|encode images|verify images|source images|read codes|read codes|read codes"
    way, stage = rng.choice(f"{ways}|verify codes|verify samples|source samples".split("|")).split(" ")
    run = copied(folder, "prior" if stage != "samples" else "", "codes" if way == "encode" else "")
    shard = rng.choice(sorted((run / stage).glob("*.tar")))
    what, data = mutate_tar(rng, shard.read_bytes(), rng.choice(sorted(ROOT.glob("run/*/*.tar"))).read_bytes())
    shard.write_bytes(data)
    if rng.random() < 0.97:
        reseal(rng, shard)
    return read_by(rng, way, f"{way} {stage}: {what}", run, stage, shard.name.split("-")[0])


def manifest_case(rng: Random, folder: Path) -> Case:
    """Damage a manifest or a receipt."""
    ways = "read images|read images|encode images|verify images|pack images|read codes|read codes|read codes"
    way, stage = rng.choice(f"{ways}|verify codes|train-prior codes|verify samples|sample samples".split("|")).split(
        " "
    )
    run = copied(folder, "codes" if way == "encode" else "")
    receipt = way != "read" and rng.random() < 0.4
    file = rng.choice(sorted((run / stage).glob("*0.json"))) if receipt else run / stage / "manifest.json"
    what, data = mutate_bytes(rng, file.read_bytes(), b'{"format": 1}')
    if rng.random() < 0.7:
        tree = json.loads(file.read_text())
        what, data = mutate_tree(rng, tree), dumped(tree)
    file.write_bytes(data)
    return read_by(rng, way, f"{way} {stage}/{file.name}: {what}", run, stage, rng.choice(["train", "val"]))


def config_case(rng: Random, folder: Path) -> Case:
    """Damage a run's config, or the one that a stage keeps."""
    way = rng.choice(["load", "load", "load", "verify", "pack", "kept"])
    run, file = copied(folder), folder / "config.yaml"
    settings = yaml.safe_load((ROOT / ("resolved.yaml" if rng.random() < 0.5 else "config.yaml")).read_text())
    if own := way != "kept":
        file.write_text(yaml.safe_dump(settings | {"run_dir": str(run)}))
    else:
        kept = "pack images|encode codes|sample samples|train-prior prior/level0"
        way, stage = rng.choice(kept.split("|")).split(" ")
        file = run / stage / "config.yaml"
    tree, lines = yaml.safe_load(file.read_text()), file.read_text().splitlines()
    # A size or a number of processes is a user's to ask for: a config that packs is changed in its sources.
    part = tree["images"] if own and way == "pack" else tree
    fixed = {"size": part.pop("size")} if part is not tree else {}
    what = mutate_tree(rng, part)
    part |= fixed
    data, kind = dumped(tree, 3000, as_yaml=rng.random() < 0.5), rng.random()
    if kind < 0.2:
        what, data = mutate_bytes(rng, file.read_bytes(), b"a: {b: [")
    elif kind < 0.4:
        at, tag = rng.randrange(len(lines)), rng.choice(YAML.split("|"))
        key = lines[at].rpartition(":")[0] or "x"
        lines[at] = what = rng.choice([f"{key}: {tag}", f"{key}:\n  {tag}", tag, f"{tag}: 1"])
        data = "\n".join(lines).encode()
    file.write_bytes(data)
    what = f"{way} {file.relative_to(folder)}: {what}"
    if own and (way == "load" or b"://" in data or (way == "pack" and kind < 0.4)):
        return Case(what, lambda: load_config(file).compute.cache)
    if own:
        return Case(what, partial(command, way, file, *(["--redo", "pack"] if way == "pack" else [])))
    return Case(what, perform(rng, way, run))


def use_tokenizer(folder: Path) -> None:
    """Load a tokenizer and have it encode and decode."""
    model = HierarchicalVQVAE.from_pretrained(folder)
    if model.image_size <= 256:
        model.decode(model.encode(torch.zeros(1, model.channels, model.image_size, model.image_size)))


def use_prior(folder: Path) -> None:
    """Load the priors and draw a sample."""
    prior = HierarchicalPrior.from_pretrained(folder)
    if sum(h * w for h, w in prior.levels[-1].config.grids) <= 1000:
        prior.sample([0] if prior.class_names else None)


def model_case(rng: Random, folder: Path) -> Case:
    """Damage a tokenizer, a prior, or a checkpoint."""
    which = rng.choice(["tokenizer", "tokenizer", "prior/level0", "prior/level1", "tokenizer/checkpoints"])
    run, load = copied(folder, "codes" if "tokenizer" in which else "", "samples"), rng.random() < 0.75
    names = "last.ckpt|last.ckpt|best.ckpt" if "checkpoints" in which else "model.safetensors|config.json"
    file = run / which / rng.choice(names.split("|"))
    what, data = mutate_bytes(rng, file.read_bytes(), b'{"level": 0}')
    if file.suffix == ".json" and rng.random() < 0.75:
        tree = json.loads(file.read_text())
        what, data = mutate_tree(rng, tree), dumped(tree)
    elif file.suffix != ".json":
        what, data = (mutate_checkpoint if file.suffix == ".ckpt" else mutate_tensors)(rng, file.read_bytes())
    file.write_bytes(data)
    what = f"{'load' if load else 'use'} {which}/{file.name}: {what}"
    if file.suffix == ".ckpt":
        (run / "tokenizer" / "model.safetensors").unlink()
        act = partial(WholeCheckpoints().load_checkpoint, file) if load else perform(rng, "train-tokenizer", run)
        return Case(what, act, run / "tokenizer")
    if load:
        return Case(
            what, partial(use_tokenizer, run / which) if which == "tokenizer" else partial(use_prior, run / "prior")
        )
    stage, output = ("encode", "codes") if which == "tokenizer" else ("sample", "samples")
    return Case(what, perform(rng, stage, run), run / output)


def image_case(rng: Random, folder: Path) -> Case:
    """Damage one image of a folder that is packed."""
    extension, data = rng.choice(PICTURES)
    what, data = mutate_image(rng, data)
    for number in range(3):
        (folder / f"{number}.png").write_bytes(PICTURES[0][1])
    named = rng.choice([extension] * 9 + ["png", "gif", "jpg", "tif"])
    (folder / f"x.{named}").write_bytes(data)
    images: dict[str, Any] = {"source": f"folder:{folder}", "val_fraction": 0.5, "max_bad": rng.choice([0.0, 1.0])}
    images |= {
        "size": rng.choice([8, 12]),
        "channels": rng.choice([1, 3]),
        "format": rng.choice(["png", "jpg", "webp"]),
    }
    act = perform(rng, "pack", folder / "new", **images)
    return Case(f"{extension} as {named}: {what}", act, folder / "new" / "images")


KINDS = {"shards": shard_case, "manifests": manifest_case, "configs": config_case, "models": model_case}
KINDS["images"] = image_case


def left_over(folder: Path) -> str | None:
    """Return the file that a command that failed has left under a final name, unless it is a shard that is whole."""
    for path in sorted(folder.glob("*")) + sorted(folder.glob(".*.tmp")):
        receipt = read_receipt(path) if path.suffix == ".tar" else None
        whole = receipt and receipt["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        alone = path.suffix == ".json" and path.stem[-6:].isdigit() and not path.with_suffix(".tar").exists()
        final = path.name in ("manifest.json", "model.safetensors") or path.suffix in (".npy", ".tmp")
        if final or alone or (path.suffix == ".tar" and not whole):
            return path.name
    return None


def alarm(*_: Any) -> NoReturn:
    """End a case that hangs."""
    raise Hang(f"takes more than {HANG_S} s")


def judge(case: Case) -> str:
    """Run a case; return the sentence with which it is refused, nothing if it is not; raise what is a finding."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    faulthandler.dump_traceback_later(DEAD_S, exit=True)
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    try:
        said = case.act()
        message = said if isinstance(said, str) else ""
    except (ValueError, OSError) as error:
        message = str(error)
        if not message.strip():
            raise Broken("an error without a message") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if taken > MEMORY_BYTES:
        raise Broken(f"takes {taken / 2**30:.1f} GiB of memory")
    if CANARY.exists():
        CANARY.unlink()
        raise Broken("code ran")
    if message and case.output and (left := left_over(case.output)):
        raise Broken(f"refused ({message[:200]}) but left {left}")
    return message


def masked(message: str) -> str:
    """Return a message without what differs from file to file."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|/\S+|[0-9a-f]{8,}|\s+|\d+", lambda m: " " if m[0].isspace() else "#", message)[
        :110
    ]


def location(error: BaseException) -> str:
    """Return what tells one finding from another: the kind of error and where in smalti it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).parent.name in ("pipelines", "tokenizer", "prior")]
    last = (own or frames)[-1]
    said = masked(str(error))[:60] if isinstance(error, Broken) else ""
    return f"{type(error).__name__} {Path(last.filename).name}:{last.lineno} {said}".strip()


def fuzz(kind: str, each: int, seed: int, keep: Path | None) -> list[str]:
    """Run the cases of a kind; print findings as they come; return the lines of the table."""
    began, successes, refused, findings = time.monotonic(), 0, Counter[str](), Counter[str]()
    for number in range(each):
        folder = ROOT / f"case-{kind}-{number}"
        folder.mkdir()
        os.chdir(folder)
        case = KINDS[kind](Random(f"{seed} {kind} {number}"), folder)
        try:
            message = judge(case)
            successes += not message
            refused.update([masked(message)] if message else [])
        except (Exception, Hang) as error:
            findings[where := location(error)] += 1
            if findings[where] == 1:
                shown = "".join(traceback.format_exception(error)[-9:])
                print(f"\nFINDING {kind} {number}: {case.what}\n{shown}", flush=True)
            if keep and findings[where] <= 3:
                shutil.copytree(folder, keep / folder.name, dirs_exist_ok=True)
        os.chdir(ROOT)
        shutil.rmtree(folder)
    found, seconds = findings.total(), time.monotonic() - began
    lines = [f"{kind:10} {each} cases, {successes} done, {refused.total()} refused, {found} findings, {seconds:.0f} s"]
    lines += [f"{count:10} {message}" for message, count in refused.most_common(5)]
    return lines + [f"{count:10} FINDING {where}" for where, count in findings.most_common()]


def make_run() -> None:
    """Make the tiny run, and a config with all its settings."""
    for number in range(12):
        path = ROOT / "pictures" / "ab"[number % 2] / f"{number}.{('png', 'jpg', 'webp')[number % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((8, 8), 80).convert("RGB").save(path)
    BASE.write_text(json.dumps(CONFIG))
    if said := command("run", BASE):
        raise SystemExit(said)
    kept = [yaml.safe_load(path.read_text()) for path in sorted(ROOT.glob("run/*/config.yaml"))]
    resolved = {key: value for part in kept for key, value in part.items() if key != "made_from"}
    (ROOT / "resolved.yaml").write_text(json.dumps(CONFIG | resolved))


def main() -> int:
    """Make the tiny run, fuzz, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--each", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    keep = options.keep.resolve() if options.keep else None
    sys.stderr = os.fdopen(os.dup(2), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the libraries' C code says much about damaged images
    faulthandler.enable()
    signal.signal(signal.SIGALRM, alarm)
    torch.set_num_threads(1)
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    os.environ["XDG_CACHE_HOME"] = str(ROOT / "cache")
    make_run()
    logging.disable()
    lines = [line for kind in options.kind or KINDS for line in fuzz(kind, options.each, options.seed, keep)]
    print("\n" + "\n".join(lines))
    return int(any("FINDING" in line for line in lines))


if __name__ == "__main__":
    try:
        code = main()
    finally:
        os.chdir("/")
        shutil.rmtree(ROOT)
    sys.exit(code)
