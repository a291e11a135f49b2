"""Masks, negatives and noise are functions of (seed, epoch, sample)."""

from __future__ import annotations

import pytest
import torch

from suite.randomness import sample_seeds, uniform_grid
from tasks.speech.masks import (
    gumbel,
    layers_kept,
    most_masked,
    negatives,
    slots,
    span_mask,
    thinned,
)

RULE = {"prob": 0.65, "span": 10, "min_spans": 2}


def seeds(count: int = 256, *, seed: int = 0, epoch: int = 0, stream: str = "mask") -> torch.Tensor:
    ids = torch.arange(count)
    return sample_seeds(seed, stream, ids=ids, epoch=torch.full((count,), epoch))


def masked(frames: int, *, size: int | None = None, count: int = 256, epoch: int = 0):  # type: ignore[no-untyped-def]
    length = torch.full((count,), frames)
    return span_mask(length, size=size or frames, seeds_B=seeds(count, epoch=epoch), **RULE)


def test_uniform_numbers_are_uniform_and_never_0_or_1() -> None:
    grid = uniform_grid(seeds(512), 400)
    assert float(grid.min()) > 0
    assert float(grid.max()) < 1
    assert grid.double().mean() == pytest.approx(0.5, abs=3e-3)
    assert grid.double().var() == pytest.approx(1 / 12, rel=1e-2)
    neighbours = torch.corrcoef(torch.stack([grid[:, :-1].flatten(), grid[:, 1:].flatten()]))
    assert abs(float(neighbours[0, 1])) < 0.01


@pytest.mark.parametrize(("frames", "share"), [(49, 0.51), (781, 0.49), (999, 0.49)])
def test_as_large_a_share_is_masked_as_published(frames: int, share: float) -> None:
    assert masked(frames).float().mean() == pytest.approx(share, abs=0.015)


def test_spans_are_at_least_ten_frames_long() -> None:
    mask = masked(200)
    padded = torch.nn.functional.pad(mask.int(), (1, 1)).diff(dim=1)
    starts, stops = (padded == 1).nonzero()[:, 1], (padded == -1).nonzero()[:, 1]
    assert int((stops - starts).min()) == 10


@pytest.mark.parametrize("frames", [1, 2, 5, 10, 12, 25, 49])
def test_short_rows_are_masked_inside_their_length_and_within_the_bound(frames: int) -> None:
    mask = masked(frames, size=60)
    assert not mask[:, frames:].any()
    counts = mask.sum(dim=1)
    assert int(counts.min()) >= 1
    assert int(counts.max()) <= most_masked(frames, **RULE)


def test_a_mask_depends_on_the_sample_and_epoch_and_on_nothing_else() -> None:
    mask = masked(100)
    again = span_mask(torch.tensor([100, 100]), size=140, seeds_B=seeds()[[7, 3]], **RULE)
    assert torch.equal(again[:, :100], mask[[7, 3]])
    assert not torch.equal(masked(100, epoch=1), mask)
    assert not torch.equal(mask[0], mask[1])


def test_thinning_leaves_every_row_the_smallest_count_of_its_own_masks() -> None:
    mask, real = masked(100, count=8), torch.ones(8, dtype=torch.bool)
    thin = thinned(mask, real_B=real, seeds_B=seeds(8))
    assert set(thin.sum(dim=1).tolist()) == {int(mask.sum(dim=1).min())}
    assert not (thin & ~mask).any()


def test_slots_name_the_masked_frames_in_order() -> None:
    mask = masked(60, count=5)
    at, used = slots(mask, most=most_masked(60, **RULE))
    for row in range(5):
        assert at[row][used[row]].tolist() == mask[row].nonzero().flatten().tolist()


def test_negatives_are_other_slots_of_the_row_each_equally_likely() -> None:
    used = torch.arange(20) < torch.tensor([[20], [7], [2]])
    drawn = negatives(used, count=4000, seeds_B=seeds(3, stream="negatives"))
    for row, count in enumerate((20, 7, 2)):
        for slot in range(count):
            others = sorted(set(range(count)) - {slot})
            share = torch.bincount(drawn[row, slot], minlength=20).float() / 4000
            assert share[others].tolist() == pytest.approx(
                [1 / (count - 1)] * (count - 1), abs=0.04
            )
            assert float(share.sum() - share[others].sum()) == pytest.approx(0.0, abs=1e-6)


def test_negatives_of_a_row_do_not_depend_on_the_others() -> None:
    used = torch.ones(2, 9, dtype=torch.bool)
    wide = torch.nn.functional.pad(used, (0, 4))
    both = negatives(used, count=5, seeds_B=seeds(2))
    assert torch.equal(negatives(wide, count=5, seeds_B=seeds(2))[:, :9], both)
    assert torch.equal(negatives(used[1:], count=5, seeds_B=seeds(2)[1:]), both[1:])


def test_gumbel_noise_has_the_mean_and_variance_of_its_distribution() -> None:
    noise = gumbel(seeds(64), 100, 20)
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(torch.pi**2 / 6, rel=0.02)


def test_layers_are_dropped_as_often_as_asked_and_by_the_step() -> None:
    kept = torch.stack([layers_kept(0, step, 12, prob=0.2) for step in range(500)])  # type: ignore[misc]
    assert float(kept.float().mean()) == pytest.approx(0.8, abs=0.02)
    assert torch.equal(kept[3], layers_kept(0, 3, 12, prob=0.2))  # type: ignore[arg-type]
    assert layers_kept(0, 3, 12, prob=0.0) is None
