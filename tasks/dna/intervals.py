"""Intervals of a genome and the split that each is in: BED of four columns.

    chr18   928386   1059458   train

chromosome, start (0-based), end (excluded) and train, valid (or val) or test: the layout of
Basenji's human-sequences.bed (Kelley, 2020, doi:10.1371/journal.pcbi.1008050), which HyenaDNA and
Caduceus are pre-trained with. Tabs or spaces; further columns, comments, `track` and `browser`
lines and one header line are passed over.

Intervals of different splits must not overlap: what is trained on would be tested on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from suite.errors import ConfigError, shown

SPLITS = ("train", "val", "test")
WORDS = {
    "train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
}  # fmt: skip
LINE = "CHROMOSOME START END SPLIT"


class Interval(NamedTuple):
    """Bases start:end of a chromosome, 0-based, and the line that says so."""

    chrom: str
    start: int
    end: int
    split: str
    line: int


def read_bed(file: Path, *, lengths: Mapping[str, int], name: str = "genome") -> list[Interval]:
    """The intervals of a BED file, in its order. lengths: the bases of each chromosome.

    Raises ConfigError, with the number of the line, for what is not an interval of these
    chromosomes, and for intervals of two splits that overlap.
    """
    where = f"data={name}: {shown(file)}"
    intervals = [parse(row, number, lengths, where) for number, row in rows_of(file, where)]
    if not intervals:
        raise ConfigError(f"{where} has no intervals; add lines of {LINE}")
    check_apart(intervals, where)
    return intervals


def rows_of(file: Path, where: str) -> Iterator[tuple[int, list[str]]]:
    """(number, columns) of the lines that must be intervals."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"{where} cannot be read ({error.strerror}); set data.bed=FILE to lines of {LINE}"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{where} is not text; it must be lines of {LINE}") from None
    first = True
    for number, line in enumerate(text.split("\n"), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        columns = [c.strip() for c in line.split("\t")] if "\t" in line else line.split()
        if columns[0].split(" ")[0] in ("track", "browser"):
            continue
        header = first and len(columns) > 2 and not any(map(is_number, columns[1:3]))
        first = False
        if not (header and columns[1].lower().endswith("start")):
            yield number, columns


def is_number(text: str) -> bool:
    """Whether it is a whole number, as BED has it."""
    return text.isascii() and text.isdecimal()


def parse(columns: Sequence[str], line: int, lengths: Mapping[str, int], where: str) -> Interval:
    """The interval of a line. Raises ConfigError that says what is wrong with it."""

    def wrong(what: str) -> ConfigError:
        return ConfigError(f"{where} line {line}: {what}")

    if len(columns) < 3:
        raise wrong(f"{len(columns)} column(s); it must be {LINE}")
    chrom, *texts = columns[:3]
    for text in texts:
        if not is_number(text) or len(text) > 15:
            raise wrong(f"{text!r} is not a position; it must be {LINE}, with 0-based numbers")
    start, end = map(int, texts)
    if len(columns) < 4 or not columns[3]:
        raise wrong("has no split; column 4 must be train, valid or test")
    if columns[3] not in WORDS:
        raise wrong(f"no such split, {columns[3]!r}; column 4 must be train, valid or test")
    if chrom not in lengths:
        raise wrong(f"no sequence {chrom!r} in the FASTA file{hint(chrom, lengths)}")
    if start >= end:
        raise wrong(f"start {start:,} is not below end {end:,}")
    if end > lengths[chrom]:
        raise wrong(f"end {end:,} is beyond {chrom}, which has {lengths[chrom]:,} bases")
    return Interval(chrom, start, end, WORDS[columns[3]], line)


def hint(chrom: str, lengths: Mapping[str, int]) -> str:
    """What the sequence may be called instead."""
    other = chrom[3:] if chrom.startswith("chr") else f"chr{chrom}"
    if other in lengths:
        return (
            f", which calls it {other!r}: one file has the prefix 'chr' and the other has not; "
            "write both alike"
        )
    near = get_close_matches(chrom, lengths, n=1, cutoff=0.5)
    few = ", ".join(list(lengths)[:3])
    return (
        f"; did you mean {near[0]!r}?" if near else f"; it has {few}{', ...' * (len(lengths) > 3)}"
    )


def check_apart(intervals: Sequence[Interval], where: str) -> None:
    """Raise ConfigError if intervals of two splits overlap."""
    reach: dict[tuple[str, str], Interval] = {}  # of (chromosome, split): what ends last so far
    for each in sorted(intervals, key=lambda i: (i.chrom, i.start, i.end)):
        for split in SPLITS:
            last = reach.get((each.chrom, split))
            if last is not None and split != each.split and last.end > each.start:
                a, b = sorted((last, each), key=lambda i: i.line)
                raise ConfigError(
                    f"{where} line {b.line}: {b.chrom}:{b.start:,}-{b.end:,} ({b.split}) overlaps "
                    f"line {a.line}, {a.start:,}-{a.end:,} ({a.split}); splits must share no base"
                )
        last = reach.get((each.chrom, each.split))
        if last is None or each.end > last.end:
            reach[each.chrom, each.split] = each


def merged(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans of one chromosome in order, those that overlap as one; those that touch stay two."""
    out: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if out and start < out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out
