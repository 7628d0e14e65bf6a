from statistics import NormalDist

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu
from sklearn.datasets import load_digits

from pipelines.metrics import copies as module
from pipelines.metrics.copies import copies, nearest


@pytest.mark.parametrize("codes", [False, True])
def test_the_nearest_training_image_is_found_whatever_the_blocks(codes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    training = torch.randint(0, 3, (30, 6)) if codes else torch.randn(30, 6) + 10  # where products round
    training[20] = training[3]
    queries = torch.cat([training[20:21], training[:9].roll(1, 1)])
    apart = queries[:, None] - training
    expected = (apart != 0).double().mean(2) if codes else apart.double().norm(dim=2)
    for rows in (2000, 7):
        monkeypatch.setattr(module, "ROWS", rows)
        found = nearest(queries, training, codes)
        assert (found.distances[0], found.rows[0]) == (0, 3)  # equal ones are 0 apart; of two the first
        torch.testing.assert_close(found.distances, expected.min(1).values)
        assert torch.equal(found.rows, expected.argmin(1))


def test_training_images_passed_off_as_samples_are_caught() -> None:
    images = torch.from_numpy(load_digits().data).float() / 8 - 1
    training, held_out, new = images[:900], images[900:1350], images[1350:]
    there = nearest(held_out, training).distances
    honest = copies(nearest(new, training).distances, there)
    assert abs(honest["z"]) < 3 and abs(honest["nearer_share"] - 0.5) < 0.06 and honest["too_near_share"] < 0.03
    few = torch.cat([training[:45] + 0.05 * torch.randn(45, 64), new[45:]])  # a tenth, and not even to the last bit
    mixed = copies(nearest(few, training).distances, there)
    assert mixed["too_near_share"] > 0.09 and mixed["equal_share"] == 0
    all_of_them = copies(nearest(training[:450], training).distances, there)
    assert all_of_them["z"] < -20 and all_of_them["nearer_share"] == all_of_them["too_near_share"] == 1
    assert (all_of_them["equal_share"], all_of_them["equal_share_held_out"]) == (1, 0)


def test_z_is_that_of_mann_and_whitney_ties_and_all() -> None:
    generator = np.random.default_rng(0)
    for samples, held_out in [(generator.random(40), generator.random(30)), generator.integers(0, 5, (2, 35)) / 4]:
        found = copies(torch.from_numpy(samples), torch.from_numpy(held_out))
        peer = mannwhitneyu(samples, held_out, use_continuity=False, method="asymptotic")
        assert found["nearer_share"] == pytest.approx(1 - peer.statistic / (len(samples) * len(held_out)))
        assert 2 * NormalDist().cdf(-abs(found["z"])) == pytest.approx(peer.pvalue)
    same = torch.zeros(5).double()
    assert copies(same, same)["z"] == 0
