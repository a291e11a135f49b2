"""The processes that Lightning starts for the other ranks: how they are watched and ended.

Lightning's own observer kills rank 0 before it can write its record. Three of Lightning's private
names are used here (`launcher.procs`, `_ChildProcessObserver`, `_signal_connector`), each with a
test.
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

from suite.train import complain


class Children:
    """Rank 0's watch over the processes that Lightning starts for the other ranks.

    Lightning's own observer ends rank 0 with SIGKILL up to 5 s after another rank has failed: no
    result.json, exit code 137, whatever rank 0 was about to say. Here rank 0 has GRACE seconds to
    end by itself; one that hangs in a collective is ended, after `failed` was told why. SIGTERM is
    meanwhile what Ctrl-C is.
    """

    GRACE = 10.0

    def __init__(
        self, trainer: L.Trainer, *, failed: Callable[[str], Any] = lambda text: None
    ) -> None:
        self.trainer, self.failed = trainer, failed
        self._over = threading.Event()
        self._sigterm: Any = None

    @property
    def processes(self) -> list[subprocess.Popen[bytes]]:
        """Those of ranks 1 and up; none under torchrun, or before the launch."""
        return list(getattr(self.trainer.strategy.launcher, "procs", []))

    def __enter__(self) -> Children:
        # SLURM has a protocol of its own, which Lightning follows
        if threading.current_thread() is threading.main_thread() and not os.getenv("SLURM_JOB_ID"):
            self._sigterm = signal.signal(signal.SIGTERM, signal.default_int_handler)
            # Lightning's broadcasts in the signal handler, which hangs between two collectives
            signals: Any = self.trainer._signal_connector
            signals._sigterm_notifier_fn = signal.default_int_handler
        if self.trainer.strategy.launcher is not None:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._close(grace=self.GRACE / 2)
        if self._sigterm is not None:
            signal.signal(signal.SIGTERM, self._sigterm)

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            for thread in threading.enumerate():
                if isinstance(thread, _ChildProcessObserver):
                    thread._child_processes = []
            codes = {rank: p.poll() for rank, p in enumerate(self.processes, 1)}
            bad = {rank: code for rank, code in codes.items() if code}
            if bad and not self._over.wait(self.GRACE):
                text = ", ".join(f"rank {r} ended with exit code {c}" for r, c in bad.items())
                self.failed(f"{text}; its own lines say why")
                self._close(grace=0.0)
                complain(text)
                os._exit(1)

    def _close(self, *, grace: float) -> None:
        """Stop watching; wait `grace` seconds for the processes to end and kill the rest."""
        self._over.set()
        until = time.monotonic() + grace
        for process in self.processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
