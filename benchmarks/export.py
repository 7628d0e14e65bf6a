"""Exporting tokens, beside numpy that writes the same codes flat; and what 1,300 shards take.

    python -m benchmarks.export

Speed is that of codes of 16x16 and 32x32, from code shards to bin shards with receipts, index and layout. The limit is
numpy, which reads the arrays of the same shards and writes them flat. Scale is that of made-up shards of a 2x2 grid,
130 and 1,300 of them: what each step takes in a process of its own, and that process's peak memory. `receipts` finds
that all shards are there, `verify` reads every record, `memory map` unpacks for training; `export` is killed when half
of its shards are there, and goes on.

Nothing quadratic was found. At 100 times as many, 130,000, these would bend first: layout.json, some 1 kB
per shard, read whole by whoever loads it, and the receipts that `export` merges in memory, together some 1.5 GiB; the
looks at every file with which each process begins and ends, minutes of each; and the syncs to disk, 14 per shard, that
small shards spend most of their time on. Larger shards (`images.shard_size`) mend all three.
"""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.measure import interleaved_medians, main, print_table, resident_mib
from pipelines.compute.devices import ComputeConfig
from pipelines.data.codes import unpack_codes
from pipelines.stages.export import ExportConfig, export
from pipelines.stages.verify import verify_codes
from pipelines.storage.cache import Cache
from pipelines.storage.manifest import all_receipts, read_manifest, shards_hold, write_manifest
from pipelines.storage.paths import write_json
from pipelines.storage.receipts import receipt_path
from pipelines.storage.shards import array_bytes, code_dtype, index_shard, read_member

SPEED = {"grids": [(16, 16), (32, 32)], "codebook_size": 1024, "shards": 4, "records": 1000}
SCALE = {"grids": [(2, 2)], "codebook_size": 256, "records": 1000}
COUNTS = (130, 1300)
STEPS = ("receipts", "verify", "memory map", "export, killed", "export, resumed")
CLASSES = [str(number) for number in range(10)]
NONE = "0" * 64


def made_up(folder: Path, grids: list[tuple[int, int]], codebook_size: int, shards: int, records: int) -> None:
    """Write a folder of code shards with their receipts and manifest: 1,300 shards of 1,000 records in minutes."""
    folder.mkdir()
    names = [f"train-{number:06d}.tar" for number in range(shards)]
    for number, name in enumerate(names):
        data = _tar(number, grids, codebook_size, records)
        (folder / name).write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        receipt = {"format": 1, "shard": name, "sha256": sha256, "bytes": len(data), "samples": records}
        write_json(receipt_path(folder / name), {**receipt, "made_from": NONE, "fingerprints": {}, "settings": NONE})
    contents = {
        "kind": "codes",
        "tokenizer": NONE,
        "levels": [{"grid": list(grid), "codebook_size": codebook_size} for grid in grids],
        "class_names": CLASSES,
        "image_size": 64,
        "channels": 3,
        "preprocessing": {},
        "views": ["image"],
        "precision": "float32",
        "made_from": NONE,
    }
    write_manifest(folder, {"train": names}, contents)


def _tar(number: int, grids: list[tuple[int, int]], codebook_size: int, records: int) -> bytes:
    """Return a shard, a hundred times sooner than `write_shard` writes one."""
    generator = np.random.default_rng(number)
    dtype, parts = code_dtype(codebook_size), []
    codes = [generator.integers(0, codebook_size, (records, *grid)).astype(dtype) for grid in grids]
    for record in range(records):
        key = f"{number * records + record:08d}"
        members = {f"level{level}.npy": array_bytes(grid[record]) for level, grid in enumerate(codes)}
        for extension, data in {**members, "cls": CLASSES[record % len(CLASSES)].encode()}.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(data)
            parts += [info.tobuf(), data, bytes(-len(data) % 512)]
    return b"".join([*parts, bytes(1024)])


def write_flat(codes: Path, folder: Path) -> int:
    """Write the codes of all shards by numpy alone, a file each; return how many codes."""
    count, manifest = 0, read_manifest(codes, "codes", "encode")
    names = [f"level{level}.npy" for level in range(len(manifest["levels"]))]
    for _, receipt in all_receipts(manifest):
        path = codes / receipt["shard"]
        with path.open("rb") as file:
            arrays = [
                np.load(io.BytesIO(read_member(file, sample.members[name]))).ravel()
                for sample in index_shard(path)
                for name in names
            ]
        flat = np.concatenate(arrays)
        flat.tofile(folder / f"{path.stem}.bin")
        count += len(flat)
    return count


def export_tokens(codes: Path, folder: Path, cache: Path) -> None:
    """Export code shards as bin, with a cache of its own."""
    folder.mkdir(exist_ok=True)
    compute = ComputeConfig(accelerator="cpu", cache_dir=str(cache))
    export(ExportConfig(format=["bin"]), 0, compute, codes, folder)


def measure_speed() -> dict[str, float]:
    """Return tokens a second of the stage and of numpy."""
    with tempfile.TemporaryDirectory() as root:
        codes = Path(root) / "codes"
        made_up(codes, **SPEED)  # type: ignore[arg-type]
        flat = Path(root) / "flat"
        flat.mkdir()
        tokens = write_flat(codes, flat)

        def ours() -> None:
            with tempfile.TemporaryDirectory() as out:
                export_tokens(codes, Path(out) / "tokens", Path(out) / "cache")

        seconds = interleaved_medians({"ours": ours, "numpy": lambda: write_flat(codes, flat)}, repeats=5)
    rates = {name: tokens / found for name, found in seconds.items()}
    print_table(
        ["codes/s", *rates, "share of it"], [["16x16 + 32x32", *rates.values(), rates["ours"] / rates["numpy"]]]
    )
    return rates


def take_step(name: str, run: Path) -> None:
    """Do one step of scale in a run folder that holds codes."""
    cache, codes = Cache(run / "cache" / name, 2**40), run / "codes"
    manifest = read_manifest(codes, "codes", "encode")
    if name == "receipts":
        assert shards_hold(manifest, codes, cache)
    elif name == "verify":
        verify_codes(codes, None, None, cache)
    elif name == "memory map":
        unpack_codes(codes, manifest, "train", run / "unpacked", cache)
    else:
        export_tokens(codes, run / "tokens", run / "cache" / "export")


def command_of(name: str, run: Path) -> list[str]:
    """Return the command of a step in a process of its own."""
    return [sys.executable, "-m", "benchmarks.export", name, str(run)]


def killed(run: Path, shards: int) -> dict[str, float]:
    """Kill an export when half of its shards are there; return its seconds until then."""
    start = time.perf_counter()
    process = subprocess.Popen(command_of("export, killed", run), stdout=subprocess.DEVNULL)
    while process.poll() is None and len(list((run / "tokens").glob("train-*.json"))) < shards // 2:
        time.sleep(0.05)
    process.kill()
    process.wait()
    return {"seconds": time.perf_counter() - start}


def measure_scale(shards: int) -> dict[str, dict[str, float]]:
    """Return seconds and peak memory of each step over so many shards."""
    figures = {}
    with tempfile.TemporaryDirectory() as root:
        run = Path(root)
        start = time.perf_counter()
        made_up(run / "codes", shards=shards, **SCALE)  # type: ignore[arg-type]
        print(f"made up {shards} shards in {time.perf_counter() - start:.0f} s", flush=True)
        for name in STEPS:
            if name == "export, killed":
                figures[name] = killed(run, shards)
                continue
            done = subprocess.run(command_of(name, run), capture_output=True, text=True, check=True)
            figures[name] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure() -> dict:
    """Time all, and print the tables."""
    speed, scale = measure_speed(), {shards: measure_scale(shards) for shards in COUNTS}
    rows = []
    for name in STEPS:
        parts = [(scale[shards][name]["seconds"], scale[shards][name].get("peak_mib", "")) for shards in COUNTS]
        rows.append([name, *(value for part in parts for value in part)])
    print(f"shards of {SCALE['records']} records")
    print_table(["", *(f"{what}, {shards} shards" for shards in COUNTS for what in ("s", "peak MiB"))], rows)
    return {"speed": speed, "scale": {str(shards): found for shards, found in scale.items()}}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        begun = time.perf_counter()
        take_step(sys.argv[1], Path(sys.argv[2]))
        print(json.dumps({"seconds": time.perf_counter() - begun, "peak_mib": resident_mib("VmHWM")}))
    else:
        main("export", measure)
