"""The cells of a sweep as processes: started, watched, ended, and judged by the result.json that
they leave.

Each child leads a session of its own, so Ctrl-C in the terminal reaches the sweep alone; the sweep
passes it on once, waits, and kills what is left. The lock is an `flock` that the children share:
the kernel lets it go when the last of them is dead, so a lock file left by a killed sweep stops no
one, and a sweep whose parent was killed stays locked for as long as its orphans still write.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from suite.errors import ConfigError, DivergedError
from suite.records import comparable, differences, flatten, plain, read_result
from suite.safety import printable

Status = Literal["done", "skipped", "failed", "diverged", "interrupted", "not started"]
LOCK = ".sweep.lock"
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    name: its folder. tokens: what suite.train is given. config: what they resolve to, a nested
    dict.
    """

    name: str
    tokens: tuple[str, ...]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    seconds: wall time of the process, None where none ran. primary: that of result.json.
    detail: why it failed, one line. stopped: it was ended by a signal to the sweep.
    """

    cell: Cell
    status: Status
    seconds: float | None = None
    primary: Mapping[str, Any] = field(default_factory=dict)
    detail: str = ""
    stopped: bool = False


@dataclass
class _Running:
    cell: Cell
    process: subprocess.Popen[bytes]
    began: float


@dataclass
class _Stop:
    """How often the sweep was asked to stop, and when first."""

    count: int = 0
    since: float = 0.0

    def ask(self, number: int, frame: FrameType | None) -> None:
        """A signal handler: it only counts, so that no child can be lost between two lines."""
        self.since = self.since or time.monotonic()
        self.count += 1


def is_finished(cell: Cell, *, out: Path) -> bool:
    """Whether the cell's folder holds a finished run of this configuration.

    Raises ConfigError where it holds a finished run of another one: that is a result, and is not
    moved.
    """
    try:
        result = read_result(out / cell.name)
    except ValueError:
        return False
    if result["status"] != "done":
        return False
    saved, chosen = (comparable(flatten(config)) for config in (result["config"], cell.config))
    differ = differences(saved, chosen)
    if differ:
        shown = ", ".join(f"{k} {plain(was)} -> {plain(now)}" for k, (was, now) in differ.items())
        raise ConfigError(
            f"{out / cell.name}: holds a finished run of another configuration ({shown}); "
            "choose another --out, or move that folder away"
        )
    return True


def run_cells(
    cells: Sequence[Cell], *, out: Path, command: Sequence[str], jobs: int = 1, grace: float = 30.0
) -> list[Outcome]:
    """Run `command <tokens> run.dir=<out>/<cell>` for each cell that is not finished, `jobs` at
    once.

    grace: seconds between the interrupt that a stop passes on and the kill. Outcomes come in the
    order of the cells. SIGINT, SIGTERM and SIGHUP stop the sweep. Call it from the main thread.
    Raises ConfigError when another sweep is at work in `out`, or `out` cannot be written.
    """
    with _locked(out) as lock, _stoppable() as stop:
        sweep = _Sweep(cells, out=out, command=command, jobs=jobs, lock=lock)
        try:
            while (sweep.waiting and not stop.count) or sweep.running:
                while sweep.waiting and len(sweep.running) < jobs and not stop.count:
                    sweep.start(sweep.waiting.popleft())
                if stop.count:
                    over = stop.count > 1 or time.monotonic() - stop.since > grace
                    sweep.end_all(signal.SIGKILL if over else signal.SIGINT)
                time.sleep(POLL_SECONDS)
                for one in [one for one in sweep.running if _has_ended(one.process)]:
                    sweep.collect(one, stopped=stop.count > 0)
        finally:  # a full disk, say, must leave no child behind
            sweep.end_all(signal.SIGKILL)
            for one in sweep.running:
                one.process.wait()
        return sweep.in_order()


class _Sweep:
    """The state of one sweep: what waits, what runs, what is over."""

    def __init__(
        self, cells: Sequence[Cell], *, out: Path, command: Sequence[str], jobs: int, lock: int
    ) -> None:
        self.cells, self.out, self.command, self.jobs, self.lock = cells, out, command, jobs, lock
        self.running: list[_Running] = []
        self.outcomes: dict[str, Outcome] = {}
        self._signalled: set[tuple[int, int]] = set()
        for cell in cells:
            if is_finished(cell, out=out):
                primary = read_result(out / cell.name)["primary"]
                self.outcomes[cell.name] = Outcome(cell, "skipped", primary=primary)
                self._say(cell, f"done before, skipped  {_show_primary(primary)}")
        self.waiting = deque(cell for cell in cells if cell.name not in self.outcomes)

    def start(self, cell: Cell) -> None:
        """Set an old attempt aside and start the cell's process."""
        _set_aside(self.out, cell.name)
        log = self.out / "logs" / f"{cell.name}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*self.command, *cell.tokens, f"run.dir={self.out / cell.name}"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": str(max(1, _cores() // self.jobs)), **os.environ},
                start_new_session=True,
                pass_fds=(self.lock,),
            )
        self.running.append(_Running(cell, process, time.monotonic()))
        self._say(cell, "start")

    def end_all(self, number: signal.Signals) -> None:
        """Send the signal, once, to the process group of every child that has not ended."""
        for one in self.running:
            if (one.process.pid, number) not in self._signalled:
                self._signalled.add((one.process.pid, number))
                _signal_group(one.process.pid, number)

    def collect(self, one: _Running, *, stopped: bool) -> None:
        """Take in a process that has ended."""
        self.running.remove(one)
        seconds = time.monotonic() - one.began
        outcome = self._judge(one, seconds=seconds, stopped=stopped)
        self.outcomes[one.cell.name] = outcome
        words = [outcome.status, _show_primary(outcome.primary), show_seconds(seconds)]
        left = len(self.waiting) + len(self.running)
        if left and not stopped:
            spent = [o.seconds for o in self.outcomes.values() if o.seconds is not None]
            words.append(f"ETA {show_seconds(sum(spent) / len(spent) * left / self.jobs)}")
        self._say(one.cell, "  ".join(word for word in [*words, outcome.detail] if word))

    def _judge(self, one: _Running, *, seconds: float, stopped: bool) -> Outcome:
        code = one.process.returncode
        try:
            result = read_result(self.out / one.cell.name)
            why = ""
        except ValueError as error:
            result, why = {}, str(error)
        primary = result.get("primary", {})
        if result.get("status") == "done":  # written last: what went wrong after it is no loss
            late = f"exit code {code} after its result was written" if code else ""
            return Outcome(one.cell, "done", seconds, primary, late)
        if stopped:
            return Outcome(one.cell, "interrupted", seconds, primary, stopped=True)
        status: Status = "diverged" if code == DivergedError.exit_code else "failed"
        log = self.out / "logs" / f"{one.cell.name}.log"
        detail = result.get("error") or _last_line(log) or why
        ended = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        return Outcome(one.cell, status, seconds, primary, f"{ended}: {detail} (log: {log})")

    def in_order(self) -> list[Outcome]:
        """One outcome a cell, also for those that never started."""
        return [
            self.outcomes.get(cell.name, Outcome(cell, "not started", stopped=True))
            for cell in self.cells
        ]

    def _say(self, cell: Cell, what: str) -> None:
        place = f"[{list(self.cells).index(cell) + 1}/{len(self.cells)}]"
        with contextlib.suppress(BrokenPipeError):  # a closed `| head` must not orphan the children
            print(f"{place} {cell.name}  {printable(what)}", flush=True)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[int]:
    """Hold the folder's lock; yields its descriptor, for the children to share."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(
            f"{out}: cannot be written ({error.strerror}); choose another --out"
        ) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 100, 0).decode(errors="replace").strip() or "unknown"
            raise ConfigError(
                f"{out}: another sweep, or a run that outlived it, is at work there (process "
                f"{holder}); wait for it, end it, or choose another --out"
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        yield lock
    finally:
        os.close(lock)


@contextlib.contextmanager
def _stoppable() -> Iterator[_Stop]:
    """Count SIGINT, SIGTERM and SIGHUP instead of dying of them; SIGHUP stays ignored under nohup.

    A handler, not SIG_IGN, is also what lets a child of a background job see SIGINT at all:
    handlers are reset on exec.
    """
    stop = _Stop()
    before: dict[signal.Signals, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
            continue
        before[number] = signal.signal(number, stop.ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether the child is over; then what is left of its group is killed and the child reaped.

    Seen before it is reaped: until then no other process can be given its number, so only what the
    child started (a rank that hangs, a data worker) can be hit.
    """
    if hasattr(os, "waitid"):
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        if os.waitid(os.P_PID, process.pid, options) is None:
            return False
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()
    return process.poll() is not None


def _signal_group(leader: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


def _set_aside(out: Path, name: str) -> None:
    """Rename an unfinished attempt, and its log, to `<name>.failed-<k>`."""
    folder, log = out / name, out / "logs" / f"{name}.log"
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    k = 1
    while (out / f"{name}.failed-{k}").exists():
        k += 1
    folder.rename(out / f"{name}.failed-{k}")
    if log.exists():
        log.rename(log.with_name(f"{name}.failed-{k}.log"))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _last_line(log: Path) -> str:
    """The last line of a log that says something, at most 300 characters of it."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    return next((printable(line[:300]) for line in reversed(lines) if line), "")


def _show_primary(primary: Mapping[str, Any]) -> str:
    best = primary.get("best")
    if not isinstance(best, (int, float)):
        return ""
    return f"{primary.get('split', 'val')}/{primary.get('name')} {best:.4f}"


def show_seconds(seconds: float) -> str:
    """3725.0 -> "1h02m", 62.0 -> "1m02s", 4.2 -> "4s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
