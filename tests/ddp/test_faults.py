"""Runs of two processes that are stopped or diverge: status, exit code, no orphans.

Run as a script this file is the worker: `test_faults.py FAULT key=value ...` is suite.train with
that fault put into one rank. The runs are started together, since they wait more than they compute.
Other faults are in tests/reliability.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from suite.saving import newest

pytestmark = pytest.mark.ddp
TIMEOUT = 80
BASE = [
    "data.batch_size=32",
    "trainer.limit_train_batches=4",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "run.tensorboard=false",
]


def start(folder: Path, fault: str, *tokens: str) -> subprocess.Popen[str]:
    """One process (which starts its own second one with trainer.devices=2), in its own session."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    clean.pop("SUITE_RUN_DIR", None)
    return subprocess.Popen(
        [sys.executable, __file__, fault, *BASE, *tokens],
        cwd=folder,
        env={**clean, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """All runs, under way; whatever is left of them at the end is killed."""
    folder = tmp_path_factory.mktemp("faults")
    two = ["trainer.devices=2", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
    under_way: dict[str, Any] = {"folder": folder}
    for fault, epochs in (("nan", 2), ("none", 100_000)):
        tokens = [*two, f"trainer.max_epochs={epochs}", f"run.dir={fault}"]
        under_way[fault] = start(folder, fault, *tokens)
    yield under_way
    for name, process in under_way.items():
        if name != "folder":
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def end(runs: dict[str, Any], name: str) -> tuple[int, str]:
    """Exit code and output of a run that comes to its end."""
    output = runs[name].communicate(timeout=TIMEOUT)[0]
    return runs[name].returncode, output


def record(runs: dict[str, Any], name: str) -> dict[str, Any]:
    return json.loads((runs["folder"] / name / "result.json").read_text())


def assert_nothing_is_left(process: subprocess.Popen[str]) -> None:
    """No process of the run's session is alive (one that was just killed may take a moment)."""
    for _ in range(50):
        listed = subprocess.run(
            ["ps", "-o", "stat=", "-s", str(process.pid)], capture_output=True, text=True
        )
        if not [line for line in listed.stdout.split() if not line.startswith("Z")]:
            return
        time.sleep(0.1)
    raise AssertionError(listed.stdout)


@pytest.mark.timeout(2 * TIMEOUT + 10)
def test_sigterm_to_the_first_process_ends_both_with_a_checkpoint(runs: dict[str, Any]) -> None:
    """As a container's or a scheduler's stop does. Lightning's own handler hung in a broadcast."""
    log = runs["folder"] / "none" / "metrics.jsonl"
    until = time.monotonic() + TIMEOUT
    while not (log.exists() and log.stat().st_size) and time.monotonic() < until:
        time.sleep(0.1)
    runs["none"].send_signal(signal.SIGTERM)
    code, output = end(runs, "none")
    assert code == 143, output
    found = record(runs, "none")
    assert found["status"] == "interrupted"
    folder = runs["folder"] / "none"
    assert found["error"] == f"preempted by SIGTERM; saved {Path('none/checkpoints/last.ckpt')}"
    assert newest(folder)[0] == folder / "checkpoints" / "last.ckpt"
    assert_nothing_is_left(runs["none"])


@pytest.mark.timeout(2 * TIMEOUT + 10)
def test_a_nan_on_one_rank_ends_both_with_the_record_of_it(runs: dict[str, Any]) -> None:
    code, output = end(runs, "nan")
    assert code == 3, output
    assert record(runs, "nan")["status"] == "diverged"
    text = "non-finite loss or gradient at step 3, epoch 0, rank 1: first non-finite output"
    assert record(runs, "nan")["error"].startswith(text)
    assert output.count(f"error: {text}") == 1
    assert "batch['image']" in output
    assert_nothing_is_left(runs["nan"])


def worker(fault: str, tokens: list[str]) -> int:
    """suite.train with the fault."""
    import torch
    from lightning.pytorch.callbacks import Callback

    import suite.build
    import suite.run
    from suite.train import main

    torch.set_num_threads(1)
    second = os.environ.get("LOCAL_RANK") == "1"

    class Poison(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if trainer.global_step == 2:
                batch["image"][0, 0, 0, 0] = float("nan")

    if fault == "nan" and second:
        whole = suite.build.build_callbacks
        suite.run.build_callbacks = lambda *a, **k: [*whole(*a, **k), Poison()]
    return main(tokens)


if __name__ == "__main__":
    sys.exit(worker(sys.argv[1], sys.argv[2:]))
