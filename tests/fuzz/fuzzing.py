"""What the fuzz tests share: how many examples, from which seed, and a call that cannot do harm.

Each test makes a share of SUITE_FUZZ_EXAMPLES random examples from SUITE_FUZZ_SEED, which pytest's
first lines name. What can hang or ask for memory runs in a child process with limits on both.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import random
import re
import resource
import signal
import tempfile
import time
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import seed as seeded

from suite.errors import ConfigError, DataError
from suite.train import complain

EXAMPLES = int(os.environ.get("SUITE_FUZZ_EXAMPLES", "1000"))
# into the environment, from which pytest-xdist's processes have it
SEED = int(os.environ.setdefault("SUITE_FUZZ_SEED", str(random.SystemRandom().randrange(2**32))))
torch.set_num_threads(1)  # a child inherits no threads, and would wait for them
GIB = 2**30
LINE = 700  # characters that an error may have beyond the temporary folder's own name
HIDDEN = ("Cc", "Cs", "Cf", "Zl", "Zp")  # Unicode's categories that a terminal may obey
ASIDE = (  # lines that may stand beside an error
    *("note: ", "warning: ", "written to "),
    *(
        "Note: ",
        "[src/libmpg123/",
        "Warning: Xing",
    ),  # what libmpg123 says of a damaged MP3, from C, as it goes on
)


def fuzz(share: float = 1.0) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test of `share` of the examples, from the reported seed."""
    profile = settings(
        max_examples=max(5, round(EXAMPLES * share)),
        deadline=None,
        derandomize=False,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: seeded(SEED)(profile(test))


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative: the signal), and what it printed."""

    code: int
    out: str
    err: str
    seconds: float = 0.0

    @property
    def errors(self) -> list[str]:
        """The lines of stderr that are no notes."""
        return [line for line in self.err.splitlines() if line and not line.startswith(ASIDE)]


def called(command: Callable[[list[str]], int], argv: list[str]) -> Ended:
    """Call an entry point here, with its output caught as a terminal's bytes would be."""
    out, err = _stream("strict"), _stream("backslashreplace")  # as sys.stdout and sys.stderr are
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("default")
        warnings.simplefilter("ignore", DeprecationWarning)
        code = command(argv)
    return Ended(code, _text(out), _text(err))


def _stream(errors: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors)


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    buffer: Any = stream.buffer
    return buffer.getvalue().decode("utf-8")


def forked(work: Callable[[], int], *, seconds: float = 20.0, memory: int = 8 * GIB) -> Ended:
    """Call `work` in a child that is killed after `seconds` and may take `memory` bytes more.

    An exception that leaves `work` is printed and gives 99. A child that lasts gives -9.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.monotonic()
        child = os.fork()
        if not child:
            faulthandler.dump_traceback_later(max(seconds - 1, 0.5), file=err)  # where it hangs
            _behave(work, out.fileno(), err.fileno(), memory)
        code = _wait(child, started + seconds)
        took = time.monotonic() - started
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode("utf-8", "replace"))
    return Ended(code, *texts, seconds=took)


def _behave(work: Callable[[], int], out: int, err: int, memory: int) -> None:
    """The child's whole life; it never returns."""
    code = 99
    try:
        os.setsid()  # so that what it starts ends with it
        os.dup2(out, 1)
        os.dup2(err, 2)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory,) * 2)
        with (
            open(1, "w", closefd=False) as stdout,
            open(2, "w", closefd=False, errors="backslashreplace") as stderr,
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
        ):
            try:
                code = work()
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code & 0xFF)


def _wait(child: int, until: float) -> int:
    """The child's exit code; negative for a signal. Whatever it has started is ended too."""
    pause = 0.001
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(pause)
        pause = min(0.02, pause * 1.5)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(status)


def check_refusal(ended: Ended, *, allowed: tuple[int, ...] = (2,), most: int = 1) -> None:
    """One printable line that says what is wrong, of a length that can be read; or `most` such."""
    assert ended.code in allowed, f"exit code {ended.code}\n{ended.err[-3000:]}"
    assert "Traceback" not in ended.err, ended.err[-3000:]
    lines = ended.errors
    assert 1 <= len(lines) <= most, f"{len(lines)} lines:\n{ended.err[-3000:]}"
    for line in lines:
        assert line.startswith("error: "), line
        assert not any(unicodedata.category(c) in HIDDEN for c in line), ascii(line)
        plain = re.sub(r"/\S*/suite-fuzz-\w+", "", line)
        assert len(plain) <= LINE, f"{len(plain)} characters: {plain[:2000]}"


@contextlib.contextmanager
def fresh_folder() -> Iterator[Path]:
    """An empty folder that is the current one meanwhile."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="suite-fuzz-") as name:
        os.chdir(name)
        try:
            yield Path(name)
        finally:
            os.chdir(before)


def left_in(folder: Path) -> list[str]:
    """Everything below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused_or(work: Callable[[], object]) -> int:
    """The exit code that suite.train would give: 0, or the error's own with its line printed."""
    try:
        work()
    except (ConfigError, DataError) as error:
        complain(str(error))
        return error.exit_code
    return 0
