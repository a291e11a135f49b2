"""The measuring behind `suite.bench step`: all cells in one process, in turns.

A cell is a model with one norm, backend, compile mode and precision, trained by a plain loop over
one batch (`suite.reference.Side`). Differences between norms are a few per cent of a step, less
than a busy machine's drift over minutes; so every round holds a turn of every cell, in random
order, and a ratio compares two turns of one round.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from suite.backends import backends
from suite.benches.peers import reference_of
from suite.benches.step_cells import EAGER, Cell, Peer, peer_cells, settle_cell, settle_peer
from suite.benches.step_table import Grid, Timed
from suite.build import build_parts, quiet
from suite.config import Config
from suite.errors import ConfigError, DataError
from suite.flops import peak_flops
from suite.module import Batch, SuiteModule
from suite.norms.kernels import KERNELS
from suite.reference import (
    PEAK_STEPS,
    Side,
    alone,
    device_of,
    our_loss,
    peak,
    restart_peak,
)
from suite.registry import load_task
from suite.steptime import SLICE_SECONDS, now
from suite.train import say

WARMUP = 3


@dataclass
class Loop:
    """A cell that runs. ran: the backend that its norms took; added: bytes that steps add."""

    cell: Cell
    side: Side
    ran: str | None
    notes: list[str]
    steps: int = 1
    added: int | None = None
    seconds: list[float] = field(default_factory=list)


def measure(
    cells: Sequence[Cell],
    *,
    rounds: int,
    steps: int | None,
    seconds: float | None = None,
    extras: Sequence[str] = (),
) -> Grid:
    """Time every cell. steps: of a turn; None: what lasts SLICE_SECONDS. extras: peer, memory.

    Raises ConfigError or DataError if no cell runs.
    """
    quiet()
    device, notes = device_of(cells[0].config), []
    peer = settle_peer(cells[0].config, seconds=seconds) if "peer" in extras else None
    if peer is not None:
        cells = [*(settle_cell(cell, peer=peer) for cell in cells), *peer_cells(cells, peer=peer)]
        notes += [f"{peer.reference.name}: {note}" for note in peer.reference.notes]
    batch = on_device(batch_of(cells[0].config, peer=peer), device)
    with unlimited_compiling(len(cells)):
        loops, left_out = start(cells, batch=batch, peer=peer, steps=steps)
        notes += left_out
        if device.type == "cuda" or "memory" in extras:
            notes += measure_memory(loops, peer=peer)
        take_turns(loops, rounds=rounds, order=random.Random(cells[0].config.seed))
    return grid_of(loops, batch=batch, device=device, notes=notes)


def unlimited_compiling(cells: int) -> Any:
    """Dynamo gives up, silently, after 8 versions of one forward, and every cell is one."""
    most = max(64, 8 * cells)
    return torch._dynamo.config.patch(
        recompile_limit=most,
        accumulated_recompile_limit=4 * most,
        fail_on_recompile_limit_hit=True,
    )


# -- cells -----------------------------------------------------------------------------------------


def batch_of(config: Config, *, peer: Peer | None) -> Batch:
    """The first batch of training, or the one that the peer is given too; on the CPU."""
    config = replace(config, data=replace(config.data, num_workers=0))
    data = build_parts(config, processes=1).data
    if peer is None:
        batch: Batch = next(iter(data.train_dataloader()))
        batch.pop("unreadable", None)
        return batch
    return peer.reference.batch(data.splits, rows=config.data.batch_size, seconds=peer.seconds)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch where the models are."""
    return {name: value.to(device) for name, value in batch.items()}


def start(
    cells: Sequence[Cell], *, batch: Batch, peer: Peer | None, steps: int | None
) -> tuple[list[Loop], list[str]]:
    """Build and warm up every cell; those that run, and a note for each of the others."""
    loops: list[Loop] = []
    notes, failed = [], []
    for cell in cells:
        gc.collect()  # what a cell that failed has left
        try:
            loop = ready_loop(cell, batch=batch, peer=peer, steps=steps)
        except Exception as error:  # whatever one cell fails of, the others are to be measured
            failed.append(released(error))
            notes.append(f"left out: {cell.name}: {reason(error)}")
            if not isinstance(error, (ConfigError, DataError)):
                say(f"note: {notes[-1]}")  # a mistake is said with the result, or is all of it
            continue
        say(f"ready: {cell.name}, {1e3 * loop.seconds.pop():.1f} ms a step at first")
        loops.append(loop)
        notes += loop.notes
    if loops:
        return loops, notes
    if isinstance(failed[0], (ConfigError, DataError)):
        raise failed[0]
    raise DataError(f"no cell runs; the first, {cells[0].name}: {reason(failed[0])}")


def released(error: Exception) -> Exception:
    """Without the frames that it came through: they hold a model, and the memory that a cell has
    run out of would lack the next ones too."""
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)


def reason(error: Exception) -> str:
    """The first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    known = isinstance(error, (ConfigError, DataError))
    return lines[0] if known and lines else f"{type(error).__name__}: {(lines or [''])[0]}"


def ready_loop(cell: Cell, *, batch: Batch, peer: Peer | None, steps: int | None) -> Loop:
    """A cell that is built and warm. What is made for one that fails goes with this frame."""
    loop = build_loop(cell, batch=batch, peer=peer)
    warm_up(loop, steps=steps)
    return loop


def build_loop(cell: Cell, *, batch: Batch, peer: Peer | None) -> Loop:
    """The cell's model and optimizer where the batch is, compiled if that is asked for."""
    module = build_parts(cell.config, processes=1).module.train()
    device = next(iter(batch.values())).device
    model: nn.Module
    loss: Callable[[], Tensor]
    ran: str | None = None
    notes: list[str] = []
    if cell.peer is None:
        module.to(device)
        model, (ran, notes) = module.model, chosen(module, cell)
        loss = partial(our_loss, module, batch)
    else:
        assert peer is not None
        model = peer.reference.build(cell.config).to(device)
        loss = peer.reference.loss(model, module.to(device), batch)
    if cell.compile != EAGER:
        model.compile(mode=None if cell.compile == "default" else cell.compile)
    return Loop(cell, Side(model, loss, config=cell.config), ran, notes)


def chosen(module: SuiteModule, cell: Cell) -> tuple[str | None, list[str]]:
    """What the norms that have a backend run as, and why where that is not what was asked for."""
    compiled = cell.compile != EAGER
    rows = backends(module.model, module.device, compiled=compiled)
    if cell.backend is None:
        return None, []
    ran = sorted({backend for _, backend, _ in rows})
    other = {f"{backend}: {why}" for _, backend, why in rows if backend != cell.backend}
    asked = cell.backend in KERNELS
    return "+".join(ran), [f"{cell.name}: {text}" for text in sorted(other) if asked]


def warm_up(loop: Loop, *, steps: int | None) -> None:
    """Compile, allocate, and find how many steps a turn has."""
    took(loop.side, steps=WARMUP)
    once = took(loop.side, steps=1)
    loop.seconds.append(once)
    loop.steps = steps or max(1, math.ceil(SLICE_SECONDS / max(once, 1e-6)))


# -- time ------------------------------------------------------------------------------------------


def took(side: Side, *, steps: int) -> float:
    """Seconds that so many steps take: see `clock_of`."""
    if side.device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(side.device)
        begin.record()
        for _ in range(steps):
            side.step()
        end.record()
        torch.cuda.synchronize(side.device)
        return float(begin.elapsed_time(end)) / 1e3
    read = time.process_time if clock_of(side.device).startswith("process") else None
    start_at = read() if read else now(side.device)
    for _ in range(steps):
        side.step()
    return (read() if read else now(side.device)) - start_at


def clock_of(device: torch.device) -> str:
    """What times are. Process time leaves out what neighbours take, but adds threads up."""
    if device.type == "cuda":
        return "events on the device"
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return "process CPU time"
    return "wall clock"


def take_turns(loops: Sequence[Loop], *, rounds: int, order: random.Random) -> None:
    """Every loop once a round, in random order."""
    for number in range(rounds):
        gc.collect()
        for loop in order.sample(loops, len(loops)):
            loop.seconds.append(took(loop.side, steps=loop.steps) / loop.steps)
        fastest = min(loops, key=lambda loop: loop.seconds[-1])
        say(
            f"round {number + 1}/{rounds}: fastest {fastest.cell.name}, "
            f"{1e3 * fastest.seconds[-1]:.1f} ms a step"
        )


# -- memory ----------------------------------------------------------------------------------------


def measure_memory(loops: Sequence[Loop], *, peer: Peer | None) -> list[str]:
    """Fill `added` in; notes of what is not measured."""
    notes = []
    for loop in loops:
        say(f"memory: {loop.cell.name}")
        if loop.side.device.type == "cuda":
            loop.added = added_on_device(loop.side)
        elif loop.cell.compile != EAGER:
            note = "memory: of compiled steps only on a GPU; on a CPU the compiler's would count"
            notes += [note] * (note not in notes)
        else:
            try:
                loop.added = added_alone(loop.cell, peer=peer)
            except (DataError, BrokenProcessPool, RuntimeError, MemoryError) as error:
                notes.append(f"memory: {loop.cell.name}: not known, {reason(error)}")
    return notes


def added_alone(cell: Cell, *, peer: Peer | None) -> int:
    """Bytes that steps of a cell add, in a process of its own."""
    if cell.peer is None:
        return in_a_process(cell, peer=peer)
    assert peer is not None
    return alone("theirs", cell.config, rows=cell.config.data.batch_size, seconds=peer.seconds)


def added_on_device(side: Side) -> int:
    """Bytes that steps add to the weights and the batch: as if the first of them came now."""
    side.optimizer.zero_grad()
    side.optimizer.state.clear()
    before = restart_peak(side.device)
    for _ in range(PEAK_STEPS):
        side.step()
    return peak(side.device) - before


def in_a_process(cell: Cell, *, peer: Peer | None) -> int:
    """Bytes that steps add in a fresh process."""
    seconds = None if peer is None else peer.seconds
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(added_by_cell, cell, peer is not None, seconds).result()


def added_by_cell(cell: Cell, with_peer: bool, seconds: float | None) -> int:
    """Bytes that steps of a cell add to what this process holds before the first of them."""
    quiet()
    reference = reference_of(cell.config.task_name) if with_peer else None
    peer = None if reference is None else Peer(reference, cell.config, seconds)
    batch = batch_of(cell.config, peer=peer)
    loop = build_loop(cell, batch=batch, peer=None)
    gc.collect()
    before = restart_peak(loop.side.device)
    for _ in range(PEAK_STEPS):
        loop.side.step()
    return peak(loop.side.device) - before


# -- result ----------------------------------------------------------------------------------------


def grid_of(
    loops: Sequence[Loop], *, batch: Batch, device: torch.device, notes: Sequence[str]
) -> Grid:
    """The figures of all cells."""
    config = loops[0].cell.config
    spec = load_task(config.task_name)
    module = build_parts(config, processes=1).module.to(device).train()
    with torch.no_grad():
        out = module.step(batch, "train")
    units = float(out.count if out.units is None else out.units)
    examples = int(batch["valid"].sum())
    flops = flops_of(module, batch, units=units)
    timed = []
    for loop in loops:
        cell = loop.cell
        top = peak_flops(device, cell.precision)
        mfu = None
        if flops is not None and top is not None:
            mfu = flops / statistics.median(loop.seconds) / top
        timed.append(
            Timed(
                norm=cell.norm,
                backend=cell.backend,
                ran=loop.ran,
                compile=cell.compile,
                precision=cell.precision,
                peer=cell.peer,
                seconds=loop.seconds,
                steps=loop.steps,
                added=loop.added,
                mfu=mfu,
            )
        )
    return Grid(
        config=config,
        cells=timed,
        unit=spec.unit,
        units=units,
        examples=examples,
        device=device,
        clock=clock_of(device),
        warmup=WARMUP,
        notes=list(notes),
    )


def flops_of(module: SuiteModule, batch: Batch, *, units: float) -> float | None:
    """Operations of a step: the task's own figure, else on a GPU what torch counts of products.

    None on a CPU, whose peak is not known.
    """
    if module.flops_per_unit is not None:
        return module.flops_per_unit * units
    if module.device.type != "cuda":
        return None
    try:
        return counted_flops(module, batch)
    except torch.OutOfMemoryError:  # float32, beside all cells: their times must not be lost
        say("note: MFU is not known: counting a step's operations ran out of memory")
        return None


def counted_flops(module: SuiteModule, batch: Batch) -> float:
    """Operations of the matrix products, convolutions and attentions of forward and backward."""
    with FlopCounterMode(display=False) as counter:
        our_loss(module, batch).backward()
    return float(counter.get_total_flops())
