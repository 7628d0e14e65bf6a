from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.batches import TrainingBatches, ValidationBatches, drawn_sample, epoch_permutation


def test_every_epoch_is_a_permutation_and_no_two_are_alike() -> None:
    epochs = [[drawn_sample(7, epoch * 50 + place, (20, 30)) for place in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != [drawn_sample(8, place, (20, 30)) for place in range(50)]


@given(shards=st.lists(st.integers(0, 9), min_size=1, max_size=8), window=st.integers(1, 9), epoch=st.integers(0, 3))
def test_windows_of_shards_make_a_permutation_that_reads_few_shards_at_once(
    shards: list[int], window: int, epoch: int
) -> None:
    order = epoch_permutation(3, epoch, tuple(shards), window)
    assert sorted(order) == list(range(sum(shards)))
    owner = [number for number, size in enumerate(shards) for _ in range(size)]
    visited = [owner[sample] for sample in order]
    ends = {shard: max(place for place, one in enumerate(visited) if one == shard) for shard in visited}
    starts = {shard: visited.index(shard) for shard in visited}
    open_at_once = [sum(starts[s] <= place <= ends[s] for s in starts) for place in range(len(visited))]
    assert max(open_at_once, default=0) <= window


@given(world=st.sampled_from([1, 2, 4]), micro=st.sampled_from([1, 2, 3]), start=st.integers(0, 5))
def test_the_global_batch_is_the_same_for_any_ranks_and_micro_batches(world: int, micro: int, start: int) -> None:
    batch = 24
    ranks = [list(TrainingBatches(start, 6, batch, micro, rank, world)) for rank in range(world)]
    for step in range(start, 6):
        parts = [ranks[rank][(step - start) * micro + part] for part in range(micro) for rank in range(world)]
        assert [draw for part in parts for draw in part] == list(range(step * batch, (step + 1) * batch))


def test_a_resumed_loader_counts_the_batches_before_it() -> None:
    assert len(TrainingBatches(4, 10, 8)) == 10
    assert len(list(TrainingBatches(4, 10, 8))) == 6


@given(samples=st.integers(1, 60), batch=st.integers(1, 20), world=st.sampled_from([1, 2, 3, 4]))
def test_validation_sees_every_sample_once_in_equal_steps(samples: int, batch: int, world: int) -> None:
    ranks = [list(ValidationBatches(samples, batch, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert len({len(part) for batches in ranks for part in batches}) == 1
    seen = Counter(index for batches in ranks for part in batches for index in part)
    seen.pop(-1, None)
    assert seen == Counter(range(samples))


@pytest.mark.parametrize("epoch", [0, 3])
def test_draws_seek_without_history(epoch: int) -> None:
    assert drawn_sample(1, epoch * 1000 + 999, (600, 400)) == drawn_sample(1, epoch * 1000 + 999, (600, 400))
