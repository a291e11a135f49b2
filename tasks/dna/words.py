"""Words of bases as codes in base 4, and how often each occurs: what Markov models are made of.

The last base of a word is the lowest digit of its code, so the low digits are the shorter word that
ends at the same place. The counts of every length come from those of the longest by a sum over its
first base, and of the words at the beginning of a run of bases, which have no base before them.

Shapes: L positions, B windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tasks.dna.tokens import A, T

LONGEST = 13  # bases of a word: a table of 4^13 counts takes 268 MB
PIECE = 1 << 21  # positions that are worked on at once: bounds the memory whatever the genome
GAP = 4  # the digit of what is no base


def joined(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """All sequences as digits 0 to 3, or GAP for what is no base, with a GAP before each."""
    text = np.full(sum(len(s) + 1 for s in sequences), GAP, np.uint8)
    at = 0
    for ids in sequences:
        text[at + 1 : at + 1 + len(ids)] = np.where((ids >= A) & (ids <= T), ids - A, GAP)
        at += len(ids) + 1
    return text


def placed(sequences: Sequence[np.ndarray], windows: np.ndarray) -> np.ndarray:
    """[B, 2]: where each window starts and ends in the joined sequences."""
    lengths = np.array([0] + [len(s) + 1 for s in sequences], np.int64)
    return windows[:, 1:] + (lengths.cumsum() + 1)[windows[:, :1]]


@dataclass(frozen=True)
class Piece:
    """A part of the joined sequences: digits, of which the first `lead` and the last `tail` are
    only context; the position of the first that counts is `start`.
    """

    digits: np.ndarray
    start: int
    lead: int
    tail: int

    def own(self, values_L: np.ndarray) -> np.ndarray:
        return values_L[self.lead : len(self.digits) - self.tail]


def pieces(text: np.ndarray, *, lead: int, tail: int = 0) -> Iterator[Piece]:
    """The whole text, PIECE positions at a time."""
    for start in range(0, len(text), PIECE):
        stop = min(start + PIECE, len(text))
        first, last = max(start - lead, 0), min(stop + tail, len(text))
        yield Piece(text[first:last], start, start - first, last - stop)


class Words:
    """The words up to `longest` bases that end at each position of digits [L].

    code_L: of the longest; a shorter one is its low digits. reverse_L: of the reverse complement of
    the longest; a shorter one's is its high digits. run_L: how many bases end there without a gap,
    at most `longest`: a longer word has no meaning.
    """

    def __init__(self, digits: np.ndarray, longest: int) -> None:
        size = len(digits)
        self.longest = longest
        self.digit_L = (digits & 3).astype(np.uint32)
        self.code_L = np.zeros(size, np.uint32)
        self.reverse_L = np.zeros(size, np.uint32)
        for back in range(min(longest, size)):
            base = self.digit_L[: size - back]
            self.code_L[back:] |= base << 2 * back
            self.reverse_L[back:] |= (3 - base) << 2 * (longest - 1 - back)
        at = np.arange(size)
        gap = np.maximum.accumulate(np.where(digits == GAP, at, -1))
        self.run_L = np.minimum(at - gap, longest).astype(np.uint8)

    def of(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The codes of the words of `length` bases and of their reverse complements."""
        low = np.uint32(4**length - 1)
        return self.code_L & low, self.reverse_L >> np.uint32(2 * (self.longest - length))


class Counts:
    """How often each word of 1 to `longest` bases occurs on the given strand.

    words[w]: uint32 [4^w]. preceded[w]: uint32 [4^(w-1)], how often a word of w - 1 bases occurs
    with a base before it. The other strand is not counted: its counts of a word are these of the
    reverse complement.
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.words = [np.zeros(4**w, np.uint32) for w in range(longest + 1)]
        self.preceded = [np.zeros(4 ** max(w - 1, 0), np.uint32) for w in range(longest + 1)]
        self.first = [np.zeros(4**w, np.uint32) for w in range(longest)]  # at a run's beginning

    def add(self, text: np.ndarray) -> None:
        """Count the words of joined sequences too."""
        top = self.longest
        for piece in pieces(text, lead=top - 1):
            words = Words(piece.digits, top)
            run, code = piece.own(words.run_L), piece.own(words.code_L)
            self._count_longest(code[run == top])
            short = run < top
            run, code = run[short], code[short]  # few: the beginnings of runs
            for w in range(1, top):
                np.add.at(self.first[w], code[run == w] & np.uint32(4**w - 1), 1)
        for w in range(top, 0, -1):
            np.sum(self.words[w].reshape(4, -1), axis=0, dtype=np.uint32, out=self.preceded[w])
            np.add(self.preceded[w], self.first[w - 1], out=self.words[w - 1])

    def _count_longest(self, code: np.ndarray) -> None:
        table = self.words[self.longest]
        if len(table) <= PIECE:
            table += np.bincount(code, minlength=len(table)).astype(np.uint32)
        else:  # bincount would take twice the table's memory for every piece
            found, times = np.unique(code, return_counts=True)
            table[found] += times.astype(np.uint32)

    def causal(self, words: Words, order: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """n and N of each position, on the given strand, then on both."""
        w = order + 1
        code, reverse = words.of(w)
        n = self.words[w][code].astype(np.float64)
        total = self.words[w].reshape(-1, 4)[code >> np.uint32(2)].sum(axis=1, dtype=np.float64)
        yield n, total
        # the other strand: the complement of the base, then the reverse complement of the context
        n_both = n + self.words[w][reverse]
        yield n_both, total + self.preceded[w][reverse & np.uint32(4**order - 1)]

    def two_sided(self, words: Words, order: int) -> tuple[np.ndarray, np.ndarray]:
        """n and N, on both strands, of the middle of the word that ends at each position."""
        w = 2 * order + 1
        shift = np.uint32(2 * order)
        code, reverse = words.of(w)
        n = self.words[w][code].astype(np.float64) + self.words[w][reverse]
        total = np.zeros_like(n)
        for side in (code, reverse):
            rest = side & ~np.uint32(3 << 2 * order)
            for base in range(4):
                total += self.words[w][rest | np.uint32(base) << shift]
        return n, total
