"""Two gloo processes with batch B/2 give what one process gives with batch B."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import assert_same_training, free_port, launch, record
from photographs import write_tree

pytestmark = pytest.mark.ddp
SIZES = (7, 11, 64)
NORMS = ("layernorm", "dyt")
CONVNEXT = [
    "model=convnext_fmnist",
    "model.dim=8",
    "model.depth1=1",
    "model.depth2=1",
    "model.depth3=1",
    "model.layer_scale=0.5",
]


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


BROKEN = ("train/bag/3.jpg", "train/coat/0.jpg", "val/dress/1.jpg")
AUGMENTED = [
    *CONVNEXT[:-3],
    "model.depth2=1",
    "model.in_chans=3",
    "data.image_size=32",
    "data.randaugment=rand-m9-mstd0.5-inc1",
    "data.erase=0.25",
    "data.mixup=0.8",
    "data.cutmix=1.0",
    "data.on_error=skip",
    "data.num_workers=1",
    "data.drop_last=true",
    "task.label_smoothing=0.1",
]


def photograph_arguments(folder: Path, *, world: int) -> list[str]:
    """Augmented, mixed photographs of which three cannot be read."""
    common = arguments(folder / f"photos-{world}", size=1, norm="dyt", world=world)
    changed = {"data=first", "data.size=1", "data.batch_size=4", "data.drop_last=false"}
    kept = [token for token in common if token not in changed]
    cache = f"data.cache={folder / 'cache'}"
    return [
        *kept,
        "data=image_folder",
        f"data.root={folder / 'tree'}",
        cache,
        "data.batch_size=8",
        *AUGMENTED,
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, once with one process and once with two."""
    folder = tmp_path_factory.mktemp("ddp")
    write_tree(folder / "tree", broken=BROKEN)
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
        for norm in NORMS:
            for size in SIZES[1:]:
                place = folder / f"convnext-{norm}-{size}-{world}"
                commands.append([*arguments(place, size=size, norm=norm, world=world), *CONVNEXT])
        commands.append(photograph_arguments(folder, world=world))
        launch(commands, world=world, folder=folder)
    return folder


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", SIZES)
def test_two_processes_train_and_measure_as_one(runs: Path, norm: str, size: int) -> None:
    one, two = (record(runs / f"{norm}-{size}-{world}") for world in (1, 2))
    assert (one["result"]["world_size"], two["result"]["world_size"]) == (1, 2)
    assert one["result"]["metrics"]["test/count"] == size
    assert_same_training(one, two)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", SIZES[1:])
def test_a_convnext_trains_and_measures_as_one(runs: Path, norm: str, size: int) -> None:
    one, two = (record(runs / f"convnext-{norm}-{size}-{world}") for world in (1, 2))
    assert any(name.startswith("model.stages.2.blocks.0.norm") for name in one["weights"])
    assert_same_training(one, two)


def test_mixed_photographs_with_broken_files_train_as_one(runs: Path) -> None:
    """The files are skipped and counted over both ranks, and the pairs that are mixed stay."""
    one, two = (record(runs / f"photos-{world}") for world in (1, 2))
    assert_same_training(one, two)
    for found in (one, two):
        unreadable = found["result"]["data"]["unreadable"]
        assert {split: u["count"] for split, u in unreadable.items()} == {
            "train": 2,
            "val": 1,
            "test": 1,
        }
        assert found["result"]["metrics"]["val/count"] == 23


def test_a_broken_file_ends_both_ranks_and_is_named(tmp_path: Path) -> None:
    write_tree(tmp_path / "tree", broken=["train/dress/2.jpg"])
    tokens = [*AUGMENTED, "data=image_folder", f"data.root={tmp_path / 'tree'}", *SHORT]
    tokens = [t for t in tokens if not t.startswith(("data.on_error", "trainer.max_steps"))]
    tokens += ["data.batch_size=8", "trainer.max_epochs=1", "trainer.devices=2", "run.dir=run"]
    done = suite_train([], [*tokens, f"data.cache={tmp_path / 'cache'}"], tmp_path)
    assert done.returncode == 1
    named = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert any("train/dress/2.jpg" in line for line in named), done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"


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
