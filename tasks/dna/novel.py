"""Which windows have no base in a 24-mer that was trained on, on either strand.

Why: a genome repeats itself. 6 % of the bases of yeast's chromosomes 4 and 14 lie in a 24-mer that
is elsewhere too (transposons, copies of genes), and there a model that copies looks good. 24 bases
are 48 bits: a k-mer is one integer, and of it and its reverse complement the smaller is taken.
24-mers that reach over a window's border count too.

Shapes: L positions, M k-mers (L - 23).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tasks.dna.tokens import A, T

K = 24
PIECE = 1 << 22  # bases at a time: the work needs some forty bytes for each


def kmers(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the code of each k-mer [M] int64, whether it has only A, C, G and T [M])."""
    base = (ids >= A) & (ids <= T)
    code = np.where(base, ids - A, 0).astype(np.int64)
    forward, backward, size = {1: code}, {1: 3 - code}, 1
    for more in (1, 2, 4, 8, 8):  # 1 + 1 = 2, 4, 8, 16, 24
        count = max(0, len(ids) - size - more + 1)
        forward[size + more] = (forward[size][:count] << 2 * more) | forward[more][size:][:count]
        backward[size + more] = backward[size][:count] | backward[more][size:][:count] << 2 * size
        size += more
    bad = np.concatenate([[0], np.cumsum(~base)])
    return np.minimum(forward[K], backward[K]), bad[K:] == bad[: max(0, len(bad) - K)]


def pieces(ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(start, part) of a sequence, so that every k-mer is in one part."""
    for start in range(0, max(0, len(ids) - K + 1), PIECE):
        yield start, ids[start : start + PIECE + K - 1]


def known_kmers(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """The codes of all k-mers, sorted."""
    found = [np.empty(0, np.int64)]
    for ids in sequences:
        for _, part in pieces(ids):
            codes, whole = kmers(part)
            found.append(codes[whole])
    codes = np.concatenate(found)
    codes.sort()
    return codes


def novel_windows(
    sequences: Sequence[np.ndarray], places: np.ndarray, known: np.ndarray
) -> np.ndarray:
    """bool [N]: which windows have no base in a k-mer of `known` (sorted).

    places: int64 [N, 3], (index into sequences, start, end). Of a sequence shorter than a k-mer
    all windows are new.
    """
    novel = np.ones(len(places), bool)
    for number, ids in enumerate(sequences):
        rows = np.flatnonzero(places[:, 0] == number)
        hits = np.zeros(len(ids) + 1, np.int64)  # k-mers known that start before a position
        for start, part in pieces(ids):
            codes, whole = kmers(part)
            hits[start + 1 : start + 1 + len(codes)] = whole & contains(known, codes)
        hits = np.cumsum(hits)
        first = np.maximum(places[rows, 1] - K + 1, 0)
        novel[rows] = hits[places[rows, 2]] == hits[first]  # no k-mer starts in the last K - 1
    return novel


def contains(known: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Which codes are in `known`, which is sorted."""
    if not len(known):
        return np.zeros(len(codes), bool)
    order = np.argsort(codes)  # in order, a search starts where the last one was: five times faster
    at = np.searchsorted(known, codes[order])
    at[at == len(known)] = 0
    found = np.empty(len(codes), bool)
    found[order] = known[at] == codes[order]
    return found
