"""What `suite.bench step` found, as a Markdown table and as JSON.

Ratios are the median of the ratios inside the rounds, with the least and the most of them: to the
layernorm cell, and to the peer, of the same compile and precision.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from suite.config import Config
from suite.metrics import hardware, versions

BASELINE = "layernorm"
MIB = 2**20


@dataclass(frozen=True)
class Timed:
    """The figures of one cell. seconds: a step's, in every round; steps: of one turn.

    backend: asked for; ran: what its norms took. peer: the implementation, None of ours.
    added: bytes that steps add, mfu: share of the device's arithmetic; None where not known.
    """

    norm: str
    backend: str | None
    ran: str | None
    compile: str
    precision: str
    peer: str | None
    seconds: list[float]
    steps: int
    added: int | None
    mfu: float | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """Of one cell's time to another's, round by round."""

    median: float
    least: float
    most: float

    def to_dict(self) -> dict[str, float]:
        return {"median": self.median, "min": self.least, "max": self.most}


def ratio(cell: Timed, other: Timed | None) -> Ratio | None:
    """None without another."""
    if other is None:
        return None
    found = [a / b for a, b in zip(cell.seconds, other.seconds, strict=True)]
    return Ratio(statistics.median(found), min(found), max(found))


@dataclass(frozen=True)
class Grid:
    """What was measured. units: of the task's unit in the batch, examples: its rows."""

    config: Config
    cells: Sequence[Timed]
    unit: str
    units: float
    examples: int
    device: torch.device
    clock: str
    warmup: int
    notes: Sequence[str]

    @property
    def name(self) -> str:
        """Of the saved files."""
        return f"step-{self.config.task_name.replace('/', '-')}-{self.config.model_name}"

    def alike(self, cell: Timed, wanted: Callable[[Timed], bool]) -> Timed | None:
        """The first cell of the same compile and precision that is `wanted`."""
        same = (cell.compile, cell.precision)
        return next((c for c in self.cells if (c.compile, c.precision) == same and wanted(c)), None)

    def to_baseline(self, cell: Timed) -> Ratio | None:
        """Ratio to our layernorm."""
        return ratio(cell, self.alike(cell, lambda c: c.norm == BASELINE and c.peer is None))

    def to_peer(self, cell: Timed) -> Ratio | None:
        """Ratio to the peer."""
        return ratio(cell, self.alike(cell, lambda c: c.peer is not None))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        c = self.config
        return {
            "bench": "step",
            "task": c.task_name,
            "model": c.model_name,
            "data": c.data_name,
            "examples": self.examples,
            "unit": self.unit,
            "units": self.units,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "clock": self.clock,
            "warmup": self.warmup,
            "rounds": len(self.cells[0].seconds),
            "baseline": BASELINE,
            "peer": next((cell.peer for cell in self.cells if cell.peer), None),
            "cells": [self.of_cell(cell) for cell in self.cells],
            "notes": list(self.notes),
            "hardware": hardware(),
            "versions": versions(),
        }

    def of_cell(self, cell: Timed) -> dict[str, Any]:
        """One cell's plain values."""
        to_baseline, to_peer = self.to_baseline(cell), self.to_peer(cell)
        return {
            "norm": cell.norm,
            "backend": cell.backend,
            "ran": cell.ran,
            "compile": cell.compile,
            "precision": cell.precision,
            "peer": cell.peer,
            "ms": {
                "median": 1e3 * cell.median,
                "min": 1e3 * min(cell.seconds),
                "max": 1e3 * max(cell.seconds),
            },
            "examples_per_s": self.examples / cell.median,
            "units_per_s": self.units / cell.median,
            "mfu": cell.mfu,
            "added_bytes": cell.added,
            "ratio_to_baseline": to_baseline and to_baseline.to_dict(),
            "ratio_to_peer": to_peer and to_peer.to_dict(),
            "steps": cell.steps,
            "seconds": cell.seconds,
        }

    def to_text(self) -> str:
        """Markdown: what was run, the table, the notes."""
        c, rounds = self.config, len(self.cells[0].seconds)
        where = str(self.device)
        if where == "cpu":
            threads = torch.get_num_threads()
            where = f"cpu, {threads} thread{'s' * (threads != 1)}"
        lines = [
            f"A training step of {c.task_name}, model={c.model_name}, {self.examples} examples "
            f"a batch, on {where}: medians of {rounds} rounds ({self.clock}), with the least and "
            "the most.",
            "",
            *markdown(self.columns(), rows=len(self.cells)),
        ]
        return "\n".join([*lines, *([""] * bool(self.notes)), *(f"- {n}" for n in self.notes)])

    def columns(self) -> dict[str, list[str]]:
        """Heading -> a text of each cell; a column in which nothing stands is left out."""
        every = {
            "norm": [c.norm if c.peer is None else f"{c.norm} ({c.peer})" for c in self.cells],
            "backend": [backend_text(c) for c in self.cells],
            "compile": [c.compile for c in self.cells],
            "precision": [c.precision for c in self.cells],
            "ms a step": [
                spread(1e3 * c.median, 1e3 * min(c.seconds), 1e3 * max(c.seconds), digits=2)
                for c in self.cells
            ],
            "examples/s": [f"{self.examples / c.median:,.1f}" for c in self.cells],
            f"{self.unit}/s": [
                "" if self.units == self.examples else f"{self.units / c.median:,.1f}"
                for c in self.cells
            ],
            "MFU": ["" if c.mfu is None else f"{c.mfu:.1%}" for c in self.cells],
            "added MiB": ["" if c.added is None else f"{c.added / MIB:,.0f}" for c in self.cells],
            f"of {BASELINE}": [ratio_text(self.to_baseline(c)) for c in self.cells],
            "of the peer": [ratio_text(self.to_peer(c)) for c in self.cells],
        }
        return {heading: texts for heading, texts in every.items() if any(texts)}


def backend_text(cell: Timed) -> str:
    """As asked for, and what ran where that is something else."""
    if cell.backend is None or cell.ran in (None, cell.backend):
        return cell.backend or ""
    return f"{cell.backend} ({cell.ran})"


def spread(median: float, least: float, most: float, *, digits: int) -> str:
    """`1.03 (0.99 to 1.08)`."""
    return f"{median:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


def ratio_text(found: Ratio | None) -> str:
    """A ratio in a table."""
    return "" if found is None else spread(found.median, found.least, found.most, digits=3)


def markdown(columns: dict[str, list[str]], *, rows: int) -> list[str]:
    """Lines of a Markdown table."""
    widths = {h: max(len(h), *(len(text) for text in texts)) for h, texts in columns.items()}
    lines = ["| " + " | ".join(h.ljust(widths[h]) for h in columns) + " |"]
    lines.append("|" + "|".join("-" * (widths[h] + 2) for h in columns) + "|")
    for row in range(rows):
        texts = (columns[h][row].ljust(widths[h]) for h in columns)
        lines.append("| " + " | ".join(texts) + " |")
    return lines
