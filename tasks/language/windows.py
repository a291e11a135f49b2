"""Rows of a long array of ids: what every data set of the language task gives.

A split is one array of ids (in memory, or a memory-mapped file of any size) and the places where
its documents begin. A row is `length` inputs and the id after each, its target. Rows lie side by
side, so that an evaluation asks for every id but the first exactly once, whatever the batch size;
nanoGPT draws rows at random instead, and its losses are estimates.

In training with `shift` the rows of an epoch begin at another place, so that a model does not see
the same cuts again. That place is a function of (seed, epoch): a resumed run sees the same rows.

Shapes: N ids of a split, D documents, R rows of an epoch, B rows of a batch, T positions of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from suite.data import SPLITS, DataInfo, DataOptions, Split, Splits
from suite.errors import ConfigError
from suite.randomness import derive
from tasks.language.encoding import Encoding
from tasks.language.tokens import IGNORE

Documents = Literal["join", "mask", "pad"]


@dataclass(frozen=True)
class LanguageDataOptions(DataOptions):
    """Settings of the rows of any text.

    length: tokens of a row. documents: join lets a row run over the end of a document, mask does
    so too and tells the model which document a position is of, pad fills a row with one document
    alone. shift: training rows begin at another place in every epoch.
    """

    length: int = 256
    documents: Documents = "join"
    shift: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 2:
            raise ValueError(f"length must be at least 2, got {self.length}")
        if self.documents not in get_args(Documents):
            allowed = ", ".join(get_args(Documents))
            raise ValueError(f"documents must be one of {allowed}, got {self.documents!r}")


class TokenSplit:
    """The rows of a split; `fetch` reads them.

    tokens: ids [N] of any integer type; may be a memory map, of which only rows that are asked for
    are read. starts: int64, where documents begin; [0] where that is not known. shift: see the
    options; the builder sets it for training alone.

    With pad a document's first id is asked of nobody: nothing of its document is before it.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        starts: np.ndarray,
        length: int,
        documents: Documents,
        shift: bool,
        seed: int,
    ) -> None:
        self.tokens, self.length, self.documents = tokens, length, documents
        self.shift, self.seed = shift, seed
        self.starts = np.unique(np.append(0, np.asarray(starts, np.int64)))
        if self.starts[0] < 0 or self.starts[-1] > max(len(tokens) - 1, 0):
            raise ValueError(f"starts must lie within the {len(tokens):,} tokens")
        if documents == "pad":
            self._asked_D = np.diff(np.append(self.starts, len(tokens))) - 1
            self._ends_D = np.cumsum(-(-self._asked_D // length))  # rows up to a document's end
            self._size = int(self._ends_D[-1])
        else:
            pairs = max(len(tokens) - 1, 0)
            whole = max(1, (pairs + 1 - length) // length)
            self._room = pairs - whole * length  # by how many ids the rows of an epoch can move
            self._shifts = shift and self._room > 0
            self._size = whole if self._shifts else -(-pairs // length)

    def __len__(self) -> int:
        return self._size

    @property
    def asked(self) -> int:
        """Targets of an evaluation of the whole split."""
        if self.documents == "pad":
            return int(self._asked_D.sum())
        return max(len(self.tokens) - 1, 0)

    def fetch(self, indices: list[int], *, epoch: int, train: bool) -> dict[str, Tensor]:
        """ids and target, int64 [B, T]; with mask document [B, T], counted from 0 in each row."""
        row_B = np.asarray(indices, np.int64)
        first_B, count_B = self.spans(row_B, epoch=epoch if train and self.shift else None)
        step_T = np.arange(self.length + 1)
        place_BT = first_B[:, None] + np.minimum(step_T, count_B[:, None])
        got_BT = np.asarray(self.tokens[place_BT]).astype(np.int64)
        target_BT = got_BT[:, 1:].copy()
        target_BT[step_T[:-1] >= count_B[:, None]] = IGNORE
        batch = {
            "ids": torch.from_numpy(got_BT[:, :-1].copy()),
            "target": torch.from_numpy(target_BT),
        }
        if self.documents == "mask":
            number_BT = np.searchsorted(self.starts, place_BT[:, :-1], side="right")
            batch["document"] = torch.from_numpy(number_BT - number_BT[:, :1])
        return batch

    def spans(self, row_B: np.ndarray, *, epoch: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Where each row's inputs begin and how many targets it asks for, both int64 [B].

        epoch: None for rows that are not shifted.
        """
        if self.documents == "pad":
            return self._spans_of_documents(row_B, epoch=epoch)
        moved = 0
        if epoch is not None and self._shifts:
            moved = derive(self.seed, "shift", epoch) % (self._room + 1)
        first_B = row_B * self.length + moved
        return first_B, np.minimum(self.length, len(self.tokens) - 1 - first_B)

    def _spans_of_documents(
        self, row_B: np.ndarray, *, epoch: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """A document's last row is short, or with a shift its first: each target is asked once."""
        document_B = np.searchsorted(self._ends_D, row_B, side="right")
        asked_B = self._asked_D[document_B]
        rows_B = -(-asked_B // self.length)
        nth_B = row_B - (self._ends_D[document_B] - rows_B)
        moved_B = np.zeros_like(row_B)
        if epoch is not None:
            spare_B = rows_B * self.length - asked_B
            moved_B = derive(self.seed, "shift", epoch) % (spare_B + 1)
        begin_B = np.maximum(nth_B * self.length - moved_B, 0)
        end_B = np.minimum((nth_B + 1) * self.length - moved_B, asked_B)
        return self.starts[document_B] + begin_B, end_B - begin_B


# --- building -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class About:
    """What DataInfo says of a text."""

    name: str
    license: str
    source: str
    sha256: str


@dataclass(frozen=True)
class Part:
    """The ids of a split, and where its documents begin."""

    tokens: np.ndarray
    starts: np.ndarray


def join_documents(documents: Sequence[np.ndarray], *, encoding: Encoding) -> Part:
    """One array of the ids of each document, with the encoding's end after each."""
    dtype = documents[0].dtype if documents else np.dtype(np.uint16)
    end = np.array([] if encoding.end is None else [encoding.end], dtype)
    ids = [np.concatenate([each, end]) for each in documents]
    starts = np.cumsum([0, *(len(each) for each in ids)], dtype=np.int64)[:-1]
    return Part(np.concatenate(ids) if ids else np.empty(0, dtype), starts)


def token_splits(
    parts: Mapping[Split, Part],
    *,
    about: About,
    options: LanguageDataOptions,
    seed: int,
    encoding: Encoding | None,
    vocab_size: int,
    notes: Sequence[str] = (),
) -> Splits:
    """The splits of a task. encoding: None where ids cannot be turned into text.

    Raises ConfigError for a split that has not one row.
    """
    for split in SPLITS:
        found = len(parts[split].tokens)
        if found < options.length + 1:
            raise ConfigError(
                f"data={about.name}: {split} has {found:,} tokens, and a row of data.length="
                f"{options.length:,} needs {options.length + 1:,}; use a longer text, a larger "
                "share of it, or a smaller data.length"
            )
    splits = {
        split: TokenSplit(
            part.tokens,
            starts=part.starts,
            length=options.length,
            documents=options.documents,
            shift=options.shift and split == "train",
            seed=seed,
        )
        for split, part in parts.items()
    }
    info = DataInfo(
        name=about.name,
        license=about.license,
        source=about.source,
        sha256=about.sha256,
        synthetic=False,
        sizes={split: len(splits[split]) for split in SPLITS},
        extra={
            "vocab_size": vocab_size,
            "length": options.length,
            "documents": options.documents,
            **encoding_extra(encoding),
            "notes": [*notes, *bytes_note(encoding)],
        },
    )
    return Splits(splits["train"], splits["val"], splits["test"], info)


def bytes_note(encoding: Encoding | None) -> list[str]:
    """Says why a run has no bits per byte, where it has none."""
    if encoding is None or encoding.token_bytes() is not None:
        return []
    return [
        "bits per byte is not reported: the tokenizer does not tell how many bytes of the text "
        "each token stands for"
    ]


def encoding_extra(encoding: Encoding | None) -> dict[str, Any]:
    """What a task learns of an encoding through DataInfo.extra."""
    if encoding is None:
        return {"token_bytes": None, "encode": None, "decode": None, "end": None}
    return {
        "meaning": encoding.describe(),
        "token_bytes": encoding.token_bytes(),
        "encode": lambda text: encoding.encode(text).tolist(),
        "decode": encoding.decode,
        "end": encoding.end,
    }
