import math

import pytest
import torch

from pipelines.metrics.quality import TokenizerQuality
from tests.test_hierarchy import tiny
from tokenizer.bottlenecks.usage import entropy


def test_figures_are_those_of_the_whole_split_whatever_the_batches_and_filling() -> None:
    model, images = tiny([8, 4]).eval(), torch.rand(5, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        output = model(images)
        whole, parts = TokenizerQuality(model), TokenizerQuality(model)
        whole.add(images, output, torch.ones(5))
        for start in (0, 2, 4):
            part = images[start : start + 2]
            filled = torch.cat([part, torch.ones(2 - len(part), 3, 16, 16)])
            parts.add(filled, model(filled), torch.tensor([1.0, float(len(part) == 2)]))
    expected = whole.figures()
    assert parts.figures() == pytest.approx(expected, rel=1e-6)
    assert expected["mse"] == pytest.approx(float((output.reconstruction - images).square().mean()), rel=1e-6)
    assert expected["psnr"] == pytest.approx(10 * math.log10(4 / expected["mse"]))
    assert expected["level1_usage"] == len(output.levels[1].stored[0].unique()) / 16
    assert expected["level0_commitment"] == pytest.approx(float(output.levels[0].losses["commitment"].mean()), rel=1e-5)


def test_the_entropy_of_equal_counts_is_log_k() -> None:
    assert entropy(torch.ones(8)) == pytest.approx(math.log(8))
    assert entropy(torch.tensor([5.0, 0.0])) == 0
