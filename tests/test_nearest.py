import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenizer import nearest, nearest_code


def brute_force(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return (vectors.double()[:, None] - codebook.double()[None]).square().sum(-1)


@given(n=st.integers(0, 40), k=st.integers(1, 50), d=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_the_nearest_code_is_that_of_brute_force_in_float64(n: int, k: int, d: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors, codebook = torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)
    distances = brute_force(vectors, codebook)
    codes = nearest_code(vectors, codebook)
    assert codes.dtype == torch.int64
    assert codes.shape == (n,)
    found = distances.gather(1, codes[:, None])[:, 0]
    scale = vectors.square().sum(1).double() + codebook[codes].square().sum(1).double()
    assert bool((found <= distances.amin(1) + 1e-6 * scale).all()) if n else True


@pytest.mark.parametrize("scores", [1, 7, 64, 10**9])
def test_chunks_do_not_change_codes(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, codebook = torch.randn(33, 5), torch.randn(8, 5)
    expected = brute_force(vectors, codebook).argmin(1)
    monkeypatch.setattr(nearest, "SCORES_PER_CHUNK", scores)
    assert torch.equal(nearest_code(vectors, codebook), expected)
