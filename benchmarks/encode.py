"""Encoding and packing, beside the bare model and Pillow's bare work.

    python -m benchmarks.encode

`encode` is the stage end to end: shards checked, JPEGs decoded, codes written with receipts and manifest. The limit is
the bare float32 model on pixels that lie in memory. Both are timed as commands run, which keep what they free, and with
the C library as it is; the last column is the share of its time that `encode` spends in the kernel. `pack`, its
processes' start included, is held against Pillow's decode, resize and encode alone in processes that run already, one
for each core. Memory is the peak of a process that encodes 10,000 images and of one that encodes 50,000.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import torch
from PIL import Image, ImageOps

from benchmarks.measure import DEVICE, main, print_table, resident_mib
from benchmarks.pictures import packed, pictures
from pipelines.compute.devices import ComputeConfig, num_loaders
from pipelines.compute.memory import keep_freed_memory
from pipelines.stages.encode import EncodeConfig, encode
from pipelines.stages.pack import ImagesConfig, pack
from tokenizer import HierarchicalVQVAE, TokenizerConfig

COMPUTE = ComputeConfig(accelerator="auto")
# Pixels, images: enough for some seconds each.
SIZES = ((64, 2048), (256, 128))

# A default of glibc: whoever sets its malloc is left alone.
AS_IT_IS = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"}

# The difference between both is free of what processes take to start.
PACKED = (4000, 20000)


def timed(work: object, *arguments: object) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    work(*arguments)  # type: ignore[operator]
    return time.perf_counter() - start


def bare(model: HierarchicalVQVAE, count: int, batch: int) -> None:
    """Encode random pixels that lie in memory."""
    images = torch.rand(batch, 3, model.image_size, model.image_size, device=DEVICE) * 2 - 1
    for _ in range(count // batch):
        codes = model.encode(images)
    codes[0].cpu()  # a GPU has only been told so far


def in_a_process(name: str, *numbers: int, **environment: str) -> dict:
    """Return what a function of this file returns in a process of its own that keeps what it frees."""
    command = [sys.executable, "-m", "benchmarks.encode", name, *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment)
    return json.loads(done.stdout.splitlines()[-1])


def measure_encode(size: int, count: int) -> dict[str, float]:
    """Return images a second of stage and bare model, and the kernel's share: medians of three rounds in turn."""
    torch.manual_seed(0)
    model = HierarchicalVQVAE(TokenizerConfig(), size, 3).eval().to(DEVICE)
    batch = EncodeConfig().batch_size
    rates: dict[str, list[float]] = {"ours": [], "bare": [], "kernel": []}
    with packed(count, size, 1000) as run:
        bare(model, batch, batch)
        for number in range(3):
            out = run / f"codes{number}"
            out.mkdir()
            before = os.times()
            rates["ours"].append(count / timed(encode, EncodeConfig(), 0, COMPUTE, model, run / "images", out))
            after = os.times()
            rates["kernel"].append((after.system - before.system) / sum(after[:2], -sum(before[:2])))
            rates["bare"].append(count // batch * batch / timed(bare, model, count, batch))
    return {name: sorted(values)[1] for name, values in rates.items()}


def decode_resize_encode(data: bytes) -> int:
    """Do what pack must do for an image, and no more."""
    buffer = io.BytesIO()
    picture = ImageOps.fit(Image.open(io.BytesIO(data)).convert("RGB"), (64, 64), Image.Resampling.BICUBIC)
    picture.save(buffer, "PNG")
    return len(buffer.getvalue())


def measure_pack(count: int) -> dict[str, float]:
    """Return images a second of the stage and of Pillow alone, each in a process for each core."""
    with tempfile.TemporaryDirectory() as folder:
        files = pictures(count, 96)
        for number, data in enumerate(files):
            (Path(folder) / f"{number:06d}.jpg").write_bytes(data)
        config = ImagesConfig(source=f"folder:{folder}", size=64, shard_size=500)
        with tempfile.TemporaryDirectory() as out:
            ours = count / timed(pack, config, 0, COMPUTE, Path(out))
        with get_context("spawn").Pool(num_loaders(COMPUTE), keep_freed_memory) as pool:
            pool.map(decode_resize_encode, files[:64])
            pillow = count / timed(pool.map, decode_resize_encode, files, 100)
    return {"ours": ours, "bare": pillow}


def measure_peak(count: int) -> dict[str, float]:
    """Encode images of 16 pixels, and return this process's peak memory."""
    model = HierarchicalVQVAE(TokenizerConfig(width=16, residual_width=8, code_dim=8), 16, 3).eval()
    with packed(count, 16, 5000) as run:
        (run / "codes").mkdir()
        encode(EncodeConfig(), 0, COMPUTE, model, run / "images", run / "codes")
    return {"peak_mib": resident_mib("VmHWM")}  # getrusage would tell of the process that started this one


def measure() -> dict:
    """Time all, and print the tables."""
    figures: dict = {}
    for size, count in SIZES:
        figures[f"encode {size} px"] = in_a_process("measure_encode", size, count)
        figures[f"… malloc as it is, {size} px"] = in_a_process("measure_encode", size, count, **AS_IT_IS)
    for count in PACKED:
        figures[f"pack, {count} of 96 to 64 px"] = measure_pack(count)
    rows = [
        [name, one["ours"], one["bare"], one["ours"] / one["bare"], one.get("kernel", "")]
        for name, one in figures.items()
    ]
    print_table(["images/s", "ours", "bare", "share of it", "in the kernel"], rows)
    if not Path("/proc/self/status").exists():
        return figures
    memory = {str(count): in_a_process("measure_peak", count)["peak_mib"] for count in (10_000, 50_000)}
    growth = memory["50000"] / memory["10000"] - 1
    print(f"peak memory: {memory['10000']:.0f} MiB for 10,000 images, {memory['50000']:.0f} for 50,000 ({growth:+.1%})")
    return figures | {"peak_mib": memory}


if __name__ == "__main__":
    keep_freed_memory()
    if len(sys.argv) > 1:
        print(json.dumps(globals()[sys.argv[1]](*map(int, sys.argv[2:]))))
    else:
        main("encode", measure)
