"""Time and memory of the long convolution against its length (`python -m suite.bench longconv`).

What is measured is a forward and a backward, in float32, on a GPU where there is one. Against: the
formula that HyenaDNA was published with (hyena-dna d553021, fftconv), written plainly; torch's own
depthwise convolution, tap by tap, up to DIRECT_LIMIT; and torchaudio's fftconvolve where it is
installed. That all of them compute the same is checked first.

How it is timed: a round has a turn of each, of about TURN_SECONDS, in an order drawn anew, so that
a machine that slows down slows all. On a CPU memory is measured in a process of its own, forked
from one that has torch imported and has computed nothing; on a GPU it is what torch allocates.
"""

from __future__ import annotations

import gc
import json
import math
import multiprocessing
import random
import signal
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from suite.bench import MIN_ROUNDS, split_tokens, whole_number
from suite.errors import ConfigError, DataError, DivergedError
from suite.metrics import hardware, versions
from suite.reference import MIB, peak, restart_peak
from suite.steptime import now
from suite.train import say
from tasks.dna.longconv import fft_conv

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
BATCH, DIM = {"cpu": 2, "cuda": 16}, {"cpu": 128, "cuda": 256}
MIN_LENGTH, MAX_LENGTH = 8, 2**24
DIRECT_LIMIT = 2048
TURN_SECONDS = 0.1
TOLERANCE = 1e-3  # of the largest value of an output or gradient
PRELOAD = ("suite.reference", "tasks.dna.longconv")  # not this: it would import suite.bench twice
OURS = "ours"

Conv = Callable[[Tensor, Tensor, Tensor], Tensor]


def published(u_BDL: Tensor, k_DL: Tensor, D_D: Tensor) -> Tensor:
    """y = irfft(rfft(u) rfft(k)) + D u over 2 L points, as autograd differentiates it."""
    L = u_BDL.shape[-1]
    product = torch.fft.rfft(u_BDL, n=2 * L) * torch.fft.rfft(k_DL, n=2 * L)
    return torch.fft.irfft(product, n=2 * L)[..., :L] + u_BDL * D_D[:, None]


def depthwise(u_BDL: Tensor, k_DL: Tensor, D_D: Tensor) -> Tensor:
    """torch's convolution, tap by tap."""
    D, L = k_DL.shape
    padded = F.pad(u_BDL, (L - 1, 0))
    return F.conv1d(padded, k_DL.flip(-1).unsqueeze(1), groups=D) + u_BDL * D_D[:, None]


def torchaudio_fft(u_BDL: Tensor, k_DL: Tensor, D_D: Tensor) -> Tensor:
    """torchaudio's convolution by FFT."""
    from torchaudio.functional import fftconvolve

    full = fftconvolve(u_BDL, k_DL.unsqueeze(0))
    return full[..., : u_BDL.shape[-1]] + u_BDL * D_D[:, None]


def ours(u_BDL: Tensor, k_DL: Tensor, D_D: Tensor) -> Tensor:
    """tasks/dna/longconv.py."""
    return fft_conv(u_BDL, k_DL, D_D=D_D)


METHODS: dict[str, Conv] = {
    OURS: ours,
    "published": published,
    "conv1d": depthwise,
    "torchaudio": torchaudio_fft,
}


def methods_for(length: int) -> list[str]:
    """What is measured at this length, ours first."""
    left_out = {
        "conv1d": length > DIRECT_LIMIT,
        "torchaudio": find_spec("torchaudio") is None,
    }
    return [name for name in METHODS if not left_out.get(name, False)]


class Step:
    """A forward and a backward of one method, on tensors of its own with the same numbers."""

    def __init__(self, method: str, *, length: int, batch: int, dim: int, device: str) -> None:
        self.conv, self.device = METHODS[method], torch.device(device)
        g = torch.Generator().manual_seed(length)
        shapes = ((batch, dim, length), (dim, length), (dim,), (batch, dim, length))
        u, k, D, grad = (torch.randn(shape, generator=g).to(device) for shape in shapes)
        decay = torch.linspace(0, 5, length, device=device).exp()
        self.inputs = (u, k / decay, D)
        self.grad = grad
        for x in self.inputs:
            x.requires_grad_()

    def __call__(self) -> list[Tensor]:
        """The output and the gradients."""
        for x in self.inputs:
            x.grad = None
        y = self.conv(*self.inputs)
        y.backward(self.grad)
        return [y.detach(), *(x.grad for x in self.inputs if x.grad is not None)]

    def seconds(self, steps: int) -> float:
        """How long so many take."""
        start = now(self.device)
        for _ in range(steps):
            self()
        return now(self.device) - start


@dataclass(frozen=True)
class Row:
    """One method at one length. seconds: a step, in each round; ratios: of our time to its own, in
    each round; added: bytes that a step adds to its inputs."""

    length: int
    method: str
    seconds: list[float]
    ratios: list[float]
    added: int


@dataclass(frozen=True)
class LongConvTimes:
    """What `measure` found."""

    rows: list[Row]
    batch: int
    dim: int
    device: str

    def exponents(self) -> dict[str, float]:
        """Of each method: x where its least time grows as L ** x over the upper half of the
        lengths."""
        found = {}
        for method in METHODS:
            times = {r.length: min(r.seconds) for r in self.rows if r.method == method}
            upper = sorted(times)[len(times) // 2 :] if len(times) > 2 else sorted(times)
            if len(upper) > 1:
                logs = ([math.log(n) for n in upper], [math.log(times[n]) for n in upper])
                found[method] = statistics.linear_regression(*logs).slope
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "bench": "longconv",
            "batch": self.batch,
            "dim": self.dim,
            "dtype": "float32",
            "device": self.device,
            "threads": torch.get_num_threads(),
            "rows": [
                {
                    "length": r.length,
                    "method": r.method,
                    "ms": 1e3 * statistics.median(r.seconds),
                    "ours_to_its_time": {
                        "median": statistics.median(r.ratios),
                        "min": min(r.ratios),
                        "max": max(r.ratios),
                    },
                    "added_bytes": r.added,
                }
                for r in self.rows
            ],
            "growth_exponent": self.exponents(),
            "hardware": hardware(),
            "versions": versions(),
        }

    def to_text(self) -> str:
        """A table for a terminal."""
        threads = torch.get_num_threads()
        where = f"cpu, {threads} thread{'s' * (threads > 1)}" if self.device == "cpu" else "cuda"
        rounds = len(self.rows[0].seconds)
        lines = [
            f"longconv  forward and backward, batch {self.batch}, dim {self.dim}, float32, {where}",
            f"ratio     our time by its time, median of {rounds} rounds (least to most)",
            "memory    what a step adds to its inputs, at its peak",
            f"{'length':>7}  {'method':<10} {'ms':>9}  {'ratio':<24} {'MiB':>8}",
        ]
        for r in self.rows:
            spread = (
                f"{statistics.median(r.ratios):.3f} ({min(r.ratios):.3f} to {max(r.ratios):.3f})"
            )
            ratio = "1" if r.method == OURS else spread
            ms, mib = 1e3 * statistics.median(r.seconds), r.added / MIB
            lines.append(f"{r.length:>7}  {r.method:<10} {ms:>9.2f}  {ratio:<24} {mib:>8.1f}")
        grown = ", ".join(f"{name} L^{x:.2f}" for name, x in self.exponents().items())
        if grown:
            lines.append(f"growth    of the least time over the upper half of the lengths: {grown}")
        return "\n".join(lines)


def measure(lengths: Sequence[int], *, rounds: int, batch: int, dim: int) -> LongConvTimes:
    """Check, weigh and time every method at every length.

    Raises DivergedError where two do not compute the same, DataError for want of memory.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for length in lengths:
        make = partial(Step, length=length, batch=batch, dim=dim, device=device)
        names = methods_for(length)
        try:
            added = {name: alone(name, length=length, batch=batch, dim=dim) for name in names}
            steps = {name: make(name) for name in names}
            check_equal(steps, length=length)
            seconds = timed(steps, rounds=rounds, seed=length)
        except (BrokenProcessPool, MemoryError, torch.OutOfMemoryError):
            raise DataError(
                f"length={length} batch={batch} dim={dim}: there is too little memory; take less"
            ) from None
        for name in names:
            ratios = [a / b for a, b in zip(seconds[OURS], seconds[name], strict=True)]
            rows.append(Row(length, name, seconds[name], ratios, added[name]))
        medians = (f"{n} {1e3 * statistics.median(seconds[n]):.2f} ms" for n in names)
        say(f"length {length}: {', '.join(medians)}")
    return LongConvTimes(rows, batch, dim, device)


def check_equal(steps: dict[str, Step], *, length: int) -> None:
    """Raise DivergedError unless all outputs and gradients are those of the published formula."""
    expected = steps["published"]()
    for name, step in steps.items():
        for a, b in zip(step(), expected, strict=True):
            gap = float((a - b).abs().max() / b.abs().max())
            if not gap <= TOLERANCE:
                raise DivergedError(
                    f"length={length}: {name} and published differ by {gap:.2g} of the largest "
                    "value: they do not compute the same, so there is nothing to time"
                )


def timed(steps: dict[str, Step], *, rounds: int, seed: int) -> dict[str, list[float]]:
    """Seconds a step of each method in each round."""
    counts = {n: max(1, math.ceil(TURN_SECONDS / step.seconds(1))) for n, step in steps.items()}
    found: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(seed)
    gc.collect()
    for _ in range(rounds):
        for name in order.sample(list(steps), len(steps)):
            found[name].append(steps[name].seconds(counts[name]) / counts[name])
    return found


def alone(method: str, *, length: int, batch: int, dim: int) -> int:
    """Bytes that a step adds to its inputs: on a CPU in a fresh process."""
    if torch.cuda.is_available():
        return added_by(method, length, batch, dim, "cuda", torch.get_num_threads())
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(kind)
    context.set_forkserver_preload(list(PRELOAD))
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        with deaf_children():
            threads = torch.get_num_threads()
            waiting = pool.submit(added_by, method, length, batch, dim, "cpu", threads)
        return waiting.result()


@contextmanager
def deaf_children() -> Iterator[None]:
    """Processes that are started while it lasts leave Ctrl-C to this one."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def added_by(method: str, length: int, batch: int, dim: int, device: str, threads: int) -> int:
    """Bytes that a step adds to what this process holds before it."""
    torch.set_num_threads(threads)
    Step(method, length=MIN_LENGTH, batch=1, dim=1, device=device)()  # what is set up once
    step = Step(method, length=length, batch=batch, dim=dim, device=device)
    gc.collect()
    before = restart_peak(step.device)
    step()
    return peak(step.device) - before


def run(argv: Sequence[str]) -> int:
    """`suite.bench longconv`: its arguments -> exit code. Raises ConfigError for a wrong one."""
    if {"--help", "-h"} & set(argv):
        print(HELP)
        return 0
    own, rest = split_tokens(
        [a for a in argv if a != "--json"], own=("length", "rounds", "batch", "dim")
    )
    if rest:
        raise ConfigError(
            f"{rest[0]}: suite.bench longconv takes length=, rounds=, batch=, dim= and --json only"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rounds = whole_number("rounds", own.get("rounds", str(MIN_ROUNDS)), low=MIN_ROUNDS)
    batch = whole_number("batch", own.get("batch", str(BATCH[device])), low=1)
    dim = whole_number("dim", own.get("dim", str(DIM[device])), low=1)
    lengths = lengths_of(own["length"]) if "length" in own else list(LENGTHS)
    found = measure(lengths, rounds=rounds, batch=batch, dim=dim)
    print(json.dumps(found.to_dict(), indent=2) if "--json" in argv else found.to_text())
    return 0


def lengths_of(text: str) -> list[int]:
    """The lengths of `length=256,1024`, in order. Raises ConfigError."""
    found = sorted(whole_number("length", part.strip(), low=MIN_LENGTH) for part in text.split(","))
    if found[-1] > MAX_LENGTH:
        raise ConfigError(f"length={found[-1]}: must be {MAX_LENGTH:,} or less")
    twice = [a for a, b in pairwise(found) if a == b]
    if twice:
        raise ConfigError(f"length={text}: {twice[0]} is given twice")
    return found


HELP = f"""\
Time and memory of the long convolution of HyenaDNA against its length, beside the published
formula (fftconv over 2 L points), torch's depthwise conv1d (up to {DIRECT_LIMIT} positions) and
torchaudio's fftconvolve where it is installed.

usage: python -m suite.bench longconv [length=N,N,...] [rounds={MIN_ROUNDS}] [batch=N] [dim=N]
                                      [--json]

length=N,N   positions, {MIN_LENGTH} or more; left out: {",".join(map(str, LENGTHS))}
rounds=N     turns of each, {MIN_ROUNDS} or more; the figure is the median of the ratios
batch=N      sequences ({BATCH["cpu"]}, on a GPU {BATCH["cuda"]})
dim=N        channels ({DIM["cpu"]}, on a GPU {DIM["cuda"]})
--json       everything that was measured, as one JSON object

A step is a forward and a backward in float32, on a GPU where there is one. A ratio below 1 is
faster than what it stands beside. Memory is what one step adds to its inputs, gradients among it.
The last line says how the least time of each grows: L log L is near L^1.1 at these lengths, a
direct convolution L^2.

examples
  python -m suite.bench longconv
  python -m suite.bench longconv length=1024,4096,16384 batch=1 dim=256 rounds=9"""
