"""SIGTERM, SIGINT and SIGUSR1: a run ends after the step it is in, on all processes, and saved.

What a scheduler, a container or Ctrl-C sends reaches one process, the launcher or the whole group.
Lightning answers with a broadcast inside the handler, possibly in the middle of another collective:
a signal to the group of a two-process run hung until its time-out (lightning issue 20806), and its
loop asks all processes in every step, which on a GPU waits for the device. Here a handler only
notes the signal while training goes on; what it noted travels with the step's own all-reduce
(suite.module), so that all processes see it in the same step, save and stop together. Before
training and after it nothing has to be agreed on, and the handler ends the process at once.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from suite.errors import Stopped

if TYPE_CHECKING:
    from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGINT) + ((signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ())
AGAIN_SECONDS = 1.0  # a launcher may pass Ctrl-C on to a process that the terminal told already
UNHEARD_SECONDS = 5.0


class Signals:
    """What this process was asked by signals, and what it does about it.

    While `held`, a signal is only noted, for whoever polls `number`; else it raises Stopped where
    the process stands. Ctrl-C a second time raises in either case. Python runs a handler between
    two of its own instructions, so that a process that waits for another one in C++ does not hear:
    outside `held`, and of a second Ctrl-C within it too, a thread then calls `unheard` and ends the
    process, UNHEARD_SECONDS later.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.held = False
        self.unheard: Callable[[Stopped], Any] = lambda stopped: None
        self._first = self._last = 0.0
        self._heard = threading.Event()
        self._before: dict[int, Any] = {}
        self._ends: tuple[socket.socket, socket.socket] | None = None
        self._wakeup = -1

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in ENDING:
                if number == signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # a shell started this in the background: Ctrl-C is not for it
                self._before[number] = signal.signal(number, self._handle)
            self._ends = socket.socketpair()
            for end in self._ends:
                end.setblocking(end is self._ends[0])
            self._wakeup = signal.set_wakeup_fd(self._ends[1].fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._listen, args=(self._ends[0],), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        if self._ends is not None:
            signal.set_wakeup_fd(self._wakeup)
            self._ends[1].close()  # ends the listener, which closes the other one
            self._ends = None

    def check(self) -> None:
        """Raise Stopped for a signal whose own exception somebody has swallowed."""
        if self.number is not None:
            raise Stopped(self.number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._heard.set()
        now = self._last = time.monotonic()
        if self.number is None:
            self.number, self._first = number, now
            if self.held:
                return
        elif self.held and not (number == signal.SIGINT and now - self._first > AGAIN_SECONDS):
            return
        self.held = False
        raise Stopped(self.number)

    def _listen(self, end: socket.socket) -> None:
        """The bytes that the interpreter's own handler writes, at once, wherever Python stands."""
        first = 0.0
        with end:
            while received := end.recv(16):
                number = next((n for n in received if n in ENDING), None)
                if number is None:
                    continue
                now = time.monotonic()
                first = first or now
                if number == signal.SIGINT and now - first > AGAIN_SECONDS:
                    time.sleep(UNHEARD_SECONDS)
                    heard = self._last > now - AGAIN_SECONDS / 2
                else:
                    heard = self._heard.wait(UNHEARD_SECONDS) or self.held
                if not heard:
                    stopped = Stopped(number)
                    self.unheard(stopped)
                    print(f"error: {stopped}", file=sys.stderr, flush=True)
                    os._exit(stopped.exit_code)


def end_with_parent(pid: str | None) -> None:
    """Let the system kill this process when the one that started it dies (Linux only).

    pid: of that one. It may have died before it was asked for, and this process been adopted.
    """
    if pid is None or not sys.platform.startswith("linux"):
        return
    import ctypes

    set_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
    ctypes.CDLL(None, use_errno=True).prctl(set_death_signal, signal.SIGKILL, 0, 0, 0)
    if str(os.getppid()) != pid:
        os._exit(1)


def ignore_in_worker(_: int = 0) -> None:
    """For a loader's worker, which a signal to the group would end in the middle of a batch.

    Its trainer ends it. Where that one is killed the worker notices by itself.
    """
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


def requeue(environ: Mapping[str, str] = os.environ) -> str | None:
    """Ask SLURM to start this job again; what was said about it, or None outside SLURM.

    What `#SBATCH --signal=USR1@90` is for. An array's task is asked for by its own number.
    """
    job = environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    if "SLURM_ARRAY_JOB_ID" in environ and "SLURM_ARRAY_TASK_ID" in environ:
        job = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    if not re.fullmatch(r"[0-9]+(_[0-9]+)?", job):
        return f"not requeued: {job!r} is no number of a SLURM job"
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not requeued: scontrol requeue {job}: {error}"
    if done.returncode:
        return f"not requeued: scontrol requeue {job}: {' '.join(done.stderr.split())}"
    return f"requeued SLURM job {job}"
