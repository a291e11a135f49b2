"""The processes that Lightning starts for the other ranks: how they are watched and ended.

Lightning's own observer kills rank 0 before it can write its record, and its signal handlers hang
(suite.signals). Lightning's private names that are used here (`launcher.procs`,
`_ChildProcessObserver`, `_signal_connector`, `_broadcast_sigterm_tensor`) have a test each.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver

from suite.errors import Stopped
from suite.signals import Signals
from suite.train import complain

STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM)  # the last two: before Python had a handler


class Children:
    """Rank 0's watch over the processes that Lightning starts for the other ranks.

    Lightning's own observer ends rank 0 with SIGKILL up to 5 s after another rank has failed: no
    result.json, exit code 137, whatever rank 0 was about to say. Here rank 0 has GRACE seconds to
    end by itself; one that hangs in a collective is ended, after `failed(status, text)` was told
    why. While it is open, signals are the suite's alone.
    """

    GRACE = 10.0

    def __init__(
        self,
        trainer: L.Trainer,
        signals: Signals,
        *,
        failed: Callable[[str, str], Any] = lambda status, text: None,
    ) -> None:
        self.trainer, self.signals, self.failed = trainer, signals, failed
        self._over = threading.Event()

    @property
    def processes(self) -> list[subprocess.Popen[bytes]]:
        """Those of ranks 1 and up; none under torchrun, or before the launch."""
        return list(getattr(self.trainer.strategy.launcher, "procs", []))

    def __enter__(self) -> Children:
        connector: Any = self.trainer._signal_connector
        connector.register_signal_handlers = lambda: None
        loop: Any = self.trainer.fit_loop.epoch_loop
        loop._broadcast_sigterm_tensor = lambda: None
        self.signals.unheard = self._unheard
        if self.trainer.strategy.launcher is not None:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._close(grace=self.GRACE / 2)
        self.signals.unheard = lambda stopped: None

    def _unheard(self, stopped: Stopped) -> None:
        self.failed("interrupted", str(stopped))
        self._close(grace=0.0)

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            for thread in threading.enumerate():
                if isinstance(thread, _ChildProcessObserver):
                    thread._child_processes = []
            if (bad := self._bad()) and not self._over.wait(self.GRACE):
                self._give_up(bad)

    def ended(self, *, wait: float = 2.0) -> str:
        """Which of the other ranks have ended badly, in words; empty if none has within `wait`."""
        until = time.monotonic() + wait
        while not (bad := self._bad()) and self.processes and time.monotonic() < until:
            time.sleep(0.05)
        return _listed(bad)

    def stopped_by(self) -> int | None:
        """The signal that ended the other ranks that have ended, if it was one that ends a run."""
        codes = list(self._bad().values())
        if not codes or not all(code in STOPPED for code in codes):
            return None
        return signal.SIGINT if codes[0] in (130, -signal.SIGINT) else signal.SIGTERM

    def _bad(self) -> dict[int, int]:
        codes = {rank: process.poll() for rank, process in enumerate(self.processes, 1)}
        return {rank: code for rank, code in codes.items() if code}

    def _give_up(self, bad: dict[int, int]) -> None:
        """End this process: another one has ended, and it waits for that one."""
        text = _listed(bad)
        stopped = [code for code in bad.values() if code in STOPPED]
        status = "interrupted" if len(stopped) == len(bad) else "failed"
        self.failed(status, f"{text}; its own lines say why")
        self._close(grace=0.0)
        complain(text)
        code = stopped[0] if status == "interrupted" else 1
        os._exit(code if code > 0 else 128 - code)

    def _close(self, *, grace: float) -> None:
        """Stop watching; wait `grace` seconds for the processes to end and kill the rest."""
        self._over.set()
        until = time.monotonic() + grace
        for process in self.processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()


def _listed(bad: dict[int, int]) -> str:
    return ", ".join(f"rank {rank} ended with exit code {code}" for rank, code in bad.items())
