"""What DDP costs on two processes of one CPU thread each, and which share of that the codebooks' all-reduce has.

    python -m benchmarks.ddp

Each process takes half of a batch of 64 images of 32 pixels through the tokenizer of width 128. Beside it stands one
process with that half and no other to wait for: the difference is what DDP costs, waiting included. Then the shards:
how long two processes of one thread take to pack, encode and sample, beside one; a process's start, in which Python
loads its libraries, is of the same length in both.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measure import interleaved_medians, main, print_table
from tokenizer import CodebookEMA, EMAConfig, HierarchicalVQVAE, TokenizerConfig, TokenizerLoss
from tokenizer.bottlenecks.ema import Statistics, assignment_statistics, candidate_positions, take_owned

SIZE, PART = 32, 32
# Stages that each worker has a share of, and which last half a minute: their start tells little then.
FOLDERS = {"pack": "images", "encode": "codes", "sample": "samples"}
RUN = {
    "images": {"source": "digits", "size": 64, "channels": 1, "upscale": True, "shard_size": 100},
    "tokenizer": {
        "model": {"strides": [16, 8], "codebook_size": 64, "width": 128},
        "training": {"steps": 2, "batch_size": 8, "val_every": 2, "compile": False},
    },
    "encode": {"views": ["image", "flip", "crop", "image", "flip", "crop"]},
    "prior": {"transformer": {"width": 256, "depth": 6}, "training": {"steps": 2, "batch_size": 8, "val_every": 2}},
    "sample": {"count": 600, "batch_size": 10, "shard_size": 50},
    "compute": {"accelerator": "cpu", "threads": 1, "num_workers": 0},
}
LARGE_IMAGES = RUN["images"] | {"size": 512, "shard_size": 50}


def step_of(model: torch.nn.Module, inner: HierarchicalVQVAE) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return a training step, and its all-reduce of the codebooks' statistics alone."""
    images = torch.rand(PART, 3, SIZE, SIZE) * 2 - 1
    loss = TokenizerLoss("mse", {"commitment": 0.125})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    emas = [CodebookEMA(book, EMAConfig()) for book in inner.bottlenecks]

    def step() -> None:
        output = model(images)
        optimizer.zero_grad()
        loss(output.reconstruction, images, [level.losses for level in output.levels]).backward()
        optimizer.step()
        parts = []
        for level in output.levels:
            positions = candidate_positions(2 * len(level.observed), 512, 0)
            parts += assignment_statistics(level, 512, take_owned(level.observed, positions, 0))
        flat = torch.cat([part.flatten() for part in parts])
        if dist.is_initialized():
            dist.all_reduce(flat)
        summed = [c.view_as(p) for c, p in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]
        for number, ema in enumerate(emas):
            ema.update(inner.bottlenecks[number], Statistics(*summed[3 * number : 3 * number + 3]), 10**6)

    statistics = torch.zeros(2 * (512 + 512 * 64 + 256 * 64))
    return step, lambda: dist.all_reduce(statistics)


def process(rank: int, folder: str) -> None:
    """Be one of two: time the step alone, then with DDP, and the all-reduce; the first writes the medians down."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = HierarchicalVQVAE(TokenizerConfig(strides=[8, 4]), SIZE, 3)
    alone = interleaved_medians({"alone": step_of(model, model)[0]}, repeats=15, warmup=3)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    step, reduce = step_of(DistributedDataParallel(model, forward_sync_buffers=False), model)
    together = interleaved_medians({"DDP": step, "all-reduce": reduce}, repeats=15, warmup=3)
    if rank == 0:
        Path(folder, "figures.yaml").write_text(yaml.safe_dump(alone | together))
    dist.destroy_process_group()


def measure_ddp() -> dict[str, float]:
    """Return the seconds of a step alone, of one with DDP and of the codebooks' all-reduce."""
    with TemporaryDirectory() as folder:
        mp.spawn(process, (folder,), nprocs=2)
        return yaml.safe_load(Path(folder, "figures.yaml").read_text())


def seconds_of(stage: str, config: Path, processes: int = 1) -> float:
    """Return how long a stage takes, with its start, in processes begun at once as torchrun does."""
    start, jobs = time.perf_counter(), []
    for rank in range(processes):
        place = {"OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(processes)}
        command = [sys.executable, "-m", "pipelines.cli", stage, config]
        jobs.append(subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, **place}))
    assert [job.wait() for job in jobs] == [0] * processes
    return time.perf_counter() - start


def seconds_of_one_and_two(stage: str, config: Path) -> list[float]:
    """Return how long a stage takes from nothing in one process, and in two."""
    seconds = []
    for processes in (1, 2):
        shutil.rmtree(config.parent / FOLDERS[stage], ignore_errors=True)
        seconds.append(seconds_of(stage, config, processes))
    return seconds


def measure_sharing() -> dict[str, list[float]]:
    """Return seconds of pack, encode and sample in one process and in two, and those of a stage's start."""
    with TemporaryDirectory() as name:
        large, small = Path(name, "large", "run.yaml"), Path(name, "small", "run.yaml")
        for config, images in ((large, LARGE_IMAGES), (small, RUN["images"])):
            config.parent.mkdir()
            config.write_text(yaml.safe_dump({"run_dir": str(config.parent), **RUN, "images": images}))
        found = {"pack": seconds_of_one_and_two("pack", large)}
        for stage in ("pack", "train-tokenizer"):
            seconds_of(stage, small)
        found["encode"] = seconds_of_one_and_two("encode", small)
        seconds_of("train-prior", small)
        found["sample"] = seconds_of_one_and_two("sample", small)
        found["start"] = [seconds_of("pack", small)] * 2  # of a stage that finds its work done
        return found


def measure() -> dict:
    """Time both, and print the tables."""
    ddp = measure_ddp()
    cost = ddp["DDP"] - ddp["alone"]
    print(f"a step of half a batch alone {ddp['alone'] * 1e3:.0f} ms, as one of two with DDP {ddp['DDP'] * 1e3:.0f} ms")
    print(f"DDP costs {cost / ddp['DDP']:.1%} of it; the codebooks' all-reduce takes {ddp['all-reduce'] * 1e3:.2f} ms")
    sharing = measure_sharing()
    begin = sharing["start"][0]
    rows = [
        [stage, one, two, f"{two / one:.2f}", f"{(two - begin) / (one - begin):.2f}"]
        for stage, (one, two) in sharing.items()
        if stage != "start"
    ]
    print_table(["stage", "one process, s", "two, s", "ratio", f"without the start of {begin:.1f} s"], rows)
    return {"ddp": ddp, "sharing": sharing}


if __name__ == "__main__":
    main("ddp", measure)
