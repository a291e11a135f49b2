"""GenomicBenchmarks (Gresova et al., 2023, doi:10.1186/s12863-023-01123-8) as its loader writes it.

    data.root/<dataset>/{train,test}/<class>/<id>.txt        one sequence a file

Any folder of this form will do. Labels go by the sorted names of the classes; the loaders of
HyenaDNA and Caduceus number them in the order in which the file system lists the folders, which may
swap the labels of the test set.

The largest set has 289,061 files, which take minutes to open on a network disk. They are read once,
several at a time, and kept as one array in the user's cache, which is used only while every file
has the name, size and modification time that it had.

Shapes: N files.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from suite.cache import cache_folder, keep, recall, say_once
from suite.data import Splits
from suite.errors import ConfigError, shown
from tasks.dna.sequences import FileOptions, Sequences
from tasks.dna.sets import About, make_splits
from tasks.dna.tokens import encode

NAME = "genomic_benchmarks"
DOI = "doi:10.1186/s12863-023-01123-8"
PARTS = ("train", "test")
SIZES = {  # of train and test, as published
    "dummy_mouse_enhancers_ensembl": (968, 242),
    "demo_coding_vs_intergenomic_seqs": (75_000, 25_000),
    "demo_human_or_worm": (75_000, 25_000),
    "human_enhancers_cohn": (20_843, 6_948),
    "human_enhancers_ensembl": (123_872, 30_970),
    "human_ensembl_regulatory": (231_348, 57_713),
    "human_ocr_ensembl": (139_804, 34_952),
    "human_nontata_promoters": (27_097, 9_034),
}
VERSION = 1
KEPT_FROM = 2_000  # files: fewer are read in less time than it takes to find a cache
SETTLED_NS = 2_000_000_000  # a file may change again within one tick of the file system's clock
TALK_S = 2.0  # between two lines of progress
THREADS = 16  # opening files is waiting, on a network disk above all
CHUNK = 512


@dataclass(frozen=True)
class GenomicBenchmarksOptions(FileOptions):
    """Settings of GenomicBenchmarks.

    root: the folder that holds the data sets' folders, or the folder of one.
    task: which of them.
    cache: folder to keep what was read in; None: the user's cache folder; "none": nowhere.
    """

    root: str | None = None
    task: str | None = None
    cache: str | None = None


@dataclass(frozen=True)
class ClassFiles:
    """The .txt files of one class, in order: folder, names, sizes and modification times."""

    part: str
    label: int
    folder: Path
    names: list[str]
    stamps: list[tuple[int, int]]


def build_genomic_benchmarks(options: GenomicBenchmarksOptions, *, seed: int) -> Splits:
    """The splits of one of the sets.

    Raises ConfigError for folders that are not of this form and for files that hold no sequence.
    """
    folder = find(options)
    classes = find_classes(folder)
    listing = [
        list_class(folder, part, label=label, name=class_)
        for part in PARTS
        for label, class_ in enumerate(classes)
    ]
    parts, left_out = load(folder, listing, options=options)
    published = SIZES.get(folder.name)
    about = About(
        NAME,
        license="Apache-2.0 (GenomicBenchmarks)" if published is not None else "unknown",
        source=f"GenomicBenchmarks, {DOI}" if published is not None else shown(folder),
        classes=classes,
        strand_specific=False,
        task=folder.name,
        extra={"published_metric": "accuracy"},
    )
    found = tuple(len(parts[part]) + len(left_out[part]) for part in PARTS)
    notes = []
    if published is not None and found != published:
        notes.append(
            f"{folder.name} has {found[0]:,} / {found[1]:,} sequences, "
            f"the published set {published[0]:,} / {published[1]:,}"
        )
    return make_splits(
        parts["train"],
        parts["test"],
        about=about,
        options=options,
        seed=seed,
        notes=notes,
        left_out=left_out,
    )


# --- folders --------------------------------------------------------------------------------------


def find(options: GenomicBenchmarksOptions) -> Path:
    """The folder of the set. Raises ConfigError that names the nearest one."""
    if options.root is None:
        raise ConfigError(
            f"data={NAME} needs data.root=FOLDER, the one that holds <dataset>/train/<class>/*.txt"
        )
    root = Path(options.root).expanduser().absolute()
    if not root.is_dir():
        raise ConfigError(f"data.root={shown(options.root)}: there is no such folder")
    if any((root / part).is_dir() for part in PARTS):
        if options.task not in (None, root.name):
            raise ConfigError(
                f"data.task={options.task}: data.root={shown(options.root)} is the folder of one "
                f"set, {root.name!r}; leave data.task out, or name the folder above in data.root"
            )
        return root
    names = sorted(
        entry.name
        for entry in folders_in(root)
        if any((Path(entry.path) / part).is_dir() for part in PARTS)
    )
    if options.task in names:
        return root / options.task
    here = f"data.root={shown(options.root)} has {', '.join(map(shown, names)) or 'none'}"
    if options.task is None:
        raise ConfigError(f"data={NAME} needs data.task=NAME, one of its sets; {here}")
    near = get_close_matches(options.task, [*names, *SIZES], n=1, cutoff=0.5)
    hint = f" Did you mean data.task={near[0]}?" if near and near[0] != options.task else ""
    raise ConfigError(f"data.task={options.task}: no such set.{hint} {here}")


def folders_in(folder: Path) -> list[os.DirEntry[str]]:
    """The folders in a folder, without hidden ones. Raises ConfigError."""
    return [entry for entry in entries_of(folder) if entry.is_dir()]


def entries_of(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder, without what is hidden. Raises ConfigError."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise ConfigError(
            f"data={NAME}: {shown(folder)} cannot be read ({error.strerror})"
        ) from None


def find_classes(folder: Path) -> list[str]:
    """The names of the classes, sorted. Raises ConfigError unless train and test have the same."""
    found: dict[str, list[str]] = {}
    for part in PARTS:
        if not (folder / part).is_dir():
            raise ConfigError(
                f"data={NAME}: {shown(folder)} has no folder {part}; it needs train and test, "
                "with a folder for each class in both"
            )
        found[part] = sorted(entry.name for entry in folders_in(folder / part))
        if not found[part]:
            tables = [e.name for e in entries_of(folder / part) if ".csv" in e.name]
            raise ConfigError(no_classes(folder / part, interval_form=bool(tables)))
    for part, other in (PARTS, PARTS[::-1]):
        if more := sorted(set(found[part]) - set(found[other])):
            raise ConfigError(
                f"data={NAME}: {shown(folder / part)} has the class {more[0]!r}, which {other} "
                f"has not ({', '.join(map(shown, found[other]))}); both must have the same classes"
            )
    return found["train"]


def no_classes(folder: Path, *, interval_form: bool) -> str:
    """What to do about a folder without class folders."""
    if interval_form:
        return (
            f"data={NAME}: {shown(folder)} holds intervals (.csv.gz) and no sequences; "
            "genomic_benchmarks.loc2seq.download_dataset(NAME) writes the folders of sequences: "
            "name theirs in data.root"
        )
    return (
        f"data={NAME}: {shown(folder)} has no class folders; it needs one for each class, "
        "with a .txt file for each sequence"
    )


def list_class(folder: Path, part: str, *, label: int, name: str) -> ClassFiles:
    """The files of one class, shorter names first: by number where names are numbers."""
    where = folder / part / name
    files = [entry for entry in entries_of(where) if entry.name.endswith(".txt")]
    if not files:
        raise ConfigError(
            f"data={NAME}: the class {shown(where)} is empty; it needs a .txt file for each "
            "sequence, or to be removed from train and test"
        )
    files.sort(key=lambda entry: (len(entry.name), entry.name))
    names = [entry.name for entry in files]
    return ClassFiles(part, label, where, names, [stamp(entry) for entry in files])


def stamp(entry: os.DirEntry[str]) -> tuple[int, int]:
    """A file's size and modification time; zeros of one that cannot be opened either."""
    try:
        found = entry.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def unreadable(path: str, error: OSError) -> ConfigError:
    """What is said of a file that cannot be opened."""
    return ConfigError(f"data={NAME}: {shown(path)} cannot be read ({error.strerror})")


# --- reading --------------------------------------------------------------------------------------


def load(
    folder: Path, listing: Sequence[ClassFiles], *, options: GenomicBenchmarksOptions
) -> tuple[dict[str, Sequences], dict[str, list[str]]]:
    """The sequences of train and test, and the files that hold none.

    They come from the cache if it still holds, else they are read and put there.
    """
    cache = cache_folder(options.cache, kind="dna-sequences")
    many = sum(len(each.names) for each in listing) >= KEPT_FROM
    digest = listing_digest(listing)
    path = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in folder.name)
    file = cache / f"{safe[-60:]}-{path}.npz" if cache is not None and many else None
    arrays = read_cache(file, digest) if file is not None else None
    if arrays is None:
        arrays = read_all(folder, listing)
        newest = max(stamp[1] for each in listing for stamp in each.stamps)
        if file is not None and newest < time.time_ns() - SETTLED_NS:
            meta = {"version": VERSION, "listing": digest}
            if reason := keep(file, meta, arrays):
                say_once(
                    f"note: the sequences of {shown(folder)} cannot be kept in "
                    f"{shown(file.parent)} ({reason}); each start reads every file. "
                    "data.cache=FOLDER names another"
                )
    labels = np.repeat([each.label for each in listing], [len(each.names) for each in listing])
    whole = Sequences.joined(arrays["ids"], arrays["lengths"], labels)
    count = sum(len(each.names) for each in listing if each.part == "train")
    paths = paths_of(listing)
    parts, left_out = {}, {}
    for part, first, last in (("train", 0, count), ("test", count, len(whole))):
        places = np.arange(first, last)
        faulty = places[whole.lengths[places] == 0]
        left_out[part] = [paths[i] for i in faulty]
        options.check_faults([why_not(path) for path in left_out[part]], of=len(places), what=part)
        parts[part] = whole.take(np.setdiff1d(places, faulty))
    return parts, left_out


def listing_digest(listing: Sequence[ClassFiles]) -> str:
    """Of the name, size and modification time of every file."""
    digest = hashlib.sha256()
    for each in listing:
        names = "\0".join([each.part, each.folder.name, *each.names])
        digest.update(names.encode("utf-8", "surrogateescape") + b"\0\0")
        digest.update(np.array(each.stamps, np.int64).tobytes())
    return digest.hexdigest()


def read_cache(file: Path, digest: str) -> dict[str, np.ndarray] | None:
    """What was kept, if it is of the very same files; a damaged file counts as none."""
    try:
        meta, arrays = recall(file)
        if meta["version"] != VERSION or meta["listing"] != digest:
            return None
        if int(arrays["lengths"].sum()) != len(arrays["ids"]):
            raise ValueError("arrays of different lengths")
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever a damaged archive makes of zipfile, NumPy and json
        reason = " ".join(str(error).split()) or type(error).__name__
        say_once(f"note: {shown(file)} is damaged ({reason}); the sequences are read again")
        return None
    return arrays


def read_all(folder: Path, listing: Sequence[ClassFiles]) -> dict[str, np.ndarray]:
    """Read every file: all bases in one array, and the length of each, 0 of a faulty one."""
    paths = paths_of(listing)
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    ids: list[np.ndarray] = []
    lengths: list[int] = []
    last = time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        for found, sizes in pool.map(read_chunk, chunks):
            ids.append(found)
            lengths += sizes
            if time.monotonic() - last > TALK_S:
                what = f"data={NAME}: reading {shown(folder)}"
                say_once(f"{what}: {len(lengths):,} of {len(paths):,} files")
                last = time.monotonic()
    return {"ids": np.concatenate(ids), "lengths": np.array(lengths, np.int64)}


def paths_of(listing: Sequence[ClassFiles]) -> list[str]:
    """The files in the order in which they are read."""
    return [os.path.join(each.folder, name) for each in listing for name in each.names]  # noqa: PTH118


def read_chunk(paths: Sequence[str]) -> tuple[np.ndarray, list[int]]:
    """The bases of some files and how many each has, none of a faulty one."""
    found = []
    for path in paths:
        try:
            found.append(read_one(path))
        except ConfigError:
            found.append(np.empty(0, np.uint8))
    return np.concatenate(found), [len(ids) for ids in found]


def read_one(path: str) -> np.ndarray:
    """The bases of a file. Raises ConfigError that names it."""
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            text = b"".join(file.read().split())
    except OSError as error:
        raise unreadable(path, error) from None
    if not text:
        raise ConfigError(f"data={NAME}: {shown(path)} is empty; remove it or get it again")
    try:
        return encode(text)
    except ValueError as error:
        raise ConfigError(f"data={NAME}: {shown(path)}: {error}") from None


def why_not(path: str) -> str:
    """What is wrong with a file that could not be read."""
    try:
        read_one(path)
    except ConfigError as error:
        return str(error)
    return f"data={NAME}: {shown(path)} has changed while it was read; start again"
