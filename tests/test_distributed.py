"""Several real processes: the codebooks, batches and figures of one."""

import csv
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines.config import load_config
from pipelines.run import Run
from tests.conftest import merged
from tests.jobs import ranks
from tests.steps import COMPARABLE, CRITIC, Recorded, least_margin


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def recorded(stage: str, configs: Sequence[Path], processes: int, *options: str) -> None:
    """A command on one config after the other, in so many processes; `test_processes` has Lightning start them."""
    jobs = ranks(processes, "tests.steps", stage, *configs, *options, folder=configs[0].parent)
    assert [job.wait() for job in jobs] == [0] * processes, "\n".join(job.errors for job in jobs)


# Kinds that are trained beside EMA codebooks, the finite scalars with a critic. At the centres of k-means gradients are
# nothing but rounding, which Adam would make as large as any.
KINDS: dict[str, dict] = {
    "gradient": {"gradient": {"kmeans_iterations": 0}},
    "fsq": {"fsq": {"levels": [3, 3]}},
    "residual": {"residual": {"depth": 2, "ema": {"kmeans_iterations": 0, "gradient": "rotation"}}},
    "gumbel": {"gumbel": {"anneal_steps": 4}},
    "gaussian": {
        "gaussian": {"beta": 1.0, "beta_warmup": 4, "free_bits": 0.05},
        "loss": "gaussian",
        "augment": {"corrupt": "noise"},
    },
    "sparse": {"sparse": {"weight": 1.0}},
    "contractive": {"contractive": {"weight": 1.0}, "model": {"conditional": True}},
}
Trained = Callable[[int, int], dict[str, Path]]


@pytest.fixture(scope="module")
def trained(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path]) -> Trained:
    """Train tokenizers of all kinds in so many processes, once; k-means start, revival and averaging are all at work.

    In micro-batches those with EMA codebooks alone.
    """

    @cache
    def train(devices: int, micro_batches: int) -> dict[str, Path]:
        folder, configs = tmp_path_factory.mktemp("trained"), []
        for kind in ["ema", *KINDS]:
            training = {"micro_batches": micro_batches if kind == "ema" else 1}
            changes = {
                "images": {"from": str(tiny_run.parent / "run" / "images")},
                "tokenizer": {"bottleneck": kind, "training": training, **KINDS.get(kind, {})},
                "prior": {"network": "auto"},
                "compute": {"devices": devices},
            }
            configs.append(write_config(folder / kind, merged(COMPARABLE, changes)))
        (folder / "fsq" / CRITIC).touch()
        recorded("train-tokenizer", configs if devices < 4 else configs[:1], devices)
        return {config.parent.name: config.parent for config in configs}

    return train


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "tokenizer" / "model.safetensors")


@pytest.mark.parametrize(("devices", "micro_batches"), [(2, 2), (4, 1)])
def test_several_processes_take_the_steps_of_one(devices: int, micro_batches: int, trained: Trained) -> None:
    """The same start bit for bit, the same weights and codebooks to rounding, the same bits on all ranks."""
    one, several = trained(1, 1)["ema"], trained(devices, micro_batches)["ema"]
    assert least_margin(one) > 1e-3  # rounding tips no latent to another code
    for name, tensor in weights(one).items():
        assert torch.allclose(tensor, weights(several)[name], atol=1e-5), name
    records = [(several / f"codebooks{rank}.txt").read_text().splitlines() for rank in range(devices)]
    assert len(records[0]) == 1 + 6
    assert all(record == records[0] for record in records)
    assert records[0][0] == (one / "codebooks0.txt").read_text().splitlines()[0]
    last, same = (rows(folder / "run" / "tokenizer" / "metrics.csv")[-1] for folder in (one, several))
    assert last["level1_revived"] == same["level1_revived"] != "0"


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_take_the_steps_of_one_with_every_kind(kind: str, trained: Trained) -> None:
    """The weights to rounding, and the validation's figures, that of the mean activation of all images among them."""
    one, two = trained(1, 1)[kind], trained(2, 2)[kind]
    for name, tensor in weights(one).items():
        assert torch.allclose(tensor, weights(two)[name], atol=1e-5), name
    found, wanted = (rows(folder / "run" / "tokenizer" / "metrics.csv")[-1] for folder in (two, one))
    figures = [name for name in wanted if name.startswith("val_")]
    assert [float(found[name]) for name in figures] == pytest.approx([float(wanted[name]) for name in figures], 1e-4)
    assert (kind == "sparse") == ("val_level0_divergence" in figures)
    assert (kind == "gaussian") == ({"val_mse_corrupted", "val_level0_charged", "val_loss_scale"} <= set(figures))


def test_validation_figures_and_steps_of_a_flow_do_not_depend_on_the_number_of_processes(
    tiny_run: Path, numbers_run: Path, tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    """179 images in batches of 8 leave a tail; nothing moves, so that weights and codebooks are alike.

    But for those of a flow, in the same processes.
    """
    taught = {"network": "flow", "dropout": 0.0, "class_dropout": 0.0, "training": {"batch_size": 8, "weight_ema": 0.9}}
    still = {"steps": 1, "val_every": 1, "learning_rate": 1e-12, "weight_ema": 0.0}
    ema = {"decay": 0.99999999, "revival_threshold": 0.0, "kmeans_iterations": 0}
    run, found = tiny_run.parent / "run", []
    for devices in (1, 2):
        changes = {
            "images": {"from": str(run / "images")},
            "codes": {"from": str(run / "codes")},
            "tokenizer": {"ema": ema, "training": still},
            "prior": {"training": still},
            "compute": {"devices": devices},
        }
        config = write_config(tmp_path / str(devices), merged(COMPARABLE, changes))
        (config.parent / "run").mkdir()
        of_numbers = {"codes": {"from": str(numbers_run.parent / "run" / "codes")}, "prior": taught}
        flow = write_config(tmp_path / f"flow{devices}", merged(changes, of_numbers))
        recorded("train-prior", [config, flow], devices, "--level", "0")
        recorded("train-tokenizer", [config], devices)
        folder = config.parent / "run"
        figures = [rows(folder / name / "metrics.csv")[-1] for name in ("tokenizer", "prior/level0")]
        found.append({name: float(value) for row in figures for name, value in row.items() if name.startswith("val_")})
    assert least_margin(tmp_path / "1", "validation") > 1e-4
    assert len(found[0]) > 8
    one, two = (tmp_path / f"flow{devices}" / "run" / "prior" / "level0" for devices in (1, 2))
    weights_of_two, figures = load_file(two / "model.safetensors"), rows(one / "metrics.csv")[-1]
    for name, tensor in load_file(one / "model.safetensors").items():
        assert torch.allclose(tensor, weights_of_two[name], atol=1e-5), name
    value = float(rows(two / "metrics.csv")[-1]["val_nats_per_value"])
    assert value == pytest.approx(float(figures["val_nats_per_value"]), rel=1e-4)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_job_goes_on_with_the_same_batches_on_another_number_of_processes(
    tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.stages.train_tokenizer.TokenizerTraining", Recorded)
    found = []
    for name, first in (("one", 1), ("two, then one", 2)):
        changes = {
            "images": {"from": str(tiny_run.parent / "run" / "images")},
            "compute": {"devices": first},
            "tokenizer": {"training": {"steps": 3, "val_every": 3, "log_every": 1, "weight_ema": 0.0}},
        }
        config = write_config(tmp_path / name, merged(COMPARABLE, changes))
        recorded("train-tokenizer", [config], first)
        folder = tmp_path / name / "run" / "tokenizer"
        for path in (config, folder / "config.yaml"):  # as if it had been stopped there with more steps to go
            path.write_text(path.read_text().replace("steps: 3", "steps: 6").replace("devices: 2", "devices: 1"))
        (folder / "model.safetensors").unlink()
        monkeypatch.setenv("RECORD", str(tmp_path / name))
        Run(load_config(config)).stage("train-tokenizer")
        found.append((load_file(folder / "model.safetensors"), rows(folder / "metrics.csv")))
    assert least_margin(tmp_path / "one") > 1e-3
    assert [row["step"] for row in found[0][1]] == [row["step"] for row in found[1][1]] == list("012345")
    for one, two in zip(found[0][1][3:], found[1][1][3:], strict=True):  # before, a loss is that of the first rank
        assert float(one["train_loss"]) == pytest.approx(float(two["train_loss"]), rel=1e-4)
    assert all(torch.allclose(tensor, found[1][0][name], atol=1e-5) for name, tensor in found[0][0].items())


@pytest.mark.parametrize(("stage", "kind"), [("train-tokenizer", "tokenizer"), ("train-prior", "prior")])
def test_activation_checkpointing_changes_nothing(
    stage: str, kind: str, tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    """One EMA step an optimizer step, the same dropout twice: the weights of a plain job, bit for bit."""
    run = tiny_run.parent / "run"
    found = []
    for checkpointing in (False, True):
        training = {"activation_checkpointing": checkpointing, "weight_ema": 0.9, "micro_batches": 2}
        changes: dict = {"images": {"from": str(run / "images")}, kind: {"training": training}}
        if kind == "prior":
            changes["codes"] = {"from": str(run / "codes")}
        Run(load_config(write_config(tmp_path / str(checkpointing), changes))).stage(stage)
        folders = [tmp_path / str(checkpointing) / "run" / "tokenizer"]
        if kind == "prior":
            folders = [tmp_path / str(checkpointing) / "run" / "prior" / f"level{level}" for level in (0, 1)]
        found.append([load_file(folder / "model.safetensors") for folder in folders])
    for plain, checkpointed in zip(*found, strict=True):
        assert plain.keys() == checkpointed.keys()
        assert all(torch.equal(tensor, checkpointed[name]) for name, tensor in plain.items())


def test_fsdp_is_for_priors_on_gpus(
    tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path], smalti: Callable[..., tuple[int, str]]
) -> None:
    run = tiny_run.parent / "run"
    config = write_config(tmp_path, {"images": {"from": str(run / "images")}, "codes": {"from": str(run / "codes")}})
    code, text = smalti("train-tokenizer", config, "--compute.strategy=fsdp")
    assert code == 2
    assert "fsdp is for priors" in text
    code, text = smalti("train-prior", config, "--compute.strategy=fsdp")
    assert code == 2
    assert "fsdp needs GPUs" in text
