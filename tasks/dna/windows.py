"""Where the windows of a split lie: whole ones side by side in each interval.

An interval that is shorter than a window gives one: itself, or with `extend` a window that grows
around it, as HyenaDNA's reader does. That one grows into the validation's intervals too; here it
ends where the chromosome does, and half-way to the nearest interval of another split, so that no
base is in the windows of two splits.

Shapes: N windows, R regions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from tasks.dna.intervals import SPLITS, Interval, merged

Span = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """The windows of a split.

    regions: (chromosome, start, end) of the intervals that hold them, in order; those that overlap
    are one. places: int64 [N, 3], (index into regions, start, end), counted from the region's
    start. room: int64 [N, 2], how far each may move, down (<= 0) and up (>= 0). left_out: bases of
    the intervals that are in no window. bases: of the intervals. short: windows shorter than
    `length`.
    """

    regions: tuple[tuple[str, int, int], ...]
    places: np.ndarray
    room: np.ndarray
    left_out: int
    bases: int
    short: int


def lay_out(
    intervals: Sequence[Interval], *, lengths: Mapping[str, int], length: int, extend: bool
) -> dict[str, Layout]:
    """The windows of train, val and test. lengths: the bases of each chromosome, in order."""
    spans: dict[tuple[str, str], list[Span]] = {}
    for each in intervals:
        spans.setdefault((each.chrom, each.split), []).append((each.start, each.end))
    spans = {key: merged(given) for key, given in spans.items()}
    tables: dict[str, list[tuple[str, list[Span], list[Span]]]] = {split: [] for split in SPLITS}
    for chrom, total in lengths.items():
        cuts = borders({s: spans.get((chrom, s), []) for s in SPLITS}, total)
        for split in SPLITS:
            if (chrom, split) in spans:
                own = spans[chrom, split]
                wide = [grow(span, length, cuts) for span in own] if extend else own
                tables[split].append((chrom, own, wide))
    return {split: lay_split(tables[split], length) for split in SPLITS}


def borders(spans: Mapping[str, Sequence[Span]], total: int) -> np.ndarray:
    """Where a window has to end, in order: 0, half-way between different splits, and `total`."""
    rows = sorted((start, end, split) for split, given in spans.items() for start, end in given)
    cuts = [0]
    for (_, end, split), (start, _, other) in pairwise(rows):
        if split != other:
            cuts.append((end + start) // 2)
    return np.array([*cuts, total])


def grow(span: Span, length: int, cuts: np.ndarray) -> Span:
    """The interval made `length` long around its middle, as far as the borders let it."""
    start, end = span
    if end - start >= length:
        return span
    low = int(cuts[np.searchsorted(cuts, start, side="right") - 1])
    high = int(cuts[np.searchsorted(cuts, end, side="left")])
    start = max(low, min((start + end - length) // 2, high - length))
    return start, min(start + length, high)


def lay_split(table: Sequence[tuple[str, list[Span], list[Span]]], length: int) -> Layout:
    """The windows of one split. table: (chromosome, intervals, the same as they grew)."""
    regions: list[tuple[str, int, int]] = []
    blocks: list[np.ndarray] = []
    left_out = bases = 0
    for chrom, own, wide in table:
        whole = merged([*own, *wide])
        starts = np.array([start for start, _ in whole])
        for (low, high), grown in zip(own, wide, strict=True):
            bases += high - low
            at = int(np.searchsorted(starts, grown[0], side="right")) - 1
            block = tile(grown, length)
            if high - low >= length:
                left_out += (high - low) % length
            number = np.full((len(block), 1), len(regions) + at)
            blocks.append(np.hstack([number, block - [starts[at], starts[at], 0, 0]]))
        regions += [(chrom, start, end) for start, end in whole]
    rows = np.concatenate([np.empty((0, 5), np.int64), *blocks]).astype(np.int64)
    short = int((rows[:, 2] - rows[:, 1] < length).sum())
    return Layout(tuple(regions), rows[:, :3], rows[:, 3:], left_out, bases, short)


def tile(span: Span, length: int) -> np.ndarray:
    """int64 [N, 4]: (start, end, room down, room up) of the windows of one interval."""
    start, end = span
    if end - start <= length:
        return np.array([[start, end, 0, 0]])
    starts = np.arange(start, end - length + 1, length)
    return np.stack([starts, starts + length, start - starts, end - length - starts], axis=1)
