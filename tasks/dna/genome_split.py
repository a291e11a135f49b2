"""Windows of a genome in a FASTA and a BED file: what `data=genome` and `data=yeast` give.

Windows lie side by side inside the intervals of their split. In training they may be moved by up to
`shift` bases and are read from either strand by the toss of a coin; both are functions of (seed,
epoch, window), so that a resumed run and another number of workers see the same bases.

Shapes: B windows of a batch, L positions, N windows, R regions.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from suite.cache import cache_folder, keep, recall
from suite.data import SKIP_LIMIT, DataInfo, DataOptions, Splits, check_skip_limit
from suite.errors import ConfigError, DataError, shown
from suite.randomness import uniform
from tasks.dna.fasta import Fasta, LetterError
from tasks.dna.intervals import SPLITS, read_bed
from tasks.dna.novel import K, known_kmers, novel_windows
from tasks.dna.tokens import PAD, N, reverse_complement
from tasks.dna.windows import Layout, lay_out

MOST_WARNINGS = 20  # of a loader's worker
SMALL = 64_000_000  # bases; above it the k-mers of all sequences take too much memory


@dataclass(frozen=True)
class WindowOptions(DataOptions):
    """Settings of the windows of any genome.

    length: bases of a window. shift: by how many bases a training window may move, inside its
    interval. rc_augment: read each training window from either strand. extend: where an interval
    is shorter than a window, let the window grow around it. novel: find the val and test windows
    that have no base in a 24-mer of what was trained on; auto: where all sequences are at most
    64 Mb. on_error: what a window does that holds a letter which is no base: end the run, or count
    for nothing. skip_limit: the largest share of a split that may. cache: folder for indices and
    the like; None: the user's cache folder; "none": keep nothing.
    """

    length: int = 1024
    shift: int = 0
    rc_augment: bool = True
    extend: bool = False
    novel: Literal["auto", "on", "off"] = "auto"
    on_error: Literal["fail", "skip"] = "fail"
    skip_limit: float = SKIP_LIMIT
    cache: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 8:
            raise ValueError(f"length must be at least 8, got {self.length}")
        if self.shift < 0:
            raise ValueError(f"shift must not be negative, got {self.shift}")
        check_skip_limit(self.skip_limit)


class GenomeSplit:
    """The windows of a split; `fetch` reads them.

    windows: int64 [N, 3], (index into `chroms`, start, end), where they lie when not moved.
    length: L of every batch. novel: bool [N], or None where it is not known. cache: the option.
    skips: whether windows may turn out to hold what is no base (on_error=skip of `fasta`);
    skip_limit: how many.
    """

    def __init__(
        self,
        fasta: Fasta,
        layout: Layout,
        *,
        length: int,
        seed: int,
        shift: int = 0,
        rc_augment: bool = False,
        novel: np.ndarray | None = None,
        cache: str | None = None,
        skip_limit: float = SKIP_LIMIT,
    ) -> None:
        self.skips, self.skip_limit = fasta.on_error == "skip", skip_limit
        self.named: set[str] = set()  # what this process has warned of
        self.fasta, self.layout, self.length, self.seed = fasta, layout, length, seed
        self.shift, self.rc_augment, self.novel, self.cache = shift, rc_augment, novel, cache
        self.chroms = tuple(fasta.lengths)
        number = {chrom: i for i, chrom in enumerate(self.chroms)}
        regions = [(number[chrom], start) for chrom, start, _ in layout.regions]
        region_N2 = np.array(regions, np.int64).reshape(-1, 2)[layout.places[:, 0]]
        self.windows = np.column_stack([region_N2[:, 0], layout.places[:, 1:] + region_N2[:, 1:]])

    def __len__(self) -> int:
        return len(self.windows)

    def fetch(self, indices: list[int], *, epoch: int, train: bool) -> dict[str, Tensor]:
        """ids [B, L], padded at the end; novel [B] in evaluation.

        With on_error=skip also "valid" [B] bool; a row that is not is all N. Raises DataError.
        """
        where = np.asarray(indices, np.int64)
        rows = self.windows[where]
        other = np.zeros(len(rows), bool)
        if train and (self.shift or self.rc_augment):
            draws = uniform(
                self.seed, "window", epoch, ids=torch.from_numpy(where), draws=2
            ).numpy()
            rows = rows + self._moves(where, draws[:, :1]) * [0, 1, 1]
            other = (draws[:, 1] < 0.5) & self.rc_augment
        ids_BL = np.full((len(rows), self.length), PAD, np.int64)
        valid = np.ones(len(rows), bool)
        for i, (chrom, start, end) in enumerate(rows.tolist()):
            try:
                ids = self.fasta.fetch(self.chroms[chrom], start, end)
            except LetterError as error:
                if not self.skips:
                    raise
                self.warn(error)
                ids, valid[i] = np.full(end - start, N), False
            ids_BL[i, : len(ids)] = reverse_complement(ids) if other[i] else ids
        batch = {"ids": torch.from_numpy(ids_BL)}
        if self.novel is not None and not train:
            batch["novel"] = torch.from_numpy(self.novel[where])
        return {**batch, "valid": torch.from_numpy(valid)} if self.skips else batch

    def path_of(self, index: int) -> str:
        """Where a window lies when it is not moved."""
        chrom, start, end = self.windows[index].tolist()
        return f"{self.fasta.file}: {self.chroms[chrom]}:{start:,}-{end:,}"

    def warn(self, error: LetterError) -> None:
        """Say where what is skipped lies, once in this process, and not without end."""
        known, text = len(self.named), str(error)
        if text in self.named or known > MOST_WARNINGS:
            return
        self.named.add(text)
        text = f"{text}; skipped" if known < MOST_WARNINGS else "further places are not named"
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def _moves(self, where: np.ndarray, draw_B1: np.ndarray) -> np.ndarray:
        """By how much each window moves, int64 [B, 1]: alike likely wherever it has room."""
        room = np.clip(self.layout.room[where], -self.shift, self.shift)
        low, high = room[:, :1], room[:, 1:]
        return low + np.floor(draw_B1 * (high - low + 1)).astype(np.int64)

    @property
    def bases(self) -> int:
        """How many bases `sequences` has."""
        return sum(end - start for _, start, end in self.layout.regions)

    def sequences(self) -> list[np.ndarray]:
        """The ids of each region that holds windows, uint8; with on_error=skip N for what is no
        base. Raises DataError.
        """
        read = self.fasta.masked if self.skips else self.fasta.fetch
        return [read(*region) for region in self.layout.regions]

    def window_places(self) -> np.ndarray:
        """int64 [N, 3]: (index into sequences(), start, end) of each window."""
        return self.layout.places


# --- building -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class About:
    """What DataInfo says of a genome."""

    name: str
    license: str
    source: str


def split_genome(
    fasta: Path,
    bed: Path,
    *,
    about: About,
    options: WindowOptions,
    seed: int,
    notes: Sequence[str] = (),
) -> Splits:
    """The splits of a genome in files. Raises ConfigError for files that cannot be used."""
    reader = Fasta(fasta, name=about.name, cache=options.cache, on_error=options.on_error)
    intervals = read_bed(bed, lengths=reader.lengths, name=about.name)
    layouts = lay_out(
        intervals, lengths=reader.lengths, length=options.length, extend=options.extend
    )
    for split, word in (("train", "train"), ("val", "valid")):
        if not len(layouts[split].places):
            raise ConfigError(
                f"data={about.name}: {shown(bed)} has no intervals of the split {word!r}; "
                "training needs train and valid in column 4 (test may be left out)"
            )
    said = [*notes, *layout_notes(layouts, options)]
    if not len(layouts["test"].places):
        layouts["test"] = layouts["val"]
        said.append("the validation is the test too: the BED file has no test intervals")
    digest = hashlib.sha256(f"{file_sha256(fasta, options.cache)} {sha256_of(bed)}".encode())
    longest = max(int(np.diff(each.places[:, 1:]).max()) for each in layouts.values())
    splits = {
        name: GenomeSplit(
            reader,
            layouts[name],
            length=longest,
            seed=seed,
            shift=options.shift if name == "train" else 0,
            rc_augment=options.rc_augment and name == "train",
            cache=options.cache,
            skip_limit=options.skip_limit,
        )
        for name in SPLITS
    }
    said += add_novel(splits, options, digest=digest.hexdigest(), name=about.name)
    info = DataInfo(
        name=about.name,
        license=about.license,
        source=about.source,
        sha256=digest.hexdigest(),
        synthetic=False,
        sizes={name: len(split) for name, split in splits.items()},
        extra={
            "length": longest,
            "padded": any((np.diff(s.windows[:, 1:]) < longest).any() for s in splits.values()),
            "strand_specific": False,
            "notes": said,
        },
    )
    return Splits(splits["train"], splits["val"], splits["test"], info)


def layout_notes(layouts: dict[str, Layout], options: WindowOptions) -> list[str]:
    """What of the intervals is in no window, and which windows are not whole."""
    notes = []
    for split, layout in layouts.items():
        if layout.left_out:
            notes.append(
                f"{split}: {layout.left_out:,} of {layout.bases:,} bases are left out, the ends of "
                f"intervals that are too short for a window of {options.length:,}"
            )
        if layout.short:
            notes.append(
                f"{split}: {layout.short:,} of {len(layout.places):,} windows are shorter than "
                f"data.length={options.length:,} and are padded"
            )
    return notes


def add_novel(
    splits: dict[str, GenomeSplit], options: WindowOptions, *, digest: str, name: str
) -> list[str]:
    """Give val and test their `novel`; notes. Raises ConfigError for a letter that is no base."""
    regions = {region for split in splits.values() for region in split.layout.regions}
    total = sum(end - start for _, start, end in regions)
    if options.novel == "off":
        return []
    if options.novel == "auto" and total > SMALL:
        return [
            f"windows that repeat training sequence are not told apart: {total:,} bases are more "
            f"than {SMALL:,} (data.novel=on looks for them all the same)"
        ]
    folder = cache_folder(options.cache, kind="novel")
    key = hashlib.sha256(f"2 {K} {options.length} {options.extend} {digest}".encode()).hexdigest()
    file = None if folder is None else folder / f"{key[:32]}.npz"
    found = recall_novel(file, splits)
    if found is None:
        try:
            found = find_novel(splits)
        except DataError as error:
            raise ConfigError(str(error)) from None
        if file is not None:
            keep(file, {}, found)
    notes = []
    for split in ("val", "test"):
        splits[split].novel = found[split]
        notes.append(
            f"{split}: {int(found[split].sum()):,} of {len(found[split]):,} windows have no "
            f"base in a {K}-mer of {'train' if split == 'val' else 'train and val'}"
        )
    return notes


def recall_novel(file: Path | None, splits: dict[str, GenomeSplit]) -> dict[str, np.ndarray] | None:
    """What an earlier start found, or None."""
    if file is None:
        return None
    try:
        _, found = recall(file)
        sound = all(
            found[split].dtype == bool and found[split].shape == (len(splits[split]),)
            for split in ("val", "test")
        )
    except Exception:  # of a damaged file: see recall
        return None
    return found if sound else None


def find_novel(splits: dict[str, GenomeSplit]) -> dict[str, np.ndarray]:
    """Which windows of val share no k-mer with train, and which of test none with either."""
    found = {}
    train, val = splits["train"].sequences(), splits["val"].sequences()
    known = known_kmers(train)
    found["val"] = novel_windows(val, splits["val"].window_places(), known)
    if splits["test"].layout is splits["val"].layout:
        return found | {"test": found["val"]}
    known = known_kmers([*train, *val])
    found["test"] = novel_windows(splits["test"].sequences(), splits["test"].window_places(), known)
    return found


def file_sha256(file: Path, cache: str | None) -> str:
    """Of a file's bytes; of a large one that did not change since, as it was kept."""
    stat = file.stat()
    folder = cache_folder(cache, kind="fasta")
    if stat.st_size <= SMALL or folder is None:
        return sha256_of(file)
    key = f"{file.absolute()} {stat.st_size} {stat.st_mtime_ns}"
    kept = folder / f"{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.npz"
    try:
        return str(recall(kept)[0]["sha256"])
    except Exception:  # there is none, or a damaged one: see recall
        digest = sha256_of(file)
        keep(kept, {"sha256": digest}, {})
        return digest


def sha256_of(file: Path) -> str:
    """Of a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()
