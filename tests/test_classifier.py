import pytest
import torch
from sklearn.datasets import load_digits

from pipelines.metrics import classifier as module
from pipelines.metrics.classifier import accuracy, judged, train_classifier


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    return torch.from_numpy(data.images * 15).to(torch.uint8)[:, None], torch.from_numpy(data.target)


def test_a_classifier_learns_digits_whatever_was_drawn_before(
    digits: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STEPS", 25)
    images, labels = digits
    model = train_classifier(images[:1200], labels[:1200], 10, 0)
    found = accuracy(model, images[1200:], labels[1200:])
    assert found.overall > 0.6 and not model.training
    wanted = [
        float((judged(model, images[1200:]).argmax(1) == one)[labels[1200:] == one].double().mean())
        for one in range(10)
    ]
    assert found.of_classes == wanted


def test_training_is_a_function_of_images_labels_and_seed(
    digits: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STEPS", 2)
    images, labels = digits[0][:50], digits[1][:50]
    first = train_classifier(images, labels, 10, 0).state_dict()
    torch.rand(3)
    state = torch.random.get_rng_state()
    again, other = (train_classifier(images, labels, 10, seed).state_dict() for seed in (0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["last.weight"], other["last.weight"])


def test_large_images_are_judged_at_32_pixels() -> None:
    model = module.Classifier(3, 4).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    small = torch.nn.functional.interpolate(images / 127.5 - 1, (32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(judged(model, images), model(small).log_softmax(1).detach())
