"""Genomes to pre-train on: `data=yeast`, inside the package, and `data=genome`, any in files.

task=dna/pretrain data=genome data.fasta=hg38.ml.fa data.bed=human-sequences.bed
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from suite.data import Splits
from suite.errors import ConfigError
from suite.registry import Choice
from tasks.dna.genome_split import About, GenomeSplit, WindowOptions, split_genome
from tasks.dna.intervals import LINE
from tasks.dna.yeast import YeastOptions, build_yeast

__all__ = ["GENOME_DATA", "GenomeOptions", "GenomeSplit", "build_genome"]

NAME = "genome"


@dataclass(frozen=True)
class GenomeOptions(WindowOptions):
    """Settings of a genome in files.

    fasta: the sequences, not compressed. bed: lines of chromosome, start, end and split.
    """

    fasta: str | None = None
    bed: str | None = None


def build_genome(options: GenomeOptions, *, seed: int) -> Splits:
    """The splits of a FASTA and a BED file. Raises ConfigError for files that cannot be used."""
    if options.fasta is None or options.bed is None:
        missing = "fasta" if options.fasta is None else "bed"
        raise ConfigError(
            f"data=genome: needs data.{missing}=FILE: data.fasta is the sequences, data.bed lines "
            f"of {LINE} (train, valid or test); data=yeast needs neither"
        )
    about = About(NAME, license="unknown", source=f"{options.fasta}, {options.bed}")
    fasta, bed = (Path(file).expanduser() for file in (options.fasta, options.bed))
    return split_genome(fasta, bed, about=about, options=options, seed=seed)


GENOME_DATA: dict[str, Choice] = {
    "yeast": Choice(
        YeastOptions(),
        build_yeast,
        "12.07 Mb, the nuclear genome of baker's yeast, inside the package",
    ),
    "genome": Choice(
        GenomeOptions(),
        build_genome,
        "any genome: data.fasta and data.bed (hg38 with Basenji's intervals)",
    ),
}
