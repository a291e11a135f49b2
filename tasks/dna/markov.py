"""Markov and backoff models of a genome, exact, to stand beside a network's bits per base.

All orders of a genome from 0 to 5 lie within 0.02 bits, and order 12 with backoff copies repeats as
well as a network of some minutes, so "better than chance" says nothing. Each row is a model whose
probabilities follow from counts alone, scored on the very bases that the network is scored on:

- add-one, order k: p(x | k bases to the left) = (n + 1) / (N + 4), n and N counted in training.
- backoff up to k: p_k = (n + b_k p_(k-1)) / (N + b_k), p_0 from a uniform p_(-1); b_k is the power
  of 2 that suits the tuning sequences best, their own counts removed. It is added back after.
- both strands: a word is counted wherever it or its reverse complement occurs.
- two-sided, order k: p(x | k bases to the left, k to the right), add-one, both strands.

A position with fewer bases before it than the order (the first of a sequence, or after an N) takes
the highest order that fits. Contexts run across the borders of windows, as a network's do not.

Shapes: L positions, B windows, R rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from suite.cache import cache_folder, keep, recall, say_once
from tasks.dna.words import GAP, LONGEST, Counts, Piece, Words, joined, pieces, placed

VERSION = 1  # of what is kept in the cache
ADD_ONE, ADD_ONE_BOTH = "add-one", "add-one, both strands"
BACKOFF, BACKOFF_BOTH = "backoff", "backoff, both strands"
TWO_SIDED = "two-sided, both strands"
KINDS = (ADD_ONE, ADD_ONE_BOTH, BACKOFF, BACKOFF_BOTH, TWO_SIDED)
TUNE_BASES = 1 << 22  # of the tuning sequences, at most, that choose b_k
B_CHOICES = tuple(2.0**i for i in range(-2, 19))


@dataclass(frozen=True)
class Row:
    """A model's bits per base.

    kind: of KINDS. order: k. bits: the mean over the bases of all windows. bits_novel: over those
    of the novel windows, None where they are unknown or have no base. bits_B: of each window, NaN
    for one without a base.
    """

    kind: str
    order: int
    bits: float
    bits_novel: float | None
    bits_B: np.ndarray

    @property
    def name(self) -> str:
        return f"order {self.order} {self.kind}"


def causal_rows(
    train: Sequence[np.ndarray],
    tune: Sequence[np.ndarray],
    test: Sequence[np.ndarray],
    windows: np.ndarray,
    *,
    novel: np.ndarray | None = None,
    orders: int = LONGEST,
) -> list[Row]:
    """The rows of models that see the left context alone, of order 0 to orders - 1.

    train, tune, test: sequences of ids, uint8. All models count train and tune; without a base in
    tune there are no backoff rows. windows: int64 [B, 3], a sequence of test, start, end (not
    included). novel: bool [B]. Raises ValueError for windows outside the sequences.
    """
    check(orders, highest=LONGEST, windows=windows, test=test, novel=novel)
    counts = Counts(orders)
    counts.add(joined(train))
    tuning = joined(tune)
    strengths = tuned(counts, tuning) if (tuning < GAP).any() else None
    counts.add(tuning)
    text, places = joined(test), placed(test, windows)
    kinds = (ADD_ONE, ADD_ONE_BOTH, BACKOFF, BACKOFF_BOTH)[: 4 if strengths else 2]
    sums_RB = np.zeros((len(kinds) * orders, len(places)))
    for piece in pieces(text, lead=orders - 1):
        for i, bits_L in enumerate(causal_bits(counts, Words(piece.digits, orders), strengths)):
            sums_RB[i] += window_sums(bits_L, piece, places)
    named = [(kind, order) for order in range(orders) for kind in kinds]
    found = made(named, sums_RB, bases_of(text, places), novel)
    return sorted(found, key=lambda row: KINDS.index(row.kind))


def two_sided_rows(
    train: Sequence[np.ndarray],
    tune: Sequence[np.ndarray],
    test: Sequence[np.ndarray],
    windows: np.ndarray,
    *,
    novel: np.ndarray | None = None,
    orders: int = 6,
) -> list[Row]:
    """The rows for masked models: k bases to the left and to the right, k from 0 to orders - 1.

    Arguments as for `causal_rows`; train and tune are counted alike. Where k bases do not fit on
    both sides (at a sequence's end, beside an N), the widest that does is taken. Every base of the
    windows is scored and sees all its neighbours: a masked network misses 15 % of them, so the row
    is a little better than the same model would be on the network's own input.
    """
    check(orders, highest=(LONGEST + 1) // 2, windows=windows, test=test, novel=novel)
    counts = Counts(2 * orders - 1)
    counts.add(joined(train))
    counts.add(joined(tune))
    text, places = joined(test), placed(test, windows)
    sums_RB = np.zeros((orders, len(places)))
    for piece in pieces(text, lead=orders - 1, tail=orders - 1):
        for order, bits_L in enumerate(two_sided_bits(counts, piece.digits, orders)):
            sums_RB[order] += window_sums(bits_L, piece, places)
    named = [(TWO_SIDED, order) for order in range(orders)]
    return made(named, sums_RB, bases_of(text, places), novel)


def check(
    orders: int,
    *,
    highest: int,
    windows: np.ndarray,
    test: Sequence[np.ndarray],
    novel: np.ndarray | None,
) -> None:
    """Raises ValueError for arguments that do not fit each other."""
    if not 1 <= orders <= highest:
        raise ValueError(f"orders must be 1 to {highest}, got {orders}")
    if windows.ndim != 2 or windows.shape[1] != 3:
        raise ValueError(f"windows must be [B, 3], got {list(windows.shape)}")
    which, start, end = windows.T
    lengths = np.array([len(s) for s in test] + [0], np.int64)
    inside = (which >= 0) & (which < len(test))
    inside &= (start >= 0) & (start <= end) & (end <= lengths[np.where(inside, which, -1)])
    if not inside.all():
        bad = windows[np.flatnonzero(~inside)[0]].tolist()
        raise ValueError(f"windows must lie within the test sequences, got {bad}")
    if novel is not None and novel.shape != (len(windows),):
        raise ValueError(f"novel must be [{len(windows)}], got {list(novel.shape)}")


# --- models ---------------------------------------------------------------------------------------

Strengths = tuple[list[float], list[float]]  # b_k of each order: one strand, both


def backed_off(n: np.ndarray, total: np.ndarray, b: float, lower_L: np.ndarray) -> np.ndarray:
    return (n + b * lower_L) / (total + b)


def tuned(counts: Counts, text: np.ndarray) -> Strengths:
    """The b_k, order by order, under which the text takes the fewest bits."""
    words = Words(text[:TUNE_BASES], counts.longest)
    lower = [np.full(len(words.run_L), 0.25) for _ in range(2)]
    strengths: Strengths = ([], [])
    for order in range(counts.longest):
        fits_L = words.run_L > order
        for i, (n, total) in enumerate(counts.causal(words, order)):
            given = n[fits_L], total[fits_L]
            below = lower[i][fits_L]
            tries = [(bits_in(backed_off(*given, b, below)), b) for b in B_CHOICES]
            strengths[i].append(min(tries)[1] if len(below) else 1.0)
            lower[i][fits_L] = backed_off(*given, strengths[i][-1], below)
    return strengths


def bits_in(p: np.ndarray) -> float:
    """The sum of -log2 p, by logarithms of products of 8, where none of them underflows."""
    whole = len(p) // 8 * 8
    products = p[:whole].reshape(8, -1).prod(axis=0)
    if whole and products.min() < 1e-300:
        return -float(np.log2(p).sum())
    return -float(np.log2(products).sum() + np.log2(p[whole:]).sum())


def causal_bits(counts: Counts, words: Words, strengths: Strengths | None) -> Iterator[np.ndarray]:
    """-log2 p of each position, for each order: add-one, both strands, and backoff likewise."""
    size = len(words.run_L)
    lower = [np.full(size, 0.25) for _ in range(4)]
    for order in range(counts.longest):
        short_L = np.flatnonzero(words.run_L <= order)  # keep what a lower order said
        for i, (n, total) in enumerate(counts.causal(words, order)):
            models = {i: (n + 1) / (total + 4)}
            if strengths is not None:
                models[2 + i] = backed_off(n, total, strengths[i][order], lower[2 + i])
            for j, p_L in models.items():
                p_L[short_L] = lower[j][short_L]
                lower[j] = p_L
        yield from (-np.log2(p_L) for p_L in (lower if strengths is not None else lower[:2]))


def two_sided_bits(counts: Counts, digits: np.ndarray, orders: int) -> Iterator[np.ndarray]:
    """-log2 p of each position, for each order."""
    words = Words(digits, counts.longest)
    p_L = np.full(len(digits), 0.25)
    for order in range(orders):
        n, total = counts.two_sided(words, order)
        ends = np.flatnonzero(words.run_L > 2 * order)  # of words that are whole
        p_L[ends - order] = ((n + 1) / (total + 4))[ends]
        yield -np.log2(p_L)


# --- rows -----------------------------------------------------------------------------------------


def window_sums(bits_L: np.ndarray, piece: Piece, places: np.ndarray) -> np.ndarray:
    """The bits of each window [B] that a piece adds; what is no base adds none."""
    own = np.where(piece.own(piece.digits) < GAP, piece.own(bits_L), 0.0)
    up_to = np.concatenate([[0.0], own.cumsum()])
    start, end = np.clip(places - piece.start, 0, len(own)).T
    return up_to[end] - up_to[start]


def bases_of(text: np.ndarray, places: np.ndarray) -> np.ndarray:
    """How many bases each window has, int64 [B]."""
    up_to = np.concatenate([[0], (text < GAP).cumsum(dtype=np.int64)])
    return up_to[places[:, 1]] - up_to[places[:, 0]]


def made(
    named: Sequence[tuple[str, int]],
    sums_RB: np.ndarray,
    bases_B: np.ndarray,
    novel: np.ndarray | None,
) -> list[Row]:
    def mean(bits_B: np.ndarray, chosen: np.ndarray | slice) -> float | None:
        bases = int(bases_B[chosen].sum())
        return float(bits_B[chosen].sum()) / bases if bases else None

    rows = []
    for (kind, order), bits_B in zip(named, sums_RB, strict=True):
        bits = mean(bits_B, slice(None))
        unseen = None if novel is None else mean(bits_B, novel.astype(bool))
        each = np.divide(bits_B, bases_B, where=bases_B > 0, out=np.full(len(bits_B), np.nan))
        rows.append(Row(kind, order, float("nan") if bits is None else bits, unseen, each))
    return rows


def pick(rows: Sequence[Row], kind: str, order: int | None = None) -> Row | None:
    """The row of a kind and order; of the highest order if none is given. None if there is none."""
    found = [row for row in rows if row.kind == kind and order in (None, row.order)]
    return max(found, key=lambda row: row.order, default=None)


def best(rows: Sequence[Row], *kinds: str, novel: bool = False) -> Row | None:
    """The row of the fewest bits, of these kinds or of all. novel: on the novel windows."""
    scored = [
        (bits, i)
        for i, row in enumerate(rows)
        if (not kinds or row.kind in kinds)
        and (bits := row.bits_novel if novel else row.bits) is not None
    ]
    return rows[min(scored)[1]] if scored else None


def telling(rows: Sequence[Row]) -> list[Row]:
    """The rows that say how good a network is: the usual order 5, the best of each count, backoff
    to 8 and to the highest order, the best on novel windows, and all two-sided ones.
    """
    plain = best(rows, ADD_ONE)
    wanted = [
        pick(rows, ADD_ONE, 5),
        plain,
        pick(rows, ADD_ONE_BOTH, plain.order) if plain else None,
        best(rows, ADD_ONE_BOTH),
        pick(rows, BACKOFF_BOTH, 8),
        pick(rows, BACKOFF_BOTH),
        best(rows, novel=True),
    ]
    chosen = {(row.kind, row.order) for row in wanted if row is not None}
    return [row for row in rows if row.kind == TWO_SIDED or (row.kind, row.order) in chosen]


def table(rows: Sequence[Row], bits: float, bits_novel: float | None = None) -> list[str]:
    """A network's bits per base above the telling rows, with the network minus each; the lines.

    bits_novel: the network's on the novel windows; without it they are left out.
    """
    shown = telling(rows)
    novel = bits_novel is not None and any(row.bits_novel is not None for row in shown)
    width = max(len(name) for name in ("bits per base", *(row.name for row in shown)))

    def line(name: str, *cells: str) -> str:
        return (name.ljust(width) + "".join(cell.rjust(11) for cell in cells)).rstrip()

    def pair(network: float | None, row: float | None) -> tuple[str, str]:
        if network is None or row is None:
            return "-", ""
        return f"{row:.4f}", f"{network - row:+.4f}"

    lines = [line("bits per base", "all", "net - row", *(["novel", "net - row"] if novel else []))]
    lines.append(line("network", f"{bits:.4f}", "", *([f"{bits_novel:.4f}"] if novel else [])))
    for row in shown:
        cells = pair(bits, row.bits)
        lines.append(line(row.name, *cells, *(pair(bits_novel, row.bits_novel) if novel else ())))
    return lines


# --- the cache ------------------------------------------------------------------------------------


def cached_rows(
    train: Sequence[np.ndarray],
    tune: Sequence[np.ndarray],
    test: Sequence[np.ndarray],
    windows: np.ndarray,
    *,
    two_sided: bool = False,
    novel: np.ndarray | None = None,
    orders: int | None = None,
    cache: str | None = None,
) -> list[Row]:
    """The rows of `causal_rows`, or of `two_sided_rows`, kept for the next start.

    orders: None for as many as they have. cache: a folder, "none", or None for the user's own.
    """
    orders = orders or (6 if two_sided else LONGEST)
    key = digest(train, tune, test, windows, novel, f"{VERSION} {two_sided} {orders}")
    folder = cache_folder(cache, kind="markov")
    file = None if folder is None else folder / f"{key[:32]}.npz"
    if file is not None and (kept := read_rows(file, key)) is not None:
        return kept
    make = two_sided_rows if two_sided else causal_rows
    rows = make(train, tune, test, windows, novel=novel, orders=orders)
    if file is not None:
        write_rows(file, key, rows)
    return rows


def digest(
    train: Sequence[np.ndarray],
    tune: Sequence[np.ndarray],
    test: Sequence[np.ndarray],
    windows: np.ndarray,
    novel: np.ndarray | None,
    rest: str,
) -> str:
    """SHA-256 of all that the rows depend on."""
    whole = [windows.astype(np.int64), *([] if novel is None else [novel.astype(bool)])]
    parts = [list(train), list(tune), list(test), whole]
    sizes = [[array.size for array in part] for part in parts]
    seen = hashlib.sha256(json.dumps([rest, sizes]).encode())
    for part in parts:
        for array in part:
            seen.update(array.tobytes())
    return seen.hexdigest()


def write_rows(file: Path, key: str, rows: Sequence[Row]) -> None:
    """Keep the rows. A cache that cannot be written is a note: only the next start is slower."""
    found = [[row.kind, row.order, row.bits, row.bits_novel] for row in rows]
    arrays = {"bits_RB": np.stack([row.bits_B for row in rows])}
    if reason := keep(file, {"key": key, "rows": found}, arrays):
        say_once(f"note: the Markov rows cannot be kept in {file.parent} ({reason})")


def read_rows(file: Path, key: str) -> list[Row] | None:
    """What was kept; a damaged file counts as none."""
    try:
        meta, arrays = recall(file)
        if meta["key"] != key:
            return None
        pairs = zip(meta["rows"], arrays["bits_RB"], strict=True)
        return [Row(kind, order, bits, unseen, b) for (kind, order, bits, unseen), b in pairs]
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever a damaged archive makes of zipfile, NumPy and json
        reason = " ".join(str(error).split()) or type(error).__name__
        say_once(f"note: {file} is damaged ({reason}); the Markov rows are computed again")
        return None
