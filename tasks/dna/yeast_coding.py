"""Coding or intergenic: windows of 200 bases of yeast, those of chromosomes 4 and 14 for the test.

A larger labelled set that needs no download, an analog of GenomicBenchmarks'
demo_coding_vs_intergenomic_seqs. There is no published figure for it. Its windows are these:

- coding: the middle 200 bases of every exon of a CDS that has 200 or more (an exon that two CDS
  share is taken once);
- intergenic: what lies outside every annotated feature from its first base to its last, so outside
  introns, repeats and origins too. Each such stretch is cut into as many windows of 200 as it
  holds, with what is left over at both ends; of these each chromosome gives as many as it has
  coding ones, evenly spaced along it.

All are read on the forward strand of their chromosome, whatever the strand of the gene: a window
and its reverse complement have the same label. No window lies in two splits, but genes overlap in
places, so that a coding window of validation may share bases with one of training.

A model that was pre-trained on `data=yeast` has not seen chromosomes 4 and 14 either.
"""

from __future__ import annotations

import numpy as np

from suite.data import Splits
from tasks.dna.sequences import Ints, LabelledOptions, Sequences
from tasks.dna.sets import About, make_splits
from tasks.dna.tokens import N
from tasks.dna.yeast import ABOUT as GENOME
from tasks.dna.yeast import ASSET_SHA256, HELD_OUT, Features, load_genome

LENGTH = 200
CLASSES = ("coding", "intergenic")
TEST = tuple(name for name, split in HELD_OUT.items() if split == "test")  # as in pre-training

ABOUT = About(
    "yeast_coding",
    license=GENOME.license,
    source=GENOME.source,
    classes=CLASSES,
    strand_specific=False,
)


def build_yeast_coding(options: LabelledOptions, *, seed: int) -> Splits:
    """The splits. Raises ConfigError if the genome's file is not the one that was shipped."""
    genome = load_genome()
    rows: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    for chrom, (name, ids) in enumerate(zip(genome.names, genome.sequences(), strict=True)):
        part = "test" if name in TEST else "train"
        for start, label in windows(genome.features, chrom=chrom, ids=ids):
            rows[part].append(ids[start : start + LENGTH])
            labels[part].append(label)
    parts = {part: Sequences.listed(rows[part], labels[part]) for part in rows}
    return make_splits(
        parts["train"], parts["test"], about=ABOUT, options=options, seed=seed, sha256=ASSET_SHA256
    )


def windows(features: Features, *, chrom: int, ids: np.ndarray) -> list[tuple[int, int]]:
    """(start, label) of the windows of one chromosome, as many of each class, in order of both."""
    unknown = np.concatenate([[0], np.cumsum(ids == N)])
    coding, intergenic = (
        starts[unknown[starts + LENGTH] == unknown[starts]]
        for starts in (coding_starts(features, chrom), free_starts(features, chrom, len(ids)))
    )
    count = min(len(coding), len(intergenic))
    return [
        (int(start), label)
        for label, starts in enumerate((coding, intergenic))
        for start in starts[np.arange(count) * len(starts) // max(count, 1)]
    ]


def coding_starts(features: Features, chrom: int) -> Ints:
    """Where the windows in the middle of long exons start, sorted."""
    rows = features.of("CDS")
    rows = rows[features.chrom[rows] == chrom]
    exons = np.unique(np.stack([features.start[rows], features.end[rows]], axis=1), axis=0)
    start, end = exons[exons[:, 1] - exons[:, 0] >= LENGTH].T.astype(np.int64)
    return np.sort((start + end - LENGTH) // 2)


def free_starts(features: Features, chrom: int, length: int) -> Ints:
    """Where the windows between the features start, sorted."""
    rows = np.flatnonzero(features.chrom == chrom)
    _, feature = np.unique(features.number[rows], return_inverse=True)
    count = int(feature.max(initial=-1)) + 1
    first, last = np.full(count, length), np.zeros(count, np.int64)
    np.minimum.at(first, feature, features.start[rows])
    np.maximum.at(last, feature, features.end[rows])
    taken = np.zeros(length, bool)
    for start, end in zip(first.tolist(), last.tolist(), strict=True):
        taken[start:end] = True
    edges = np.diff(np.concatenate([[True], taken, [True]]).astype(np.int8))
    found = [
        start + (end - start) % LENGTH // 2 + np.arange((end - start) // LENGTH) * LENGTH
        for start, end in zip(np.flatnonzero(edges == -1), np.flatnonzero(edges == 1), strict=True)
    ]
    return np.concatenate([np.zeros(0, np.int64), *found])
