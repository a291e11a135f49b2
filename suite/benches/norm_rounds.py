"""The rounds of `suite.bench norms`: one shape and dtype, all sides by turns.

All sides take turns in an order drawn for each round, so that a machine that slows down slows all;
ratios are taken inside a round.

CPU: one thread is timed in process time, which leaves out what neighbours take; more threads by the
wall clock. One set of inputs, so that what fits in the last cache stays there, as the layer before
would leave it. CUDA: events around the calls of a turn; input sets take turns, so that together
they are past the L2 cache. Calls from Python are timed, or with `graph` replays of a CUDA graph of
them: the device's time alone, where a call's own is longer than its kernels.

A side that fails, or is not there, is left out with a note.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from suite.benches.norm_figures import SIZES, Found, Pass, Table
from suite.benches.norm_sides import Absent, Side, Work, build, exact, names

SLICE_SECONDS = {"cpu": 0.01, "cuda": 0.005}  # what a turn lasts at least
CACHES = 4  # input sets hold so many times the L2 cache
GRAPH_CALLS = 8  # of a CUDA graph at least: a replay has a start of its own
MOST_SETS = 256  # an input of a few bytes would need millions to be past it

Call = Callable[[int], object]  # with the number of an input set
Start = Callable[[], Call]  # what is not timed comes before the first call


@dataclass(frozen=True)
class Setting:
    """What is measured, as the command line says it."""

    shapes: tuple[tuple[int, int], ...]
    dtypes: tuple[str, ...]
    norms: tuple[str, ...]
    passes: tuple[Pass, ...]
    kinds: tuple[str, ...]
    works: tuple[Work, ...]
    rounds: int
    device: str
    graph: bool = False


class Bench:
    """One shape, dtype and work: inputs, sides and clock."""

    def __init__(
        self, setting: Setting, rows: int, dim: int, dtype: str, work: Work, notes: list[str]
    ) -> None:
        self.setting, self.rows, self.dim, self.work = setting, rows, dim, work
        self.notes = notes
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.device = torch.device(setting.device)
        self.order = random.Random(f"{rows} {dim} {dtype} {work}")
        outputs = 2 if work == "add" else 1
        one = rows * dim * SIZES[dtype]
        past = math.ceil(CACHES * l2_bytes(self.device) / (2 * outputs * one))
        sets = min(max(1, past), MOST_SETS)
        draw = torch.Generator(self.device).manual_seed(0)

        def drawn() -> Tensor:
            return torch.randn(rows, dim, generator=draw, device=self.device).to(self.dtype)

        self.turn = sets * math.ceil(GRAPH_CALLS / sets) if setting.graph else sets
        self.stream = torch.cuda.Stream() if setting.graph else None
        self.pool = torch.cuda.graph_pool_handle() if setting.graph else None
        self.inputs = [[drawn().requires_grad_() for _ in range(outputs)] for _ in range(sets)]
        self.gradients = [[drawn() for _ in range(outputs)] for _ in range(sets)]
        self.into = torch.empty_like(self.gradients[0][0])
        self.result = Table(rows, dim, dtype, work, sets, sets * 2 * outputs * one)

    def table(self) -> Table:
        """Everything; for graphs on one stream, as the nodes of a leaf stay on their first."""
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            return self.measured()

    def measured(self) -> Table:
        """All sides weighed, then all passes timed."""
        every = names(
            self.setting.norms, work=self.work, device=self.device.type, kinds=self.setting.kinds
        )
        ready: list[tuple[Side, Found]] = []
        for norm in dict.fromkeys(norm for norm, _ in every):
            wanted = self.wanted(norm)
            for kind in (kind for name, kind in every if name == norm):
                done = self.weighed(norm, kind, wanted)
                if done is not None:
                    ready.append(done)
        self.result.found = [found for _, found in ready]
        for which in self.setting.passes:
            self.timed(which, ready)
        return self.result

    def wanted(self, norm: str) -> dict[str, Tensor] | None:
        """Output ("y") and gradients of the first inputs in float64; None, with a note, if too
        large."""
        try:
            options = {"work": self.work, "dim": self.dim, "dtype": self.dtype}
            side = exact(norm, device=self.device, **options)  # type: ignore[arg-type]
            leaves = [x.detach().double().requires_grad_() for x in self.inputs[0]]
            outputs = side.run(*leaves)
            given = [g.double() for g in self.gradients[0]]
            found = torch.autograd.grad(outputs, [*leaves, *side.parameters.values()], given)
            of = dict(zip(side.parameters, found[len(leaves) :], strict=True))
            return {"y": outputs[0].detach(), "x": found[0], **of}
        except (RuntimeError, MemoryError) as error:  # a CPU's allocator raises RuntimeError
            self.note(f"{norm}: no error is known, float64 failed: {first_line(error)}")
            return None

    def weighed(
        self, norm: str, kind: str, wanted: dict[str, Tensor] | None
    ) -> tuple[Side, Found] | None:
        """A side with its errors and bytes; None, with a note, if it cannot run."""
        try:
            options = {"work": self.work, "dim": self.dim, "dtype": self.dtype}
            side = build(norm, kind, device=self.device, **options)  # type: ignore[arg-type]
            sizes = {name: p.numel() for name, p in side.parameters.items()}
            found = Found(norm, kind, sizes)
            outputs, gradients = self.step(side, 0)
            found.errors = errors(side, outputs, gradients, wanted, len(self.inputs[0]))
            if outputs[0].dtype != self.dtype:
                self.note(f"{side.name} returns {outputs[0].dtype}")
            del outputs, gradients
            found.saved = self.saved(side)
            if self.device.type == "cuda":
                found.peak = {p: peak(self.start(side, p)) for p in self.setting.passes}
            return side, found
        except Absent as reason:
            self.note(f"{norm} {kind}: {reason}")
        except Exception as error:  # of a peer, a compiler or a kernel
            self.note(f"{norm} {kind} failed: {first_line(error)}")
        return None

    def saved(self, side: Side) -> float:
        """Bytes an element that autograd keeps for the backward: each storage once."""
        owned = {p.untyped_storage()._cdata for p in side.parameters.values()}
        kept: dict[int, tuple[Tensor, int]] = {}  # the tensor too, lest its address be used again

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in owned:
                kept[storage._cdata] = (tensor, storage.nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            side.run(*self.inputs[0])
        return sum(size for _, size in kept.values()) / (self.rows * self.dim)

    def step(self, side: Side, k: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Outputs, and gradients of inputs and parameters, on input set k."""
        outputs = side.run(*self.inputs[k])
        leaves = [*self.inputs[k], *side.parameters.values()]
        return outputs, torch.autograd.grad(outputs, leaves, self.gradients[k])

    def start(self, side: Side, which: Pass) -> Call:
        """What one call of a pass is. The graphs of pass "backward" are made here."""
        if which == "train":
            return partial(self.step, side)
        if which == "forward":
            return torch.no_grad()(lambda k: side.run(*self.inputs[k]))
        graphs = [side.run(*inputs) for inputs in self.inputs]
        parameters = list(side.parameters.values())

        def backward(k: int) -> object:
            leaves = [*self.inputs[k], *parameters]
            return torch.autograd.grad(graphs[k], leaves, self.gradients[k], retain_graph=True)

        return backward

    def captured(self, start: Start) -> Start:
        """A turn of calls as a CUDA graph, which the first of them replays. All graphs share their
        memory: what they make is not looked at."""
        call, sets, graph = start(), self.result.sets, torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                for k in range(self.turn):
                    call(k % sets)
        except RuntimeError:
            self.pool = torch.cuda.graph_pool_handle()  # the old one is left as it was
            raise

        def replay(k: int) -> object:
            if k == 0:
                graph.replay()
            return call  # and with it what its backward has kept

        return lambda: replay

    def references(self) -> dict[str, Start]:
        """What moves bytes and computes next to nothing, into memory that is there."""
        into, xs = self.into, [inputs[0].detach() for inputs in self.inputs]
        gs = [gradients[0] for gradients in self.gradients]

        def copy(k: int) -> object:
            return into.copy_(xs[k])

        def add(k: int) -> object:
            return torch.add(xs[k], gs[k], out=into)

        both: Call = lambda k: (copy(k), add(k))  # noqa: E731
        return {"copy": lambda: copy, "add": lambda: add, "copy + add": lambda: both}

    def timed(self, which: Pass, ready: list[tuple[Side, Found]]) -> None:
        """All sides of a pass, by turns."""
        needed = {
            "forward": ("copy",),
            "backward": ("copy", "add"),
            "train": ("copy", "copy + add"),
        }
        starts: dict[Any, Start] = {n: self.references()[n] for n in needed[which]}
        starts |= {found.key: partial(self.start, side, which) for side, found in ready}
        repeats = {}
        for key in list(starts):
            try:
                self.seconds(starts[key], self.result.sets)  # compiles what is left to compile
                if self.setting.graph:
                    starts[key] = self.captured(starts[key])
                once = self.seconds(starts[key], self.turn)
            except Exception as error:
                if isinstance(key, str):  # a reference: nothing can be said without it
                    raise
                self.note(f"{' '.join(key)} {which} failed: {first_line(error)}")
                del starts[key]
                continue
            turn = SLICE_SECONDS[self.device.type] / once
            repeats[key] = self.turn * max(1, math.ceil(turn / self.turn))
        times: dict[Any, list[float]] = {key: [] for key in starts}
        for _ in range(self.setting.rounds):
            for key in self.order.sample(list(starts), len(starts)):
                times[key].append(1e6 * self.seconds(starts[key], repeats[key]))
        self.result.references[which] = {n: times[n] for n in needed[which]}
        for _, found in ready:
            if found.key in times:
                found.us[which] = times[found.key]
                found.calls[which] = repeats[found.key]

    def seconds(self, start: Start, repeats: int) -> float:
        """Of one call, of `repeats` in a row over the input sets."""
        call, turn = start(), self.turn
        if self.device.type == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            torch.cuda.synchronize()
            events[0].record()
            for k in range(repeats):
                call(k % turn)
            events[1].record()
            events[1].synchronize()
            return float(events[0].elapsed_time(events[1])) / 1e3 / repeats
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        began = clock()
        for k in range(repeats):
            call(k % turn)
        return max(clock() - began, 1e-9) / repeats  # a clock may stand still

    def note(self, text: str) -> None:
        """Said in the result, with where."""
        self.notes.append(f"{self.result.title}, {self.work}: {text}")


def errors(
    side: Side,
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    wanted: dict[str, Tensor] | None,
    inputs: int,
) -> dict[str, float]:
    """Of the output and of each gradient; see WHAT."""
    if wanted is None:
        return {}
    y, exact_y = outputs[0].detach().double(), wanted["y"]
    found = {"y": float(((y - exact_y).abs() / (1 + exact_y.abs())).max())}
    got = dict(zip(["x", *side.parameters], [gradients[0], *gradients[inputs:]], strict=True))
    for name, gradient in got.items():
        true = wanted[name]
        worst, largest = (gradient.double() - true).abs().max(), true.abs().max()
        found[name] = float(worst / largest) if largest > 0 else float(worst)
    return found


def peak(call: Call) -> int:
    """Bytes that a call adds at its peak to what is held."""
    call(0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(0)
    return torch.cuda.max_memory_allocated() - before


def l2_bytes(device: torch.device) -> int:
    """Of the cache that inputs must be past; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def first_line(error: Exception) -> str:
    """What went wrong, in at most a line."""
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:160]}"
