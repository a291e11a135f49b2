"""Time and memory of a training step: a task of the suite against the field's own implementation.

The task names the implementation (`TaskSpec.reference`) and says how both are given the same: equal
sizes and first weights, one batch, the same random draws. That both then have the same loss is
checked first. Each side is a plain loop (forward, loss, backward, update) with the same optimizer
over the same groups of parameters; what a suite and Lightning put around a step is the matter of
suite.steptime.

How it is timed: a round holds as many steps of each side, in turns of about SLICE_SECONDS, and
which side begins is drawn for each round, so that a machine that slows down slows both. WARMUP
steps of each come before. The learning rate is next to nothing: the last round has the weights of
the first, and what depends on them costs the same.

Memory is that of each side alone, in a process of its own: what PEAK_STEPS steps add to what the
process held before the first of them. So it holds activations, gradients and the optimizer's state;
weights and batch, which both have, come on top.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import random
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from suite.benches.peers import check_settings, reference_of, settle_seconds
from suite.build import build_parts, build_trainer, quiet
from suite.config import Config
from suite.errors import DataError, DivergedError
from suite.metrics import hardware, peak_memory, versions
from suite.module import Batch, SuiteModule
from suite.optim import build_optimizer
from suite.steptime import PILOT, ROUND_SECONDS, SLICE_SECONDS, clip, cut, now
from suite.train import say

WARMUP = 3
PEAK_STEPS = 2
TOLERANCE = 1e-3  # of the two losses, in float32
RATE = 1e-9  # of learning
MIB = 2**20

SideName = Literal["ours", "theirs"]
SIDES: tuple[SideName, ...] = ("ours", "theirs")


@dataclass(frozen=True)
class Round:
    """One pair of timings. ours, theirs: seconds a step."""

    ours: float
    theirs: float

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs


@dataclass(frozen=True)
class Comparison:
    """What `measure` found. losses: of ours and of theirs; added: bytes that steps of each add."""

    config: Config
    name: str
    notes: Sequence[str]
    rows: int
    seconds: float | None
    losses: tuple[float, float]
    added: dict[SideName, int]
    rounds: list[Round]
    steps: int
    device: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        c, ratios, added = self.config, [r.ratio for r in self.rounds], self.added
        return {
            "bench": "reference",
            "reference": self.name,
            "task": c.task_name,
            "model": c.model_name,
            "norm": c.norm_name,
            "rows": self.rows,
            "seconds": self.seconds,
            "precision": c.trainer.precision,
            "device": self.device,
            "threads": torch.get_num_threads(),
            "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
            "ours_ms": 1e3 * statistics.median(r.ours for r in self.rounds),
            "theirs_ms": 1e3 * statistics.median(r.theirs for r in self.rounds),
            "memory": {
                "what": memory_text(self.device),
                "ours_bytes": added["ours"],
                "theirs_bytes": added["theirs"],
                "ratio": added["ours"] / max(1, added["theirs"]),
            },
            "loss": {"ours": self.losses[0], "theirs": self.losses[1]},
            "steps": self.steps,
            "warmup": WARMUP,
            "notes": list(self.notes),
            "rounds": [asdict(r) for r in self.rounds],
            "hardware": hardware(),
            "versions": versions(),
        }

    def to_text(self) -> str:
        """A few lines for a terminal."""
        d = self.to_dict()
        ratio, memory = d["ratio"], d["memory"]
        where = f"cpu, {d['threads']} threads" if self.device == "cpu" else self.device
        length = "" if self.seconds is None else f" x {self.seconds:g} s"
        what = f"{d['task']} {d['model']} {d['norm']}, {self.rows}{length or ' examples'}"
        rounds = f"{len(self.rounds)} rounds of {self.steps} steps"
        ours, theirs = (f"{memory[f'{s}_bytes'] / MIB:.0f} MiB" for s in SIDES)
        lines = [
            ("step", f"{what}, {where}, {d['precision']}"),
            ("ours", f"{d['ours_ms']:.2f} ms a step"),
            ("theirs", f"{d['theirs_ms']:.2f} ms a step: {self.name}"),
            (
                "ratio",
                f"{ratio['median']:.3f} of their time "
                f"(median of {rounds}, {ratio['min']:.3f} to {ratio['max']:.3f})",
            ),
            ("memory", f"{memory['ratio']:.3f} of theirs: {ours} to {theirs}, {memory['what']}"),
            ("check", "losses {ours:.6g} and {theirs:.6g} of the same draws".format(**d["loss"])),
            *(("note", note) for note in self.notes),
        ]
        return "\n".join(f"{name:<8}{text}" for name, text in lines)


def memory_text(device: str) -> str:
    """What the figures of memory are."""
    kind = "resident memory" if device == "cpu" else "allocations on the device"
    return f"peak {kind} of {PEAK_STEPS} steps in a process of its own, over that before the first"


def measure(config: Config, *, rounds: int, rows: int, seconds: float | None) -> Comparison:
    """Compare losses, memory and time; rows and seconds are the batch's, None the usual length.

    Raises ConfigError for what cannot be compared, DivergedError if the two losses differ.
    """
    quiet()
    reference = reference_of(config.task_name)
    check_settings(config)
    config = reference.settle(config)
    seconds = settle_seconds(seconds, reference=reference, task=config.task_name)
    device = device_of(config)
    pair = Pair(config, rows=rows, seconds=seconds)
    losses = pair.losses()
    check_losses(*losses, name=reference.name)
    # before this process has allocated anything on the device
    added = {s: alone(s, config, rows=rows, seconds=seconds) for s in SIDES}
    pair.to(device)
    step_seconds = pair.pilot()
    steps = max(1, math.ceil(ROUND_SECONDS / step_seconds))
    slices = cut(steps, size=max(1, math.ceil(SLICE_SECONDS / step_seconds)))
    found, order = [], random.Random(config.seed)
    for number in range(rounds):
        done = pair.round(slices, order=order)
        say(
            f"round {number + 1}/{rounds}: ours {1e3 * done.ours:.2f} ms, "
            f"theirs {1e3 * done.theirs:.2f} ms, ratio {done.ratio:.3f}"
        )
        found.append(done)
    name, notes = reference.name, reference.notes
    return Comparison(config, name, notes, rows, seconds, losses, added, found, steps, str(device))


def check_losses(ours: float, theirs: float, *, name: str) -> None:
    """Raise DivergedError unless both sides compute one loss."""
    if not math.isclose(ours, theirs, rel_tol=TOLERANCE):
        raise DivergedError(
            f"the suite's loss is {ours:.6g} and that of {name} is {theirs:.6g} for the same "
            "weights, batch and draws: they do not compute the same, so there is nothing to time"
        )


def device_of(config: Config) -> torch.device:
    """The device that trainer.accelerator names."""
    idle = build_trainer(config, processes=1, callbacks=[], folder=None)
    device: torch.device = idle.strategy.root_device
    return device


class Side:
    """A model that is trained by a plain loop. loss: of its one batch."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor], *, config: Config) -> None:
        self.model, self.loss = model, loss
        self.device = next(model.parameters()).device
        self.half = config.trainer.precision == "bf16-mixed"
        self.config = config
        fused = config.optim.fused
        fused = self.device.type == "cuda" if fused is None else fused
        self.optimizer = build_optimizer(model, config.optim, fused=fused)
        for group in self.optimizer.param_groups:
            group["lr"] = RATE

    def step(self) -> None:
        """The loop that everyone writes."""
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16) if self.half else nullcontext():
            loss = self.loss()
        loss.backward()
        clip(self.model, self.config)
        self.optimizer.step()

    def seconds(self, steps: int) -> float:
        """How long so many steps take."""
        start = now(self.device)
        for _ in range(steps):
            self.step()
        return now(self.device) - start


class Pair:
    """The suite's module and the reference with the same weights and batch, at first on the CPU."""

    def __init__(self, config: Config, *, rows: int, seconds: float | None) -> None:
        self.config, self.reference = config, reference_of(config.task_name)
        parts = build_parts(config, processes=1)
        self.module = parts.module.train()
        self.batch = self.reference.batch(parts.data.splits, rows=rows, seconds=seconds)
        self.model = self.reference.build(config)
        self.reference.share(self.model, self.module)
        self.sides: dict[SideName, Side] = {}

    def losses(self) -> tuple[float, float]:
        """Of our side and of theirs, with the same noise."""
        theirs = self.reference.loss(self.model, self.module, self.batch)
        with torch.no_grad(), self.reference.same_noise(self.module, self.batch):
            return float(our_loss(self.module, self.batch)), float(theirs())

    def to(self, device: torch.device) -> None:
        """Move both to the device and make their loops."""
        for side in SIDES:
            self.sides[side] = self.side(side, device)

    def side(self, side: SideName, device: torch.device) -> Side:
        """The loop of one of the two."""
        batch = {name: value.to(device) for name, value in self.batch.items()}
        module = self.module
        if side == "ours":
            module.to(device)
            return Side(module.model, lambda: our_loss(module, batch), config=self.config)
        theirs = self.model.to(device)
        return Side(theirs, self.reference.loss(theirs, module, batch), config=self.config)

    def pilot(self) -> float:
        """Seconds a step of the quicker side, roughly, after the warm-up of both."""
        for side in self.sides.values():
            side.seconds(WARMUP)
        once = max(side.seconds(1) for side in self.sides.values())
        steps = PILOT if once < ROUND_SECONDS else 1
        return min(side.seconds(steps) / steps for side in self.sides.values())

    def round(self, slices: Sequence[int], *, order: random.Random) -> Round:
        """Both sides by turns. slices: steps of each turn."""
        gc.collect()
        turns = order.sample(SIDES, 2)
        took: dict[SideName, float] = dict.fromkeys(turns, 0.0)
        for steps in slices:
            for side in turns:
                took[side] += self.sides[side].seconds(steps)
        return Round(**{side: spent / sum(slices) for side, spent in took.items()})


def our_loss(module: SuiteModule, batch: Batch) -> Tensor:
    """The mean that a training step of the suite minimises."""
    with module.saving:
        out = module.step(batch, "train")
    return out.loss_sum / out.count


def alone(side: SideName, config: Config, *, rows: int, seconds: float | None) -> int:
    """Bytes that steps of one side add, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(added_by, side, config, rows, seconds).result()
        except (BrokenProcessPool, MemoryError, torch.OutOfMemoryError):
            size = "" if seconds is None else f" seconds={seconds:g}"
            raise DataError(
                f"rows={rows}{size}: the process that measures the memory of {side} was ended, "
                f"most likely for want of memory; take fewer rows{' or seconds' * bool(size)}"
            ) from None


def added_by(side: SideName, config: Config, rows: int, seconds: float | None) -> int:
    """Bytes that steps of one side add to what this process holds before the first of them."""
    quiet()
    pair = Pair(config, rows=rows, seconds=seconds)
    loop = pair.side(side, device_of(config))
    del pair  # and with it the other side
    gc.collect()
    before = restart_peak(loop.device)
    loop.seconds(PEAK_STEPS)
    return peak(loop.device) - before


def restart_peak(device: torch.device) -> int:
    """Forget the peak so far; what is held now (where the system keeps it, that peak)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    return peak(device)


def peak(device: torch.device) -> int:
    """Most bytes held so far: on a GPU what torch allocated, else this process's resident set.

    ru_maxrss of a fresh process on Linux starts at its parent's peak, VmHWM at nothing.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return peak_memory()
