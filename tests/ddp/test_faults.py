"""Runs of two processes that end badly, and ranks that differ: status, exit code, no orphans.

Run as a script this file is the worker: `test_faults.py FAULT key=value ...` is suite.train with
that fault put into one rank. The runs are started together, since they wait more than they compute.
"""

from __future__ import annotations

import json
import os
import signal
import socket
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


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def start(
    folder: Path, fault: str, *tokens: str, env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """One process (which starts its own second one with trainer.devices=2), in its own session."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    clean.pop("SUITE_RUN_DIR", None)
    return subprocess.Popen(
        [sys.executable, __file__, fault, *BASE, *tokens],
        cwd=folder,
        env={**clean, "OMP_NUM_THREADS": "1", **(env or {})},
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
    for fault, epochs in (("early", 2), ("nan", 2), ("none", 100_000)):
        tokens = [*two, f"trainer.max_epochs={epochs}", f"run.dir={fault}"]
        under_way[fault] = start(folder, fault, *tokens)
    # the last evaluation batch has 1000 - 31 * 32 = 8 rows, all of them of rank 0
    exact = ["data.eval_batch_size=31", "trainer.max_epochs=2"]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    shared |= {"LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1", "GROUP_RANK": "0"}
    for rank in ("0", "1"):
        place = {**shared, "RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_RUN_ID": "test"}
        under_way[f"torchrun-{rank}"] = start(folder, "late", *exact, env=place)
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
    assert found["error"] == f"preempted by SIGTERM; saved {folder / 'checkpoints' / 'last.ckpt'}"
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


@pytest.mark.timeout(2 * TIMEOUT + 10)
def test_a_rank_that_fails_before_the_first_step_is_recorded(runs: dict[str, Any]) -> None:
    """Lightning's observer killed rank 0 as it waited: exit code 137 and no result.json."""
    code, output = end(runs, "early")
    assert code == 1, output
    found = record(runs, "early")
    assert (found["status"], "rank 1" in found["error"]) == ("failed", True)
    assert "error (rank 1): RuntimeError: broken before the start" in output
    assert_nothing_is_left(runs["early"])


@pytest.mark.timeout(2 * TIMEOUT + 10)
def test_ranks_of_torchrun_test_the_same_weights_each_example_once(
    runs: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 alone chooses the folder; the best weights are not the last ones."""
    from suite.train import main

    for rank in ("1", "0"):
        code, output = end(runs, f"torchrun-{rank}")
        assert code == 0, output
    (path,) = (runs["folder"] / "runs").rglob("result.json")
    found = json.loads(path.read_text())
    assert found["primary"]["best_step"] == 4
    assert found["metrics"]["test/count"] == found["metrics"]["val/count"] == 1000
    monkeypatch.chdir(runs["folder"])
    assert main([f"evaluate={path.parent}", "trainer.devices=1", "trainer.num_nodes=1"]) == 0
    alone = json.loads(capsys.readouterr().out)
    for name in ("test/loss", "test/acc", "test/acc_top5"):
        assert found["metrics"][name] == pytest.approx(alone[name], rel=1e-5)


def worker(fault: str, tokens: list[str]) -> int:
    """suite.train with the fault."""
    import torch
    from lightning.pytorch.callbacks import Callback

    import suite.build
    import suite.run
    from suite.module import SuiteModule
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
    if fault == "early" and second:

        def fail(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("broken before the start")

        suite.run.build_parts = fail
    if fault == "late":
        log, choose = SuiteModule.log_dict, suite.run.choose_place

        def falling(self: Any, values: dict[str, Any], **kwargs: Any) -> None:
            if "val/acc" in values:
                values = {**values, "val/acc": torch.tensor(1.0 / self.trainer.global_step)}
            log(self, values, **kwargs)

        def of_the_first(config: Any) -> Any:
            assert not second
            return choose(config)

        SuiteModule.log_dict = falling  # type: ignore[method-assign, assignment]
        suite.run.choose_place = of_the_first
    return main(tokens)


if __name__ == "__main__":
    sys.exit(worker(sys.argv[1], sys.argv[2:]))
