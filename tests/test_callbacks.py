import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn

from pipelines.training.callbacks import Average, AverageWeights


def layers() -> nn.Module:
    parts = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 5)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parts.register_buffer("sums", torch.randn(6))
    return parts


def changed(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(torch.randn_like(tensor))


def test_the_average_is_that_of_a_loop_and_young_at_first() -> None:
    model = layers()
    average = Average(model, 0.5, torch.device("cpu"))
    expected: list[torch.Tensor] = []
    for number in range(12):
        changed(model)
        current = [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]
        decay = min(0.5, (1 + number) / (10 + number)) if number else 0.0
        expected = [decay * a + (1 - decay) * b for a, b in zip(expected or current, current, strict=True)]
        average.update_parameters(model)
    for tensor, wanted in zip((*average.module.parameters(), *average.module.buffers()), expected, strict=True):
        torch.testing.assert_close(tensor.detach(), wanted)
        assert tensor.stride() == wanted.stride()
    assert int(average.n_averaged) == 12


def test_an_average_goes_on_from_a_checkpoint_bit_for_bit() -> None:
    model = layers()
    whole = Average(model, 0.9, torch.device("cpu"))
    for _ in range(3):
        whole.update_parameters(model)
        changed(model)
    resumed = Average(layers(), 0.9, torch.device("cpu"))
    resumed.load_state_dict({name: tensor.clone() for name, tensor in whole.state_dict().items()})
    for average in (whole, resumed):
        average.update_parameters(model)
    assert resumed.state_dict().keys() == whole.state_dict().keys()
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_only_training_makes_an_average_on_the_device_of_the_model(stage: str) -> None:
    """`meta` stands for a device that is not the host."""

    class Job:
        class strategy:
            root_device = torch.device("meta")

    keeper = AverageWeights(0.9)
    assert isinstance(keeper, WeightAveraging)
    keeper.setup(Job, layers(), stage)  # type: ignore[arg-type]
    average = keeper._average_model
    assert (average is None) == (stage == "validate")
    if average is not None:
        assert {tensor.device.type for tensor in average.module.state_dict().values()} == {"meta"}
        assert average.n_averaged.device.type == "cpu"
