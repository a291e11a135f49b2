"""Bases at four to a byte: what the embedded sequences are stored as.

A base is two bits (A 0, C 1, G 2, T 3), the first base of a byte in its lowest bits. Anything but
A, C, G and T has no place in it. Not UCSC's .2bit, whose order and header differ.
"""

from __future__ import annotations

import numpy as np

from tasks.dna.tokens import A, T

_SHIFTS = np.array([0, 2, 4, 6], np.uint8)
_FOUR = (np.arange(256)[:, None] >> _SHIFTS & 3).astype(np.uint8) + np.uint8(A)


def packed_size(length: int) -> int:
    """The bytes that `length` bases take."""
    return (length + 3) // 4


def pack(ids: np.ndarray) -> np.ndarray:
    """The bytes of a sequence of ids [L], uint8. Raises ValueError unless all are A, C, G or T."""
    if len(ids) and not A <= ids.min() <= ids.max() <= T:
        raise ValueError("only A, C, G and T fit into two bits")
    codes = np.zeros(4 * packed_size(len(ids)), np.uint8)
    codes[: len(ids)] = ids - A
    packed: np.ndarray = np.bitwise_or.reduce(codes.reshape(-1, 4) << _SHIFTS, axis=1)
    return packed


def unpack(packed: np.ndarray, length: int) -> np.ndarray:
    """The ids of the first `length` bases, uint8 [length]."""
    if len(packed) != packed_size(length):
        raise ValueError(f"{length} bases are {packed_size(length)} bytes, got {len(packed)}")
    return _FOUR[packed].reshape(-1)[:length]
