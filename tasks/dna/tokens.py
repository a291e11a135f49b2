"""Bases as the ids that HyenaDNA and Caduceus were published with, and the reverse complement.

Source: the character tokenizer of hyena-dna d553021 and caduceus 0060a6d, whose ids agree. Both
pad the vocabulary to 16. Lower case, which marks repeats in hg38, is read as upper case: HyenaDNA's
own reader makes it [UNK].

Shapes: B sequences, L positions.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

SPECIAL = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]")
CLS, SEP, BOS, MASK, PAD, RESERVED, UNK = range(7)
A, C, G, T, N = range(7, 12)
BASES = "ACGT"
VOCAB = 12  # ids that mean something
ROWS = 16  # of the embedding and the head, a multiple of 8 as published
AMBIGUOUS = "RYSWKMBDHVN"  # IUPAC's letters for more than one base: all become N
COMPLEMENT = np.array([*range(A), T, G, C, A, *range(N, ROWS)], np.uint8)
BAD = 255

_IDS = np.full(256, BAD, np.uint8)
_IDS[list(b"ACGT")] = (A, C, G, T)
_IDS[list(b"Uu")] = T
_IDS[list(b"acgt")] = (A, C, G, T)
for _letter in AMBIGUOUS + AMBIGUOUS.lower():
    _IDS[ord(_letter)] = N
_LETTERS = np.frombuffer(b"........ACGTN...", np.uint8)[[*range(1, A + 1), *range(8, 13)]]


def encode(letters: bytes | str) -> np.ndarray:
    """The ids of a sequence, uint8 [L].

    Raises ValueError that names the first letter that is not IUPAC, and its position from 1.
    """
    raw = letters.encode("utf-8", "replace") if isinstance(letters, str) else letters
    ids = _IDS[np.frombuffer(raw, np.uint8)]
    if (bad := np.flatnonzero(ids == BAD)).size:
        at = int(bad[0])
        letter = raw[at : at + 1].decode("ascii", "backslashreplace")
        raise ValueError(f"letter {letter!r} at position {at + 1} is not an IUPAC base")
    return ids


def decode(ids: np.ndarray) -> str:
    """The letters of bases and N; every other id becomes a dot."""
    return bytes(_LETTERS[np.asarray(ids, np.int64)]).decode()


def reverse_complement(ids: np.ndarray) -> np.ndarray:
    """The other strand of a sequence [L] (or of each row of [B, L]), read in its own direction."""
    return COMPLEMENT[ids[..., ::-1]].astype(ids.dtype)


def is_base(ids_BL: Tensor) -> Tensor:
    """Which positions are A, C, G or T: those that a loss may count."""
    return (ids_BL >= A) & (ids_BL <= T)


def other_strand(ids_BL: Tensor) -> Tensor:
    """The reverse complement of each row, its padding left where it was (at the end).

    Rows are padded at the end only.
    """
    length_B1 = (ids_BL != PAD).sum(dim=1, keepdim=True)
    at_BL = _positions(ids_BL, length_B1)
    return complement(ids_BL).gather(1, at_BL)


def complement(ids: Tensor) -> Tensor:
    """A to T and C to G, and back; every other id is its own."""
    return (A + T - ids).where(is_base(ids), ids)


def _positions(ids_BL: Tensor, length_B1: Tensor) -> Tensor:
    """Where each position of the other strand is read from: mirrored, the padding from itself."""
    at_L = ids_BL.new_ones(ids_BL.shape[1]).cumsum(0) - 1
    return (length_B1 - 1 - at_L).where(at_L < length_B1, at_L)
