"""Encoding and packing, beside the bare model and Pillow's bare work.

    python -m benchmarks.encode

`encode` is the stage end to end: shards checked, JPEGs decoded, codes written with receipts and manifest. The limit is
the bare float32 model on pixels that lie in memory. `pack`, its processes' start included, is held against Pillow's
decode, resize and encode alone in processes that run already, one for each core. Memory is the peak of a process that
encodes 10,000 images and of one that encodes 50,000.
"""

import io
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
from pipelines.compute import ComputeConfig, num_processes
from pipelines.encode import EncodeConfig, encode
from pipelines.pack import ImagesConfig, pack
from tokenizer import HierarchicalVQVAE, TokenizerConfig

COMPUTE = ComputeConfig(accelerator="auto")
# Pixels, images: enough for some seconds each.
SIZES = ((64, 2048), (256, 128))

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


def measure_encode(size: int, count: int) -> dict[str, float]:
    """Return images a second of the stage and of the bare model, medians of three rounds in turn."""
    torch.manual_seed(0)
    model = HierarchicalVQVAE(TokenizerConfig(), size, 3).eval().to(DEVICE)
    batch = EncodeConfig().batch_size
    rates: dict[str, list[float]] = {"ours": [], "bare": []}
    with packed(count, size, 1000) as run:
        bare(model, batch, batch)
        for number in range(3):
            out = run / f"codes{number}"
            out.mkdir()
            rates["ours"].append(count / timed(encode, EncodeConfig(), 0, COMPUTE, model, run / "images", out))
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
        with get_context("spawn").Pool(num_processes(COMPUTE)) as pool:
            pool.map(decode_resize_encode, files[:64])
            pillow = count / timed(pool.map, decode_resize_encode, files, 100)
    return {"ours": ours, "bare": pillow}


def peak_mib(count: int) -> float:
    """Return the peak memory of a process that encodes so many small images, in MiB."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.encode", str(count)], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def encode_and_tell(count: int) -> None:
    """Encode images of 16 pixels, and print this process's peak memory."""
    model = HierarchicalVQVAE(TokenizerConfig(width=16, residual_width=8, code_dim=8), 16, 3).eval()
    with packed(count, 16, 5000) as run:
        (run / "codes").mkdir()
        encode(EncodeConfig(), 0, COMPUTE, model, run / "images", run / "codes")
    print(resident_mib("VmHWM"))  # getrusage would tell of the process that started this one


def measure() -> dict:
    """Time all, and print the tables."""
    figures: dict = {f"encode {size} px": measure_encode(size, count) for size, count in SIZES}
    for count in PACKED:
        figures[f"pack, {count} of 96 to 64 px"] = measure_pack(count)
    rows = [[name, one["ours"], one["bare"], one["ours"] / one["bare"]] for name, one in figures.items()]
    print_table(["images/s", "ours", "bare", "share of it"], rows)
    memory = {str(count): peak_mib(count) for count in (10_000, 50_000)}
    growth = memory["50000"] / memory["10000"] - 1
    print(f"peak memory: {memory['10000']:.0f} MiB for 10,000 images, {memory['50000']:.0f} for 50,000 ({growth:+.1%})")
    return figures | {"peak_mib": memory}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        encode_and_tell(int(sys.argv[1]))
    else:
        main("encode", measure)
