"""Batches of examples of like length: as many as fit a budget of padded length.

Audio comes in lengths from one second to twenty, and a batch costs its longest example times its
rows. So examples are sorted into buckets of like length, a bucket's batches have as many rows as
the budget allows, and every epoch shuffles inside the buckets and then the batches. How many
batches there are does not depend on the epoch, and which examples a batch holds depends on (seed,
epoch) alone: so every rank takes the same number of steps by construction, and an interrupted epoch
goes on where it stood.

Shapes: N examples of a split. Lengths are whole numbers of any one unit (samples, bases, tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from suite.errors import ConfigError
from suite.randomness import derive
from suite.sampling import BatchAddress, address, limited

RATIO = 1.1  # the longest of a bucket to its shortest, where there are enough examples
ALIKE = 1.5  # at most, for what would fill no batch


class LengthBuckets:
    """The batches of a split whose examples differ in length.

    lengths: [N], above 0. budget: the most that a batch's longest example times its rows may be
    (one row is always taken). max_rows: the most examples of a batch. seed: of the order. advice:
    what a user can set so that a batch holds more.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        budget: float,
        max_rows: int,
        seed: int,
        advice: str = "shorten the examples or raise the length of a batch",
    ) -> None:
        self.advice = advice
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if self.lengths.size and self.lengths.min() < 1:
            raise ValueError("lengths must be above 0")
        self.budget, self.max_rows, self.seed = budget, max_rows, seed
        self.buckets = self._divide()
        self.counts = [-(-len(b) // self.rows_of(b)) for b in self.buckets]
        self.crop_to = np.zeros(len(self.lengths), dtype=np.int64)
        for bucket in self.buckets:
            self.crop_to[bucket] = self.lengths[bucket].min()

    def __len__(self) -> int:
        """Batches of an epoch."""
        return sum(self.counts)

    @property
    def longest(self) -> int:
        """The largest length; 0 without examples."""
        return int(self.lengths.max()) if self.lengths.size else 0

    def rows_of(self, bucket: np.ndarray) -> int:
        """The most rows that a batch of this bucket has."""
        return self._rows(int(self.lengths[bucket].max()))

    def _rows(self, longest: int) -> int:
        return max(1, min(self.max_rows, int(self.budget // longest)))

    def _divide(self) -> list[np.ndarray]:
        """From the longest down: a bucket ends where lengths fall below RATIO, if it fills a batch.

        What would be left as less than a batch at the end joins the last bucket if it is alike;
        else it is a smaller batch of its own.
        """
        order = np.argsort(-self.lengths, kind="stable")
        down = self.lengths[order]
        buckets, start = [], 0
        while start < len(order):
            rows = self._rows(int(down[start]))
            alike = int(np.searchsorted(-down, -down[start] / RATIO, side="right"))
            stop = max(alike, start + rows)
            left = len(order) - stop
            if 0 < left < self._rows(int(down[stop])) and down[start] <= ALIKE * down[-1]:
                stop = len(order)
            buckets.append(order[start : min(stop, len(order))])
            start = stop
        return buckets

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch, each the numbers of its examples."""
        batches: list[np.ndarray] = []
        for number, (bucket, count) in enumerate(zip(self.buckets, self.counts, strict=True)):
            rng = np.random.default_rng(derive(self.seed, "order", epoch, number))
            batches += np.array_split(rng.permutation(bucket), count)
        shuffled = np.random.default_rng(derive(self.seed, "batches", epoch))
        return [batches[i] for i in shuffled.permutation(len(batches))]

    def in_order(self) -> list[np.ndarray]:
        """The batches of an evaluation: by length, the longest first, so that memory ends a run at
        once.
        """
        return [
            part
            for bucket, count in zip(self.buckets, self.counts, strict=True)
            for part in np.array_split(bucket, count)
        ]


def dealt(batch: np.ndarray, *, part: int, parts: int, epoch: int) -> BatchAddress:
    """The share of one of `parts` processes in a batch, padded to as many rows as the first has.

    Padding counts for nothing, except in BatchNorm's statistics of a task that has no mask of rows.
    """
    return address(batch[part::parts].tolist(), size=-(-len(batch) // parts), epoch=epoch)


class BucketSampler(Sampler[BatchAddress]):
    """This rank's micro-batches of a training split, from wherever `position` says.

    An optimizer step takes one batch of the buckets, dealt to all ranks and accumulation steps: how
    many there are changes nothing in what is trained on. Raises ConfigError if a process's share of
    the budget is less than the longest example.
    """

    def __init__(
        self,
        buckets: LengthBuckets,
        *,
        accumulate: int,
        rank: int,
        world_size: int,
        limit: int | float | None,
        position: Callable[[], int],
    ) -> None:
        if not len(buckets):
            raise ConfigError(
                "data: there is nothing to train on; it can only be evaluated, with evaluate=FILE"
            )
        self.buckets, self.accumulate, self.position = buckets, accumulate, position
        self.rank, self.world_size = rank, world_size
        parts = world_size * accumulate
        fit = max(1, min(buckets.max_rows, int(buckets.budget // buckets.longest)))
        if fit < parts:
            raise ConfigError(
                f"data: one step is dealt to {world_size} processes x "
                f"trainer.accumulate_grad_batches={accumulate}, and a batch of the longest "
                f"examples has only {fit}; take fewer, "
                f"or {buckets.advice}"
            )
        self.batches = limited(len(buckets) * accumulate, limit, multiple=accumulate)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[BatchAddress]:
        start, epoch = self.position(), -1
        batches: Sequence[np.ndarray] = ()
        for position in range(start, start + self.batches):
            if position // self.batches != epoch:
                epoch = position // self.batches
                batches = self.buckets.epoch(epoch)
            step, micro = divmod(position % self.batches, self.accumulate)
            yield dealt(
                batches[step],
                part=micro * self.world_size + self.rank,
                parts=self.accumulate * self.world_size,
                epoch=epoch,
            )


class BucketEvalSampler(Sampler[BatchAddress]):
    """This rank's evaluation batches, each dealt to all ranks.

    accumulate: of training, whose step is so many batches: one of them is what memory holds.
    """

    def __init__(
        self,
        buckets: LengthBuckets,
        *,
        accumulate: int = 1,
        rank: int,
        world_size: int,
        limit: int | float | None,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        if accumulate > 1:
            buckets = LengthBuckets(
                buckets.lengths,
                budget=buckets.budget / accumulate,
                max_rows=buckets.max_rows,
                seed=buckets.seed,
            )
        found = buckets.in_order()
        self.batches = found[: limited(len(found), limit, multiple=1)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[BatchAddress]:
        for batch in self.batches:
            yield dealt(batch, part=self.rank, parts=self.world_size, epoch=0)
