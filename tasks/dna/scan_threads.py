"""Work on sequences in threads of Python, each of which runs its operations alone.

PyTorch's own threads meet at the end of every operation. A scan has some twenty operations of a few
tens of microseconds a chunk, and where a core is busy with something else each such meeting costs
milliseconds: on two loaded cores two threads took several times as long as one. Threads that have
sequences of their own meet once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from tasks.dna.scan import Scan

Found = TypeVar("Found")


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it, operations on the CPU, and those of threads that begin here, use one thread."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def spread(work: Callable[[slice, Scan], Found], parts: list[tuple[slice, Scan]]) -> list[Found]:
    """`work` done on every part; on a CPU in as many threads as PyTorch has.

    A thread of Python that begins while PyTorch has one thread keeps to one.
    """
    threads = min(torch.get_num_threads(), len(parts))
    if parts[0][1].u.device.type != "cpu":
        return [work(*part) for part in parts]

    @torch.no_grad()  # it is a thread's own, and so is autocast, which a new thread has off
    def quietly(part: tuple[slice, Scan]) -> Found:
        return work(*part)

    with one_thread():
        if threads == 1:
            return [quietly(part) for part in parts]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(quietly, parts))
