"""Steps of a tokenizer that can be compared however they are cut.

`python -m tests.steps STAGE CONFIG …` is `smalti`, one config after the other, and records them beside each.

Sums are rounded by the size of a part, which moves weights by less than 1e-5. But it tips a latent that lies nearly as
far from another code as from its own, and then codebooks part by far more. Without biases an untrained encoder spreads
its latents, and where they and the codes are few none comes near such a tie: `least_margin` tells how near.
"""

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pipelines.stages.train_tokenizer
from pipelines.cli import main
from pipelines.stages.train_tokenizer import TokenizerTraining
from pipelines.training.sections import TokenizerSection
from tokenizer import Codebook, HierarchicalVQVAE
from tokenizer.hierarchy import Autoencoded
from tokenizer.loss import OwnedLoss

# Over the tiny settings. K-means start, revival and weight averaging are all at work.
COMPARABLE = {
    "seed": 8,
    "tokenizer": {
        "model": {"strides": [16, 8], "codebook_size": [4, 8]},
        "ema": {"revival_threshold": 0.3, "decay": 0.8},
        "training": {"weight_ema": 0.9, "batch_size": 8, "val_every": 6},
    },
}


# A file of this name beside a config asks for a critic, a loss with a network of its own.
CRITIC = "critic"


class Recorded(TokenizerTraining):
    """Starts without biases, with latents of about 1, and writes what each process does into the folder RECORD."""

    def __init__(self, model: HierarchicalVQVAE, *arguments: Any) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0 if parameter.ndim == 1 else 6**0.5)  # the variance of He et al. 2015
        super().__init__(model, *arguments)
        model.register_forward_hook(self._margins)

    def _note(self, name: str, line: str) -> None:
        with (Path(os.environ["RECORD"]) / f"{name}{self.global_rank}.txt").open("a") as file:
            file.write(f"{line}\n")

    def _margins(self, model: HierarchicalVQVAE, images: tuple[Tensor], output: Autoencoded) -> None:
        for book, level in zip(model.bottlenecks, output.levels, strict=True):
            if not isinstance(book, Codebook):
                continue
            latents = level.observed.double()
            nearest = torch.cdist(latents, book.table.double()).square().topk(2, largest=False).values  # (N, 2)
            margin = (nearest[:, 1] - nearest[:, 0]).min() / latents.square().sum(1).mean()
            self._note("training" if model.training else "validation", f"{margin:.3e}")

    def _bits(self, step: str) -> None:
        modules: list[Any] = [*self.learners, *self.model.bottlenecks]
        tensors = [tensor.detach() for module in modules for tensor in module.state_dict().values()]
        sha = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()
        self._note("codebooks", f"{step} {sha}")

    def _start_learners(self, draws: range) -> None:
        super()._start_learners(draws)
        self._bits("start")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self._bits(str(self.global_step))


def least_margin(folder: Path, loop: str = "training") -> float:
    """Return how much nearer than the next the nearest code is, squared, as a share of latents' squares; the least."""
    return min(float(line) for path in folder.glob(f"{loop}*.txt") for line in path.read_text().split())


def critics(section: TokenizerSection) -> list[OwnedLoss]:
    """Return the critic of the tests of owned losses where one is asked for."""
    from tests.test_owned_losses import Critic

    return [Critic(0.1)] if (Path(os.environ["RECORD"]) / CRITIC).exists() else []


if __name__ == "__main__":
    pipelines.stages.train_tokenizer.TokenizerTraining = Recorded  # type: ignore[misc]
    pipelines.stages.train_tokenizer.owned_losses = critics
    stage, *given = sys.argv[1:]
    configs = [argument for argument in given if argument.endswith(".yaml")]
    for config in configs:
        os.environ["RECORD"] = str(Path(config).parent)
        if code := main([stage, config, *(argument for argument in given if argument not in configs)]):
            sys.exit(code)
