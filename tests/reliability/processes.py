"""Starting real runs, hitting them, and looking at what is left of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

SLOWLY = Path(__file__).with_name("slowly.py")
TINY = [
    "task=vision/classify",
    "model.dim=16",
    "model.depth=1",
    "model.heads=1",
    "data.batch_size=32",
    "trainer.limit_train_batches=6",
    "trainer.limit_val_batches=4",
    "trainer.limit_test_batches=4",
    "trainer.max_epochs=3",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "run.tensorboard=false",
]
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SUITE_RUN_DIR")


def environment(**more: str) -> dict[str, str]:
    """This process's, without what would make a run a part of another one."""
    clean = {k: v for k, v in os.environ.items() if k not in RANKS and "TORCHELASTIC" not in k}
    return {**clean, "OMP_NUM_THREADS": "1", **more}


@contextmanager
def started(command: Sequence[str], folder: Path, **more: str) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own, all of which is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def slowly(place: str, folder: Path, *tokens: str) -> list[str]:
    """The command of a tiny run that is slow in one place; tokens go before TINY's of their key."""
    given = {token.partition("=")[0] for token in tokens}
    kept = [token for token in TINY if token.partition("=")[0] not in given]
    return [str(SLOWLY), place, str(folder), *kept, *tokens]


def until(true: Callable[[], Any], *, seconds: float = 60.0, what: str = "") -> None:
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def in_session(process: subprocess.Popen[str]) -> dict[int, str]:
    """pid -> command of what is alive in a process's session."""
    listed = subprocess.run(
        ["ps", "-ww", "-o", "pid=,stat=,args=", "-s", str(process.pid)],
        capture_output=True,
        text=True,
    )
    rows = [line.split(None, 2) for line in listed.stdout.splitlines()]
    return {int(pid): args for pid, stat, args in rows if not stat.startswith("Z")}


def other_rank(process: subprocess.Popen[str]) -> int:
    """The pid of the rank that Lightning has started."""
    found = [pid for pid, args in in_session(process).items() if "slowly" in args]
    return next(pid for pid in sorted(found) if pid != process.pid)


def assert_nothing_is_left(process: subprocess.Popen[str]) -> None:
    """One that was just killed may take a moment."""
    until(lambda: not in_session(process), seconds=5, what=str(in_session(process)))


def end(process: subprocess.Popen[str], *, seconds: float = 60.0) -> tuple[int, str]:
    """Exit code and output."""
    output = process.communicate(timeout=seconds)[0]
    return process.returncode, output


def result(folder: Path) -> dict[str, Any]:
    """What a run says of itself."""
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def state(folder: Path, name: str = "last") -> dict[str, Any]:
    """What a run's checkpoint holds."""
    found: dict[str, Any] = torch.load(
        folder / "checkpoints" / f"{name}.ckpt", weights_only=True, map_location="cpu"
    )
    return found


def same(a: Any, b: Any) -> bool:
    """Whether two nested values are equal, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def assert_same_end(one: Path, two: Path) -> None:
    """Weights, moments, schedule and what was measured are the same of both runs."""
    a, b = state(one), state(two)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert same(a[key], b[key]), key
    first, second = result(one), result(two)
    for key in ("status", "primary", "metrics", "loss", "steps", "epochs"):
        assert first[key] == second[key], (key, first[key], second[key])
