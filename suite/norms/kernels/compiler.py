"""Builds the C++ kernels once with the user's compiler and loads them with ctypes.

The sources are plain C++ with a C interface, without torch's headers: they build in a few seconds
and do not care which torch is installed. The library is kept under $XDG_CACHE_HOME (or ~/.cache) in
dyt-suite/kernels. Its name holds a hash of the sources, the flags, the compiler and the processor:
a home directory that is shared by a cluster never gives one node the code of another. It is
written under a temporary name and renamed, so two processes may build at once, and ends with its
own digest, so that a damaged file is found before it is loaded and built again. Where nothing can
be kept, or others could put a library of theirs, each process builds its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

SOURCES = ("pointwise.cpp", "rows.cpp")
HEADERS = ("functions.h", "numbers.h")
COMPILERS = ("c++", "g++", "clang++")
TIMEOUT = 300  # seconds
# Not -ffast-math: it takes NaN and infinity for impossible, and the suite's guard looks for them.
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
)
# What not every compiler or processor takes, from the best to none of it.
EXTRA_FLAGS = (
    ("-fopenmp", "-march=native", "-mprefer-vector-width=512"),
    ("-fopenmp", "-march=native"),
    ("-march=native",),
    ("-fopenmp",),
    (),
)
_DIGEST = hashlib.sha256().digest_size


def compiler() -> list[str] | None:
    """The command of a C++ compiler: $CXX, which may have arguments, else one installed."""
    try:
        asked = shlex.split(os.environ.get("CXX", ""))
    except ValueError:  # a quote that is not closed
        return None
    if asked:
        found = shutil.which(asked[0])
        return None if found is None else [found, *asked[1:]]
    for name in COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return [found]
    return None


def missing() -> str | None:
    """Why there is no compiler, in a few words; None if there is one."""
    if compiler() is not None:
        return None
    asked = os.environ.get("CXX", "").strip()
    return f"CXX={asked} is not a program" if asked else f"no C++ compiler ({', '.join(COMPILERS)})"


def folder() -> Path | None:
    """Where built libraries are kept; None for a user without a home, as in some containers."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:  # its standard has a relative one ignored
        root = base if base.is_absolute() else Path("~/.cache").expanduser()
    except RuntimeError:
        return None
    return root / "dyt-suite" / "kernels"


@cache
def library() -> ctypes.CDLL:
    """The library, from the cache or built now.

    Raises ValueError, in one line, where there is no compiler or it does not build or load.
    """
    command = compiler()
    if command is None:
        raise ValueError(missing())
    where, name = folder(), f"kernels-{_key(command)}.so"
    if where is not None:
        with suppress(OSError, ValueError):
            _check_private(where)
            return _loaded(where / name)
    try:
        with tempfile.TemporaryDirectory(prefix="dyt-suite-") as temporary:
            fresh = Path(temporary) / name
            _compile(command, fresh)
            content = fresh.read_bytes()
            with fresh.open("ab") as file:
                file.write(hashlib.sha256(content).digest())
            if where is not None:
                with suppress(OSError):  # read-only, full, or mounted without execution
                    return _loaded(_keep(fresh, where))
            return _loaded(fresh)
    except OSError as error:
        raise ValueError(f"the C++ kernels could not be loaded: {_line(error)}") from None


def _keep(fresh: Path, where: Path) -> Path:
    """Copy a library into the cache, whole or not at all. Raises OSError if that cannot be."""
    where.mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_private(where)
    with tempfile.TemporaryDirectory(prefix="build-", dir=where) as temporary:
        shutil.copyfile(fresh, Path(temporary) / fresh.name)
        return (Path(temporary) / fresh.name).replace(where / fresh.name)


def _check_private(where: Path) -> None:
    """Raise OSError for a folder in which others can put code for this user to load."""
    found = where.stat()
    if os.name == "posix" and (found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022):
        raise PermissionError(f"others may write to {where}")


def _loaded(path: Path) -> ctypes.CDLL:
    """Load a library whose digest is right: to map a cut file can end the process."""
    content = path.read_bytes()
    if hashlib.sha256(content[:-_DIGEST]).digest() != content[-_DIGEST:]:
        raise ValueError(f"{path} is damaged")
    return ctypes.CDLL(str(path))


def _compile(command: list[str], out: Path) -> None:
    """Run the compiler, with fewer flags each time that it refuses."""
    sources = [str(Path(__file__).with_name(name)) for name in SOURCES]
    said = ""
    for extra in EXTRA_FLAGS:
        try:
            subprocess.run(
                [*command, *FLAGS, *extra, *sources, "-o", str(out)],
                check=True,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT,
            )
            return
        except subprocess.CalledProcessError as error:
            said = said or error.stderr
        except (OSError, subprocess.TimeoutExpired) as error:
            said = str(error)
            break
    raise ValueError(f"{command[0]} does not build the C++ kernels: {_line(said)}")


def _line(said: object) -> str:
    """The line that says what is wrong."""
    lines = [line.strip() for line in str(said).splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no reason given"])[0]


def _key(command: list[str]) -> str:
    """A hash of everything that decides what is built."""
    digest = hashlib.sha256()
    for name in (*SOURCES, *HEADERS):
        digest.update(Path(__file__).with_name(name).read_bytes())
    for part in (*command, *FLAGS, *map(str, EXTRA_FLAGS), _version(command), _processor()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:20]


def _version(command: list[str]) -> str:
    """What the compiler says of itself. Raises ValueError if it does not run."""
    try:
        done = subprocess.run(
            [*command, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"{command[0]} does not run: {_line(error)}") from None
    return done.stdout


def _processor() -> str:
    """Model and instruction sets of the processor, as far as the system tells."""
    known = [platform.system(), platform.machine(), platform.processor()]
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(errors="replace")
        keys = ("model name", "flags", "Features", "CPU part", "isa")
        found = {line for line in text.splitlines() if line.partition(":")[0].strip() in keys}
        known += sorted(found)  # the same on all cores, or all kinds of cores
    return "\n".join(known)
