"""Speed of loading: the suite's training loader against the plain loop that the task names.

Both sides decode the same files with the same operations, batch size and workers; what differs is
who draws the random numbers, and everything that the suite puts around a sample. No model runs, and
neither side pins its memory.

How it is timed: a round starts a loader of each side, one after the other, in random order, with
workers of its own, and ends it before the other one starts. Some batches go by untimed until every
worker has delivered; the clock then runs from one batch's arrival to a later one's, a whole number
of batches for each worker. A round before the first reads the files once, so that both sides find
them in the system's cache.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from suite.build import build_data, quiet
from suite.config import Config
from suite.data import SuiteDataModule
from suite.errors import ConfigError, DataError
from suite.metrics import hardware, versions
from suite.registry import DEFAULT_TASK, load_task
from suite.train import say

IMAGES = 2000


@dataclass(frozen=True)
class Round:
    """One pair of timings. ours, plain: examples a second."""

    ours: float
    plain: float

    @property
    def ratio(self) -> float:
        return self.ours / self.plain


@dataclass(frozen=True)
class LoadTimes:
    """What `measure` found. batches: of one timing; unit: what an example is.

    start_s, again_s: until the data is known, at first and once more, when a cache may help.
    """

    config: Config
    rounds: list[Round]
    batches: int
    unit: str
    start_s: float
    again_s: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        c, ratios = self.config, [r.ratio for r in self.rounds]
        return {
            "bench": "loading",
            "task": c.task_name,
            "data": c.data_name,
            "unit": self.unit,
            "batch_size": c.data.batch_size,
            "num_workers": c.data.num_workers,
            "batches": self.batches,
            "start_s": self.start_s,
            "again_s": self.again_s,
            "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
            "ours_per_s": statistics.median(r.ours for r in self.rounds),
            "plain_per_s": statistics.median(r.plain for r in self.rounds),
            "threads": torch.get_num_threads(),
            "rounds": [asdict(r) for r in self.rounds],
            "hardware": hardware(),
            "versions": versions(),
        }

    def to_text(self) -> str:
        """A few lines for a terminal."""
        d = self.to_dict()
        ratio, unit = d["ratio"], d["unit"]
        rounds = f"{len(self.rounds)} rounds of {d['batches'] * d['batch_size']} {unit}"
        lines = {
            "loading": f"{d['task']} {d['data']}, batch {d['batch_size']}, "
            f"data.num_workers={d['num_workers']}",
            "start": f"{self.start_s:.3f} s until the files are known, {self.again_s:.3f} s again",
            "ours": f"{d['ours_per_s']:.1f} {unit}/s",
            "plain": f"{d['plain_per_s']:.1f} {unit}/s",
            "ratio": f"{ratio['median']:.3f} of the plain loop's speed "
            f"(median of {rounds}, {ratio['min']:.3f} to {ratio['max']:.3f})",
        }
        return "\n".join(f"{name:<9}{text}" for name, text in lines.items())


def measure(config: Config, *, rounds: int, images: int | None) -> LoadTimes:
    """Time `rounds` pairs. images: of one timing; None: IMAGES, or what an epoch has.

    Raises ConfigError for a task or data without a plain loop, DataError for a file that cannot be
    read.
    """
    quiet()
    spec, data = load_task(config.task_name), config.data
    plain_loader = spec.plain_loader
    if plain_loader is None:
        raise ConfigError(
            f"task={config.task_name}: has no plain loader that suite.bench loading could compare "
            f"with; choose task={DEFAULT_TASK}"
        )
    starts = []
    for _ in range(2):
        start = time.perf_counter()
        splits = build_data(config, spec)
        starts.append(time.perf_counter() - start)
    sides: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain_loader(data, seed=config.seed),
        "ours": SuiteDataModule(splits, options=data, seed=config.seed).train_dataloader,
    }
    workers = max(1, data.num_workers)
    available = min(len(make()) for make in sides.values()) - workers
    batches = choose_batches(images, config, available=available)
    for make in sides.values():
        read(make, warmup=0, batches=batches + workers)
    found, order = [], random.Random(config.seed)
    for number in range(rounds):
        seconds = {
            side: read(sides[side], warmup=workers, batches=batches)
            for side in order.sample(sorted(sides), 2)
        }
        speed = {side: batches * data.batch_size / took for side, took in seconds.items()}
        done = Round(**speed)
        say(
            f"round {number + 1}/{rounds}: ours {done.ours:.1f}, plain {done.plain:.1f} "
            f"{spec.unit}/s, ratio {done.ratio:.3f}"
        )
        found.append(done)
    return LoadTimes(config, found, batches, spec.unit, *starts)


def choose_batches(images: int | None, config: Config, *, available: int) -> int:
    """Batches of one timing: as many for each worker. Raises ConfigError if there are too few."""
    size, workers = config.data.batch_size, max(1, config.data.num_workers)
    asked = IMAGES if images is None else images
    wanted = -(-asked // (size * workers)) * workers
    most = max(0, available) // workers * workers
    if most == 0 or (images is not None and wanted > most):
        raise ConfigError(
            f"images={asked}: an epoch of data.batch_size={size} has {most * size} to be timed "
            f"with {workers} loading processes; take fewer images or workers, a smaller batch or "
            "a larger folder"
        )
    return min(wanted, most)


def read(make: Callable[[], Iterable[Any]], *, warmup: int, batches: int) -> float:
    """Seconds from the arrival of batch `warmup` to that of batch `warmup + batches`.

    With warmup=0 from before the first. The loader lives in here alone, so that its workers have
    ended when this returns. Raises DataError.
    """
    loader = make()
    iterator, start = iter(loader), time.perf_counter()
    try:
        for k in range(warmup + batches):
            next(iterator)
            if k + 1 == warmup:
                start = time.perf_counter()
    except OSError as error:
        last = str(error).strip().rpartition("\n")[2]
        raise DataError(
            f"the plain loop cannot read a file ({last}); take a folder in which every file can "
            "be decoded"
        ) from None
    return time.perf_counter() - start
