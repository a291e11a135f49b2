"""Saves that are killed at random moments, and disks that fill: what is left verifies and loads.

Run as a script this file is the nursery: it has imported torch, and for each line that it reads,
RUN STEP, it forks a process that saves again and again. So a kill costs a fraction of a second.
"""

from __future__ import annotations

import os
import random
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from suite import saving
from suite.saving import CheckpointFiles, SaveError, newest, problem, sweep_unfinished

KILLS = 60
NUMBERS = 1 << 20  # of each of a checkpoint's two tensors: 8 MB
TIMEOUT = 60
NAMES = {f"{name}.ckpt{end}" for name in ("last", "best") for end in ("", ".json")}


def content(step: int, *, numbers: int = NUMBERS) -> dict[str, Any]:
    """A checkpoint that says its step in every value."""
    weights = {name: torch.full((numbers,), float(step)) for name in ("a", "b")}
    return {"state_dict": weights, "global_step": step}


def save(folder: Path, step: int, **options: int) -> None:
    """Every third one is the best so far."""
    name = "best.ckpt" if step % 3 == 0 else "last.ckpt"
    CheckpointFiles().save_checkpoint(content(step, **options), folder / "checkpoints" / name)


def nursery() -> None:
    """Fork a saver for each line of stdin; say its number, what it saved, and that it ended."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        folder, _, step = line.rpartition(" ")
        saver = os.fork()
        if saver == 0:
            for number in range(int(step) + 1, 10**9):
                save(Path(folder), number)
                os.write(1, f"saved {number}\n".encode())
        os.write(1, f"saver {saver}\n".encode())
        os.waitpid(saver, 0)
        os.write(1, b"ended\n")


class Nursery:
    """The process that `nursery` runs in, and the lines that it and its savers write."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process, self.saver, self._left = process, 0, b""

    def line(self) -> list[str]:
        """The next line's words; fails if none comes."""
        stdout: Any = self.process.stdout
        while b"\n" not in self._left:
            assert select.select([stdout], [], [], TIMEOUT)[0], "no line came"
            part = os.read(stdout.fileno(), 1 << 16)
            assert part, "the nursery has ended"
            self._left += part
        first, _, self._left = self._left.partition(b"\n")
        return first.decode().split()

    def kill_after(self, seconds: float, *, run: Path, step: int) -> int:
        """Let a process save from `step` on and kill it; the last step that it said it saved."""
        stdin: Any = self.process.stdin
        stdin.write(f"{run} {step}\n".encode())
        stdin.flush()
        lines = []
        while not any(words[0] == "saver" for words in lines):
            lines.append(self.line())
        self.saver = next(int(words[1]) for words in lines if words[0] == "saver")
        time.sleep(seconds)
        os.kill(self.saver, 9)
        while lines[-1] != ["ended"]:
            lines.append(self.line())
        self.saver = 0
        return max((int(words[1]) for words in lines if words[0] == "saved"), default=step)


@pytest.fixture
def savers(tmp_path: Path) -> Iterator[Nursery]:
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    (tmp_path / "tmpdir").mkdir()
    with subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "tmpdir")},
    ) as process:
        found = Nursery(process)
        yield found
        if found.saver:
            with suppress(ProcessLookupError):
                os.kill(found.saver, 9)
        process.kill()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def assert_whole(run: Path, *steps: int) -> int:
    """Every checkpoint of the run verifies, and the newest holds one of `steps`. Returns it."""
    path, skipped = newest(run)
    assert path is not None
    assert skipped == []
    assert [problem(p) for p in (run / "checkpoints").glob("*.ckpt")].count(None) <= 2
    assert all(problem(p) is None for p in (run / "checkpoints").glob("*.ckpt"))
    found = CheckpointFiles().load_checkpoint(path)
    step = found["global_step"]
    assert step in steps
    assert saving.step_of(path) == step
    assert all(bool((tensor == step).all()) for tensor in found["state_dict"].values())
    return int(step)


@pytest.mark.timeout(600)
def test_after_kills_at_random_moments_the_newest_checkpoint_is_whole(
    savers: Nursery, tmp_path: Path
) -> None:
    """It is the last one that the process said it saved, or the one that it was about to say."""
    run, draw, step, cut, ahead = tmp_path / "run", random.Random(0), 0, 0, 0
    save(run, step)
    for _ in range(KILLS):
        said = savers.kill_after(draw.uniform(0.0, 0.4), run=run, step=step)
        cut += bool(names(run / ".tmp"))
        assert names(run) <= {"checkpoints", ".tmp"}
        assert names(run / "checkpoints") <= NAMES
        assert names(tmp_path / "tmpdir") == set()
        step = assert_whole(run, said, said + 1)
        ahead += step > said
        sweep_unfinished(run)
        assert names(run) == {"checkpoints"}
    print(f"{KILLS} kills in {step} saves: {cut} left a draft, {ahead} came after the rename")
    assert cut > 0  # else nothing was tried


# -- disks that fill -------------------------------------------------------------------------------


class Disks(NamedTuple):
    """Two small file systems. run: a run's folder on the first; elsewhere: the second."""

    run: Path
    elsewhere: Path


def mount(place: Path, *, megabytes: int) -> bool:
    """A tmpfs of its own at `place`; whether this is allowed here."""
    place.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
    with suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    return False


def unmount(place: Path) -> None:
    subprocess.run(["umount", str(place)], capture_output=True, timeout=20)


@pytest.fixture
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disks]:
    """32 MB for the run, and TMPDIR on another file system."""
    small, other = tmp_path / "small", tmp_path / "other"
    mounted = [place for place in (small, other) if mount(place, megabytes=32)]
    try:
        if len(mounted) < 2:
            pytest.skip("mounting a tmpfs is not allowed here")
        monkeypatch.setenv("TMPDIR", str(other))
        yield Disks(small / "run", other)
    finally:
        for place in mounted:
            unmount(place)


@pytest.fixture(params=["known", "unknown"])
def space(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether the free space is known beforehand, or the disk turns out to be full in a write."""
    if request.param == "unknown":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
    return str(request.param)


def assert_full(error: pytest.ExceptionInfo[SaveError], space: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert "run.resume" in text
    assert ("MB free" if space == "known" else "No space left on device") in text


@pytest.mark.timeout(120)
def test_a_full_disk_leaves_only_whole_files(disks: Disks, space: str) -> None:
    """8 MB each: last, best, and the third as it is written; then something else fills it."""
    for step in range(1, 6):
        save(disks.run, step)
    (disks.run / "other").write_bytes(bytes(12 << 20))
    for step in (6, 7, 8):
        with pytest.raises(SaveError) as error:
            save(disks.run, step)
        assert_full(error, space)
        assert_whole(disks.run, 5)
        assert names(disks.run / "checkpoints") == NAMES
        assert names(disks.run) == {"checkpoints", "other"}
        assert names(disks.elsewhere) == set()
    (disks.run / "other").unlink()
    save(disks.run, 9)
    assert_whole(disks.run, 9)


@pytest.mark.timeout(120)
def test_a_first_checkpoint_that_does_not_fit_leaves_nothing(disks: Disks, space: str) -> None:
    with pytest.raises(SaveError) as error:
        save(disks.run, 1, numbers=5 << 20)
    assert_full(error, space)
    assert newest(disks.run) == (None, [])
    assert names(disks.run / "checkpoints") == names(disks.elsewhere) == set()


@pytest.mark.timeout(120)
def test_a_sidecar_that_does_not_fit_leaves_a_file_that_verifies(
    disks: Disks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is filled to the last byte between the checkpoint's write and its rename."""
    save(disks.run, 1)
    real = saving.replace_verified

    def fill_first(*arguments: Any) -> None:
        with suppress(OSError), (disks.run / "other").open("wb", buffering=0) as file:
            while file.write(bytes(1 << 12)):
                pass
        real(*arguments)

    monkeypatch.setattr(saving, "replace_verified", fill_first)
    with pytest.raises(SaveError, match="No space left on device"):
        save(disks.run, 2)
    assert_whole(disks.run, 1)
    assert names(disks.run) == {"checkpoints", "other"}


@pytest.mark.timeout(120)
def test_a_folder_of_checkpoints_on_a_disk_of_its_own(tmp_path: Path) -> None:
    """A rename cannot go from one file system to another: the drafts are then in the folder."""
    run = tmp_path / "run"
    if not mount(run / "checkpoints", megabytes=32):
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        for step in (1, 2, 3):
            save(run, step)
        assert_whole(run, 3)
        assert names(run / "checkpoints") == NAMES
        assert names(run) == {"checkpoints"}
        (run / "checkpoints" / ".last.ckpt.1.unfinished").touch()
        sweep_unfinished(run)
        assert names(run / "checkpoints") == NAMES
    finally:
        unmount(run / "checkpoints")


if __name__ == "__main__":
    nursery()
