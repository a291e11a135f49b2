"""How long audio files are, found once and kept in a cache.

Batches are made by length, so every file's length must be known before training. Opening the
281,241 files of LibriSpeech takes minutes; so what their headers say is kept in a file. It is used
only while the list of files is the same and every folder that holds one of them has the
modification and change time that it had: adding, renaming or removing a file changes both. Writing
other content into a file of the same name does not: such a clip is found to have another length
when it is read, and data.cache=none reads all headers again.

Shapes: N files.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from suite.cache import keep, recall, say_once
from suite.errors import shown
from tasks.speech.audio import AudioError, UnreadableError, probe

VERSION = 1
SETTLED_NS = 2_000_000_000  # a folder may change again within one tick of the file system's clock
TALK_S = 2.0  # between two lines of progress
THREADS = 16  # opening files is waiting, on a network disk above all
CHUNK = 256

Array = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Headers:
    """What the headers of N files say. samples is 0 and rate 1 where `faults` has a reason."""

    samples: Array
    rates: Array
    channels: Array
    faults: dict[int, str]


def load_headers(paths: Sequence[str], *, name: str, label: str, cache: Path | None) -> Headers:
    """What the files' headers say, from `cache` where that still holds, else read and put there.

    name: of the data set; label: of the list, for the cache's name and for messages.
    """
    listing = hashlib.sha256(b"\0".join(map(os.fsencode, paths))).hexdigest()
    folders = sorted({os.path.dirname(path) for path in paths})  # noqa: PTH120
    stamps = times_of(folders)
    file = cache / f"{safe(label)}-{listing[:16]}.npz" if cache is not None else None
    kept = read_cache(file, listing, stamps) if file is not None else None
    if kept is not None:
        return repaired(kept, paths)
    found = read_headers(paths, what=f"data={name}: reading the lengths of {label}")
    settled = time.time_ns() - SETTLED_NS
    if file is not None and stamps is not None and (stamps[:, 0] < settled).all():
        write_cache(file, found, listing=listing, stamps=stamps)
    return found


def read_headers(paths: Sequence[str], *, what: str) -> Headers:
    """Open every file, several at a time, with lines of progress where it takes long."""
    values = np.zeros((len(paths), 3), dtype=np.int64)
    values[:, 1:] = 1
    faults: dict[int, str] = {}
    last = time.monotonic()
    parts = [range(i, min(i + CHUNK, len(paths))) for i in range(0, len(paths), CHUNK)]
    with ThreadPoolExecutor(THREADS) as pool:
        done = 0
        for part, found in zip(parts, pool.map(lambda p: probed(paths, p), parts), strict=True):
            for i, one in zip(part, found, strict=True):
                if isinstance(one, str):
                    faults[i] = one
                else:
                    values[i] = one
            done += len(part)
            if time.monotonic() - last > TALK_S:
                say_once(f"{what}: {done:,} of {len(paths):,} files")
                last = time.monotonic()
    samples, rates, channels = values.T.copy()
    return Headers(samples, rates, channels, faults)


def repaired(kept: Headers, paths: Sequence[str]) -> Headers:
    """What was kept, with the files opened again that were faulty: a repair shows in no folder."""
    faults = {}
    for i in kept.faults:
        (found,) = probed(paths, range(i, i + 1))
        if isinstance(found, str):
            faults[i] = found
        else:
            kept.samples[i], kept.rates[i], kept.channels[i] = found
    return replace(kept, faults=faults)


def probed(paths: Sequence[str], part: range) -> list[tuple[int, int, int] | str]:
    """What each header says, or why it says nothing. Raises UnreadableError."""
    found: list[tuple[int, int, int] | str] = []
    for i in part:
        try:
            found.append(probe(paths[i]))
        except UnreadableError:
            raise
        except AudioError as error:
            found.append(error.reason)
    return found


# --- the cache ------------------------------------------------------------------------------------


def safe(label: str) -> str:
    """A label as a part of a file's name."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-.") else "_" for c in label)[-40:]


def times_of(folders: Sequence[str]) -> Array | None:
    """[F, 2] modification and change time of each folder; None if one cannot be looked at."""
    try:
        found = [os.stat(folder or ".") for folder in folders]  # noqa: PTH116
    except OSError:
        return None
    return np.array([(s.st_mtime_ns, s.st_ctime_ns) for s in found], dtype=np.int64).reshape(-1, 2)


def write_cache(file: Path, headers: Headers, *, listing: str, stamps: Array) -> None:
    """Keep the headers. A cache that cannot be written is a note: only the next start is slower."""
    meta = {
        "version": VERSION,
        "listing": listing,
        "faults": {str(i): reason for i, reason in headers.faults.items()},
    }
    values = np.stack([headers.samples, headers.rates, headers.channels])
    if reason := keep(file, meta, {"stamps": stamps, "values": values}):
        say_once(
            f"note: the lengths of the clips cannot be kept in {shown(str(file.parent))} "
            f"({reason}); each start reads every file's header. data.cache=FOLDER names another"
        )


def read_cache(file: Path, listing: str, stamps: Array | None) -> Headers | None:
    """What was kept, if no folder has changed since; a damaged file counts as none."""
    try:
        meta, arrays = recall(file)
        if meta["version"] != VERSION or meta["listing"] != listing:
            return None
        samples, rates, channels = arrays["values"].astype(np.int64)
        faults = {int(i): str(reason) for i, reason in meta["faults"].items()}
        if (rates < 1).any() or any(not 0 <= i < len(samples) for i in faults):
            raise ValueError("values out of range")
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever a damaged archive makes of zipfile, NumPy and json
        reason = " ".join(str(error).split()) or type(error).__name__
        say_once(f"note: {shown(str(file))} is damaged ({reason}); the lengths are read again")
        return None
    same = stamps is not None and np.array_equal(arrays["stamps"], stamps)
    return Headers(samples, rates, channels, faults) if same else None
