"""Splice junctions of primates (StatLog's DNA): 2,000 / 1,186 sequences of 60 bases.

The default labelled set: it is inside the package, small, and has published accuracies (StatLog,
1994): RBF network 95.9 %, DIPOL92 95.2, ALLOC80 94.3, logistic regression 93.9, most frequent class
52.0. The junction lies between bases 30 and 31; the classes are exon/intron (ei, a donor),
intron/exon (ie, an acceptor) and neither (n). A junction is one of its strand: a reverse complement
has none. assets/DATA.md has the source and the licence.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from suite.data import Splits
from suite.shipped import check_shipped
from tasks.dna.sequences import LabelledOptions, Sequences
from tasks.dna.sets import About, make_splits
from tasks.dna.tokens import encode

FILE = Path(__file__).parent / "assets" / "splice.npz"
SHA256 = "dc7b9e79342198511f18a5e59f8e5b9b7992315c10692035370513d547f7fc54"
CLASSES = ("ei", "ie", "n")
SIZES = {"train": 2000, "test": 1186}  # StatLog's own division
LENGTH = 60

ABOUT = About(
    "splice",
    license="CC BY 4.0 (UCI, Splice-junction Gene Sequences, doi:10.24432/C5M888)",
    source="StatLog DNA, Debian package r-cran-mlbench 2.1-3-1",
    classes=CLASSES,
    strand_specific=True,
    extra={"published_metric": "accuracy"},
)


def build_splice(options: LabelledOptions, *, seed: int) -> Splits:
    """The splits. Raises ConfigError if the file is not the one that was shipped."""
    check_shipped(FILE, SHA256, name=ABOUT.name)
    with np.load(FILE, allow_pickle=False) as stored:
        arrays = dict(stored)
    parts = {}
    for split in SIZES:
        letters, labels = arrays[f"{split}_letters"], arrays[f"{split}_labels"]
        ids = encode(letters.tobytes())
        parts[split] = Sequences.joined(ids, np.full(len(labels), LENGTH), labels)
    return make_splits(
        parts["train"], parts["test"], about=ABOUT, options=options, seed=seed, sha256=SHA256
    )
