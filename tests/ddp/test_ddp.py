"""Two gloo processes with batch B/2 give what one process gives with batch B."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.ddp
WORKER = Path(__file__).with_name("worker.py")
SIZES = (7, 11, 64)
NORMS = ("layernorm", "dyt")


def arguments(folder: Path, *, size: int, norm: str, world: int, accumulate: int = 1) -> list[str]:
    """SGD without momentum: weights after two epochs are equal only if every gradient was."""
    return [
        f"run.dir={folder}",
        f"norm={norm}",
        "data=first",
        f"data.size={size}",
        "data.batch_size=4",
        "data.eval_batch_size=4",
        "data.drop_last=false",
        "optim.name=sgd",
        "optim.lr=0.05",
        "optim.momentum=0.0",
        "trainer.max_epochs=2",
        "trainer.log_every_n_steps=1",
        "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false",
        f"trainer.devices={world}",
        f"trainer.accumulate_grad_batches={accumulate}",
        "run.tensorboard=false",
    ]


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


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, once with one process and once with two."""
    folder = tmp_path_factory.mktemp("ddp")
    for world in (1, 2):
        commands = [
            arguments(folder / f"{norm}-{size}-{world}", size=size, norm=norm, world=world)
            for norm in NORMS
            for size in SIZES
        ]
        commands.append(
            arguments(
                folder / f"accumulated-{world}", size=11, norm="dyt", world=world, accumulate=2
            )
        )
        launch(commands, world=world, folder=folder)
    return folder


def record(folder: Path) -> dict[str, Any]:
    result = json.loads((folder / "result.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {"result": result, "rows": rows, "weights": weights}


def assert_same_training(one: dict[str, Any], two: dict[str, Any]) -> None:
    names = ("train/loss", "train/acc", "grad_norm", "lr", "val/loss", "val/acc", "val/count")
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
    for key in ("test/acc", "test/loss", "test/count"):
        assert one["result"]["metrics"][key] == pytest.approx(
            two["result"]["metrics"][key], rel=2e-5
        )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", SIZES)
def test_two_processes_train_and_measure_as_one(runs: Path, norm: str, size: int) -> None:
    one, two = (record(runs / f"{norm}-{size}-{world}") for world in (1, 2))
    assert (one["result"]["world_size"], two["result"]["world_size"]) == (1, 2)
    assert one["result"]["metrics"]["test/count"] == size
    assert_same_training(one, two)


@pytest.mark.parametrize("world", [1, 2])
def test_accumulation_changes_nothing(runs: Path, world: int) -> None:
    assert_same_training(record(runs / f"dyt-11-{1}"), record(runs / f"accumulated-{world}"))


def suite_train(
    launcher: list[str], tokens: list[str], cwd: Path, *, timeout: int = 200
) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    env["OMP_NUM_THREADS"] = "1"
    return subprocess.run(
        [sys.executable, *launcher, "-m", "suite.train", *tokens],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


SHORT = [
    "trainer.max_steps=2",
    "trainer.accelerator=cpu",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
]


def test_devices_2_starts_its_own_processes(tmp_path: Path) -> None:
    done = suite_train([], [*SHORT, "trainer.devices=2"], tmp_path)
    assert done.returncode == 0, done.stderr
    (result,) = tmp_path.glob("runs/vision/classify/*/result.json")
    assert json.loads(result.read_text())["world_size"] == 2


def test_torchrun_starts_the_processes(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    done = suite_train(torchrun, SHORT, tmp_path)
    assert done.returncode == 0, done.stderr
    (result,) = tmp_path.glob("runs/vision/classify/*/result.json")
    assert json.loads(result.read_text())["world_size"] == 2
