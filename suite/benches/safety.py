"""What it costs that a run survives: its checkpoints and its guards (`suite.bench safety`).

Saving: a checkpoint of so many float32 parameters with AdamW's two moments, written to the current
folder's disk by turns: by the suite (hashed, renamed, verified later), by torch.save, each down to
the disk (fsync) and without, and by Lightning's own writer. Every side replaces its file of the
round before, and what it left in the system's cache is written out, untimed, before the next one.
Memory is what a save adds to a process of its own that holds the checkpoint. See safety_saves.

Guards: in one training of the trainer that suite.build makes, callbacks that guard a run are taken
out and put back, some steps with them, as many without, in random order. So both sides have the
same weights, batches and neighbours, and the difference inside a pair of slices is the guards'.
Not in it: what the all-reduce of a step carries for them, three numbers more in a message that is
sent anyway, with more than one process.
"""

from __future__ import annotations

import gc
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from suite.bench import MIN_ROUNDS, settled, split_tokens, whole_number
from suite.benches.safety_saves import AGAINST, SIDES, memory_of, time_saves
from suite.benches.saved import check_folder, header, header_lines, keep
from suite.build import build_callbacks, build_parts, build_trainer, quiet
from suite.config import Config
from suite.divergence import DivergenceWatch
from suite.errors import ConfigError
from suite.module import Observer, SuiteModule
from suite.nonfinite import NonFiniteGuard
from suite.registry import DEFAULT_TASK
from suite.run import initialise
from suite.signals import Signals
from suite.steptime import check_single, now
from suite.stopping import StopTogether
from suite.train import say

KEYS = ("parameters", "steps", "rounds", "device")
SWITCHES = ("--json", "--save")
GUARDS = (NonFiniteGuard, DivergenceWatch, StopTogether)
SLICE = 10  # steps: one logging window
WARMUP = 20
REFERENCE_STEP = 0.050  # seconds, that a guard's cost is a share of
TASK = {
    "task": DEFAULT_TASK,
    "data.batch_size": "8",
    "model.dim": "32",
    "model.depth": "2",
    "model.heads": "2",
    "norm.alpha_init": "calibrated",  # nothing to warn of
}


@dataclass(frozen=True)
class Setting:
    """What the command was told. steps: of each side of a round, with the guards and without."""

    parameters: int
    steps: int
    rounds: int
    device: str
    config: Config


# -- guards ----------------------------------------------------------------------------------------


class Turns(Callback):
    """Trains by slices with the guards and without them, and notes the seconds of each.

    order: for each slice after WARMUP whether the guards are there.
    """

    def __init__(self, order: Sequence[bool], *, device: torch.device) -> None:
        self.left, self.device = list(order), device
        self.slices: list[tuple[bool, float]] = []
        self._to_go, self._since = WARMUP, 0.0
        self._on: bool | None = None
        self._callbacks: list[Callback] = []
        self._observers: list[Observer] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, SuiteModule)
        self._callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]
        self._observers = list(module.observers)

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self._to_go -= 1
        if self._to_go:
            return
        here = seconds_of(self.device)
        if self._on is not None:
            self.slices.append((self._on, here - self._since))
        if self.left:
            self._on, self._to_go = self.left.pop(0), SLICE
            # new lists: Lightning is going through the old ones
            trainer.callbacks = chosen(self._callbacks, guarded=self._on)
            module.observers = chosen(self._observers, guarded=self._on)
        self._since = seconds_of(self.device)

    def pairs(self) -> list[tuple[float, float]]:
        """Seconds a step with the guards and without them, of slices that follow each other."""
        halves = zip(self.slices[::2], self.slices[1::2], strict=True)
        found = (dict(pair) for pair in halves)
        return [(p[True] / SLICE, p[False] / SLICE) for p in found]


def seconds_of(device: torch.device) -> float:
    """The clock that `clock_of` names, after all that was given to the device is done."""
    return time.process_time() if clock_of(device).startswith("process") else now(device)


def clock_of(device: torch.device) -> str:
    """What a step's times are. Process time leaves out what neighbours take."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return "process CPU time" if alone else "wall clock"


def chosen(parts: Sequence[Any], *, guarded: bool) -> list[Any]:
    """All of a trainer's parts, or those that are no guard."""
    return [part for part in parts if guarded or not isinstance(part, GUARDS)]


def time_guards(setting: Setting) -> tuple[list[list[tuple[float, float]]], list[str]]:
    """For each round its pairs of seconds a step, with the guards and without; the guards' names.

    Raises ConfigError for settings that this cannot take.
    """
    quiet()
    check_single(setting.config)
    count = setting.steps // SLICE
    steps = WARMUP + 2 * count * SLICE
    limits = {"max_epochs": None, "max_time": None, "max_steps": steps, "limit_val_batches": 0}
    trainer_options: Any = {**limits, "log_every_n_steps": SLICE}
    config = replace(
        setting.config,
        run=replace(setting.config.run, save_every_n_steps=None),
        trainer=replace(setting.config.trainer, **trainer_options),
    )
    draw, found, names = random.Random(config.seed), [], list[str]()
    for number in range(setting.rounds):
        parts = build_parts(config, processes=1)
        initialise(parts)
        order = [on for _ in range(count) for on in draw.sample((True, False), 2)]
        usual = build_callbacks(config, parts.spec, None, Signals())
        turns = Turns(order, device=torch.device(setting.device))
        trainer = build_trainer(config, processes=1, callbacks=[*usual, turns], folder=None)
        names = [type(c).__name__ for c in usual if isinstance(c, GUARDS)]
        gc.collect()
        trainer.fit(parts.module, datamodule=parts.data)
        found.append(turns.pairs())
        cost = statistics.median(a - b for a, b in found[-1])
        say(f"guards, round {number + 1}/{setting.rounds}: {1e6 * cost:+.1f} us a step")
    return found, names


# -- the command -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What `measure` found. added: bytes by side. pairs: of each round; guards: their names."""

    setting: Setting
    header: dict[str, Any]
    bytes: int
    seconds: dict[str, list[float]]
    added: dict[str, int]
    pairs: list[list[tuple[float, float]]]
    guards: list[str]

    def of_saving(self, side: str) -> dict[str, Any]:
        """The figures of one side."""
        other, own = AGAINST.get(side), self.seconds[side]
        found = {"side": side, "seconds": own, **spread(own), "added_bytes": self.added[side]}
        if other is None:
            return {**found, "ratio": None}
        ratios = [a / b for a, b in zip(own, self.seconds[other], strict=True)]
        return {**found, "ratio": {"to": other, **spread(ratios)}}

    def of_guards(self) -> dict[str, Any]:
        """Their cost: of each round the median difference, and the median of those."""
        costs = [statistics.median(a - b for a, b in pairs) for pairs in self.pairs]
        plain = statistics.median(b for pairs in self.pairs for _, b in pairs)
        return {
            "guards": self.guards,
            "clock": clock_of(torch.device(self.setting.device)),
            "cost_us": spread([1e6 * cost for cost in costs]),
            "step_ms": 1e3 * plain,
            "share_of_50_ms": statistics.median(costs) / REFERENCE_STEP,
            "pairs": self.pairs,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "bench": "safety",
            "header": self.header,
            "parameters": self.setting.parameters,
            "steps": self.setting.steps,
            "rounds": self.setting.rounds,
            "bytes": self.bytes,
            "saving": [self.of_saving(side) for side in SIDES],
            "guarding": self.of_guards(),
        }

    def to_markdown(self) -> str:
        """A table and a sentence."""
        s, found = self.setting, self.of_guards()
        lines = [
            f"A checkpoint of {s.parameters:,} parameters with AdamW's moments, {s.device}, "
            f"{self.bytes / 1e6:,.0f} MB, {s.rounds} rounds. Seconds are medians; a ratio is the "
            "median of those inside a round, with least and most. Memory: what a save adds.",
            "",
            "| written by | s | ratio | to | MB of memory |",
            "|---|---|---|---|---|",
        ]
        for side in SIDES:
            f = self.of_saving(side)
            r = f["ratio"]
            ratio = f"{r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})" if r else "-"
            added = f"{f['added_bytes'] / 1e6:,.0f}"
            lines.append(f"| {side} | {f['median']:.2f} | {ratio} | {r['to'] if r else '-'} | ")
            lines[-1] += f"{added} |"
        cost = found["cost_us"]
        config = s.config
        lines += [
            "",
            f"Guards ({', '.join(found['guards'])}; run.nonfinite={config.run.nonfinite}) on a "
            f"step of {found['step_ms']:.2f} ms of {config.task_name}: {cost['median']:+.0f} us "
            f"({cost['min']:+.0f} to {cost['max']:+.0f}), {found['share_of_50_ms']:.2%} of a step "
            f"of 50 ms. {s.rounds} rounds of {s.steps} steps with them and as many without, by "
            f"turns of {SLICE}, one of which is logged; {found['clock']}.",
        ]
        return "\n".join(lines)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def run(argv: Sequence[str]) -> int:
    """`python -m suite.bench safety`. Raises ConfigError for a mistake in the tokens."""
    if {"--help", "-h"} & set(argv):
        print(HELP)
        return 0
    setting = parse(argv)
    device = torch.device(setting.device)
    if "--save" in argv:
        check_folder(device)
    result = measure(setting)
    if "--json" in argv:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        print("\n".join([*header_lines(result.header), "", result.to_markdown()]))
    if "--save" in argv:
        folder = keep(
            "safety",
            device=device,
            result=result.to_dict(),
            markdown=result.to_markdown(),
            command=" ".join(["python -m suite.bench safety", *argv]),
        )
        say(f"kept in {folder}")
    return 0


def parse(argv: Sequence[str]) -> Setting:
    """The setting that the tokens name. Raises ConfigError."""
    own, rest = split_tokens([a for a in argv if a not in SWITCHES], own=KEYS)
    device = own.get("device", "cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"device={device}: must be cpu, or cuda where there is an NVIDIA GPU")
    given = {token.partition("=")[0] for token in rest}
    if "trainer.accelerator" in given:
        raise ConfigError("trainer.accelerator: suite.bench safety takes device=cpu or cuda")
    usual = {} if given & {"task", "model", "norm"} else TASK
    tokens = [f"{key}={value}" for key, value in usual.items() if key not in given]
    accelerator = "gpu" if device == "cuda" else "cpu"
    return Setting(
        parameters=whole_number("parameters", own.get("parameters", "100000000"), low=1),
        steps=whole_number("steps", own.get("steps", "400"), low=SLICE),
        rounds=whole_number("rounds", own.get("rounds", str(MIN_ROUNDS)), low=1),
        device=device,
        config=settled([*tokens, *rest, f"trainer.accelerator={accelerator}"], command="safety"),
    )


def measure(setting: Setting) -> Result:
    """Both parts. Raises ConfigError where the files have no room in the current folder."""
    size = 3 * 4 * setting.parameters
    needed, free = (len(SIDES) + 2) * size, shutil.disk_usage(".").free
    if free < needed:
        raise ConfigError(
            f"parameters={setting.parameters}: needs {needed / 1e9:.1f} GB in the current folder, "
            f"which has {free / 1e9:.1f} GB free; take fewer, or run it elsewhere"
        )
    pairs, guards = time_guards(setting)
    with tempfile.TemporaryDirectory(dir=".", prefix=".safety-") as name:
        folder = Path(name).resolve()
        added = memory_of(setting.parameters, folder, device=setting.device)
        seconds = time_saves(
            setting.parameters, folder, rounds=setting.rounds, device=setting.device
        )
    head = header(torch.device(setting.device))
    return Result(setting, head, size, seconds, added, pairs, guards)


HELP = f"""\
What it costs that a run survives faults: saving, and the guards of a training step.

usage: python -m suite.bench safety [parameters=100000000] [steps=400] [rounds={MIN_ROUNDS}]
                                    [device=cpu|cuda] [key=value ...] [--json] [--save]

parameters=N  of the checkpoint that is saved, float32, with AdamW's two moments
steps=N       steps of a round with the guards, and as many without, in whole turns of {SLICE}
rounds=N      turns of each way to save, and trainings; figures are medians over them
device        where weights are and the training runs; cuda where there is an NVIDIA GPU, else cpu
key=value     what suite.train takes, for the training, such as run.nonfinite=skip; without task=,
              model= and norm= a small {DEFAULT_TASK}: in short steps a difference shows
--json        everything that was measured, as one JSON object
--save        keep it in benchmarks/<device>/safety.json and .md

Files are written to the current folder's disk and removed; they take {len(SIDES) + 2} times the
checkpoint's size of it.

examples
  OMP_NUM_THREADS=1 python -m suite.bench safety device=cpu
  python -m suite.bench safety parameters=1000000 rounds=9 run.nonfinite=skip"""
