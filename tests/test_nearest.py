import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.memory import peak_bytes
from tokenizer import nearest, nearest_code
from tokenizer.nearest import CODES_PER_BLOCK, CODES_PER_TILE


def distances_to(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Return all squared distances (N, K) in float64, the plain way."""
    return (vectors.double()[:, None] - codebook.double()[None]).square().sum(-1)


def assert_nearest(codes: torch.Tensor, vectors: torch.Tensor, codebook: torch.Tensor) -> None:
    """Codes may differ from brute force only where distances agree to 1e-6 of |x|^2 + |c|^2."""
    assert codes.dtype == torch.int64
    assert codes.shape == (len(vectors),)
    if len(vectors):
        distances = distances_to(vectors, codebook)
        found = distances.gather(1, codes[:, None])[:, 0]
        scale = vectors.double().square().sum(1) + codebook[codes].double().square().sum(1)
        assert bool((found <= distances.amin(1) + 1e-6 * scale).all())


def drawn(n: int, k: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)


def rounded(n: int, k: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return multiples of 1/256, to which an offset is added without rounding: distances stay what they are."""
    vectors, codebook = drawn(n, k, d)
    return torch.round(256 * vectors) / 256, torch.round(256 * codebook) / 256


@given(n=st.integers(0, 40), k=st.integers(1, 200), d=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_the_nearest_code_is_that_of_brute_force_in_float64(n: int, k: int, d: int, seed: int) -> None:
    vectors, codebook = drawn(n, k, d, seed)
    assert_nearest(nearest_code(vectors, codebook), vectors, codebook)


@pytest.mark.parametrize("d", [1, 3, 64, 256])
@pytest.mark.parametrize("k", [2, CODES_PER_TILE - 1, CODES_PER_TILE + 1, 2 * CODES_PER_TILE + CODES_PER_BLOCK])
def test_codes_past_a_tile_and_within_a_part_of_one_are_found(k: int, d: int) -> None:
    vectors, codebook = drawn(33, k, d)
    vectors[:3] = codebook[[0, k // 2, -1]]
    assert_nearest(nearest_code(vectors, codebook), vectors, codebook)


@pytest.mark.parametrize("floats", [1, 512, 5000, 10**9])
@pytest.mark.parametrize("codes", [CODES_PER_BLOCK, 3 * CODES_PER_BLOCK, 10**6])
def test_tiles_do_not_change_codes(floats: int, codes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, codebook = drawn(33, 500, 5)
    monkeypatch.setattr(nearest, "FLOATS_PER_TILE", floats)
    monkeypatch.setattr(nearest, "CODES_PER_TILE", codes)
    assert torch.equal(nearest_code(vectors, codebook), distances_to(vectors, codebook).argmin(1))


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_far_from_the_origin_codes_differ_only_where_float32_cannot_tell(offset: float) -> None:
    vectors, codebook = drawn(200, 300, 64)
    vectors, codebook = vectors + offset, codebook + offset
    assert_nearest(nearest_code(vectors, codebook), vectors, codebook)


@pytest.mark.parametrize("offset", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("k", [64, CODES_PER_TILE + 1])
def test_an_offset_that_latents_and_codes_share_costs_no_digits(offset: float, k: int) -> None:
    vectors, codebook = rounded(300, k, 64)
    assert_nearest(nearest_code(vectors + offset, codebook + offset), vectors, codebook)


def test_no_centred_copy_of_all_vectors_is_held() -> None:
    vectors, codebook = drawn(2**17, 64, 64)
    assert peak_bytes(lambda: nearest_code(vectors, codebook)) < vectors.nbytes


@pytest.mark.parametrize(
    ("vectors", "codebook"),
    [((3, 4), (5, 3)), ((3,), (5, 3)), ((3, 4), (0, 4)), ((3, 4, 1), (5, 4))],
)
def test_vectors_and_codebook_that_do_not_fit_are_refused(vectors: tuple, codebook: tuple) -> None:
    with pytest.raises(ValueError, match=r"must be float32 \(N, D\) and \(K, D\), got"):
        nearest_code(torch.zeros(vectors), torch.zeros(codebook))
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        nearest_code(torch.zeros(3, 4).double(), torch.zeros(5, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("k", [2, 65])
def test_a_vector_that_is_not_finite_gets_a_code_that_exists(bad: float, k: int) -> None:
    vectors, codebook = drawn(4, k, 3)
    vectors[1, 1] = bad
    codes = nearest_code(vectors, codebook)
    assert 0 <= int(codes.min()) <= int(codes.max()) < k


def test_vectors_in_any_memory_layout_find_the_same_codes() -> None:
    vectors, codebook = drawn(70, 90, 6)
    strided = nearest_code(vectors.T.contiguous().T, codebook.T.contiguous().T)
    assert_nearest(strided, vectors, codebook)


def test_scores_are_never_all_held() -> None:
    vectors, codebook = drawn(8192, 8192, 2)
    peak = peak_bytes(lambda: nearest_code(vectors, codebook))
    assert 2**20 < peak < 2**25, f"all scores are {4 * 8192 * 8192} bytes, got {peak}"


def test_the_operator_keeps_what_it_promises_to_a_compiled_model() -> None:
    torch.library.opcheck(nearest_code, drawn(5, 7, 3), test_utils=("test_schema", "test_faketensor"))


INTERPRETED = pytest.mark.skipif(not os.environ.get("TRITON_INTERPRET"), reason="needs triton and TRITON_INTERPRET=1")


@pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=INTERPRETED)]
)
@pytest.mark.parametrize("n", [0, 1, 130])
@pytest.mark.parametrize(("k", "d"), [(2, 1), (65, 3), (200, 64), (130, 33), (64, 8)])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_the_gpu_kernel_finds_the_codes_of_brute_force(n: int, k: int, d: int, offset: float, device: str) -> None:
    triton = pytest.importorskip("tokenizer.nearest_triton")
    vectors, codebook = rounded(n, k, d)
    codes = triton.nearest_code_triton((vectors + offset).to(device), (codebook + offset).to(device)).cpu()
    assert_nearest(codes, vectors, codebook)
