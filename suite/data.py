"""Batches by address: which samples a step sees is a function of (seed, epoch, batches done).

Why not a plain DataLoader with Lightning's samplers: on a mid-epoch resume it repeats a third of an
epoch or skips one, and under DDP its evaluation counts some samples twice. Here the position is
read from the trainer's own progress, the permutation from the seed and the epoch, and evaluation
pads its last batch with rows marked `valid = 0`, so that every rank takes the same number of steps
and every sample counts once.

Shapes: B examples of one rank's micro-batch, N examples of a split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from suite.buckets import BucketEvalSampler, BucketSampler
from suite.errors import DataError, shown
from suite.sampling import BatchAddress, EvalSampler, TrainSampler, address
from suite.signals import ignore_in_worker

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
SKIP_LIMIT = 0.1  # the default of data.skip_limit
FEW = 10  # so many may be left out of any split, unless they are all of it


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

    sizes: examples by split; extra: what a model must know. extra["meaning"]: plain values that say
    what an id stands for; weights of another meaning are refused.
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
    little as padding does. A split whose fetch does so has `skips = True`, `path_of(index)` and
    `skip_limit`, the share of it that may be so; `left_out` are names of what was found to be
    unreadable before the split was made, and is not in it; `listed` is of how many where that is
    not these and the examples together.
    A split of examples that differ in length has `buckets`, a suite.buckets.LengthBuckets, which
    then says what a batch holds, in training and in evaluation.
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


def batches_done(trainer: L.Trainer) -> int:
    """Micro-batches that this run has trained on, over all its interruptions."""
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(total.processed)


class AddressedDataset(Dataset[dict[str, Tensor]]):
    """Turns an address into the batch's dict, with `sample_id`, `epoch` and `valid` added.

    epoch: [B], 0 in evaluation, so that what a step draws is a function of (seed, epoch, sample).
    """

    def __init__(self, split: BatchDataset, *, train: bool) -> None:
        self.split, self.train = split, train

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, where: BatchAddress) -> dict[str, Tensor]:
        batch = self.split.fetch(where.indices, epoch=where.epoch, train=self.train)
        batch["sample_id"] = torch.tensor(where.indices)
        batch["epoch"] = torch.full((len(where.indices),), where.epoch)
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
            ids, known = batch["sample_id"][bad].tolist(), self.unreadable[split]
            if not known.issuperset(ids):  # in later epochs they are the same ones
                known.update(ids)
                self.check_share(split)
        return batch

    def gather_unreadable(self) -> None:
        """Let every process know what any could not read; every one has to call it.

        Raises DataError, in all of them, if that is too much.
        """
        if not (self.skips and dist.is_available() and dist.is_initialized()):
            return
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, self.unreadable)
        for split, ids in self.unreadable.items():
            ids.update(*(theirs[split] for theirs in everyone))
        for split in self.unreadable:
            self.check_share(split)

    def check_share(self, split: Split) -> None:
        """Raise DataError if too much of a split is known to be unreadable."""
        part = getattr(self.splits, split)
        count, total = self._share(split)
        if count and (why := too_many(count, total, limit=part.skip_limit)):
            first = self.unreadable_files()[split]["files"][0]
            raise DataError(f"{split}: {why}, such as {shown(first)}")

    def _share(self, split: Split) -> tuple[int, int]:
        """How many of a split this process knows to be unreadable, of how many."""
        part = getattr(self.splits, split)
        before = len(getattr(part, "left_out", ()))
        total = getattr(part, "listed", before + len(part))
        return before + len(self.unreadable[split]), total

    def unreadable_files(self) -> dict[str, dict[str, Any]]:
        """By split, how many files this process knows to be unreadable, of how many, and the first
        ten of them.
        """
        found = {}
        for split, ids in self.unreadable.items():
            part = getattr(self.splits, split)
            before = list(getattr(part, "left_out", ()))
            if before or ids:
                names = before[:10] + [
                    part.path_of(i) for i in sorted(ids)[: 10 - len(before[:10])]
                ]
                count, total = self._share(split)
                found[str(split)] = {
                    "count": count,
                    "of": total,
                    "files": [str(name) for name in names],
                }
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
            worker_init_fn=ignore_in_worker,
            generator=torch.Generator(),  # its own: the loader must not draw from the global one
        )

    def train_sampler(self, *, rank: int, world_size: int) -> TrainSampler | BucketSampler:
        """The sampler of one process. Raises ConfigError if the data has not one whole batch."""
        buckets = getattr(self.splits.train, "buckets", None)
        if buckets is not None:
            return BucketSampler(
                buckets,
                accumulate=self.accumulate,
                rank=rank,
                world_size=world_size,
                limit=self.limits.get("train"),
                position=self._position,
            )
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
        if self.trainer is not None:  # which asks when it has restored the position
            resumption = getattr(self.trainer.lightning_module, "resumption", None)
            if resumption is not None:
                resumption.lift_limits(self.trainer)
        rank, world_size = self._place
        return self._loader("train", self.train_sampler(rank=rank, world_size=world_size))

    def _eval_dataloader(self, split: Split) -> DataLoader[Any]:
        rank, world_size = self._place
        place: Any = {"rank": rank, "world_size": world_size, "limit": self.limits.get(split)}
        chosen = getattr(self.splits, split)
        buckets = getattr(chosen, "buckets", None)
        if buckets is not None:
            return self._loader(
                split, BucketEvalSampler(buckets, accumulate=self.accumulate, **place)
            )
        size = self.options.eval_batch_size or self.options.batch_size
        return self._loader(split, EvalSampler(len(chosen), batch_size=size, **place))

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
            if not len(batch["valid"]):
                train: Any = self.splits.train
                first = shown(train.path_of(indices[0]))
                raise DataError(f"none of {count} training examples could be read, such as {first}")
        return batch


def check_skip_limit(share: float) -> None:
    """Raise ValueError for a data.skip_limit that is no share."""
    if not 0 <= share <= 1:
        raise ValueError(f"skip_limit must be from 0 to 1, got {share}")


def too_many(count: int, total: int, *, limit: float) -> str | None:
    """What is said if `count` unreadable examples of `total` are not to be passed over."""
    if count < total and (count <= FEW or count <= limit * total):
        return None
    advice = "" if count == total else f" (data.skip_limit={limit:g}): repair them, or raise it"
    return f"{count:,} of {total:,} examples cannot be read{advice}"


def lost_worker(error: BaseException) -> DataError | None:
    """The error of a loader's worker that was killed, as one line; None for any other.

    PyTorch raises it from its handler of SIGCHLD, so anywhere in the main thread.
    """
    text = str(error)
    if not (isinstance(error, RuntimeError) and text.startswith("DataLoader worker (pid")):
        return None
    return DataError(
        f"{text.partition('. ')[0]}: a process that loads data is gone; where memory ran out, take "
        "fewer data.num_workers or a smaller data.batch_size"
    )
