"""How far a tokenization is: a bar on a terminal, a line now and then elsewhere, on stderr."""

from __future__ import annotations

import sys
from time import monotonic
from types import TracebackType
from typing import Any

LINE_SECONDS = 15.0


class Display:
    """What is shown of bytes read, out of `total`."""

    def __init__(self, total: int) -> None:
        self.total = max(total, 1)
        self._bar: Any = None
        self._task: Any = None
        self._last = monotonic()

    def __enter__(self) -> Display:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            self._bar = Progress(
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}", markup=False),
                console=Console(stderr=True),
            )
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, read: int) -> None:
        """Start over, at `read` bytes."""
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task("", total=self.total, completed=read)

    def show(self, read: int, text: str) -> None:
        """`read` bytes have been worked on; text: what of them."""
        if self._bar is not None:
            self._bar.update(self._task, completed=read, description=text)
        elif monotonic() - self._last >= LINE_SECONDS:
            self._last = monotonic()
            self.line(f"{100 * read / self.total:.1f} % read: {text}")

    def line(self, text: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)
