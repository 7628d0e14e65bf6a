"""What only a real GPU can show; `make gpu` runs these and whatever else is marked so."""

import csv
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from pipelines.config import load_config
from pipelines.data.codes import Codes
from pipelines.run import Run
from pipelines.training import fit as training
from tests.gpu import ranks
from tests.priors import NETWORKS, decoded, draw_codes, tiny_level, tiny_prior
from tests.test_hierarchy import tiny
from tests.test_nearest import assert_nearest, drawn
from tokenizer import Codebook, CodebookEMA, EMAConfig, HierarchicalVQVAE, nearest_code
from tokenizer.bottlenecks import KINDS
from tokenizer.bottlenecks.ema import assignment_statistics

# Warnings of libraries on a GPU that nobody has seen yet are shown, and fail nothing.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
DEVICE = "cuda"
GRIDS, SIZES = [(2, 3), (5, 7)], [16, 32]
# What a GPU and a CPU, both in float32, may differ by: they add up in other orders.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _true_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("n", [0, 1, 63, 65, 200])
@pytest.mark.parametrize(("k", "d"), [(2, 1), (64, 16), (65, 17), (1000, 3), (513, 64), (2049, 100)])
def test_the_lookup_finds_the_codes_of_brute_force(n: int, k: int, d: int) -> None:
    vectors, codebook = drawn(n, k, d)
    assert_nearest(nearest_code(vectors.to(DEVICE), codebook.to(DEVICE)).cpu(), vectors, codebook)


def test_the_lookup_takes_any_layout_and_numbers_that_are_not_finite() -> None:
    vectors, codebook = drawn(70, 90, 6)
    strided = nearest_code(vectors.to(DEVICE).T.contiguous().T, codebook.to(DEVICE).T.contiguous().T)
    assert_nearest(strided.cpu(), vectors, codebook)
    vectors[1, 1], vectors[2, 2], vectors[3, 3] = float("nan"), float("inf"), -float("inf")
    codes = nearest_code(vectors.to(DEVICE), codebook.to(DEVICE))
    assert 0 <= int(codes.min()) <= int(codes.max()) < 90
    given = (vectors.to(DEVICE), codebook.to(DEVICE))
    torch.library.opcheck(nearest_code, given, test_utils=("test_schema", "test_faketensor"))


def test_a_codebook_learns_as_on_a_cpu() -> None:
    found = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        latents, codebook = torch.randn(500, 8).to(device), Codebook(32, 8)
        ema = CodebookEMA(codebook, EMAConfig(revival_threshold=0.3)).to(device)
        codebook.to(device)
        for _ in range(3):
            output = codebook(latents.T[None, :, :, None])
            ema.update(codebook, assignment_statistics(output, 32, latents[:16]), 10**6)
        found.append(codebook.vectors.cpu())
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize("network", NETWORKS)
def test_logits_of_forward_and_of_each_position_are_those_of_a_cpu(network: str) -> None:
    level = tiny_level(network, GRIDS, SIZES)
    codes, classes = draw_codes(GRIDS, SIZES), torch.tensor([0, 3])
    with torch.no_grad():
        expected = level.logits(codes[-1], codes[:-1], classes).flatten(1, 2)
        level.to(DEVICE)
        there = [code.to(DEVICE) for code in codes]
        full = level.logits(there[-1], there[:-1], classes.to(DEVICE)).flatten(1, 2)
        steps = decoded(level.decoder(there[:-1], classes.to(DEVICE), 2), there[-1])
    torch.testing.assert_close(full.cpu(), expected, **CLOSE)
    torch.testing.assert_close(steps.cpu(), expected, **CLOSE)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_kept_decoders_and_their_graphs_draw_what_new_ones_draw(network: str, guidance: float) -> None:
    prior = tiny_prior(network, [(2, 2), (9, 8)], [16, 16]).to(DEVICE)  # more positions than one graph serves
    kept: dict = {}
    for seed in range(3):
        fresh = prior.sample([0, 1, 2], seed=seed, guidance=guidance)
        again = prior.sample([0, 1, 2], seed=seed, guidance=guidance, decoders=kept)
        assert all(torch.equal(a, b) for a, b in zip(fresh, again, strict=True))


def gradients(model: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True))


def test_a_compiled_tokenizer_is_the_plain_one() -> None:
    model, images = tiny([8, 4]).to(DEVICE), torch.rand(4, 3, 16, 16, device=DEVICE) * 2 - 1
    found = []
    for compiled in (False, True):
        if compiled:
            model.compile(fullgraph=True)
        output = model(images)
        loss = output.reconstruction.square().mean() + output.levels[0].losses["commitment"].mean()
        found.append([output.reconstruction, *gradients(model, loss)])
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_compiled_prior_is_the_plain_one(network: str) -> None:
    level, codes = tiny_level(network, GRIDS, SIZES).to(DEVICE), [c.to(DEVICE) for c in draw_codes(GRIDS, SIZES)]
    found = []
    for compiled in (False, True):
        if compiled:
            level.compile()
        logits = level(codes[-1], codes[:-1], None)
        found.append([logits, *gradients(level, logits.square().mean())])
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_every_bottleneck_stores_and_learns_what_it_does_on_a_cpu(kind: str) -> None:
    model = HierarchicalVQVAE(tiny([8, 4]).config, 16, 3, KINDS[kind]())
    images, found = torch.rand(4, 3, 16, 16) * 2 - 1, []
    channels = [part.noise_channels for part in model.bottlenecks]
    noise = [torch.randn(4, n, *grid) for n, grid in zip(channels, model.level_grids, strict=True)]
    for device in ("cpu", DEVICE):
        model.to(device)
        output = model(images.to(device), [one.to(device) for one in noise] if any(channels) else None)
        losses = [values.mean() for level in output.levels for values in level.losses.values()]
        loss = output.reconstruction.square().mean() + sum(losses, start=torch.zeros((), device=device))
        found.append([*losses, *(one for one in gradients(model, loss) if one is not None)])
    torch.testing.assert_close([one.to("cpu") for one in found[1]], found[0], **CLOSE)


def test_bfloat16_is_near_float32() -> None:
    model, images = tiny([8, 4]).to(DEVICE).eval(), torch.rand(4, 3, 16, 16, device=DEVICE) * 2 - 1
    prior, codes = tiny_prior("transformer", GRIDS, SIZES).to(DEVICE), [c.to(DEVICE) for c in draw_codes(GRIDS, SIZES)]
    found = []
    for half in (False, True):
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=half):
            found.append((model(images).levels[0].observed, prior.nll(codes, [0, 1])))
    (latents, nats), (half_latents, half_nats) = found
    assert 0 < float((half_latents - latents).abs().max()) < 0.05 * float(latents.abs().max())
    torch.testing.assert_close(half_nats, nats, rtol=0.05, atol=0.0)


@pytest.fixture
def config_on(tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path]) -> Callable[..., Path]:
    """Write a config with the images, codes and tokenizer of the tiny run."""
    run = tiny_run.parent / "run"

    def write(accelerator: str, devices: int = 1, **changes: Any) -> Path:
        compute = {"accelerator": accelerator, "devices": devices}
        images = {"images": {"from": str(run / "images")}, "compute": compute}
        return write_config(tmp_path / f"{accelerator} {devices}", images | changes)

    return write


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("kind", "level"), [("tokenizer", None), ("prior", 0), ("prior", 1)])
def test_training_follows_that_of_a_cpu(
    kind: str, level: int | None, tiny_run: Path, config_on: Callable[..., Path]
) -> None:
    """Nothing is drawn on the device, whose random numbers are its own."""
    section: dict = {"training": {"log_every": 1, "compile": False, "weight_ema": 0.9}}
    changes = {kind: section}
    if kind == "prior":
        section |= {"dropout": 0.0, "class_dropout": 0.0}
        changes["codes"] = {"from": str(tiny_run.parent / "run" / "codes")}
    found = []
    for accelerator in ("cpu", "gpu"):
        config = config_on(accelerator, **changes)
        Run(load_config(config)).stage(f"train-{kind}", level)
        name = "train_loss" if kind == "tokenizer" else "train_nats_per_code"
        folder = config.parent / "run" / (kind if level is None else f"prior/level{level}")
        found.append([float(row[name]) for row in rows(folder / "metrics.csv")])
    assert found[1][:1] == pytest.approx(found[0][:1], rel=0.01)
    assert found[1] == pytest.approx(found[0], rel=0.1)


def test_encode_writes_the_codes_of_a_cpu(tiny_run: Path, tmp_path: Path, config_on: Callable[..., Path]) -> None:
    run = tiny_run.parent / "run"
    config = load_config(config_on("gpu", tokenizer={"from": str(run / "tokenizer")}))
    Run(config).stage("encode")
    splits = [
        Codes(folder / "codes", "train", tmp_path / folder.parent.name, config.compute.cache)
        for folder in (run, Path(config.run_dir))
    ]
    (codes, _), (others, _) = (split.batch(list(range(len(split)))) for split in splits)
    for level, other in zip(codes, others, strict=True):
        assert float((level == other).double().mean()) > 0.99


def test_a_whole_run_ends_with_samples(
    tmp_path: Path, write_config: Callable[..., Path], smalti: Callable[..., tuple[int, str]]
) -> None:
    half = {"training": {"precision": "auto", "compile": False, "weight_ema": 0.9}}
    config = write_config(tmp_path, {"compute": {"accelerator": "gpu", "devices": 1}, "tokenizer": half, "prior": half})
    code, text = smalti("run", config)
    assert code == 0, text
    assert (tmp_path / "run" / "samples" / "grid.png").exists()
    before = [path.read_bytes() for path in sorted((tmp_path / "run" / "samples").glob("*.tar"))]
    assert smalti("sample", config, "--redo=sample")[0] == 0
    assert before == [path.read_bytes() for path in sorted((tmp_path / "run" / "samples").glob("*.tar"))]


class NoWaiting(Callback):
    """Lets torch raise where the host waits for the GPU, from the second step on and until the last but one."""

    def __init__(self) -> None:
        self.watched = 0

    def on_train_batch_start(self, trainer: pl.Trainer, *given: Any) -> None:
        if 1 <= trainer.global_step < trainer.max_steps - 2:
            torch.cuda.set_sync_debug_mode("error")
            self.watched += 1

    def on_train_batch_end(self, *given: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, *given: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("stage", ["train-tokenizer", "train-prior"])
def test_training_steps_do_not_wait_for_the_gpu(
    stage: str, tiny_run: Path, config_on: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last callback is told of a step's end after all others, so that theirs are watched too."""
    watch, trainer = NoWaiting(), pl.Trainer
    monkeypatch.setattr(
        training.pl, "Trainer", lambda **given: trainer(**given | {"callbacks": [*given["callbacks"], watch]})
    )
    steps = {"steps": 6, "val_every": 6, "checkpoint_every": 6, "log_every": 6, "weight_ema": 0.9, "gradient_clip": 1.0}
    section = {"training": steps | {"compile": False, "precision": "auto"}}
    codes = {"from": str(tiny_run.parent / "run" / "codes")}
    Run(load_config(config_on("gpu", codes=codes, tokenizer=section, prior=section))).stage(
        stage, 0 if stage == "train-prior" else None
    )
    assert watch.watched == 3


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def assert_ranks_agree(backend: str, folder: Path) -> None:
    torch.multiprocessing.spawn(ranks.take_steps, (backend, DEVICE, free_port(), str(folder)), nprocs=2)
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    alone = ranks.steps_of(slice(0, 8), torch.device(DEVICE))
    for name, tensor in alone.items():
        torch.testing.assert_close(first[name], tensor, **CLOSE)


def test_two_processes_on_one_gpu_take_the_steps_of_one_over_gloo(tmp_path: Path) -> None:
    assert_ranks_agree("gloo", tmp_path)


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two GPUs")


@two_gpus
def test_two_gpus_take_the_steps_of_one_over_nccl(tmp_path: Path) -> None:
    assert_ranks_agree("nccl", tmp_path)


@two_gpus
@pytest.mark.parametrize("stage", ["train-tokenizer", "train-prior", "encode"])
def test_a_job_on_two_gpus_ends_well(stage: str, tiny_run: Path, config_on: Callable[..., Path]) -> None:
    run, section = tiny_run.parent / "run", {"training": {"compile": False, "weight_ema": 0.9}}
    changes: dict = {"tokenizer": section, "prior": section}
    if stage != "train-tokenizer":
        changes["tokenizer"] = {"from": str(run / "tokenizer")}
    if stage == "train-prior":
        changes["codes"] = {"from": str(run / "codes")}
    command = [sys.executable, "-m", "pipelines.cli", stage, str(config_on("gpu", 2, **changes)), "--traceback"]
    done = subprocess.run(command, timeout=300, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
