"""The jobs that are rehearsed.

python -m tests.rehearsal_jobs [JOB …]    # its last line is JSON: per job its error, and how often it waited where
"""

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import backend_registration

from pipelines.compute.devices import ComputeConfig
from pipelines.data.codes import CodeBatch, as_it_is
from pipelines.data.images import AugmentConfig, ImageSample, image_batch
from pipelines.stages import encode, pack, sample
from pipelines.stages.train_prior import PriorTraining
from pipelines.stages.train_tokenizer import TokenizerTraining
from pipelines.storage.fingerprint import tokenizer_fingerprint
from pipelines.training import fit as training
from pipelines.training.sections import PriorConfig, TokenizerSection, TrainingConfig
from prior import HierarchicalPrior, LevelConfig, LevelPrior, NormalConfig
from tests.priors import SIZES
from tests.rehearsal import DEVICE, NAME, RANKS, Backend, rehearsal
from tokenizer import HierarchicalVQVAE, TokenizerConfig
from tokenizer.bottlenecks import KINDS, GaussianConfig
from tokenizer.loss import OwnedLoss

SIDE, GRIDS, CODES = 16, [(2, 2), (4, 4)], [16, 32]
TOKENIZER = TokenizerConfig(
    strides=[8, 4], codebook_size=CODES, code_dim=8, width=16, residual_width=8, residual_blocks=1
)
COMPUTE = ComputeConfig(num_workers=0)


class Images:
    """A split of black images, as a loader takes it: each alone."""

    def __getitem__(self, index: int) -> ImageSample:
        return ImageSample(np.zeros((3, SIDE, SIDE), np.uint8), 0, str(index), "")


class Batches:
    """A split of codes, as a loader takes it: whole batches."""

    def __getitems__(self, indices: list[int]) -> CodeBatch:
        codes = [torch.zeros(len(indices), *grid, dtype=torch.int64) for grid in GRIDS]
        return CodeBatch(codes, torch.zeros(len(indices), dtype=torch.int64), torch.ones(len(indices)))


def training_config(steps: int, **changes: int) -> TrainingConfig:
    """Return settings with all callbacks at work."""
    sizes = {"batch_size": 8, "micro_batches": 2, "val_every": 2, "checkpoint_every": 1, "log_every": 1, "patience": 3}
    averages = {"weight_ema": 0.9, "gradient_clip": 1.0}
    return TrainingConfig(steps=steps, precision="32-true", **averages | sizes | changes)  # type: ignore[arg-type]


class Critic(nn.Module):
    """A loss with a network and an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.judge = nn.Conv2d(3, 1, 3)

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """Asked for once all is on the device, where a rehearsal has other parameters than on the host."""
        return torch.optim.Adam(self.parameters())

    def forward(self, reconstruction: Tensor, images: Tensor) -> dict[str, Tensor]:
        return {"adversarial": -self.judge(reconstruction).mean()}

    def own(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        return (self.judge(reconstruction) - self.judge(images)).mean()


def fit_tokenizer(
    folder: Path,
    steps: int = 2,
    kind: str = "ema",
    losses: Sequence[OwnedLoss] = (),
    settings: Mapping[str, Any] | None = None,
    **changes: int,
) -> None:
    section = TokenizerSection(bottleneck=kind, **{"model": TOKENIZER} | dict(settings or {}))  # type: ignore[arg-type]
    parts = {"micro_batches": 1} if section.family.whole_batch else {}
    config = training_config(steps, **parts | changes)
    model = HierarchicalVQVAE(section.model, SIDE, 3, section.family, num_classes=2)
    module = TokenizerTraining(model, section, config, 0, folder, losses)
    data = training.StepData(Images(), Images(), 12, steps, 8, config.micro_batches, 0, image_batch)
    training.fit(module, data, config, COMPUTE, folder, "val_loss", "a tokenizer")


def fit_prior(network: str, folder: Path, steps: int = 2, **changes: int) -> None:
    config = training_config(steps, **changes)
    module = PriorTraining(level(network, 1), PriorConfig(network=network, training=config), 0)
    data = training.StepData(Batches(), Batches(), 12, steps, 8, config.micro_batches, 0, as_it_is)
    training.fit(module, data, config, COMPUTE, folder, "val_nats_per_code", "a prior")


def vae() -> HierarchicalVQVAE:
    return HierarchicalVQVAE(TOKENIZER, SIDE, 3, GaussianConfig()).eval()


def level(network: Any, number: int, mark: str = "") -> LevelPrior:
    grids, sizes, names = GRIDS[: number + 1], CODES[: number + 1], ["cat", "dog"]
    config = LevelConfig(
        level=number,
        grids=grids,
        codebook_sizes=sizes,
        class_names=names,
        size=SIZES[network],  # type: ignore[arg-type]
        tokenizer=mark,
    )
    return LevelPrior(config, 0.1)


def fit_tokenizer_twice(folder: Path) -> None:
    """The second goes on from where the first ended."""
    fit_tokenizer(folder, 2)
    fit_tokenizer(folder, 4)


def fit_with_critic_twice(folder: Path) -> None:
    """Likewise, with a loss that owns a network, and with noise."""
    for steps in (2, 4):
        fit_tokenizer(folder, steps, "gumbel", [Critic()])


def encode_images(folder: Path, model: HierarchicalVQVAE) -> None:
    (folder / "codes").mkdir()
    config = encode.EncodeConfig(batch_size=4)
    encode.encode(config, 0, COMPUTE, model, folder / "images", folder / "codes")


def sample_numbers(folder: Path) -> None:
    model = vae()
    size: dict[str, Any] = {"codebook_sizes": [None, None], "channels": [8, 8], "class_names": []}
    about: dict[str, Any] = {"size": NormalConfig(), "tokenizer": tokenizer_fingerprint(model)}
    levels = [
        LevelPrior(LevelConfig(level=n, grids=GRIDS[: n + 1], **{k: v[: n + 1] for k, v in size.items()}, **about))
        for n in range(2)
    ]
    sample.sample(
        sample.SampleConfig(count=6, batch_size=4), 0, COMPUTE, model, HierarchicalPrior(levels).eval(), folder
    )


def sample_images(folder: Path) -> None:
    """By both decoders, with guidance."""
    model = HierarchicalVQVAE(TOKENIZER, SIDE, 3).eval()
    mark = tokenizer_fingerprint(model)
    prior = HierarchicalPrior([level("transformer", 0, mark), level("pixelsnail", 1, mark)]).eval()
    config = sample.SampleConfig(count=6, batch_size=4, guidance=2.0, top_k=5, top_p=0.9)
    sample.sample(config, 0, COMPUTE, model, prior, folder)


# What must raise, with a tensor on the device and one on the host.
REFUSED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "float": lambda there, here: float(there.sum()),
    "item": lambda there, here: there.sum().item(),
    "bool": lambda there, here: bool(there.any()),
    "tolist": lambda there, here: there.tolist(),
    "nonzero": lambda there, here: there.nonzero(),
    "to the host": lambda there, here: there.cpu(),
    "to the device": lambda there, here: here.to(DEVICE),
    "copy_": lambda there, here: here.copy_(there),
    "mixed devices": lambda there, here: there + here,
    "all_reduce of the host's": lambda there, here: torch.distributed.all_reduce(here),
    "all_gather of the host's": lambda there, here: torch.distributed.all_gather([here, here], here),
    "broadcast of the host's": lambda there, here: torch.distributed.broadcast(here, src=0),
}
QUIET = {"micro_batches": 1, "val_every": 100, "checkpoint_every": 100, "log_every": 100, "patience": 0}
JOBS: dict[str, Callable[[Path], None]] = {
    "tokenizer": fit_tokenizer_twice,
    "transformer": lambda folder: fit_prior("transformer", folder),
    "pixelsnail": lambda folder: fit_prior("pixelsnail", folder),
    **{kind: partial(fit_tokenizer, kind=kind) for kind in KINDS if kind not in ("ema", "gumbel")},
    "gumbel with a critic": fit_with_critic_twice,
    "conditional and denoising": partial(
        fit_tokenizer,
        kind="gaussian",
        settings={
            "model": replace(TOKENIZER, conditional=True),
            "augment": AugmentConfig(corrupt="mask"),
            "loss": "gaussian",
            "gaussian": GaussianConfig(beta_warmup=2),
        },
    ),
    "encode": lambda folder: encode_images(folder, HierarchicalVQVAE(TOKENIZER, SIDE, 3).eval()),
    "encode numbers": lambda folder: encode_images(folder, vae()),
    "sample": sample_images,
    "sample numbers": sample_numbers,
    "2 quiet steps": lambda folder: fit_tokenizer(folder, 2, **QUIET),
    "4 quiet steps": lambda folder: fit_tokenizer(folder, 4, **QUIET),
}


def rehearse(job: Callable[[Path], object]) -> dict[str, Any]:
    """Run a job; return its error, None if there was none, and how often it waited where."""
    error = None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if job in (JOBS["encode"], JOBS["encode numbers"]):
            for number in range(6):
                Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8)).save(folder / f"{number}.png")
            (folder / "images").mkdir()
            pack.pack(pack.ImagesConfig(source=f"folder:{folder}", size=SIDE), 0, COMPUTE, folder / "images")
        with rehearsal() as strict:
            try:
                job(folder)
            except Exception as failure:
                error = f"{type(failure).__name__}: {failure}"
                traceback.print_exc()
    return {"error": error, "waits": dict(strict.waits)}


def refusal(act: Callable[[Tensor, Tensor], object]) -> str:
    """Return the kind of error that an act raises, and "" if it raises none."""
    try:
        act(torch.zeros(3, device=DEVICE), torch.zeros(3))
    except Exception as error:
        return type(error).__name__
    return ""


def main() -> None:
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    library = torch.library.Library("_", "IMPL")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    torch.distributed.init_process_group(f"{NAME}:fake", rank=0, world_size=RANKS, store=FakeStore())
    found = {name: rehearse(JOBS[name]) for name in sys.argv[1:] or JOBS}
    with rehearsal():
        found["refused"] = {name: refusal(act) for name, act in REFUSED.items()}
    print(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # torch does not expect to end with such a device


if __name__ == "__main__":
    main()
