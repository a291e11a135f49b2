"""kill -9 at random moments of a training: what is left verifies, and the run ends bit-equal.

A run is killed and submitted again, the same command each time, until it has been killed KILLS
times (SUITE_KILLS, 60 unless set) over some chains; each chain's last attempt is left alone.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import TINY, assert_same_end, environment, result, state

from suite.saving import newest

pytestmark = [pytest.mark.timeout(800)]
KILLS = int(os.environ.get("SUITE_KILLS", "60"))
CHAIN = 6  # kills before a run is left to end
TOKENS = [*TINY, "run.save_every_n_steps=2", "optim.ema_decay=0.9", "run.resume=auto"]


class Zygote:
    """The process that forks runs."""

    def __init__(self) -> None:
        script = str(Path(__file__).with_name("zygote.py"))
        self.process = subprocess.Popen(
            [sys.executable, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def _ask(self, order: dict[str, Any]) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self._answer())

    def start(self, argv: list[str], folder: Path, **env: str) -> int:
        order = {"argv": argv, "cwd": str(folder), "env": env, "log": str(folder / "log.txt")}
        return self._ask(order)

    def wait(self, pid: int) -> int:
        return self._ask({"wait": pid})


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    assert made.process.stdin is not None
    made.process.stdin.close()
    made.process.wait(timeout=30)


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def start(zygote: Zygote, folder: Path, *, world: int) -> list[int]:
    """All ranks of the run in `folder`."""
    argv = [*TOKENS, f"run.dir={folder / 'run'}"]
    if world == 1:
        return [zygote.start(argv, folder)]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "TORCHELASTIC_RUN_ID": "test"}
    pids = []
    for rank in range(world):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
        sizes = {f"{name}WORLD_SIZE": str(world) for name in ("", "LOCAL_")}
        pids.append(zygote.start(argv, folder, **shared, **place, **sizes, GROUP_WORLD_SIZE="1"))
    return pids


def step_left(folder: Path) -> int:
    """The step of the newest checkpoint that verifies, 0 without one; a broken one fails."""
    found, skipped = newest(folder)
    assert not skipped, skipped
    return 0 if found is None else int(state(folder, found.stem)["global_step"])


@pytest.mark.parametrize(("world", "kills"), [(1, KILLS - KILLS // 5), (2, KILLS // 5)])
def test_a_run_that_is_killed_again_and_again_ends_as_the_whole_one(
    zygote: Zygote, world: int, kills: int, tmp_path: Path
) -> None:
    seed = int(os.environ.get("SUITE_KILLS_SEED", time.time_ns() % 10**6))
    print(f"SUITE_KILLS_SEED={seed}")
    draw = random.Random(seed)
    (whole := tmp_path / "whole").mkdir()
    began = time.monotonic()
    codes = [zygote.wait(pid) for pid in start(zygote, whole, world=world)]
    assert codes == [0] * world, (whole / "log.txt").read_text()
    takes = time.monotonic() - began
    done, chains, steps = 0, 0, []
    while done < kills:
        (folder := tmp_path / f"chain-{chains}").mkdir()
        for _ in range(min(CHAIN, kills - done)):
            pids = start(zygote, folder, world=world)
            time.sleep(draw.uniform(0.15, 1.0) * takes)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            ended = [zygote.wait(pid) for pid in pids]
            done += ended.count(-signal.SIGKILL) > 0
            assert set(ended) <= {0, -signal.SIGKILL}, (folder / "log.txt").read_text()
            steps.append(step_left(folder / "run"))
            if ended.count(0) == world:
                break
        codes = [zygote.wait(pid) for pid in start(zygote, folder, world=world)]
        log = (folder / "log.txt").read_text()
        assert codes == [0] * world, log
        assert "Traceback" not in log, log
        assert result(folder / "run")["status"] == "done"
        assert_same_end(folder / "run", whole / "run")
        assert not list((folder / "run" / ".tmp").glob("*"))
        chains += 1
    print(f"{done} kills in {chains} chains; steps that were left: {sorted(steps)}")
    assert any(0 < step < 18 for step in steps)  # else no kill has met a training
