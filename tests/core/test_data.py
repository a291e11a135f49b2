"""Which samples a step sees is a function of (seed, epoch, batches done)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from suite.data import AddressedDataset, DataInfo, DataOptions, Splits, SuiteDataModule
from suite.errors import ConfigError
from suite.sampling import BatchAddress, EvalSampler, TrainSampler, address, limited


def sampler(size: int = 23, **kwargs: object) -> TrainSampler:
    defaults = {
        "batch_size": 4,
        "accumulate": 1,
        "rank": 0,
        "world_size": 1,
        "seed": 0,
        "drop_last": True,
        "limit": None,
        "position": lambda: 0,
    }
    return TrainSampler(size, **{**defaults, **kwargs})  # type: ignore[arg-type]


def real(batches: list[BatchAddress]) -> list[int]:
    return [i for b in batches for i in b.indices[: b.valid]]


def test_an_epoch_sees_each_sample_at_most_once_and_the_next_one_another_order() -> None:
    first, second = list(sampler()), list(sampler(position=lambda: 5))
    assert len(real(first)) == len(set(real(first))) == 20
    assert real(first) != real(second)
    assert {b.epoch for b in second} == {1}


@pytest.mark.parametrize("done", [0, 1, 3, 4])
def test_a_resumed_epoch_goes_on_with_the_batches_that_were_left(done: int) -> None:
    whole, rest = list(sampler()), list(sampler(position=lambda: done))
    assert rest[: 5 - done] == whole[done:]
    assert rest[5 - done :] == list(sampler(position=lambda: 5))[:done]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_step_has_the_same_samples_on_any_number_of_ranks(
    world: int, accumulate: int
) -> None:
    def steps(world: int, accumulate: int) -> list[set[int]]:
        ranks = [
            list(sampler(64, batch_size=8, rank=r, world_size=world, accumulate=accumulate))
            for r in range(world)
        ]
        micro = [set(real([b[j] for b in ranks])) for j in range(len(ranks[0]))]
        return [set().union(*micro[i : i + accumulate]) for i in range(0, len(micro), accumulate)]

    assert steps(world, accumulate) == steps(1, 1)
    assert all(len(s) == 8 for s in steps(world, accumulate))


@pytest.mark.parametrize("size", [7, 11, 64])
def test_without_drop_last_every_sample_counts_once(size: int) -> None:
    ranks = [list(sampler(size, drop_last=False, rank=r, world_size=2)) for r in range(2)]
    assert len(ranks[0]) == len(ranks[1])
    assert all(len(b.indices) == 2 for rank in ranks for b in rank)
    assert sorted(real(ranks[0]) + real(ranks[1])) == list(range(size))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 7, 11, 64])
def test_evaluation_counts_every_sample_once_in_equal_steps(world: int, size: int) -> None:
    ranks = [
        list(EvalSampler(size, batch_size=4, rank=r, world_size=world, limit=None))
        for r in range(world)
    ]
    assert len({len(r) for r in ranks}) == 1
    assert sorted(i for r in ranks for i in real(r)) == list(range(size))


def test_a_batch_over_the_data_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"batch_size=128.*only 23.*drop_last=false"):
        sampler(23, batch_size=128)


@pytest.mark.parametrize(
    ("limit", "multiple", "expected"),
    [
        (None, 1, 10),
        (1.0, 1, 10),
        (0.5, 1, 5),
        (3, 1, 3),
        (99, 1, 10),
        (3, 2, 2),
        (1, 2, 2),
        (0, 1, 0),
    ],
)
def test_limits_follow_lightning_in_whole_steps(
    limit: int | float | None, multiple: int, expected: int
) -> None:
    assert limited(10, limit, multiple=multiple) == expected


class Counting:
    """A split whose rows are their index and the epoch."""

    def __len__(self) -> int:
        return 9

    def fetch(self, indices: list[int], *, epoch: int, train: bool) -> dict[str, Tensor]:
        return {"x": torch.tensor([[i, epoch, int(train)] for i in indices])}


def test_batches_carry_sample_id_and_valid() -> None:
    batch = AddressedDataset(Counting(), train=True)[address([5, 6], size=3, epoch=2)]
    assert batch["sample_id"].tolist() == [5, 6, 5]
    assert batch["valid"].tolist() == [1, 1, 0]
    assert batch["x"].tolist() == [[5, 2, 1], [6, 2, 1], [5, 2, 1]]


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_give_the_addressed_batches_and_leave_the_global_generator_alone(
    workers: int,
) -> None:
    split = Counting()
    splits = Splits(split, split, split, DataInfo("x", "", "", "", True, {}))
    module = SuiteDataModule(splits, options=DataOptions(batch_size=2, num_workers=workers), seed=1)
    state = torch.get_rng_state()
    seen = [b["sample_id"].tolist() for b in module.train_dataloader()]
    assert torch.equal(torch.get_rng_state(), state)
    assert seen == [a.indices for a in module.train_sampler(rank=0, world_size=1)]
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=1, world_size=2, accelerator=None
    )
    assert [b["sample_id"].tolist() for b in module.val_dataloader()][-1] == [0]
    assert [b["valid"].tolist() for b in module.val_dataloader()][-1] == [0]
