import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prior import filtered_probabilities, inverse_cdf, uniforms


def test_a_stream_is_a_function_of_seed_and_index() -> None:
    assert np.array_equal(uniforms(3, 5, 10), uniforms(3, 5, 10))
    assert np.array_equal(uniforms(3, 5, 10)[:4], uniforms(3, 5, 4))
    assert not np.array_equal(uniforms(3, 5, 10), uniforms(3, 6, 10))
    assert not np.array_equal(uniforms(3, 5, 10), uniforms(4, 5, 10))
    far = [uniforms(seed, index, 4)[0] for seed in (2**64 - 1, 2**64 - 2) for index in (0, 2**64 - 1)]
    assert len(set(far)) == 4
    values = np.concatenate([uniforms(0, index, 100) for index in range(100)])
    assert 0 <= values.min() < values.max() < 1
    assert abs(values.mean() - 0.5) < 0.01


@given(
    weights=st.lists(st.floats(0, 10), min_size=1, max_size=12).filter(lambda w: sum(w) > 1e-3),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_the_inverse_cdf_finds_the_interval_that_holds_the_uniform(weights: list[float], uniform: float) -> None:
    probabilities = torch.tensor([weights], dtype=torch.float64) / sum(weights)
    code = int(inverse_cdf(probabilities, torch.tensor([uniform], dtype=torch.float64)))
    cumulative = probabilities[0].cumsum(0)
    threshold = uniform * cumulative[-1]
    assert probabilities[0, code] > 0
    assert cumulative[code] > threshold
    assert code == 0 or cumulative[code - 1] <= threshold


def test_the_defaults_filter_nothing() -> None:
    logits = torch.randn(4, 100) * 5
    assert torch.allclose(filtered_probabilities(logits), logits.double().softmax(-1))


def test_temperature_comes_before_the_filters() -> None:
    """At temperature 4 the distribution is flat enough for top-p 0.5 to keep two codes; at 1 it keeps one."""
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    assert int((filtered_probabilities(logits, 1.0, top_p=0.5) > 0).sum()) == 1
    assert int((filtered_probabilities(logits, 4.0, top_p=0.5) > 0).sum()) == 2


def test_top_k_keeps_the_k_likeliest_and_their_ratios() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    kept = filtered_probabilities(logits, top_k=2)[0]
    assert (kept > 0).tolist() == [False, True, False, True]
    assert torch.allclose(kept[1] / kept[3], torch.tensor(1.0, dtype=torch.float64).exp())
    assert torch.allclose(filtered_probabilities(logits, top_k=9), filtered_probabilities(logits))


def test_top_p_keeps_the_fewest_that_reach_it_without_top_k() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, kept in ((0.01, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.96, 4)):
        probabilities = filtered_probabilities(logits, top_p=top_p)
        assert int((probabilities > 0).sum()) == kept
        assert torch.allclose(probabilities.sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
        ({"top_p": 0.0}, "top_p must lie in"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        filtered_probabilities(torch.zeros(1, 4), **settings)


@pytest.mark.parametrize("top_k", [1, 3, 20, 99])
@pytest.mark.parametrize("top_p", [0.2, 0.9])
def test_top_p_of_what_top_k_kept_is_top_p_of_all_with_the_others_at_zero(top_k: int, top_p: float) -> None:
    logits = torch.randn(4, 50) * 3
    kept = filtered_probabilities(logits, top_k=top_k)
    ordered, order = kept.sort(dim=-1, descending=True)
    expected = torch.zeros_like(kept).scatter_(-1, order, ordered * (ordered.cumsum(-1) - ordered < top_p))
    both = filtered_probabilities(logits, top_k=top_k, top_p=top_p)
    assert torch.allclose(both, expected / expected.sum(-1, keepdim=True))
    assert torch.equal(both > 0, expected > 0)


def test_of_equally_likely_codes_top_p_keeps_the_first() -> None:
    logits = torch.cat([torch.full((1, 10), -9.0), torch.zeros(1, 40)], 1)
    for top_k in (0, 40):
        kept = filtered_probabilities(logits, top_k=top_k, top_p=0.51)[0] > 0
        assert kept.nonzero()[:, 0].tolist() == list(range(10, 31))
