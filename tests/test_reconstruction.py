import pytest
import torch

from pipelines.metrics.reconstruction import similarities


def test_each_image_has_its_own_psnr() -> None:
    images = torch.zeros(2, 3, 4, 4)
    outputs = images + torch.tensor([0.2, 0.02])[:, None, None, None]
    assert similarities(outputs, images)[:, 0].tolist() == pytest.approx([20.0, 40.0], abs=1e-4)  # 10 log10(4 / 0.04)


@pytest.mark.parametrize(
    ("side", "there"), [(10, [False, False]), (11, [True, False]), (175, [True, False]), (176, [True, True])]
)
def test_images_too_small_for_a_window_have_no_similarity(side: int, there: list[bool]) -> None:
    images = torch.rand(1, 1, side, side) * 2 - 1
    found = similarities(images, images)[0, 1:]
    assert found.tolist() == pytest.approx([float(one) for one in there], abs=1e-5)


def test_similarity_falls_with_noise() -> None:
    images = torch.rand(1, 1, 176, 176) * 2 - 1
    noise = torch.randn_like(images)
    little, much = (similarities(images + amount * noise, images)[0] for amount in (0.1, 0.5))
    assert (little > much).all()
