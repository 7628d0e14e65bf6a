"""Steps of a tokenizer, as one process or as one of two; in a file of its own, which new processes import."""

import os

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipelines.compute.ranks import sum_over_ranks
from tests.test_hierarchy import tiny
from tokenizer import CodebookEMA, EMAConfig
from tokenizer.bottlenecks.ema import Statistics, assignment_statistics


def steps_of(part: slice, device: torch.device) -> dict[str, Tensor]:
    """Return weights and codebooks after three steps with a part of eight images."""
    torch.manual_seed(0)
    images = (torch.rand(8, 3, 16, 16) * 2 - 1)[part].to(device)
    model = tiny([8, 4]).to(device)
    emas = [CodebookEMA(book, EMAConfig(revival_threshold=0.0)).to(device) for book in model.bottlenecks]
    several = torch.distributed.is_initialized()
    forward = DistributedDataParallel(model, broadcast_buffers=False) if several else model
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(3):
        output = forward(images)
        optimizer.zero_grad()
        (output.reconstruction - images).square().mean().backward()
        optimizer.step()
        for book, ema, level in zip(model.bottlenecks, emas, output.levels, strict=True):
            statistics = assignment_statistics(level, len(book.vectors), level.observed[:1])
            ema.update(book, Statistics(*(sum_over_ranks(part) for part in statistics)), 10**6)
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def take_steps(rank: int, backend: str, device: str, port: int, folder: str) -> None:
    """Take them as one of two processes, each with half of the images, on a GPU of its own where there are two."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    place = torch.device(device, rank % torch.cuda.device_count()) if device == "cuda" else torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.distributed.init_process_group(backend, rank=rank, world_size=2)
    torch.save(steps_of(slice(4 * rank, 4 * rank + 4), place), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
