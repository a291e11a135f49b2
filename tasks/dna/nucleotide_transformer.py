"""The Nucleotide Transformer's downstream tasks (doi:10.1101/2023.01.11.523679).

    data.root/<task>/{train,test}.fna                   as published by InstaDeep
    data.root/<task>/<task>_{train,test}.fasta          as HyenaDNA reads them, also
    data.root/<task>/all_{train,test}_<task>.fasta      (its enhancers)

with .fna, .fasta or .fa, or with the files in data.root itself. A header's last field after "|" is
the class, or its last character where it has no "|". Classes are numbered in order.

Shapes: N records.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from suite.data import Splits
from suite.errors import ConfigError, shown
from tasks.dna.sequences import FileOptions, Sequences
from tasks.dna.sets import About, make_splits
from tasks.dna.tokens import encode

NAME = "nucleotide_transformer"
PARTS = ("train", "test")
SUFFIXES = (".fna", ".fasta", ".fa")
TABLES = (".csv", ".parquet", ".tsv", ".json", ".jsonl")
LONGEST_CLASS = 60  # characters; more are a sequence, or a damaged file
MOST_CLASSES = 100  # more are names of records that were taken for classes
HISTONES = "H3 H3K14ac H3K36me3 H3K4me1 H3K4me2 H3K4me3 H3K79me3 H3K9ac H4 H4ac"
METRICS = {  # of each task, as published
    **dict.fromkeys(HISTONES.split(), "mcc"),
    **dict.fromkeys(("enhancer", "enhancer_types", "enhancers", "enhancers_types"), "mcc"),
    **dict.fromkeys(("promoter_all", "promoter_tata", "promoter_no_tata"), "f1"),
    "promoter_non_tata": "f1",
    **dict.fromkeys(("splice_sites_acceptor", "splice_sites_donor"), "f1"),
    **dict.fromkeys(("splice_sites_acceptors", "splice_sites_donors"), "f1"),
    "splice_sites_all": "accuracy",
}


@dataclass(frozen=True)
class NucleotideTransformerOptions(FileOptions):
    """Settings of the Nucleotide Transformer's tasks.

    root: the folder that holds the tasks' folders or files.
    task: which of them.
    """

    root: str | None = None
    task: str | None = None


@dataclass(frozen=True)
class Record:
    """One sequence of a FASTA file: the line of its header, its class, its lines."""

    number: int
    label: str
    lines: list[bytes]


def build_nucleotide_transformer(options: NucleotideTransformerOptions, *, seed: int) -> Splits:
    """The splits of one task. Splice sites are taken to depend on the strand.

    Raises ConfigError for files that are missing or are not such FASTA files.
    """
    files = find(options)
    task = str(options.task)
    records = {part: read(file) for part, file in files.items()}
    classes = find_classes(records, files)
    parts, left_out = {}, {}
    for part, found in records.items():
        usable, left_out[part] = read_usable(found, files[part], part=part, options=options)
        labels = [classes.index(record.label) for record, _ in usable]
        parts[part] = Sequences.listed([ids for _, ids in usable], labels)
    metric = METRICS.get(task)
    about = About(
        NAME,
        license="as published by InstaDeep" if metric is not None else "unknown",
        source="Nucleotide Transformer, doi:10.1101/2023.01.11.523679"
        if metric is not None
        else shown(files["train"]),
        classes=classes,
        strand_specific=task.startswith("splice"),
        task=task,
        extra={} if metric is None else {"published_metric": metric},
    )
    return make_splits(
        parts["train"], parts["test"], about=about, options=options, seed=seed, left_out=left_out
    )


# --- files ----------------------------------------------------------------------------------------


def find(options: NucleotideTransformerOptions) -> dict[str, Path]:
    """The files of train and test. Raises ConfigError that names the nearest task."""
    if options.root is None or options.task is None:
        missing = "data.root=FOLDER" if options.root is None else "data.task=NAME"
        raise ConfigError(
            f"data={NAME} needs {missing}; it reads data.root/<task>/train.fna and test.fna"
        )
    root = Path(options.root).expanduser().absolute()
    if not root.is_dir():
        raise ConfigError(f"data.root={shown(options.root)}: there is no such folder")
    task = options.task
    if not task or task in (".", "..") or Path(task).name != task:
        raise ConfigError(f"data.task={task}: a name is expected, one of {', '.join(METRICS)}")
    files = {part: find_part(root, task, part) for part in PARTS}
    found = {part: file for part, file in files.items() if file is not None}
    if len(found) == len(PARTS):
        return found
    for where in (root / task, root):
        for file in sorted(where.iterdir()) if where.is_dir() else []:
            if file.suffix in TABLES and (where != root or file.stem.startswith(task)):
                raise ConfigError(
                    f"data={NAME}: {shown(file)} is a table, and FASTA files are read; write each "
                    f"row as >name|label and its sequence to {task}/train.fna and {task}/test.fna"
                )
    raise ConfigError(nothing_found(root, task, have=list(found)))


def nothing_found(root: Path, task: str, *, have: Sequence[str]) -> str:
    """What is said where files are missing."""
    if have:
        missing = next(part for part in PARTS if part not in have)
        return (
            f"data.task={task}: {shown(root)} has {have[0]} and no {missing} for it; "
            f"it needs {task}/{missing}.fna or {task}_{missing}.fasta"
        )
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    near = get_close_matches(task, [*folders, *METRICS], n=1, cutoff=0.5)
    hint = f" Did you mean data.task={near[0]}?" if near and near[0] != task else ""
    return (
        f"data.task={task}: {shown(root)} has no {task}/train.fna and test.fna "
        f"(or {task}_train.fasta).{hint}"
    )


def find_part(root: Path, task: str, part: str) -> Path | None:
    """The file of one part, whatever it is called."""
    inside = [f"{task}/{part}", f"{task}/{task}_{part}", f"{task}/all_{part}_{task}"]
    outside = [f"{task}_{part}", *([part] if root.name == task else [])]
    for stem in (*inside, *outside):
        for suffix in SUFFIXES:
            if (file := root / f"{stem}{suffix}").is_file():
                return file
    return None


# --- records --------------------------------------------------------------------------------------


def read(file: Path) -> list[Record]:
    """The records of a FASTA file. Raises ConfigError."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"data={NAME}: {shown(file)} cannot be read ({error.strerror})") from None
    records = list(parse(lines, file))
    if not records:
        raise ConfigError(f"data={NAME}: {shown(file)} is empty; it needs >name|label and bases")
    return records


def parse(lines: Sequence[bytes], file: Path) -> Iterator[Record]:
    """Headers with the lines below them. Raises ConfigError."""
    record: Record | None = None
    for number, line in enumerate(lines, 1):
        if line.startswith(b">"):
            if record is not None:
                yield record
            header = line[1:].decode("utf-8", "backslashreplace").strip()
            label = header.rpartition("|")[2].strip() if "|" in header else header[-1:]
            if not label:
                raise ConfigError(
                    f"data={NAME}: {shown(file)} line {number}: the header has no class; "
                    ">name|label is expected"
                )
            if len(label) > LONGEST_CLASS or not label.isprintable():
                raise ConfigError(
                    f"data={NAME}: {shown(file)} line {number}: the class "
                    f"{label[:LONGEST_CLASS]!a} is no name; >name|label is expected"
                )
            record = Record(number, label, [])
        elif record is not None:
            record.lines.append(line.strip())
        elif line.strip():
            raise ConfigError(
                f"data={NAME}: {shown(file)} line {number} is not a FASTA header; "
                ">name|label is expected"
            )
    if record is not None:
        yield record


def read_usable(
    records: Sequence[Record], file: Path, *, part: str, options: FileOptions
) -> tuple[list[tuple[Record, np.ndarray]], list[str]]:
    """The records with their bases, and where those are that have none. Raises ConfigError."""
    usable, left_out, faults = [], [], []
    for record in records:
        try:
            usable.append((record, encoded(record, file)))
        except ConfigError as error:
            faults.append(str(error))
            left_out.append(f"{file} line {record.number}")
    options.check_faults(faults, of=len(records), what=part)
    return usable, left_out


def encoded(record: Record, file: Path) -> np.ndarray:
    """The bases of a record. Raises ConfigError with the line and the position in it."""
    bases = b"".join(record.lines)
    if not bases:
        raise ConfigError(
            f"data={NAME}: {shown(file)} line {record.number}: the sequence is empty; remove it"
        )
    try:
        return encode(bases)
    except ValueError:
        for number, line in enumerate(record.lines, record.number + 1):
            try:
                encode(line)
            except ValueError as error:
                raise ConfigError(f"data={NAME}: {shown(file)} line {number}: {error}") from None
        raise


def find_classes(records: dict[str, list[Record]], files: dict[str, Path]) -> list[str]:
    """The classes, numbers by value. Raises ConfigError unless train and test have the same."""
    found = {part: {record.label for record in each} for part, each in records.items()}
    for part, other in (PARTS, PARTS[::-1]):
        if len(found[part]) > MOST_CLASSES:
            raise ConfigError(
                f"data={NAME}: {shown(files[part])} has {len(found[part]):,} classes; the last "
                "field of each header has to be the class: >name|label"
            )
        if more := sorted(found[part] - found[other]):
            raise ConfigError(
                f"data={NAME}: {shown(files[part])} has the class {more[0]!r}, which {other} has "
                "not; both must have the same classes"
            )
    return sorted(found["train"], key=lambda label: (label.isdecimal(), len(label), label))
