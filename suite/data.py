"""Batches by address: which samples a step sees is a function of (seed, epoch, batches done).

Why not a plain DataLoader with Lightning's samplers: on a mid-epoch resume it repeats a third of an
epoch or skips one, and under DDP its evaluation counts some samples twice. Here the position is
read from the trainer's own progress, the permutation from the seed and the epoch, and evaluation
pads its last batch with rows marked `valid = 0`, so that every rank takes the same number of steps
and every sample counts once.

Shapes: B examples of one rank's micro-batch, N examples of a split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from suite.errors import ConfigError
from suite.randomness import generator

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class DataOptions:
    """What every data set's options have.

    batch_size: examples of one optimizer step, over all processes and accumulation steps: the
    global
        batch is the fixed number, and what each process takes follows from it.
    eval_batch_size: examples of one evaluation step over all processes; None: batch_size.
    num_workers: loader processes for each training process.
    drop_last: leave out the last, incomplete training batch of an epoch; False pads it.
    """

    batch_size: int = 128
    eval_batch_size: int | None = None
    num_workers: int = 0
    drop_last: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.eval_batch_size is not None and self.eval_batch_size < 1:
            raise ValueError(f"eval_batch_size must be at least 1, got {self.eval_batch_size}")
        if self.num_workers < 0:
            raise ValueError(f"num_workers must not be negative, got {self.num_workers}")


@dataclass(frozen=True)
class DataInfo:
    """What result.json says of the data.

    sizes: examples by split; extra: what a model must know.
    """

    name: str
    license: str
    source: str
    sha256: str
    synthetic: bool
    sizes: Mapping[str, int]
    classes: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


class BatchDataset(Protocol):
    """A split; fetch's randomness depends on (seed, epoch, index) only.

    fetch may add "valid", bool [B], False for rows that could not be read: they then count for as
    little as padding does. A split whose fetch does so has `skips = True` and `path_of(index)`.
    """

    def __len__(self) -> int: ...

    def fetch(self, indices: list[int], *, epoch: int, train: bool) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Splits:
    """What a data builder returns."""

    train: BatchDataset
    val: BatchDataset
    test: BatchDataset
    info: DataInfo


@dataclass(frozen=True)
class BatchAddress:
    """Which samples a batch holds. Rows from `valid` on are padding."""

    indices: list[int]
    valid: int
    epoch: int


def batches_done(trainer: L.Trainer) -> int:
    """Micro-batches that this run has trained on, over all its interruptions."""
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(total.processed)


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


class AddressedDataset(Dataset[dict[str, Tensor]]):
    """Turns an address into the batch's dict, with `sample_id` and `valid` added."""

    def __init__(self, split: BatchDataset, *, train: bool) -> None:
        self.split, self.train = split, train

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, where: BatchAddress) -> dict[str, Tensor]:
        batch = self.split.fetch(where.indices, epoch=where.epoch, train=self.train)
        batch["sample_id"] = torch.tensor(where.indices)
        # bool: sums of it are exact in any precision (bf16-true would make floats bfloat16)
        valid = torch.arange(len(where.indices)) < where.valid
        if (readable := batch.pop("valid", None)) is not None:
            batch["unreadable"] = valid & ~readable
            valid = valid & readable
        batch["valid"] = valid
        return batch


class SuiteDataModule(L.LightningDataModule):
    """The three splits of a task as loaders whose batches are addressed.

    options: the data's options. limits: limit_{train,val,test}_batches by split.
    """

    def __init__(
        self,
        splits: Splits,
        *,
        options: DataOptions,
        seed: int,
        accumulate: int = 1,
        limits: Mapping[str, int | float | None] | None = None,
    ) -> None:
        super().__init__()
        self.splits, self.options, self.seed, self.accumulate = splits, options, seed, accumulate
        self.limits = dict(limits or {})
        self.unreadable: dict[Split, set[int]] = {"train": set(), "val": set(), "test": set()}

    @property
    def skips(self) -> bool:
        """Whether rows may turn out to be unreadable, and then count for nothing."""
        return any(getattr(getattr(self.splits, split), "skips", False) for split in SPLITS)

    def on_before_batch_transfer(
        self, batch: dict[str, Tensor], dataloader_idx: int
    ) -> dict[str, Tensor]:
        """Note which rows could not be read, here, where looking at them waits for no device."""
        bad = batch.pop("unreadable", None)
        if bad is not None and bad.any():
            trainer: Any = self.trainer
            evaluating = trainer is not None and (trainer.validating or trainer.sanity_checking)
            testing = trainer is not None and trainer.testing
            split: Split = "val" if evaluating else "test" if testing else "train"
            self.unreadable[split].update(batch["sample_id"][bad].tolist())
        return batch

    def gather_unreadable(self) -> None:
        """Let every process know what any could not read; every one has to call it."""
        if not (self.skips and dist.is_available() and dist.is_initialized()):
            return
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, self.unreadable)
        for split, ids in self.unreadable.items():
            ids.update(*(theirs[split] for theirs in everyone))

    def unreadable_files(self) -> dict[str, dict[str, Any]]:
        """By split, how many files this process knows to be unreadable, and the first ten."""
        found = {}
        for split, ids in self.unreadable.items():
            if ids:
                path_of = getattr(self.splits, split).path_of
                first = [str(path_of(index)) for index in sorted(ids)[:10]]
                found[str(split)] = {"count": len(ids), "files": first}
        return found

    @property
    def _place(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)

    def _position(self) -> int:
        return 0 if self.trainer is None else batches_done(self.trainer)

    def _loader(self, split: Split, sampler: Sampler[BatchAddress]) -> DataLoader[Any]:
        accelerator = self.trainer.accelerator if self.trainer is not None else None
        on_gpu = accelerator is not None and type(accelerator).__name__ == "CUDAAccelerator"
        return DataLoader(
            AddressedDataset(getattr(self.splits, split), train=split == "train"),
            sampler=sampler,
            batch_size=None,
            num_workers=self.options.num_workers,
            pin_memory=on_gpu,
            persistent_workers=self.options.num_workers > 0,
            generator=torch.Generator(),  # its own: the loader must not draw from the global one
        )

    def train_sampler(self, *, rank: int, world_size: int) -> TrainSampler:
        """The sampler of one process. Raises ConfigError if the data has not one whole batch."""
        return TrainSampler(
            len(self.splits.train),
            batch_size=self.options.batch_size,
            accumulate=self.accumulate,
            rank=rank,
            world_size=world_size,
            seed=self.seed,
            drop_last=self.options.drop_last,
            limit=self.limits.get("train"),
            position=self._position,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        rank, world_size = self._place
        return self._loader("train", self.train_sampler(rank=rank, world_size=world_size))

    def _eval_dataloader(self, split: Split) -> DataLoader[Any]:
        rank, world_size = self._place
        return self._loader(
            split,
            EvalSampler(
                len(getattr(self.splits, split)),
                batch_size=self.options.eval_batch_size or self.options.batch_size,
                rank=rank,
                world_size=world_size,
                limit=self.limits.get(split),
            ),
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return self._eval_dataloader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._eval_dataloader("test")

    def fixed_batch(self, size: int) -> dict[str, Tensor]:
        """`size` training examples, not augmented: the same everywhere.

        The first ones; of a split that is in order of classes (`by_class`) some of each.
        """
        total = len(self.splits.train)
        count = min(size, total)
        stride = total / count if getattr(self.splits.train, "by_class", False) else 1
        indices = [int(i * stride) for i in range(count)]
        dataset = AddressedDataset(self.splits.train, train=False)
        batch = dataset[address(indices, size=len(indices), epoch=0)]
        if batch.pop("unreadable", None) is not None:
            batch = {name: rows[batch["valid"]] for name, rows in batch.items()}
        return batch
