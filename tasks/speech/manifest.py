"""Lists of files as data: `data=manifest`.

Two kinds of list are read. A table, .tsv or .csv, with a header line: the column `path` and, for
CTC, one of `transcript`, `text` and `sentence` (Common Voice); other columns are passed over. Or
fairseq's .tsv: the first line is a folder, each other a path below it and the number of samples;
the transcripts are the lines of the .ltr (letters) or .wrd (words) file beside it.

Quotation marks are text in a .tsv, where a transcript may hold one, and quote in a .csv.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from suite.data import Splits
from suite.errors import ConfigError, shown
from tasks.speech.clips import Clips
from tasks.speech.sets import About, Listing, Part, by_hash, file_clips, make_splits
from tasks.speech.split import AudioOptions

NAME = "manifest"
TEXT_COLUMNS = ("transcript", "text", "sentence")


@dataclass(frozen=True)
class ManifestOptions(AudioOptions):
    """Settings of lists of files.

    train, val, test: the lists. Without val, val_fraction of train is the validation, by a hash of
    the paths; without test, the validation is the test too; without train, weights can be
    evaluated, not trained.
    """

    train: str | None = None
    val: str | None = None
    test: str | None = None
    val_fraction: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be above 0 and below 1, got {self.val_fraction}")


def build_manifest(options: ManifestOptions, *, seed: int, words: bool) -> Splits:
    """The splits that the lists say. Raises ConfigError for a list that cannot be used."""
    given = {split: getattr(options, split) for split in ("train", "val", "test")}
    listings = {
        split: read_manifest(Path(file).expanduser(), words=words)
        for split, file in given.items()
        if file is not None
    }
    if "train" not in listings and "val" not in listings:
        raise ConfigError(
            "data=manifest: needs data.train=FILE, a .tsv or .csv with the columns path and "
            "transcript, or fairseq's .tsv; to evaluate alone, data.val=FILE"
        )
    clips = {
        split: file_clips(listing, name=NAME, options=options, words=words)
        for split, listing in listings.items()
    }
    parts, notes = divide({k: Part.whole(c) for k, c in clips.items()}, options)
    sources = ", ".join(str(Path(file).expanduser()) for file in given.values() if file is not None)
    return make_splits(
        parts,
        about=About(NAME, license="unknown", source=sources),
        options=options,
        seed=seed,
        words=words,
        notes=[*notes, *shared_files(listings)],
    )


def divide(given: dict[str, Part], options: ManifestOptions) -> tuple[dict[str, Part], list[str]]:
    """The three parts of one, two or three lists, with notes for the user."""
    notes = []
    parts = dict(given)
    if "train" not in parts:
        parts["train"] = parts["val"].but(np.empty(0, np.int64))
        notes.append("there is no data.train: nothing to train on")
    elif "val" not in parts:
        train: Clips = parts["train"].clips
        left, taken = by_hash(train.names, options.val_fraction)
        if not len(left) or not len(taken):
            raise ConfigError(
                f"data=manifest: {shown(str(options.train))} has too few clips "
                f"({len(train.lengths):,}) for data.val_fraction={options.val_fraction:g}; a split "
                "would be empty: change it, or set data.val=FILE"
            )
        parts["train"], parts["val"] = parts["train"].but(left), parts["train"].but(taken)
        notes.append(
            f"{options.val_fraction:g} of {shown(str(options.train))} is the validation, by a hash "
            "of the paths"
        )
    if "test" not in parts:
        parts["test"] = parts["val"]
        notes.append("the validation is the test too: there is no data.test")
    return {split: parts[split] for split in ("train", "val", "test")}, notes


def shared_files(listings: dict[str, Listing]) -> list[str]:
    """A note where files of train are evaluated on too."""
    if "train" not in listings:
        return []
    train, notes = set(listings["train"].paths), []
    for split in ("val", "test"):
        both = train.intersection(listings[split].paths) if split in listings else ()
        if both:
            notes.append(
                f"{len(both):,} files of data.{split} are in data.train too: {split} is not unseen"
            )
    return notes


# --- reading a list -------------------------------------------------------------------------------


def read_manifest(file: Path, *, words: bool) -> Listing:
    """The files that a list names, in its order. words: with their transcripts.

    Raises ConfigError for a list that cannot be read, with the number of the line.
    """
    lines = read_lines(file)
    if not lines:
        raise wrong(file, "is empty; it needs a header line and a line for each clip")
    fairseq = file.suffix.lower() != ".csv" and "\t" not in lines[0] and lines[0] != "path"
    rows = (
        fairseq_rows(file, lines, words=words) if fairseq else table_rows(file, lines, words=words)
    )
    root = Path(lines[0]) if fairseq else file.parent
    if fairseq and not os.path.isdir(root):  # noqa: PTH112 (False for a name that is too long)
        raise wrong(
            file,
            f"line 1 must be the header (path, transcript) or, as fairseq has it, a folder, and "
            f"{shown(lines[0])[:200]} is none",
        )
    listing = collect(file, rows, root=os.path.abspath(root), words=words)  # noqa: PTH100
    if not listing.paths:
        raise wrong(file, "has no clips; add a line for each")
    return listing


def collect(file: Path, rows: Iterator[tuple[int, str, str]], *, root: str, words: bool) -> Listing:
    """The listing of (line, path, transcript) rows."""
    names, texts, wheres = [], [], []
    seen: dict[str, int] = {}  # path: the line that has it
    for number, name, transcript in rows:
        if not name:
            raise wrong(file, f"line {number} has no path")
        path = os.path.normpath(os.path.join(root, name))  # noqa: PTH118
        if path in seen:
            raise wrong(file, f"line {number} has the path of line {seen[path]}, {shown(name)}")
        if words and not transcript.strip():
            raise wrong(
                file, f"line {number} has no transcript for {shown(name)}; add it or the line out"
            )
        seen[path] = number
        names.append(name)
        texts.append(transcript)
        wheres.append(f"{file.name} line {number}")
    return Listing(file.stem, names, list(seen), texts if words else None, wheres)


def table_rows(file: Path, lines: Sequence[str], *, words: bool) -> Iterator[tuple[int, str, str]]:
    """(line, path, transcript) of a table with a header."""
    tabs = file.suffix.lower() != ".csv"
    reader = (
        csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        if tabs
        else csv.reader([line + "\n" for line in lines], strict=True)
    )
    kind = "tab" if tabs else "comma"
    try:
        header = [column.strip() for column in next(reader)]
        texts = [column for column in TEXT_COLUMNS if column in header]
        if "path" not in header or (words and not texts):
            needed = "path" if "path" not in header else f"any of {', '.join(TEXT_COLUMNS)}"
            raise wrong(
                file,
                f"line 1, the header, has no column {needed}; it has "
                f"{shown(', '.join(header))[:200]} ({kind}-separated)",
            )
        at, said = header.index("path"), header.index(texts[0]) if texts else None
        for row in reader:
            if not any(row):
                continue
            if len(row) != len(header):
                raise wrong(
                    file,
                    f"line {reader.line_num} has {len(row)} {kind}-separated columns, the header "
                    f"{len(header)}",
                )
            yield reader.line_num, row[at], row[said] if said is not None else ""
    except csv.Error as error:
        raise wrong(file, f"line {reader.line_num} is no CSV ({error}); check its quotes") from None


def fairseq_rows(
    file: Path, lines: Sequence[str], *, words: bool
) -> Iterator[tuple[int, str, str]]:
    """(line, path, transcript) of fairseq's .tsv and the .ltr or .wrd beside it."""
    beside = [file.with_suffix(suffix) for suffix in (".ltr", ".wrd")]
    found = next((path for path in beside if path.is_file()), None) if words else None
    if words and found is None:
        raise wrong(
            file,
            f"has a folder in line 1, as fairseq's lists do, but neither {beside[0].name} nor "
            f"{beside[1].name} with the transcripts lies beside it; CTC needs one",
        )
    texts = read_lines(found) if found is not None else [""] * (len(lines) - 1)
    if len(texts) != len(lines) - 1:
        raise wrong(
            file,
            f"has {len(lines) - 1:,} clips and {shown(str(found))} {len(texts):,} lines; they must "
            "be as many",
        )
    for i, (line, transcript) in enumerate(zip(lines[1:], texts, strict=True)):
        name, tab, samples = line.partition("\t")
        if not tab or not samples.strip().isdigit():
            raise wrong(file, f"line {i + 2} is not a path, a tab and the number of samples")
        if found is not None and found.suffix == ".ltr":
            transcript = "".join(transcript.split()).replace("|", " ")
        yield i + 2, name, transcript


def read_lines(file: Path) -> list[str]:
    """The lines of a text file, without empty ones at its end. Raises ConfigError."""
    try:
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise wrong(file, f"is not UTF-8 text (byte {error.start})") from None
    except IsADirectoryError:
        raise wrong(file, "is a folder; a .tsv or .csv file is needed") from None
    except OSError as error:
        raise wrong(file, f"cannot be read ({error.strerror})") from None
    # not splitlines: a transcript may hold a form feed or another separator of Unicode's
    lines = content.replace("\r\n", "\n").rstrip("\n").split("\n")
    return lines if lines != [""] else []


def wrong(file: Path, what: str) -> ConfigError:
    """An error about a list."""
    return ConfigError(f"data=manifest: {shown(str(file))} {what}")
