"""Labelled sequences in one array, and a split of them that gives padded batches.

A set may have 289,061 sequences: as Python objects they cost memory in every loader's worker, so
they are the bases of all in one array and where each starts. Rows are padded at their end, up to
the longest of the batch.

A classifier of both strands is trained on either: in training the reverse complement is taken with
probability 1/2, by (seed, epoch, sample) alone.

Shapes: N sequences, B of a batch, L the longest of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from suite.data import SKIP_LIMIT, DataOptions, check_skip_limit, too_many
from suite.errors import ConfigError
from suite.randomness import uniform
from tasks.dna.tokens import COMPLEMENT, PAD, other_strand

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
_OTHER_BASE = bytes([*COMPLEMENT.tolist(), *range(len(COMPLEMENT), 256)])  # for bytes.translate
RC_SHARE = 0.5  # of the training examples that are shown as their other strand


@dataclass(frozen=True)
class LabelledOptions(DataOptions):
    """Settings of every labelled set.

    max_length: bases that are kept of a longer sequence, from its start; None: all.
    rc_augment: show half of the training examples as their reverse complement; None: wherever the
        label does not depend on the strand.
    val_share: of each class of the training set, held back to choose the best model with.
    val_seed: of that choice; None: the run's seed, so that runs with other seeds differ in it too,
        as the published ones do.
    """

    max_length: int | None = None
    rc_augment: bool | None = None
    val_share: float = 0.1
    val_seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}")
        if not 0 < self.val_share < 1:
            raise ValueError(f"val_share must be above 0 and below 1, got {self.val_share}")
        if self.val_seed is not None and self.val_seed < 0:
            raise ValueError(f"val_seed must not be negative, got {self.val_seed}")


@dataclass(frozen=True)
class FileOptions(LabelledOptions):
    """Settings of every labelled set that is in files.

    on_error: what a sequence does that cannot be used: end the run, or be left out and counted.
    skip_limit: the largest share of the training or test sequences that may be.
    """

    on_error: Literal["fail", "skip"] = "fail"
    skip_limit: float = SKIP_LIMIT

    def __post_init__(self) -> None:
        super().__post_init__()
        check_skip_limit(self.skip_limit)

    def check_faults(self, faults: Sequence[str], *, of: int, what: str) -> None:
        """Raise ConfigError for the first of `faults` unless they may be left out. what: of."""
        if faults and self.on_error == "fail":
            raise ConfigError(f"{faults[0]}, or set data.on_error=skip")
        if faults and (why := too_many(len(faults), of, limit=self.skip_limit)):
            raise ConfigError(f"{faults[0]}; {what}: {why}")


@dataclass(frozen=True, eq=False)
class Sequences:
    """N labelled sequences.

    ids: the bases of all, one after the other. starts, lengths: [N] where each lies in it.
    labels: [N] its class.
    """

    ids: Bytes
    starts: Ints
    lengths: Ints
    labels: Ints

    @classmethod
    def joined(cls, ids: Bytes, lengths: npt.ArrayLike, labels: npt.ArrayLike) -> Sequences:
        """Sequences that lie one after the other in `ids`."""
        sizes = np.asarray(lengths, np.int64)
        assert sizes.sum() == len(ids), "the lengths are not those of the bases"
        return cls(ids, np.cumsum(sizes) - sizes, sizes, np.asarray(labels, np.int64))

    @classmethod
    def listed(cls, rows: Iterable[Bytes], labels: npt.ArrayLike) -> Sequences:
        """Sequences that are an array each."""
        each = list(rows)
        ids = np.concatenate([np.zeros(0, np.uint8), *each])
        return cls.joined(ids, [len(row) for row in each], labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Bytes:
        start = int(self.starts[i])
        return self.ids[start : start + int(self.lengths[i])]

    def take(self, places: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> Sequences:
        """Those at `places`; the bases are shared."""
        return Sequences(self.ids, self.starts[places], self.lengths[places], self.labels[places])

    def cut(self, longest: int) -> Sequences:
        """At most the first `longest` bases of each."""
        return replace(self, lengths=np.minimum(self.lengths, longest))

    @property
    def covered(self) -> slice:
        """What of `ids` these are in: others may lie before and behind."""
        if not len(self):
            return slice(0, 0)
        return slice(int(self.starts.min()), int((self.starts + self.lengths).max()))

    def keys(self, *, both_strands: bool) -> list[bytes]:
        """[N] equal for equal sequences; with both_strands also for reverse complements."""
        part = self.covered
        bases = self.ids[part].tobytes()
        first = self.starts - part.start
        last = first + self.lengths
        forward = [bases[a:b] for a, b in zip(first.tolist(), last.tolist(), strict=True)]
        if not both_strands:
            return forward
        # the other strand of the whole holds that of every sequence, from its end backwards
        other, total = bases[::-1].translate(_OTHER_BASE), len(bases)
        first, last = total - last, total - first
        places = zip(forward, first.tolist(), last.tolist(), strict=True)
        return [min(here, other[a:b]) for here, a, b in places]


class LabelledSplit:
    """A split of labelled sequences (a BatchDataset).

    seed: of the augmentation, or None for none. novel: [N], or None where it is not to be in the
    batch. left_out: names of sequences that could not be used.
    """

    by_class = True  # a few of it are taken all over it: whatever the order, some of each class

    def __init__(
        self,
        sequences: Sequences,
        *,
        seed: int | None = None,
        novel: npt.NDArray[np.bool_] | None = None,
        left_out: Sequence[str] = (),
    ) -> None:
        self.left_out = tuple(left_out)
        self.sequences, self.seed, self.novel = sequences, seed, novel

    def __len__(self) -> int:
        return len(self.sequences)

    def fetch(self, indices: list[int], *, epoch: int, train: bool) -> dict[str, Tensor]:
        """ids int64 [B, L] padded at the end, label int64 [B] and, in val and test, novel [B]."""
        rows = [self.sequences[i] for i in indices]
        padded_BL = np.full((len(rows), max(map(len, rows))), PAD, np.uint8)
        for place, row in zip(padded_BL, rows, strict=True):
            place[: len(row)] = row
        ids_BL = torch.from_numpy(padded_BL).long()
        if train and self.seed is not None:
            other_B = uniform(self.seed, "rc", epoch, ids=torch.tensor(indices))[:, 0] < RC_SHARE
            ids_BL[other_B] = other_strand(ids_BL[other_B])
        batch = {
            "ids": ids_BL,
            "label": torch.from_numpy(self.sequences.labels[indices]),
        }
        if self.novel is not None:
            batch["novel"] = torch.from_numpy(self.novel[indices])
        return batch
