"""Letters of a transcript, and what a CTC network's frames spell.

The 29 labels stand in the order of torchaudio's published wav2vec 2.0 heads, so that their rows fit
ours; Hugging Face's and fairseq's 32 have the same order with <s>, </s> and <unk> after the blank.
The blank is 0 and no letter, so transcripts may be padded with it.

Shapes: B examples, T frames, L letters.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from string import ascii_letters

import torch
from torch import Tensor

LABELS = "-|ETAONIHSRDLUMWCFGYPBVK'XJQZ"  # 0: the blank of CTC; 1: between words
BLANK, SPACE = 0, 1
_IDS = {label: i for i, label in enumerate(LABELS) if i not in (BLANK, SPACE)} | {" ": SPACE}
_TYPOGRAPHIC = str.maketrans({"’": "'"})
_ALLOWED = frozenset(ascii_letters + "' ")


def normalise(text: str) -> str:
    """Upper case, one space between words, none at the ends; a typographic apostrophe is one.

    Raises ValueError naming the first character that is neither a letter A-Z, an apostrophe nor a
    space: what digits and signs are read as is for whoever made the transcript to say.
    """
    found = " ".join(text.translate(_TYPOGRAPHIC).split())
    # before upper(), which makes of "ß" two letters that nobody wrote
    if odd := set(found) - _ALLOWED:
        first = next(character for character in found if character in odd)
        raise ValueError(
            f"{first!r} is none of the letters A-Z, apostrophe and space: write numbers and signs "
            "as words, and leave punctuation out"
        )
    return found.upper()


def encode(text: str) -> list[int]:
    """A transcript to label ids. Raises ValueError as `normalise` does."""
    return [_IDS[character] for character in normalise(text)]


def decode(ids: Sequence[int]) -> str:
    """Label ids to a transcript; blanks (padding) are passed over, repeated letters stay.

    Word separators at the ends, or several in a row, make no empty words.
    """
    letters = "".join(LABELS[i] for i in ids if i != BLANK)
    return " ".join(letters.replace(LABELS[SPACE], " ").split())


def decode_rows(ids_BL: Tensor) -> list[str]:
    """`decode` of each row, with one transfer from the device."""
    return [decode(row) for row in ids_BL.tolist()]


def frames_needed(ids: Sequence[int]) -> int:
    """The fewest frames that can spell `ids` in CTC: a blank has to part two equal letters."""
    return len(ids) + sum(a == b for a, b in pairwise(ids))


def collapse(ids_BT: Tensor, frames_B: Tensor) -> Tensor:
    """Each row's first `frames_B` frames without repeats, then without blanks: [B, T], zero-padded.

    Nothing is read from the device.
    """
    before_BT = torch.nn.functional.pad(ids_BT[:, :-1], (1, 0), value=-1)
    real_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) < frames_B[:, None]
    kept_BT = real_BT & (ids_BT != before_BT) & (ids_BT != BLANK)
    place_BT = (kept_BT.cumsum(1) - 1).clamp(min=0)
    # what is not kept adds a blank, 0, wherever it lands
    return torch.zeros_like(ids_BT).scatter_add_(1, place_BT, ids_BT * kept_BT)


def greedy(ids_BT: Tensor, frames_B: Tensor) -> list[str]:
    """The transcripts that the most likely label of each frame spells."""
    return decode_rows(collapse(ids_BT, frames_B))
