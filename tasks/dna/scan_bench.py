"""Time and memory of the selective scan against the field's ways of computing it in PyTorch.

Each side gets the same inputs (batch x length x dim channels of `state` states, softplus, bias, D
and gate) and does a forward and a backward. At each length all sides take turns in rounds, in an
order drawn for each round, so that a machine that slows down slows all. Before that the output of
each is compared with the position-by-position reference. Memory is measured in one fresh process a
side: what a forward and a backward add at their peak to what the process held before.

The official formula (selective_scan_ref of mamba_ssm, written here from its definition) indexes
the positions one by one, so its backward costs the square of the length; it stops early.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import multiprocessing
import random
import shutil
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from suite.bench import split_tokens, whole_number
from suite.errors import ConfigError
from suite.metrics import hardware, versions
from suite.reference import MIB, peak, restart_peak
from suite.steptime import now
from suite.train import say
from tasks.dna.scan import Scan, installed, resolve, run_reference, selective_scan

LENGTHS = "256,1024,4096,16384"
SLICE_SECONDS = 0.1  # what a timing lasts at least
TOLERANCE = 1e-3  # of an output, relative to the largest
MEMORY = "peak that a step adds to what a process of its own held before it (cpu: resident)"
KEYS = ("length", "rounds", "batch", "dim", "state", "device")

Run = Callable[[Scan], Tensor]


@dataclass(frozen=True)
class Setting:
    """What is measured, as the command line says it."""

    lengths: tuple[int, ...]
    rounds: int = 5
    batch: int = 1
    dim: int = 128
    state: int = 16
    device: str = "cpu"
    compiled: bool = False


@dataclass(frozen=True)
class Side:
    """A way of computing the scan. longest: length, beyond it `why` says why it is left out."""

    name: str
    run: Run
    longest: int | None = None
    why: str = ""


@dataclass
class Found:
    """Of one side at one length. ratios: its time by ours, a round each; bytes: peak, None where
    the process was ended."""

    side: str
    length: int
    ms: float
    ratios: list[float]
    error: float
    bytes: int | None = None


@dataclass
class Result:
    """What `measure` found. growth: exponent of time and of memory in the length, a side each."""

    setting: Setting
    ours: str
    found: list[Found]
    growth: dict[str, dict[str, float]]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "bench": "scan",
            **asdict(self.setting),
            "ours": self.ours,
            "threads": torch.get_num_threads(),
            "found": [{**asdict(f), "ratio": statistics.median(f.ratios)} for f in self.found],
            "growth": self.growth,
            "memory": MEMORY,
            "notes": self.notes,
            "hardware": hardware(),
            "versions": versions(),
        }

    def to_text(self) -> str:
        """A table for a terminal."""
        s = self.setting
        where = f"cpu, {torch.get_num_threads()} threads" if s.device == "cpu" else s.device
        lines = [
            f"scan    forward + backward, batch {s.batch}, {s.dim} channels, {s.state} states, "
            f"{where}, float32",
            f"times   of {self.ours}: median of {s.rounds} rounds (least to most); "
            "more is slower than ours",
            f"memory  {MEMORY}",
            f"{'length':>7}  {'side':<20}{'ms':>10}  {'times ours':<24}{'MiB':>8}  error",
        ]
        for f in self.found:
            spread = f"{statistics.median(f.ratios):.2f} ({min(f.ratios):.2f} to "
            spread += f"{max(f.ratios):.2f})"
            mib = "-" if f.bytes is None else f"{f.bytes / MIB:.0f}"
            lines.append(
                f"{f.length:>7}  {f.side:<20}{f.ms:>10.2f}  {spread:<24}{mib:>8}  {f.error:.1e}"
            )
        for side, powers in self.growth.items():
            listed = ", ".join(f"{what} L^{power:.2f}" for what, power in powers.items())
            lines.append(f"growth  {side}: {listed}")
        return "\n".join([*lines, *(f"note    {note}" for note in self.notes)])


def run(argv: Sequence[str]) -> int:
    """`python -m suite.bench scan`. Raises ConfigError for a mistake in the tokens."""
    if {"--help", "-h"} & set(argv):
        print(HELP)
        return 0
    result = measure(parse(argv))
    print(json.dumps(result.to_dict(), indent=2) if "--json" in argv else result.to_text())
    return 0


def parse(argv: Sequence[str]) -> Setting:
    """The setting that the tokens name. Raises ConfigError."""
    switches = ("--json", "--compile")
    own, rest = split_tokens([a for a in argv if a not in switches], own=KEYS)
    if rest:
        keys = ", ".join(f"{key}=" for key in KEYS)
        raise ConfigError(f"{rest[0]}: suite.bench scan takes {keys}, {' and '.join(switches)}")
    lengths = [whole_number("length", x, low=1) for x in own.pop("length", LENGTHS).split(",")]
    if len(set(lengths)) < len(lengths):
        raise ConfigError("length: a length is given twice; leave one out")
    device = own.pop("device", "cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"device={device}: must be cpu, or cuda where there is an NVIDIA GPU")
    numbers = {key: whole_number(key, text, low=1) for key, text in own.items()}
    compiled = "--compile" in argv
    if compiled and not any(shutil.which(name) for name in ("cc", "gcc", "clang", "cl")):
        raise ConfigError("--compile: needs a C++ compiler on the PATH; leave it out")
    return Setting(tuple(sorted(lengths)), device=device, compiled=compiled, **numbers)


def sides(setting: Setting) -> tuple[list[Side], list[str]]:
    """Ours first, then what it is compared with; and notes on what is not here."""
    ours = resolve("auto", setting.device)
    found, notes = [Side(f"{ours} (ours)", suite_run(ours))], []
    if ours != "chunked":
        found.append(Side("chunked", suite_run("chunked")))
    slow = "it keeps every state, and is slow"
    found.append(Side("reference", run_reference, 4096, slow))
    found.append(Side("official formula", official, 1024, "its backward is quadratic in length"))
    if installed("mambapy"):
        found.append(Side("mambapy pscan", blelloch, 4096, slow))
    else:
        notes.append("mambapy pscan is left out: pip install 'dyt-suite[scan]' to compare with it")
    if importlib.util.find_spec("torch._higher_order_ops.associative_scan") is not None:
        found.append(Side("associative_scan", associative, 4096, slow))
        if setting.compiled:
            compiled = torch.compile(associative, dynamic=False)
            found.append(Side("associative, compiled", compiled, 4096, slow))
    return found, notes


def suite_run(backend: str) -> Run:
    """A backend of tasks/dna/scan.py."""

    def work(s: Scan) -> Tensor:
        rest: dict[str, Any] = {"D_D": s.D, "z_BDL": s.z, "delta_bias_D": s.delta_bias}
        rest |= {"backend": backend, "layout": "BLD"}
        return selective_scan(s.u, s.delta, s.A, s.B, s.C, **rest)

    return work


def expanded(scan: Scan) -> tuple[Tensor, Tensor]:
    """exp(delta A) and delta B u for every position, [B, L, D, N]."""
    assert scan.delta_bias is not None
    delta = F.softplus(scan.delta + scan.delta_bias)
    decay = torch.exp(delta[..., None] * scan.A)
    return decay, (delta * scan.u)[..., None] * scan.B[:, :, None, :]


def finished(scan: Scan, y: Tensor) -> Tensor:
    """With the skip and the gate."""
    assert scan.D is not None
    assert scan.z is not None
    return (y + scan.u * scan.D) * F.silu(scan.z)


def official(scan: Scan) -> Tensor:
    """selective_scan_ref: each position is indexed out of the whole."""
    decay, new = expanded(scan)
    state, found = torch.zeros_like(new[:, 0]), []
    for i in range(scan.u.shape[1]):
        state = decay[:, i] * state + new[:, i]
        found.append(torch.einsum("bdn,bn->bd", state, scan.C[:, i]))
    return finished(scan, torch.stack(found, dim=1))


def blelloch(scan: Scan) -> Tensor:
    """mamba.py's parallel scan."""
    from mambapy.pscan import pscan  # type: ignore[import-not-found,import-untyped,unused-ignore]

    states = pscan(*expanded(scan))
    return finished(scan, (states @ scan.C[..., None]).squeeze(3))


def associative(scan: Scan) -> Tensor:
    """PyTorch's own scan of an associative operator."""
    from torch._higher_order_ops.associative_scan import associative_scan

    def after(first: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return then[0] * first[0], then[0] * first[1] + then[1]

    _, states = associative_scan(after, expanded(scan), dim=1, combine_mode="generic")
    return finished(scan, (states @ scan.C[..., None]).squeeze(3))


def inputs(setting: Setting, length: int) -> Scan:
    """As Mamba's first weights make them: A = -(1..N), steps of 0.001 to 0.1."""
    draw = torch.Generator().manual_seed(length)
    b, d, n = setting.batch, setting.dim, setting.state

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(setting.device).requires_grad_()

    steps = torch.exp(torch.rand(d, generator=draw) * math.log(100) + math.log(1e-3))
    bias = torch.log(torch.expm1(steps)).to(setting.device).requires_grad_()
    A = -torch.arange(1.0, n + 1).repeat(d, 1).to(setting.device)
    u, delta, z = (leaf(b, length, d) for _ in range(3))
    B, C = leaf(b, length, n), leaf(b, length, n)
    return Scan(u, delta, A.requires_grad_(), B, C, leaf(d), z, bias, None, True, False)


def once(side: Side, scan: Scan) -> Tensor:
    """A forward and a backward; the output."""
    out = side.run(scan)
    leaves = [x for x in vars(scan).values() if isinstance(x, Tensor)]
    torch.autograd.grad(out.sum(), leaves)
    return out.detach()


def timed(side: Side, scan: Scan, repeats: int) -> float:
    """Milliseconds of one, of `repeats` in a row."""
    start = now(scan.u.device)
    for _ in range(repeats):
        once(side, scan)
    return 1e3 * (now(scan.u.device) - start) / repeats


def measure(setting: Setting) -> Result:
    """Time and weigh every side at every length."""
    every, notes = sides(setting)
    found: list[Found] = []
    for length in setting.lengths:
        taken = [side for side in every if side.longest is None or length <= side.longest]
        for side in every:
            if side not in taken:
                say(f"length {length}: {side.name} is left out beyond {side.longest}: {side.why}")
        gc.collect()
        found += at_length(setting, length, taken, notes)
    for side in every:
        mine = [f for f in found if f.side == side.name]
        for one, size in zip(mine, weighed(side, setting, mine, notes), strict=True):
            one.bytes = size
    late = (f"{s.name} is left out beyond {s.longest}: {s.why}" for s in every if s.longest)
    return Result(setting, every[0].name, found, growths(found), [*notes, *late])


def at_length(setting: Setting, length: int, taken: list[Side], notes: list[str]) -> list[Found]:
    """All sides at one length, by turns. A side that raises is left out, with a note."""
    scan, ready, repeats = inputs(setting, length), [], {}
    with torch.no_grad():
        wanted = suite_run("chunked")(scan) if length > 4096 else run_reference(scan)
    errors = {}
    for side in taken:
        try:
            out = once(side, scan)
        except (RuntimeError, NotImplementedError) as error:
            text = str(error).strip().splitlines()[0][:100]
            notes.append(f"{side.name} failed at length {length}: {text}")
            continue
        errors[side.name] = float((out - wanted).abs().max() / wanted.abs().max())
        if not errors[side.name] <= TOLERANCE:
            notes.append(f"{side.name} computes something else at length {length}")
        ready.append(side)
        repeats[side.name] = max(1, math.ceil(1e3 * SLICE_SECONDS / timed(side, scan, 1)))
    order, rounds = random.Random(length), []
    for _ in range(setting.rounds):
        turns = order.sample(ready, len(ready))
        rounds.append({side.name: timed(side, scan, repeats[side.name]) for side in turns})
    ours = taken[0].name
    say(f"length {length}: {ours} {statistics.median(r[ours] for r in rounds):.2f} ms")
    return [
        Found(
            side.name,
            length,
            statistics.median(r[side.name] for r in rounds),
            [r[side.name] / r[ours] for r in rounds],
            errors[side.name],
        )
        for side in ready
    ]


def weighed(side: Side, setting: Setting, mine: list[Found], notes: list[str]) -> list[int | None]:
    """Peak bytes that a step adds at each length, in a fresh process."""
    lengths, context = [f.length for f in mine], multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return list(pool.submit(added, side.name, setting, lengths).result())
        except (BrokenProcessPool, MemoryError, torch.OutOfMemoryError):
            notes.append(f"{side.name}: the process that measures its memory was ended")
            return [None] * len(lengths)


def added(name: str, setting: Setting, lengths: Sequence[int]) -> list[int]:
    """Of the side of that name, in this process, from the shortest length on."""
    every, _ = sides(setting)
    side = next(s for s in every if s.name == name)
    once(side, inputs(setting, 8))  # what a first call loads is not the scan's
    found = []
    for length in lengths:
        scan = inputs(setting, length)
        gc.collect()
        before = restart_peak(scan.u.device)
        once(side, scan)
        found.append(max(0, peak(scan.u.device) - before))
    return found


def growths(found: Sequence[Found]) -> dict[str, dict[str, float]]:
    """The exponents, for sides that were measured at two lengths or more."""
    grown = {}
    for name in dict.fromkeys(f.side for f in found):
        mine = [f for f in found if f.side == name]
        powers = {
            "time": slope([(f.length, f.ms) for f in mine]),
            "memory": slope([(f.length, f.bytes) for f in mine if f.bytes]),
        }
        grown[name] = {what: power for what, power in powers.items() if power is not None}
    return {name: powers for name, powers in grown.items() if powers}


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Least squares on logarithms; None for fewer than two points."""
    if len(points) < 2:
        return None
    logs = [(math.log(x), math.log(y)) for x, y in points]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


HELP = f"""\
Time and memory of the selective scan, forward and backward, against other ways of computing it.

usage: python -m suite.bench scan [length={LENGTHS}] [rounds=5] [batch=1] [dim=128] [state=16]
                                  [device=cpu|cuda] [--compile] [--json]

length=..  positions, comma-separated
rounds=N   turns that each side takes at each length; figures are medians over them
batch, dim, state   sequences, channels, states of a channel
device     cuda where there is one, else cpu
--compile  also PyTorch's associative_scan under torch.compile; needs a C++ compiler
--json     everything that was measured, as one JSON object

sides   ours (triton on a GPU, chunked elsewhere), our position-by-position reference, the formula
        of mamba_ssm's selective_scan_ref, mamba.py's pscan (pip install 'dyt-suite[scan]') and
        PyTorch's associative_scan
The official formula is quadratic in length, so it is measured up to 1024; the others that keep
every state, up to 4096.

examples
  python -m suite.bench scan
  python -m suite.bench scan length=1024 batch=4 dim=256 rounds=7"""
