"""A loss with a network and an optimizer of its own, which the training of the tokenizer must not notice."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipelines.config import load_config
from pipelines.run import Run
from pipelines.training.owned_losses import OwnedLosses

STAGE = "pipelines.stages.train_tokenizer"


class Critic(nn.Module):
    """Tells images from reconstructions, as an adversarial loss does.

    Args:
        weight: of what the tokenizer is told.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight
        self.judge = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(1))
        self.judge(torch.zeros(1, 1, 16, 16))
        self.optimizer = torch.optim.Adam(self.parameters(), 1e-2)

    def forward(self, reconstruction: Tensor, images: Tensor) -> dict[str, Tensor]:
        return {"adversarial": -self.weight * self.judge(reconstruction).mean()}

    def own(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        real, made = self.judge(images), self.judge(reconstruction)
        return torch.relu(1 - real).mean() + torch.relu(1 + made).mean()


@pytest.fixture
def train(
    tiny_run: Path, tmp_path: Path, write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Path, Critic | None]]:
    """Train the tiny tokenizer with a critic of that weight; None for no critic."""

    def run(name: str, weight: float | None, **training: object) -> tuple[Path, Critic | None]:
        torch.manual_seed(0)
        critics = [] if weight is None else [Critic(weight)]
        monkeypatch.setattr(f"{STAGE}.owned_losses", lambda section: critics)
        images = {"from": str(tiny_run.parent / "run" / "images")}
        changes = {"images": images, "tokenizer": {"training": {"weight_ema": 0.9, "log_every": 1, **training}}}
        Run(load_config(write_config(tmp_path / name, changes))).stage("train-tokenizer")
        return tmp_path / name / "run" / "tokenizer", (critics or [None])[0]

    return run


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_codebooks_schedule_clock_and_export_are_what_they_are_without_it(train: Callable) -> None:
    alone, _ = train("alone", None, micro_batches=2)
    torch.manual_seed(0)
    start = Critic(0.0).state_dict()
    beside, critic = train("beside", 0.0, micro_batches=2)
    assert same(weights(alone), weights(beside))
    assert not same(start, critic.state_dict())  # it has learned meanwhile
    assert not any(parameter.requires_grad for parameter in critic.parameters())
    last, other = (torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (alone, beside))
    assert last["global_step"] == other["global_step"] == 6
    for part in ("state_dict", "current_model_state"):
        assert same(last[part], other[part])
    assert last["lr_schedulers"] == other["lr_schedulers"] and len(other["optimizer_states"]) == 1
    rows = list(csv.DictReader((beside / "metrics.csv").read_text().splitlines()))
    assert [row["train_adversarial"] for row in rows if row["train_loss"]]


def test_what_is_owned_gets_gradients_from_its_own_loss_alone() -> None:
    critic, images = Critic(1.0), torch.rand(2, 1, 16, 16)
    reconstruction = torch.rand(2, 1, 16, 16, requires_grad=True)
    wanted = torch.autograd.grad(critic.own(reconstruction.detach(), images), list(critic.parameters()))
    owned = OwnedLosses([critic])
    assert not any(parameter.requires_grad for parameter in critic.parameters())
    for _ in range(2):  # the two micro-batches of a step
        sum(owned(reconstruction, images, 2).values(), start=torch.zeros(())).backward()
    for parameter, gradient in zip(critic.parameters(), wanted, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-6)
    assert reconstruction.grad.abs().sum() > 0


def test_what_it_asks_for_moves_the_tokenizer(train: Callable) -> None:
    assert not same(weights(train("without", 0.0)[0]), weights(train("with", 1.0)[0]))


def test_it_goes_on_where_it_was(train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, wanted = train("whole", 0.5, checkpoint_every=1)
    from pipelines.training.checkpoints import KeepLast

    honest = KeepLast.on_train_batch_end

    def stopped(self: KeepLast, trainer: object, *args: object) -> None:
        honest(self, trainer, *args)  # type: ignore[arg-type]
        if trainer.global_step == 4:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(KeepLast, "on_train_batch_end", stopped)
        with pytest.raises(KeyboardInterrupt):
            train("stopped", 0.5, checkpoint_every=1)
    resumed, found = train("stopped", 0.5, checkpoint_every=1)
    assert same(weights(whole), weights(resumed))
    assert same(wanted.state_dict(), found.state_dict())
