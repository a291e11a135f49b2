"""Pieces of a corpus -> ids, in this process or in several, always in the order of the pieces.

A worker process gets what it needs once, and then pieces; it holds nothing between them, so the
number of workers changes no byte.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from suite.errors import DataError
from tasks.language.bin_writer import Encoded
from tasks.language.corpus import Piece, documents
from tasks.language.encoding import encoding_of, id_dtype


@dataclass(frozen=True)
class Job:
    """What a process needs to turn pieces into ids; plain values, sent to it once."""

    encoding: dict[str, Any]
    folder: Path
    end: int
    val_share: float
    test_share: float
    split_seed: int
    text_key: str
    skip_broken: bool


class Encoder:
    """Pieces -> ids, with one encoding."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.encoding = encoding_of(job.encoding, folder=job.folder)
        dtype = np.dtype(id_dtype(self.encoding.vocab_size)).newbyteorder("<")
        self.dtype, self.end = dtype, np.array([job.end], dtype).tobytes()

    def __call__(self, piece: Piece) -> Encoded:
        """The ids of its documents. Raises DataError for a broken one."""
        job, out = self.job, Encoded()
        for document in documents(piece, text_key=job.text_key):
            text, broken = document.text, document.broken
            ids = b""
            if broken is None and text:
                try:
                    ids = self.encoding.encode(text).astype(self.dtype, copy=False).tobytes()
                except ValueError as error:
                    broken = f"cannot be encoded: {error}"
            if broken is not None:
                if not job.skip_broken:
                    raise DataError(
                        f"{document.where} {broken}; put it right and start with a new --out, or "
                        "go on with --broken skip, which leaves it out"
                    )
                out.broken += 1
            elif not ids:
                out.empty += 1
            else:
                content = text.encode()
                split = split_of(content, job.split_seed, job.val_share, job.test_share)
                out.ids[split] += [ids, self.end]
                out.documents[split] += 1
                out.text_bytes[split] += len(content)
        return out


def split_of(content: bytes, seed: int, val_share: float, test_share: float) -> str:
    """The split of a document: a function of its text and the seed."""
    digest = hashlib.blake2b(content, digest_size=8, key=str(seed).encode()).digest()
    place = int.from_bytes(digest, "big") / 2**64
    if place < test_share:
        return "test"
    return "val" if place < test_share + val_share else "train"


class Characters:
    """Pieces -> the characters in them."""

    def __init__(self, text_key: str) -> None:
        self.text_key = text_key

    def __call__(self, piece: Piece) -> set[str]:
        found: set[str] = set()
        for document in documents(piece, text_key=self.text_key):
            found.update(document.text)
        return found


# --- processes ------------------------------------------------------------------------------------

_work: Any = None  # of a worker process: what it does with a piece


def start_worker(work: type, *arguments: Any) -> None:
    """What a worker does first: it leaves Ctrl-C to the parent, and ends when the parent has."""
    from multiprocessing import connection, parent_process

    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:

        def watch() -> None:
            connection.wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
    _work = work(*arguments)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Keep Ctrl-C waiting meanwhile; a process that is started here never gets it.

    A worker that it reaches before `start_worker` would print a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def do_work(piece: Piece) -> Any:
    """What a worker does with a piece."""
    return _work(piece)


def in_order(
    work: type, arguments: tuple[Any, ...], given: Iterable[Piece], *, workers: int
) -> Generator[tuple[Piece, Any], None, None]:
    """(piece, what work(*arguments) makes of it), in the order of the pieces.

    workers: processes; 1 works in this one. Raises DataError if one of them is ended.
    """
    if workers == 1:
        here = work(*arguments)
        for piece in given:
            yield piece, here(piece)
        return
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, start_worker, (work, *arguments))
    waiting: deque[tuple[Piece, Any]] = deque()
    try:
        for piece in given:
            with interrupts_held():
                waiting.append((piece, pool.submit(do_work, piece)))
            if len(waiting) > 2 * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool:
        raise DataError(
            "a worker process was ended, for want of memory perhaps; the same command goes on from "
            "where this one stopped, and fewer --workers need less"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
