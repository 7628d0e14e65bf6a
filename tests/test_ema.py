import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from tests.memory import peak_bytes
from tokenizer import Codebook, CodebookEMA, EMAConfig
from tokenizer.bottlenecks.bottleneck import Bottled
from tokenizer.bottlenecks.ema import (
    MAX_REVIVED,
    Statistics,
    assignment_statistics,
    candidate_positions,
    take_owned,
    young_decay,
)

GROWN = 10**6  # steps after which an average forgets as slowly as it ever will
NO_REVIVAL = EMAConfig(decay=0.9, revival_threshold=0.0)


def step(codebook: Codebook, ema: CodebookEMA, latents: torch.Tensor) -> torch.Tensor:
    output = codebook(latents)
    return ema.update(codebook, assignment_statistics(output, len(codebook.vectors), output.observed[:8]), GROWN)[
        "revived"
    ]


def test_a_young_codebook_follows_latents_that_grow() -> None:
    assert young_decay(0.99, 0) == 0.1
    assert young_decay(0.99, GROWN) == 0.99
    behind = []
    for young in (True, False):
        codebook = Codebook(2, 1)
        codebook.vectors.copy_(torch.tensor([[-1.0], [1.0]]))
        ema = CodebookEMA(codebook, NO_REVIVAL)
        for number in range(10):  # a tenth more at every step
            latents = torch.tensor([[-1.0], [1.0]]) * 1.1 ** (number + 1)
            ema.update(codebook, Statistics(torch.ones(2), latents, latents), number if young else GROWN)
        behind.append(float((latents - codebook.vectors).abs().max() / latents.max()))
    assert behind[0] < 0.2 < 0.35 < behind[1]


def test_ema_equals_a_plain_loop_over_codes_and_steps() -> None:
    codebook = Codebook(6, 3)
    ema = CodebookEMA(codebook, NO_REVIVAL)
    vectors = codebook.vectors.double().clone()
    counts, sums = torch.ones(6, dtype=torch.float64), vectors.clone()
    for _ in range(5):
        latents = torch.randn(4, 3, 2, 2)
        codes = codebook(latents).stored[0].flatten()
        step(codebook, ema, latents)
        flat = latents.permute(0, 2, 3, 1).reshape(-1, 3).double()
        for code in range(6):
            members = flat[codes == code]
            counts[code] = 0.9 * counts[code] + 0.1 * len(members)
            sums[code] = 0.9 * sums[code] + 0.1 * members.sum(0)
            if len(members):
                vectors[code] = sums[code] / counts[code]
    assert torch.allclose(codebook.vectors.double(), vectors, atol=1e-6)


def assigned(latents: torch.Tensor, codes: torch.Tensor) -> Bottled:
    """Return an output whose latents (N, D) got these codes (N,)."""
    return Bottled(latents, (codes,), {}, latents)


@given(n=st.integers(0, 60), k=st.integers(1, 40), d=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_statistics_are_those_of_a_one_hot_product(n: int, k: int, d: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    latents, codes = torch.randn(n, d, generator=generator), torch.randint(k, (n,), generator=generator)
    one_hot = torch.nn.functional.one_hot(codes, k).double()
    counts, sums, _ = assignment_statistics(assigned(latents, codes), k, latents)
    assert torch.equal(counts.double(), one_hot.sum(0))
    assert torch.allclose(sums.double(), one_hot.T @ latents.double(), atol=1e-5)


def test_statistics_hold_no_one_hot_matrix() -> None:
    output = assigned(torch.randn(8192, 2), torch.randint(8192, (8192,)))
    peak = peak_bytes(lambda: assignment_statistics(output, 8192, output.observed))
    assert peak < 2**21, f"a one-hot matrix is {4 * 8192 * 8192} bytes, got {peak}"


def test_statistics_are_the_same_bits_every_time() -> None:
    output = assigned(torch.randn(50_000, 8), torch.randint(300, (50_000,)))
    first = assignment_statistics(output, 300, output.observed)
    for _ in range(5):
        again = assignment_statistics(output, 300, output.observed)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("normalize", [False, True])
def test_a_step_reads_no_value_back_from_the_device(normalize: bool) -> None:
    with FakeTensorMode():  # tensors without values: reading one, or a size that depends on one, is an error
        codebook = Codebook(16, 4, normalize)
        ema = CodebookEMA(codebook, EMAConfig())
        output = codebook(torch.empty(2, 4, 3, 3))
        candidates = take_owned(output.observed, torch.zeros(5, dtype=torch.int64), 0)
        revived = ema.update(codebook, assignment_statistics(output, 16, candidates), GROWN)["revived"]
    assert revived.shape == ()


def test_unused_codes_stay_put() -> None:
    codebook = Codebook(16, 3)
    codebook.vectors[8:] += 100
    ema = CodebookEMA(codebook, NO_REVIVAL)
    before = codebook.vectors.clone()
    for _ in range(300):
        step(codebook, ema, torch.randn(2, 3, 2, 2))
    assert torch.equal(codebook.vectors[8:], before[8:])
    assert not torch.equal(codebook.vectors[:8], before[:8])


def test_revival_puts_current_latents_in_dead_codes_and_resets_counts_and_sums() -> None:
    codebook = Codebook(16, 3)
    codebook.vectors[10:] += 100
    ema = CodebookEMA(codebook, EMAConfig(decay=0.5, revival_threshold=0.2))
    revived = 0
    for _ in range(8):
        latents = torch.randn(8, 3, 2, 2)
        revived += int(step(codebook, ema, latents))
    assert revived >= 6
    assert codebook.vectors.abs().max() < 10
    assert torch.allclose(ema.sums / ema.counts[:, None], codebook.vectors, atol=1e-5)


def test_a_revived_code_is_not_undone_by_the_next_step() -> None:
    codebook = Codebook(4, 2)
    codebook.vectors.copy_(torch.tensor([[0.0, 0], [1, 0], [0, 1], [50, 50]]))
    ema = CodebookEMA(codebook, EMAConfig(decay=0.5, revival_threshold=0.4))
    ema.counts[3] = 0.0
    candidates = torch.tensor([[5.0, 5.0]])
    counts = torch.tensor([4.0, 4, 4, 0])
    ema.update(codebook, Statistics(counts, counts[:, None] * codebook.vectors, candidates), GROWN)
    assert torch.equal(codebook.vectors[3], candidates[0])
    ema.update(codebook, Statistics(torch.tensor([4.0, 4, 4, 4]), 4 * codebook.vectors, candidates), GROWN)
    assert torch.allclose(codebook.vectors[3], candidates[0])


def test_no_more_codes_are_revived_than_there_are_candidates() -> None:
    codebook = Codebook(32, 2)
    ema = CodebookEMA(codebook, EMAConfig(revival_threshold=0.5))
    ema.counts[1:] = 1e-9
    statistics = Statistics(torch.zeros(32), torch.zeros(32, 2), torch.randn(8, 2))
    assert int(ema.update(codebook, statistics, GROWN)["revived"]) == 8


def test_statistics_of_parts_add_up_to_those_of_the_whole() -> None:
    codebook = Codebook(16, 4)
    latents = torch.randn(8, 4, 2, 2)
    positions = candidate_positions(8 * 4, 16, seed=3)

    def statistics(part: torch.Tensor, offset: int) -> Statistics:
        output = codebook(part)
        return assignment_statistics(output, 16, take_owned(output.observed, positions, offset))

    whole = statistics(latents, 0)
    parts = [statistics(latents[start : start + 2], 4 * start) for start in (0, 2, 4, 6)]
    for one, several in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.allclose(one, torch.stack(several).sum(0), atol=1e-5)
    assert torch.equal(whole.counts, torch.stack([part.counts for part in parts]).sum(0))


def test_candidates_are_the_same_for_all_who_ask_and_bounded() -> None:
    assert torch.equal(candidate_positions(1000, 512, 7), candidate_positions(1000, 512, 7))
    assert not torch.equal(candidate_positions(1000, 512, 7), candidate_positions(1000, 512, 8))
    assert len(candidate_positions(1000, 10**6, 7)) == MAX_REVIVED


@pytest.mark.parametrize("normalize", [False, True])
def test_kmeans_start_finds_well_separated_clusters(normalize: bool) -> None:
    centres = torch.eye(4) * 10
    latents = (centres[:, None] + 0.01 * torch.randn(4, 50, 4)).flatten(0, 1)
    if normalize:
        latents = torch.nn.functional.normalize(latents, dim=1)
    codebook = Codebook(16, 4, normalize)
    ema = CodebookEMA(codebook, NO_REVIVAL)
    ema.start(codebook, latents, seed=0)
    assert float((torch.cdist(latents, codebook.vectors).amin(1)).max()) < 0.2
    assert torch.allclose(ema.sums / ema.counts[:, None], codebook.vectors, atol=1e-5)


def test_kmeans_start_manages_with_fewer_latents_than_codes() -> None:
    codebook = Codebook(16, 4)
    CodebookEMA(codebook, NO_REVIVAL).start(codebook, torch.randn(5, 4), seed=0)
    assert bool(torch.isfinite(codebook.vectors).all())


def test_kmeans_start_of_equal_latents_is_the_same_bits_every_time() -> None:
    latents, found = torch.randn(5000, 4), []
    for _ in range(3):
        codebook = Codebook(16, 4)
        CodebookEMA(codebook, NO_REVIVAL).start(codebook, latents.clone(), seed=0)
        found.append(codebook.vectors)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_statistics_stay_in_float32_under_autocast() -> None:
    codebook = Codebook(16, 4)
    with torch.autocast("cpu", torch.bfloat16):
        output = codebook(torch.randn(2, 4, 2, 2).bfloat16())
        statistics = assignment_statistics(output, 16, output.observed[:4])
    assert {part.dtype for part in statistics} == {torch.float32}


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\), got 1"):
        EMAConfig(decay=1.0)
    with pytest.raises(ValueError, match="revival_threshold must lie in"):
        EMAConfig(revival_threshold=-0.1)
