"""Runs the worker on one process or on two, and compares what came out."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = Path(__file__).with_name("worker.py")


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def launch(commands: list[list[str]], *, world: int, folder: Path) -> None:
    """Run the worker once a rank, with torchrun's variables where there is more than one."""
    file = folder / f"commands-{world}.json"
    file.write_text(json.dumps(commands))
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(world):
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "GROUP_WORLD_SIZE": "1",
            "TORCHELASTIC_RUN_ID": "test",
        }
        env = {**clean, **shared, **(place if world > 1 else {})}
        processes.append(
            subprocess.Popen(
                [sys.executable, str(WORKER), str(file)],
                env=env,
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [p.communicate(timeout=240)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0] * world, outputs


def record(folder: Path) -> dict[str, Any]:
    """What a run wrote: result.json, metrics.jsonl and its last weights."""
    result = json.loads((folder / "result.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {"result": result, "rows": rows, "weights": weights}


NAMES = ("train/loss", "train/acc", "grad_norm", "lr", "val/loss", "val/acc", "val/count")
TESTED = ("test/acc", "test/loss", "test/count")


def assert_same_training(
    one: dict[str, Any],
    two: dict[str, Any],
    *,
    names: Sequence[str] = NAMES,
    tested: Sequence[str] = TESTED,
) -> None:
    """Logged values, weights and the metrics of the test split agree."""
    assert len(one["rows"]) == len(two["rows"])
    compared = 0
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert a["step"] == b["step"]
        for name in names:
            assert (name in a) == (name in b)
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=2e-5, abs=2e-6), (a["step"], name)
                compared += 1
    assert compared > 8
    for name, tensor in one["weights"].items():
        torch.testing.assert_close(
            two["weights"][name], tensor, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    for key in tested:
        assert one["result"]["metrics"][key] == pytest.approx(
            two["result"]["metrics"][key], rel=2e-5
        )
