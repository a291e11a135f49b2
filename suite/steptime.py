"""Time of a training step: the whole stack of the suite against a plain PyTorch loop.

Both sides start from the same weights, read the same batches through the same kind of loader, call
the same task step and drive the same optimizer and schedule; what differs is everything that the
suite and Lightning put around it. That they end with the same weights shows that the work was the
same. (With dropout they do not: the suite reseeds every step, the plain loop does not.)

How it is timed: a round is one `Trainer.fit` and one plain loop of as many steps, each from the
initial weights. They take turns inside the round: after about SLICE_SECONDS of training the trainer
waits in a callback while the plain loop does the same steps, or the other way round (drawn for each
round). So a machine that slows down slows both. Our clock runs from the end of one step to the end
of a later one, so it holds whole cycles (fetch, step, hooks, logging, drawing) and no start-up,
validation or checkpoint; WARMUP steps come before. The steps of a round are a multiple of the
logging interval where the epoch is long enough, so that they hold their share of logged windows.

The task's step is on both sides, with the metrics that it computes while training; on our side
their accumulation and logging come on top. (A loop without accuracy would be faster by that much.)
"""

from __future__ import annotations

import gc
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import rich
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from suite.build import Parts, build_callbacks, build_parts, build_trainer, quiet
from suite.callbacks import ProgressLines, SuiteProgressBar
from suite.config import Config, check_devices
from suite.errors import ConfigError
from suite.metrics import hardware, versions
from suite.module import SuiteModule
from suite.optim import build_optimizer, schedule, warmup_steps
from suite.run import initialise
from suite.signals import Signals
from suite.train import say

WARMUP = 4
PILOT = 5
ROUND_SECONDS = 1.0  # what a side's share of a round lasts at least, if the epoch is long enough
SLICE_SECONDS = 0.25
TERMINAL_WIDTH = 120


@dataclass(frozen=True)
class Round:
    """One pair of timings. ours, plain: seconds a step; gap: largest difference of a weight after
    it."""

    ours: float
    plain: float
    gap: float

    @property
    def ratio(self) -> float:
        return self.ours / self.plain


@dataclass(frozen=True)
class StepTimes:
    """What `measure` found. steps: of one timing; parts_on: the callbacks and loggers of our
    side."""

    config: Config
    rounds: list[Round]
    steps: int
    log_every: int
    parts_on: list[str]
    device: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        c, ratios = self.config, [r.ratio for r in self.rounds]
        return {
            "bench": "overhead",
            "task": c.task_name,
            "model": c.model_name,
            "data": c.data_name,
            "norm": c.norm_name,
            "batch_size": c.data.batch_size,
            "precision": c.trainer.precision,
            "device": self.device,
            "threads": torch.get_num_threads(),
            "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
            "ours_ms": 1e3 * statistics.median(r.ours for r in self.rounds),
            "plain_ms": 1e3 * statistics.median(r.plain for r in self.rounds),
            "overhead_ms": 1e3 * statistics.median(r.ours - r.plain for r in self.rounds),
            "weight_gap": max(r.gap for r in self.rounds),
            "steps": self.steps,
            "warmup": WARMUP,
            "log_every_n_steps": self.log_every,
            "with": self.parts_on,
            "rounds": [asdict(r) for r in self.rounds],
            "hardware": hardware(),
            "versions": versions(),
        }

    def to_text(self) -> str:
        """A few lines for a terminal."""
        d = self.to_dict()
        ratio, gap = d["ratio"], d["weight_gap"]
        where = f"cpu, {d['threads']} threads" if self.device == "cpu" else self.device
        what = f"{d['task']} {d['model']} {d['norm']}, batch {d['batch_size']}"
        rounds = f"{len(self.rounds)} rounds of {self.steps} steps"
        spread = f"{ratio['min']:.3f} to {ratio['max']:.3f}"
        lines = {
            "step": f"{what}, {where}, {d['precision']}",
            "ours": f"{d['ours_ms']:.2f} ms a step",
            "plain": f"{d['plain_ms']:.2f} ms a step",
            "ratio": f"{ratio['median']:.3f} (median of {rounds}, {spread}); "
            f"overhead {d['overhead_ms']:+.2f} ms a step",
            "with": f"{', '.join(self.parts_on)}; logged every {self.log_every} steps",
            "check": f"largest difference of a weight after {WARMUP + self.steps} steps: {gap:.2g}",
        }
        return "\n".join(f"{name:<7}{text}" for name, text in lines.items())


def measure(config: Config, *, rounds: int, steps: int | None) -> StepTimes:
    """Time `rounds` pairs. steps: of one timing; None: chosen from a pilot of the plain loop.

    Raises ConfigError for settings that a plain loop does not have or that the data cannot serve.
    """
    quiet()
    check_single(config)
    pair = Pair(config)
    available = len(pair.loader()) - WARMUP
    if available < (steps or 1):
        raise ConfigError(
            f"steps={steps or 1}: an epoch of data.batch_size={config.data.batch_size} has "
            f"{available + WARMUP} steps, {WARMUP} of them for warm-up; "
            "take fewer steps or a smaller batch"
        )
    step_seconds = pair.pilot(min(PILOT, available))
    if steps is None:
        every = config.trainer.log_every_n_steps
        steps = choose_steps(step_seconds, every=every, available=available)
    slices = cut(steps, size=max(1, math.ceil(SLICE_SECONDS / step_seconds)))
    found, order = [], random.Random(config.seed)
    for number in range(rounds):
        done = pair.round(slices, plain_first=order.random() < 0.5)
        say(
            f"round {number + 1}/{rounds}: ours {1e3 * done.ours:.2f} ms, "
            f"plain {1e3 * done.plain:.2f} ms, ratio {done.ratio:.3f}"
        )
        found.append(done)
    every = min(config.trainer.log_every_n_steps, steps)
    return StepTimes(config, found, steps, every, pair.parts_on, str(pair.device))


def check_single(config: Config) -> None:
    """Raise ConfigError for what the plain loop does not do."""
    trainer = config.trainer
    check_devices(config)
    precisions = ("32-true", "bf16-mixed")
    refused = {
        "trainer.devices": trainer.devices not in (1, "1"),
        "trainer.num_nodes": trainer.num_nodes != 1,
        "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches != 1,
        "trainer.strategy": trainer.strategy != "auto",
        "trainer.profiler": trainer.profiler is not None,
        "trainer.detect_anomaly": trainer.detect_anomaly,
        "optim.ema_decay": config.optim.ema_decay is not None,
        "run.resume": config.run.resume != "never",
        "evaluate": config.evaluate is not None,
    }
    for key, wrong in refused.items():
        if wrong:
            raise ConfigError(
                f"{key}: the plain loop of suite.bench overhead has no such thing; leave it out"
            )
    if trainer.precision not in precisions:
        raise ConfigError(
            f"trainer.precision={trainer.precision}: suite.bench overhead takes "
            f"{' or '.join(precisions)}"
        )


def choose_steps(step_seconds: float, *, every: int, available: int) -> int:
    """Whole logging windows that last ROUND_SECONDS together; what the epoch has where it is too
    short."""
    windows = -(-ROUND_SECONDS // (step_seconds * every))
    return min(max(1, int(windows)) * every, available // every * every or available)


def cut(steps: int, *, size: int) -> list[int]:
    """`steps` as slices of `size`, or a little less, all nearly equal."""
    count = -(-steps // size)
    return [steps // count + (k < steps % count) for k in range(count)]


class Turns(Callback):
    """Lets a plain loop train by turns with the trainer that this callback belongs to.

    plain: does a step each time it is asked for the next item. slices: steps of each turn.
    """

    def __init__(
        self,
        plain: Iterator[None],
        *,
        slices: Sequence[int],
        plain_first: bool,
        device: torch.device,
    ) -> None:
        self.plain, self.device = plain, device
        self.ours_left, self.plain_left = list(slices), list(slices)
        self.plain_first = plain_first
        self.ours_seconds, self.plain_seconds = 0.0, 0.0
        self._to_go, self._since = WARMUP, 0.0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self._to_go -= 1
        if self._to_go:
            return
        here = now(self.device)
        if self._since:
            self.ours_seconds += here - self._since
            self.plain_turn()
        else:
            self.advance(WARMUP)
            if self.plain_first:
                self.plain_turn()
        if self.ours_left:
            self._to_go = self.ours_left.pop(0)
        self._since = now(self.device)
        bar = trainer.progress_bar_callback
        if isinstance(bar, SuiteProgressBar):
            bar.next_drawing += self._since - here  # it is drawn as often as without the plain loop

    def plain_turn(self) -> None:
        """The plain loop's next slice, if it has one."""
        if self.plain_left:
            start = now(self.device)
            self.advance(self.plain_left.pop(0))
            self.plain_seconds += now(self.device) - start

    def advance(self, steps: int) -> None:
        """Some steps of the plain loop."""
        for _ in range(steps):
            next(self.plain)


def now(device: torch.device) -> float:
    """Seconds, after everything that was given to the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


class Pair:
    """The two sides, which have nothing in common but the weights that they start from."""

    def __init__(self, config: Config) -> None:
        # Validation, saving and limits of time are not part of a step
        self.config = replace(
            config,
            run=replace(config.run, save_every_n_steps=None),
            trainer=replace(config.trainer, max_epochs=None, max_time=None, limit_val_batches=0),
        )
        self.parts: Parts = build_parts(self.config, processes=1)
        initialise(self.parts)
        self.start = {k: v.clone() for k, v in self.parts.module.model.state_dict().items()}
        self.plain: SuiteModule = deepcopy(self.parts.module)
        self.batches = build_parts(self.config, processes=1).data
        idle = build_trainer(self.config, processes=1, callbacks=[], folder=None)
        self.batches.trainer = (
            idle  # for its device; it never trains, so its batches are the first ones
        )
        self.device: torch.device = idle.strategy.root_device
        mode = config.run.compile
        if mode:
            for module in (self.parts.module, self.plain):
                module.model.compile(mode=None if mode == "default" else mode)
        self.parts_on: list[str] = []

    def loader(self) -> Any:
        """The plain side's batches: those that the trainer sees, from the first on."""
        return self.batches.train_dataloader()

    def round(self, slices: Sequence[int], *, plain_first: bool) -> Round:
        """Both sides, by turns. slices: steps of each turn, after WARMUP."""
        steps = sum(slices)
        last, module, t = WARMUP + steps, self.parts.module, self.config.trainer
        every = min(t.log_every_n_steps, steps)
        trainer_config = replace(t, max_steps=last, log_every_n_steps=every)
        config = replace(self.config, trainer=trainer_config)
        turns = Turns(
            self.plain_steps(last), slices=slices, plain_first=plain_first, device=self.device
        )
        module.model.load_state_dict(self.start)
        with tempfile.TemporaryDirectory() as name, Path(os.devnull).open("w") as null:
            folder = Path(name)
            usual = build_callbacks(config, self.parts.spec, folder, Signals())
            usual = [at_terminal(c, null) for c in usual]
            trainer = build_trainer(config, processes=1, callbacks=[*usual, turns], folder=folder)
            self.parts_on = [type(x).__name__ for x in (*usual, *trainer.loggers)]
            gc.collect()
            try:
                trainer.fit(module, datamodule=self.parts.data)
            finally:
                rich.reconfigure()  # the bar had put its own console in the place of Rich's
        return Round(turns.ours_seconds / steps, turns.plain_seconds / steps, self.gap())

    def pilot(self, steps: int) -> float:
        """Seconds a step of the plain loop, roughly."""
        loop = self.plain_steps(WARMUP + steps)
        for _ in range(WARMUP):
            next(loop)
        start = now(self.device)
        for _ in range(steps):
            next(loop)
        return (now(self.device) - start) / steps

    def plain_steps(self, last: int) -> Iterator[None]:
        """The loop that everyone writes: `last` steps from the initial weights, one an item."""
        module, config = self.plain, self.config
        module.model.load_state_dict(self.start)
        module.to(self.device)
        fused = config.optim.fused
        fused = self.device.type == "cuda" if fused is None else fused
        optimizer = build_optimizer(module.model, config.optim, fused=fused)
        warmup = warmup_steps(config.optim, total=last, per_epoch=len(self.loader()))
        factor = schedule(config.optim, total=last, warmup=warmup)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        half = config.trainer.precision == "bf16-mixed"
        for batch in self.loader():
            batch = {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}
            optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext():
                out = module.step(batch, "train")
                loss = out.loss_sum / out.count
            loss.backward()
            clip(module.model, config)
            optimizer.step()
            scheduler.step()
            yield

    def gap(self) -> float:
        """Largest difference between a weight of one side and the same weight of the other."""
        ours, plain = self.parts.module.model.state_dict(), self.plain.model.state_dict()

        def apart(a: Tensor, b: Tensor) -> float:
            return float((a.cpu().double() - b.cpu().double()).abs().max())

        return max(apart(value, plain[name]) for name, value in ours.items())


def clip(model: nn.Module, config: Config) -> None:
    """Gradient clipping as trainer.* asks for it."""
    limit = config.trainer.gradient_clip_val
    if limit is None:
        return
    by_value = config.trainer.gradient_clip_algorithm == "value"
    how = torch.nn.utils.clip_grad_value_ if by_value else torch.nn.utils.clip_grad_norm_
    how(model.parameters(), limit)


def at_terminal(callback: Callback, null: Any) -> Callback:
    """The progress bar of someone at a terminal, drawn in full but to `null`, wherever this
    runs."""
    if isinstance(callback, (ProgressLines, SuiteProgressBar)):
        console = {"file": null, "force_terminal": True, "width": TERMINAL_WIDTH}
        return SuiteProgressBar(console=console)
    return callback
