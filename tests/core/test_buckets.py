"""Batches of like length: every example once, the same on any number of processes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from suite.buckets import RATIO, BucketEvalSampler, BucketSampler, LengthBuckets
from suite.errors import ConfigError


def lengths(count: int = 200, *, low: int = 8_000, high: int = 64_000) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, size=count)


def buckets(count: int = 200, **changes: object) -> LengthBuckets:
    settings = {"budget": 320_000.0, "max_rows": 64, "seed": 0, **changes}
    return LengthBuckets(lengths(count), **settings)  # type: ignore[arg-type]


def sampler(made: LengthBuckets, *, rank: int, world: int, accumulate: int = 1, position: int = 0):  # type: ignore[no-untyped-def]
    return BucketSampler(
        made,
        accumulate=accumulate,
        rank=rank,
        world_size=world,
        limit=None,
        position=lambda: position,
    )


@given(
    sizes=st.lists(st.integers(1, 5_000), min_size=1, max_size=300),
    budget=st.integers(1, 20_000),
    max_rows=st.integers(1, 50),
    epoch=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_every_epoch_holds_every_example_once_in_as_many_batches(
    sizes: list[int], budget: int, max_rows: int, epoch: int
) -> None:
    made = LengthBuckets(np.array(sizes), budget=budget, max_rows=max_rows, seed=1)
    batches = made.epoch(epoch)
    assert len(batches) == len(made) == len(made.in_order())
    assert sorted(np.concatenate(batches)) == list(range(len(sizes)))
    for batch in batches:
        longest = made.lengths[batch].max()
        assert 1 <= len(batch) <= max_rows
        assert len(batch) == 1 or longest * len(batch) <= budget


def test_epochs_differ_in_batches_and_in_their_order() -> None:
    made = buckets()
    first, second = made.epoch(0), made.epoch(1)
    assert [b.tolist() for b in first] == [b.tolist() for b in made.epoch(0)]
    assert {tuple(sorted(b)) for b in first} != {tuple(sorted(b)) for b in second}
    longest = [int(made.lengths[b].max()) for b in first]
    assert longest != sorted(longest, reverse=True)


def test_little_of_a_batch_is_padding() -> None:
    made = LengthBuckets(lengths(2000), budget=320_000, max_rows=64, seed=0)
    padded = sum(len(b) * made.lengths[b].max() for b in made.epoch(0))
    assert padded <= RATIO * made.lengths.sum()


def test_an_evaluation_starts_with_the_longest_example() -> None:
    made = buckets()
    longest = [int(made.lengths[b].max()) for b in made.in_order()]
    assert longest == sorted(longest, reverse=True)


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 3), (2, 2)])
def test_processes_and_accumulation_share_the_batches_of_one(world: int, accumulate: int) -> None:
    made = buckets()
    alone = [set(a.indices[: a.valid]) for a in sampler(made, rank=0, world=1)]
    parts = [list(sampler(made, rank=r, world=world, accumulate=accumulate)) for r in range(world)]
    assert len({len(p) for p in parts}) == 1
    for step, whole in enumerate(alone):
        found: list[int] = []
        for rank in range(world):
            for micro in parts[rank][step * accumulate : (step + 1) * accumulate]:
                found += micro.indices[: micro.valid]
        assert sorted(found) == sorted(whole)


def test_a_resumed_sampler_goes_on_where_it_stood() -> None:
    made = buckets()
    whole = list(sampler(made, rank=0, world=1))
    rest = list(sampler(made, rank=0, world=1, position=3))
    assert rest[: len(whole) - 3] == whole[3:]
    assert all(a.epoch == 1 for a in rest[len(whole) - 3 :])


def test_a_rank_without_an_example_of_a_batch_gets_a_padding_row() -> None:
    made = LengthBuckets(np.full(5, 100), budget=400, max_rows=4, seed=0)
    shares = [list(sampler(made, rank=r, world=2)) for r in range(2)]
    assert [len(a.indices) for a in shares[0]] == [len(a.indices) for a in shares[1]]
    assert sum(a.valid for share in shares for a in share) == 5


def test_evaluation_counts_every_example_once_over_ranks() -> None:
    made = buckets(101)
    shares = [list(BucketEvalSampler(made, rank=r, world_size=3, limit=None)) for r in range(3)]
    assert len({len(s) for s in shares}) == 1
    found = [i for share in shares for a in share for i in a.indices[: a.valid]]
    assert sorted(found) == list(range(101))


def test_evaluation_takes_batches_that_an_accumulating_process_holds() -> None:
    made = buckets()
    parts = BucketEvalSampler(made, accumulate=4, rank=0, world_size=1, limit=None)
    for a in parts:
        held = made.lengths[a.indices]
        assert len(held) == 1 or len(held) * held.max() <= made.budget / 4
    assert sorted(i for a in parts for i in a.indices) == list(range(200))


def test_too_many_processes_for_the_longest_example_are_refused() -> None:
    made = buckets()
    with pytest.raises(ConfigError, match="dealt to 8 processes"):
        sampler(made, rank=0, world=8)


def test_an_empty_training_split_is_refused() -> None:
    made = LengthBuckets(np.array([], dtype=np.int64), budget=1, max_rows=1, seed=0)
    with pytest.raises(ConfigError, match="nothing to train on"):
        sampler(made, rank=0, world=1)


def test_what_fills_no_batch_does_not_shorten_the_others() -> None:
    long, short = np.full(100, 160_000), np.full(37, 16_000)
    made = LengthBuckets(np.concatenate([long, short]), budget=1.6e6, max_rows=64, seed=0)
    assert made.crop_to.sum() == made.lengths.sum()
    alike = LengthBuckets(np.array([100] * 10 + [80] * 2), budget=1000, max_rows=64, seed=0)
    assert [len(b) for b in alike.buckets] == [12]


def test_processes_without_a_row_of_any_batch_are_refused() -> None:
    made = LengthBuckets(np.full(40, 100), budget=1e6, max_rows=4, seed=0)
    with pytest.raises(ConfigError, match="has only 4"):
        sampler(made, rank=0, world=8)
    assert len(sampler(made, rank=0, world=4)) == 10


def test_crops_are_to_the_shortest_of_a_bucket() -> None:
    made = buckets()
    for bucket in made.buckets:
        assert set(made.crop_to[bucket]) == {made.lengths[bucket].min()}
