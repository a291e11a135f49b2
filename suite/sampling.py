"""Which examples a step sees, as a function of (seed, epoch, batches done), rank and world size.

Nothing is drawn and nothing is saved: the position in training gives the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from suite.errors import ConfigError
from suite.randomness import generator


@dataclass(frozen=True)
class BatchAddress:
    """Which samples a batch holds. Rows from `valid` on are padding."""

    indices: list[int]
    valid: int
    epoch: int


class TrainSampler(Sampler[BatchAddress]):
    """This rank's micro-batches, from wherever `position` says that training stands.

    Global micro-batch j of an epoch is the j-th slice of the epoch's permutation, and rank r takes
    the r-th part of it: one process with batch B sees the samples that two see with B/2 each.
    """

    def __init__(
        self,
        size: int,
        *,
        batch_size: int,
        accumulate: int,
        rank: int,
        world_size: int,
        seed: int,
        drop_last: bool,
        limit: int | float | None,
        position: Callable[[], int],
    ) -> None:
        if size == 0:
            raise ConfigError(
                "data: there is nothing to train on; it can only be evaluated, with evaluate=FILE"
            )
        if drop_last and size < batch_size:
            raise ConfigError(
                f"data.batch_size={batch_size}: the training split has only {size} examples. "
                f"Take a batch of at most {size}, or data.drop_last=false"
            )
        self.size, self.seed, self.position = size, seed, position
        self.rank, self.local = rank, batch_size // (world_size * accumulate)
        self.batch = self.local * world_size
        steps = size // batch_size if drop_last else -(-size // batch_size)
        self.batches = limited(steps * accumulate, limit, multiple=accumulate)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[BatchAddress]:
        """As many batches as an epoch has, from where training stands, over the epoch's end if
        need be.

        Lightning counts a run that ended in mid-epoch as a whole epoch; the stream goes on
        regardless.
        """
        start, epoch = self.position(), -1
        for position in range(start, start + self.batches):
            if position // self.batches != epoch:
                epoch = position // self.batches
                order = torch.randperm(self.size, generator=generator(self.seed, "order", epoch))
            first = position % self.batches * self.batch + self.rank * self.local
            indices = order[first : first + self.local].tolist()
            yield address(indices, size=self.local, epoch=epoch)


class EvalSampler(Sampler[BatchAddress]):
    """This rank's evaluation batches in order, padded so that all ranks take equal steps."""

    def __init__(
        self, size: int, *, batch_size: int, rank: int, world_size: int, limit: int | float | None
    ) -> None:
        self.size, self.rank = size, rank
        self.local = max(1, -(-batch_size // world_size))
        self.batch = self.local * world_size
        self.batches = limited(-(-size // self.batch), limit, multiple=1)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[BatchAddress]:
        for j in range(self.batches):
            start = j * self.batch + self.rank * self.local
            stop = min(start + self.local, self.size)
            yield address(list(range(start, stop)), size=self.local, epoch=0)


def address(indices: list[int], *, size: int, epoch: int) -> BatchAddress:
    """Pad `indices` to `size` with its first sample (or sample 0); note how many are real."""
    filler = indices[0] if indices else 0
    return BatchAddress(indices + [filler] * (size - len(indices)), len(indices), epoch)


def limited(batches: int, limit: int | float | None, *, multiple: int) -> int:
    """Lightning's limit_*_batches: an int is a number of batches, a float a share of them."""
    if limit is None or (isinstance(limit, float) and limit == 1.0):
        return batches
    wanted = int(batches * limit) if isinstance(limit, float) else min(batches, limit)
    if limit == 0:
        return 0
    return min(batches, max(multiple, wanted - wanted % multiple))
