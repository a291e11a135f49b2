"""The ways to save a checkpoint that `suite.bench safety` compares: their time and their memory."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from suite import saving
from suite.errors import DataError
from suite.reference import peak, restart_peak
from suite.train import say

LARGEST = 1 << 22  # numbers of a tensor: some dozen of them make a checkpoint


def by_suite(content: dict[str, Any], path: Path) -> None:
    saving.CheckpointFiles().save_checkpoint(content, path)


def by_suite_unsynced(content: dict[str, Any], path: Path) -> None:
    with patch.object(saving, "sync"):
        by_suite(content, path)


def by_torch(content: dict[str, Any], path: Path) -> None:
    torch.save(content, path)
    write_out(path)


def by_torch_unsynced(content: dict[str, Any], path: Path) -> None:
    torch.save(content, path)


def by_lightning(content: dict[str, Any], path: Path) -> None:
    TorchCheckpointIO().save_checkpoint(content, path)


SIDES: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "suite": by_suite,
    "torch.save": by_torch,
    "suite, no fsync": by_suite_unsynced,
    "torch.save, no fsync": by_torch_unsynced,
    "Lightning, no fsync": by_lightning,
}
AGAINST = {
    "suite": "torch.save",
    "suite, no fsync": "torch.save, no fsync",
    "Lightning, no fsync": "torch.save, no fsync",
}


def checkpoint(parameters: int, *, device: str) -> dict[str, Any]:
    """A run's checkpoint of so many weights, in tensors of LARGEST, with AdamW's moments."""
    sizes = [min(LARGEST, parameters - first) for first in range(0, parameters, LARGEST)]
    weights = {f"model.{k}": torch.rand(n, device=device) for k, n in enumerate(sizes)}
    moments = {
        k: {name: torch.rand(n, device=device) for name in ("exp_avg", "exp_avg_sq")}
        for k, n in enumerate(sizes)
    }
    groups = [{"lr": 1e-3, "params": list(moments)}]
    optimizer = {"state": moments, "param_groups": groups}
    return {"global_step": 1, "state_dict": weights, "optimizer_states": [optimizer]}


def write_out(path: Path) -> None:
    """Bring what the system's cache holds of a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def time_saves(
    parameters: int, folder: Path, *, rounds: int, device: str
) -> dict[str, list[float]]:
    """Seconds of each side's saves, one a round, after a round that is not timed."""
    content = checkpoint(parameters, device=device)
    paths = {side: folder / str(k) / "checkpoints" / "last.ckpt" for k, side in enumerate(SIDES)}
    took: dict[str, list[float]] = {side: [] for side in SIDES}
    order = random.Random(0)
    for number in range(-1, rounds):
        for side in order.sample(list(SIDES), len(SIDES)):
            paths[side].parent.mkdir(parents=True, exist_ok=True)
            start = time.perf_counter()
            SIDES[side](content, paths[side])
            seconds = time.perf_counter() - start
            write_out(paths[side])
            if number >= 0:
                took[side].append(seconds)
        if number >= 0:
            listed = ", ".join(f"{side} {seconds[-1]:.2f} s" for side, seconds in took.items())
            say(f"saving, round {number + 1}/{rounds}: {listed}")
    return took


def added_by(side: str, parameters: int, device: str, folder: Path) -> int:
    """Bytes of memory that a save adds to this process at its peak, the checkpoint not counted."""
    content, cpu = checkpoint(parameters, device=device), torch.device("cpu")
    path = folder / "alone" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    SIDES[side]({"global_step": 0, "first": torch.ones(1, device=device)}, path)  # loads its code
    gc.collect()
    before = restart_peak(cpu)
    SIDES[side](content, path)
    return peak(cpu) - before


def memory_of(parameters: int, folder: Path, *, device: str) -> dict[str, int]:
    """`added_by` each side, in fresh processes. Raises DataError where one is ended."""
    found = {}
    for side in SIDES:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                found[side] = pool.submit(added_by, side, parameters, device, folder).result()
            except (BrokenProcessPool, MemoryError, torch.OutOfMemoryError):
                raise DataError(
                    f"parameters={parameters}: the process that measures the memory of "
                    f"{side} was ended, most likely for want of memory; take fewer"
                ) from None
    return found
