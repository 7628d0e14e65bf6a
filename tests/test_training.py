"""Training of both stages: resumed equals uninterrupted, and what it leaves behind."""

import csv
import os
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file

from pipelines.config import load_config
from pipelines.data import codes
from pipelines.data import images as data
from pipelines.errors import StageError
from pipelines.run import Run
from pipelines.stages.train_tokenizer import TokenizerTraining
from pipelines.training.callbacks import ClipGradients
from pipelines.training.fit import learning_rate_factor, make_optimizer, seed_step
from pipelines.training.sections import TrainingConfig
from tests.conftest import merged
from tests.steps import COMPARABLE, Recorded, least_margin
from tokenizer import HierarchicalVQVAE


class Killed(Exception):
    """Stands for the process ending here."""


def dying_at(last: int) -> Callable[[int, int, int], int]:
    """The order of training, until the process dies at a draw."""
    honest = data.drawn_sample

    def drawn_sample(seed: int, draw: int, shards: tuple[int, ...], window: int = 0) -> int:
        if draw >= last:
            raise Killed
        return honest(seed, draw, shards, window)

    return drawn_sample


def killed(*arguments: object) -> None:
    raise Killed


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("stage", "killed_at"),
    [(stage, at) for stage in ("train-tokenizer", "train-prior") for at in (4, 5)] + [("train-prior of numbers", 5)],
)
def test_a_resumed_job_ends_where_an_uninterrupted_one_does(
    stage: str,
    killed_at: int,
    tiny_run: Path,
    numbers_run: Path,
    tmp_path: Path,
    write_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights bit for bit, and every row of metrics.csv; dropout, augmentation and weight averaging included."""
    run = tiny_run.parent / "run"
    kind = "tokenizer" if stage == "train-tokenizer" else "prior"
    training = {"weight_ema": 0.9, "log_every": 1, "warmup_steps": 2, "micro_batches": 2, "gradient_clip": 1.0}
    changes: dict = {"images": {"from": str(run / "images")}, kind: {"training": training}}
    if kind == "prior":
        changes |= {"codes": {"from": str(run / "codes")}}
        if stage == "train-prior of numbers":
            changes["prior"]["network"] = "flow"
            changes["codes"]["from"], stage = str(numbers_run.parent / "run" / "codes"), "train-prior"
    else:
        changes["tokenizer"]["ema"] = {"decay": 0.5, "revival_threshold": 0.5}
    found = []
    for name in ("whole", "killed"):
        config = load_config(write_config(tmp_path / name, changes))
        if name == "killed":
            with monkeypatch.context() as patch:
                for module in (data, codes):
                    patch.setattr(module, "drawn_sample", dying_at(killed_at * 32))
                with pytest.raises(Killed):
                    Run(config).stage(stage, 0 if kind == "prior" else None)
            assert (tmp_path / name / "run").exists()
        Run(config).stage(stage, 0 if kind == "prior" else None)
        folder = tmp_path / name / "run" / ("tokenizer" if kind == "tokenizer" else "prior/level0")
        found.append((load_file(folder / "model.safetensors"), rows(folder / "metrics.csv")))
    (weights, metrics), (resumed_weights, resumed_metrics) = found
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)
    assert metrics == resumed_metrics
    assert len(metrics) == 6
    if kind == "tokenizer":
        assert float(metrics[-1]["level1_revived"]) > 0


def test_a_job_killed_twice_before_its_next_checkpoint_loses_nothing_but_time(
    tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two micro-batches of the step after a resume, the checkpoint must stay what it is."""
    training = {
        "micro_batches": 2,
        "checkpoint_every": 2,
        "steps": 8,
        "val_every": 8,
        "log_every": 1,
        "weight_ema": 0.9,
    }
    changes = {"images": {"from": str(tiny_run.parent / "run" / "images")}, "tokenizer": {"training": training}}
    found = []
    for name in ("whole", "killed"):
        config = load_config(write_config(tmp_path / name, changes))
        for step in (2, 2.5, 2.5, 5.5, 4.5) if name == "killed" else ():
            with monkeypatch.context() as patch:
                patch.setattr(data, "drawn_sample", dying_at(int(step * 32)))
                with pytest.raises(Killed):
                    Run(config).stage("train-tokenizer")
        Run(config).stage("train-tokenizer")
        folder = tmp_path / name / "run" / "tokenizer"
        found.append((load_file(folder / "model.safetensors"), rows(folder / "metrics.csv")))
    assert found[0][1] == found[1][1]
    assert all(torch.equal(tensor, found[1][0][name]) for name, tensor in found[0][0].items())


@pytest.mark.parametrize(("stage", "kind"), [("train-tokenizer", "tokenizer"), ("train-prior", "prior")])
def test_half_precision_trains_with_clipped_gradients(
    stage: str,
    kind: str,
    tiny_run: Path,
    tmp_path: Path,
    write_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a machine with bfloat16 does by itself."""
    norms: list[float] = []
    clip = ClipGradients.on_before_optimizer_step
    monkeypatch.setattr(
        ClipGradients,
        "on_before_optimizer_step",
        lambda self, *given: norms.append(self.largest_norm) or clip(self, *given),
    )
    run = tiny_run.parent / "run"
    training = {"precision": "bf16-mixed", "gradient_clip": 1.0}
    changes: dict = {"images": {"from": str(run / "images")}, kind: {"training": training}}
    if kind == "prior":
        changes["codes"] = {"from": str(run / "codes")}
    Run(load_config(write_config(tmp_path, changes))).stage(stage)
    figures = rows(tmp_path / "run" / ("tokenizer" if kind == "tokenizer" else "prior/level0") / "metrics.csv")
    assert all(float(figures[-1][name]) < 100 for name in figures[-1] if name.startswith("val_"))
    assert norms[:6] == [1.0] * 6  # at each of six steps of a level


def test_gradients_are_clipped_to_a_norm_over_all_parameters() -> None:
    layers = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)])
    for parameter in layers.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    optimizer = torch.optim.AdamW(layers.parameters(), fused=True)

    trainer = pl.Trainer(logger=False, barebones=True)
    ClipGradients(100.0).on_before_optimizer_step(trainer, pl.LightningModule(), optimizer)
    assert float(layers[0].weight.grad[0, 0]) == 2.0  # type: ignore[index]
    ClipGradients(0.5).on_before_optimizer_step(trainer, pl.LightningModule(), optimizer)
    norm = torch.stack([parameter.grad.norm() for parameter in layers.parameters()]).norm()  # type: ignore[union-attr]
    assert float(norm) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("val_every", [3, 6])
def test_a_job_killed_while_it_validates_validates_again(
    val_every: int, tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.stages.train_prior import PriorTraining

    changes = {
        "codes": {"from": str(tiny_run.parent / "run" / "codes")},
        "prior": {"training": {"val_every": val_every, "checkpoint_every": 1, "log_every": 1}},
    }
    found = []
    for name in ("whole", "killed"):
        job = Run(load_config(write_config(tmp_path / name, changes)))
        if name == "killed":
            with monkeypatch.context() as patch:
                patch.setattr(PriorTraining, "validation_step", killed)
                with pytest.raises(Killed):
                    job.stage("train-prior", 0)
        job.stage("train-prior", 0)
        folder = tmp_path / name / "run" / "prior" / "level0"
        found.append((load_file(folder / "model.safetensors"), rows(folder / "metrics.csv")))
    assert found[0][1] == found[1][1]
    assert all(torch.equal(tensor, found[1][0][name]) for name, tensor in found[0][0].items())


def test_codebooks_start_from_the_whole_batch_however_it_is_cut(
    tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits, because a part's size, which decides on the last ones, is not that of a micro-batch."""
    found: list[list[torch.Tensor]] = []

    def started(self: TokenizerTraining, *arguments: object) -> None:
        found.append([book.vectors for book in self.model.bottlenecks] + [ema.counts for ema in self.learners])
        raise Killed

    monkeypatch.setattr(TokenizerTraining, "training_step", started)
    for micro in (1, 2, 16):
        changes = {
            "images": {"from": str(tiny_run.parent / "run" / "images")},
            "tokenizer": {"training": {"micro_batches": micro}},
        }
        with pytest.raises(Killed):
            Run(load_config(write_config(tmp_path / str(micro), changes))).stage("train-tokenizer")
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))
    assert [float(counts[0]) for counts in found[0][2:]] == [32 * 4 / 16, 32 * 16 / 32]


def test_micro_batches_take_the_codebook_step_of_the_whole_batch(
    tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One EMA step an optimizer step."""
    monkeypatch.setattr("pipelines.stages.train_tokenizer.TokenizerTraining", Recorded)
    found = []
    for micro in (1, 4):
        changes = {
            "images": {"from": str(tiny_run.parent / "run" / "images")},
            "tokenizer": {"training": {"micro_batches": micro}},
        }
        config = write_config(tmp_path / str(micro), merged(COMPARABLE, changes))
        monkeypatch.setenv("RECORD", str(config.parent))
        Run(load_config(config)).stage("train-tokenizer")
        found.append(load_file(tmp_path / str(micro) / "run" / "tokenizer" / "model.safetensors"))
    assert least_margin(tmp_path / "1") > 1e-3  # rounding tips no latent to another code
    assert all(torch.allclose(tensor, found[1][name], atol=1e-5) for name, tensor in found[0].items())


def test_training_leaves_the_environment_that_says_how_many_processes_there_are(
    tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("NODE_RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    honest = pl.Trainer.fit

    def fit(*args: object, **options: object) -> None:
        honest(*args, **options)  # type: ignore[arg-type]
        del os.environ["WORLD_SIZE"]  # as Lightning's own environment does under DDP

    monkeypatch.setattr(pl.Trainer, "fit", fit)
    changes = {"images": {"from": str(tiny_run.parent / "run" / "images")}}
    Run(load_config(write_config(tmp_path, changes))).stage("train-tokenizer")
    assert os.environ["WORLD_SIZE"] == "1"  # stages after it ask


def test_eval_changes_no_buffer_and_the_codebook_moves_in_training(tiny_run: Path) -> None:
    checkpoint = torch.load(tiny_run.parent / "run/tokenizer/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["state_dict"]["learners.0.counts"].dtype == torch.float32
    model = HierarchicalVQVAE.from_pretrained(tiny_run.parent / "run" / "tokenizer")
    assert not torch.equal(model.bottlenecks[0].vectors, HierarchicalVQVAE(model.config, 16, 1).bottlenecks[0].vectors)
    assert not [name for name in model.state_dict() if "counts" in name or "sums" in name]


def test_weight_averaging_covers_the_codebooks_and_is_what_is_exported(
    tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    changes = {
        "images": {"from": str(tiny_run.parent / "run" / "images")},
        "tokenizer": {"training": {"weight_ema": 0.9, "val_every": 6}},
    }
    Run(load_config(write_config(tmp_path, changes))).stage("train-tokenizer")
    folder = tmp_path / "run" / "tokenizer"
    checkpoint = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    exported = load_file(folder / "model.safetensors")
    for name in ("codebooks.0.vectors", "encoders.0.0.weight"):
        kept = f"model.{name.replace('codebooks', 'bottlenecks')}"
        assert torch.equal(exported[name], checkpoint["state_dict"][kept])
        assert not torch.equal(exported[name], checkpoint["current_model_state"][kept])


@pytest.mark.parametrize("kind", ["tokenizer", "vae", "prior"])
def test_a_loss_that_becomes_nan_stops_with_a_sentence_and_keeps_the_checkpoint(
    kind: str, tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run.parent / "run"
    changes: dict = {"images": {"from": str(run / "images")}, kind: {"training": {"log_every": 1}}}
    if kind == "prior":
        changes |= {"codes": {"from": str(run / "codes")}}
    if kind == "vae":  # whose validation decodes numbers before anything is logged
        kind = "tokenizer"
        changes = {"images": changes["images"], kind: {"bottleneck": "gaussian"}, "prior": {"network": "auto"}}
    config = load_config(write_config(tmp_path, changes))
    from pipelines.stages.train_prior import PriorTraining

    module = TokenizerTraining if kind == "tokenizer" else PriorTraining
    honest = module.training_step

    def broken(self, batch, batch_idx):
        loss = honest(self, batch, batch_idx)
        return loss * float("nan") if self.global_step >= 4 else loss

    monkeypatch.setattr(module, "training_step", broken)
    with pytest.raises(
        StageError, match=r"became NaN or infinite by step [56]; the last good checkpoint is kept in .*last"
    ):
        Run(config).stage("train-tokenizer" if kind == "tokenizer" else "train-prior")
    folder = tmp_path / "run" / ("tokenizer" if kind == "tokenizer" else "prior/level0")
    assert not (folder / "model.safetensors").exists()
    kept = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 3
    assert all(bool(torch.isfinite(t).all()) for t in kept["state_dict"].values() if t.is_floating_point())


def test_early_stopping_ends_a_job_that_no_longer_improves(
    tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    run = tiny_run.parent / "run"
    training = {"steps": 40, "val_every": 2, "patience": 1, "learning_rate": 5.0, "log_every": 2}
    config = load_config(
        write_config(tmp_path, {"codes": {"from": str(run / "codes")}, "prior": {"training": training}})
    )
    Run(config).stage("train-prior", 0)
    assert (tmp_path / "run" / "prior" / "level0" / "model.safetensors").exists()
    assert int(rows(tmp_path / "run" / "prior" / "level0" / "metrics.csv")[-1]["step"]) < 39


def test_a_collapsed_level_and_an_overfitted_prior_are_warned_of(
    tiny_run: Path,
    picture_folder: Path,
    tmp_path: Path,
    write_config: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tiny_run.parent / "run"
    changes = {
        "images": {"from": str(run / "images")},
        "tokenizer": {"model": {"codebook_size": 512}, "ema": {"revival_threshold": 0.0}},
    }
    Run(load_config(write_config(tmp_path / "a", changes))).stage("train-tokenizer")
    assert "of its codes: it has collapsed" in caplog.text
    training = {"steps": 100, "val_every": 50, "learning_rate": 1e-2, "log_every": 1}
    changes = {
        "images": {"source": f"folder:{picture_folder}", "channels": 3},
        "prior": {"network": "transformer", "dropout": 0.0, "transformer": {"width": 32}, "training": training},
    }
    noise = Run(load_config(write_config(tmp_path / "b", changes)))
    for stage in ("pack", "train-tokenizer", "encode"):
        noise.stage(stage)
    monkeypatch.setattr("pipelines.stages.train_prior.GAP_WARNED_OF", 0.05)
    noise.stage("train-prior", 1)
    assert "they part, and the best checkpoint may be behind" in caplog.text


@pytest.mark.parametrize("logger", ["wandb", "tensorboard"])
def test_other_loggers_get_figures_and_pictures(
    logger: str, tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb's real package, offline."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    changes = {"images": {"from": str(tiny_run.parent / "run" / "images")}, "compute": {"logger": logger}}
    Run(load_config(write_config(tmp_path, changes))).stage("train-tokenizer")
    folder = tmp_path / "run" / "tokenizer"
    assert (folder / "metrics.csv").exists()
    if logger == "wandb":
        import wandb

        wandb.finish()
        assert list(folder.glob("wandb/offline-run-*/files/media/images/reconstructions*.png"))
        assert list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    else:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        assert events.Tags()["images"] == ["reconstructions"]
        assert "val_mse" in events.Tags()["scalars"]


def test_the_schedule_warms_up_and_falls_along_a_cosine_to_zero() -> None:
    factors = [learning_rate_factor(step, 10, 110) for step in range(111)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1
    assert factors[60] == pytest.approx(0.5)
    assert factors[110] == pytest.approx(0)


def test_vectors_are_not_decayed() -> None:
    layer = torch.nn.Linear(3, 3)
    groups = make_optimizer(layer.parameters(), TrainingConfig(weight_decay=0.1))["optimizer"].param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.1), (1, 0.0)]


def test_a_step_is_seeded_by_its_place() -> None:
    def draw(*place: int) -> float:
        seed_step(*place)
        return float(torch.rand(()))

    assert draw(0, 1, 0, 0) == draw(0, 1, 0, 0)
    assert len({draw(0, 1, 0, 0), draw(1, 1, 0, 0), draw(0, 2, 0, 0), draw(0, 1, 1, 0), draw(0, 1, 0, 1)}) == 5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
@pytest.mark.skipif(not os.environ.get("SMALTI_COMPILE"), reason="takes a minute; set SMALTI_COMPILE=1")
def test_a_compiled_job_trains(tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path]) -> None:
    training = {"compile": True, "weight_ema": 0.9}
    changes = {"images": {"from": str(tiny_run.parent / "run" / "images")}, "tokenizer": {"training": training}}
    Run(load_config(write_config(tmp_path, changes))).stage("train-tokenizer")
    HierarchicalVQVAE.from_pretrained(tmp_path / "run" / "tokenizer")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 5, "micro_batches": 2}, r"multiple of micro_batches \(2\), got 5"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"weight_ema": 1.0}, r"weight_ema must lie in \[0, 1\)"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**changes)
