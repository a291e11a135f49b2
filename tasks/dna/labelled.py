"""The labelled sets that `data=` may name; the first is the default."""

from __future__ import annotations

from suite.registry import Choice
from tasks.dna.genomic_benchmarks import GenomicBenchmarksOptions, build_genomic_benchmarks
from tasks.dna.nucleotide_transformer import (
    NucleotideTransformerOptions,
    build_nucleotide_transformer,
)
from tasks.dna.sequences import LabelledOptions, LabelledSplit
from tasks.dna.splice import build_splice
from tasks.dna.yeast_coding import build_yeast_coding

__all__ = ["LABELLED_DATA", "LabelledOptions", "LabelledSplit"]

LABELLED_DATA = {
    "splice": Choice(
        LabelledOptions(), build_splice, "2,000 / 1,186 splice junctions, inside the package"
    ),
    "yeast_coding": Choice(
        LabelledOptions(),
        build_yeast_coding,
        "9,522 / 2,312 coding or intergenic windows of yeast, inside the package",
    ),
    "genomic_benchmarks": Choice(
        GenomicBenchmarksOptions(),
        build_genomic_benchmarks,
        "data.task of GenomicBenchmarks, folders of .txt files below data.root",
    ),
    "nucleotide_transformer": Choice(
        NucleotideTransformerOptions(),
        build_nucleotide_transformer,
        "data.task of the Nucleotide Transformer's, FASTA files below data.root",
    ),
}
