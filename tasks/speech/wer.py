"""Word and character error rates over a whole set: (substitutions + deletions + insertions) /
length of the references.

Errors and lengths are summed over batches and ranks before they are divided, so that the figure
does not depend on how the set was cut up; the mean of each utterance's rate is another number.

Shapes: B utterances, L letters, zero-padded; W words or letters of the longest of a batch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchmetrics import Metric

from suite.errors import DataError
from tasks.speech.text import decode_rows

Ints = npt.NDArray[np.int64]


def edit_distances(
    hypotheses: Sequence[Sequence[Hashable]], references: Sequence[Sequence[Hashable]]
) -> Ints:
    """Levenshtein distance of each pair, [B]: the fewest insertions, deletions, substitutions.

    The rows of the usual table are filled for all pairs together. Within a row an insertion looks
    at the cell to the left, d[j] = min over k <= j of (without[k] + j - k), which is a running
    minimum of without[k] - k (so that no loop over j is left).
    """
    codes: dict[Hashable, int] = {}
    hyp_BW, hyp_B = _padded(hypotheses, codes=codes)
    ref_BW, ref_B = _padded(references, codes=codes)
    j_W = np.arange(hyp_BW.shape[1] + 1)
    row_BW = np.tile(j_W, (len(ref_B), 1))
    pairs = np.arange(len(ref_B))
    found_B = row_BW[pairs, hyp_B]  # of an empty reference: all insertions
    for i in range(ref_BW.shape[1]):
        without_BW = row_BW + 1
        substituted_BW = row_BW[:, :-1] + (hyp_BW != ref_BW[:, i : i + 1])
        without_BW[:, 1:] = np.minimum(without_BW[:, 1:], substituted_BW)
        row_BW = np.minimum.accumulate(without_BW - j_W, axis=1) + j_W
        found_B = np.where(ref_B == i + 1, row_BW[pairs, hyp_B], found_B)
    return found_B


def _padded(rows: Sequence[Sequence[Hashable]], *, codes: dict[Hashable, int]) -> tuple[Ints, Ints]:
    """Rows of symbols as numbers, [B, W] padded with -1, and their lengths, [B]."""
    lengths_B = np.array([len(row) for row in rows], dtype=np.int64)
    padded_BW = np.full((len(rows), max([0, *lengths_B])), -1, dtype=np.int64)
    for row_W, row in zip(padded_BW, rows, strict=True):
        row_W[: len(row)] = [codes.setdefault(symbol, len(codes)) for symbol in row]
    return padded_BW, lengths_B


class ErrorRate(Metric):
    """Edit distance over reference length of everything that was added.

    shown: how many pairs (reference, hypothesis) of the set's beginning to keep in `pairs`; they
    outlive `reset`, up to the next set's first batch.
    """

    full_state_update = False
    higher_is_better = False
    what = ""  # the symbols that are counted
    errors: Tensor
    total: Tensor

    def __init__(self, *, shown: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shown, self.pairs, self._another = shown, list[tuple[str, str]](), False
        for name in ("errors", "total"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    @abstractmethod
    def symbols(self, text: str) -> Sequence[str]:
        """What of a transcript is compared."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """preds, target: [B, L] letter ids, zero-padded."""
        hypotheses, references = decode_rows(preds), decode_rows(target)
        if self._another:
            self.pairs, self._another = [], False
        self.pairs += list(zip(references, hypotheses, strict=True))[: self.shown - len(self.pairs)]
        words = [self.symbols(text) for text in references]
        found = edit_distances([self.symbols(text) for text in hypotheses], words)
        self.errors += int(found.sum())
        self.total += sum(len(symbols) for symbols in words)

    def compute(self) -> Tensor:
        if not int(self.total):
            raise DataError(
                f"no {self.what} in any transcript of this split, so there is no error rate: give "
                "transcripts, or take task=speech/pretrain, which needs none"
            )
        return self.errors / self.total

    def reset(self) -> None:
        super().reset()
        self._another = True


class WordErrors(ErrorRate):
    """Word error rate."""

    what = "word"

    def symbols(self, text: str) -> list[str]:
        return text.split()


class CharErrors(ErrorRate):
    """Character error rate; the space between words is a character."""

    what = "character"

    def symbols(self, text: str) -> str:
        return text
