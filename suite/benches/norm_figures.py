"""What the times of `suite.bench norms` say: ratios, bytes, shares of the copy's bandwidth, goals.

Bytes that must move, an element of s bytes: forward 2 s (x in, y out), backward 3 s (x and dy in,
dx out), both 5 s; with a residual added, forward 4 s (x and residual in, sum and y out), backward
4 s (sum, dy and the sum's own gradient in, dx out). Parameters are read in each pass (the bias in
the forward only) and their gradients written. Row statistics, 4 to 8 bytes a row, are not counted.

The floor of a pass is these bytes at the rate of a reference that moves as many: y.copy_(x) for the
forward, torch.add(x, g, out=dx) for the backward, one after the other for both; "of copy" is a
side's rate by that of y.copy_(x) alone. All are timed in the same rounds, and every ratio is taken
inside a round.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from suite.benches.norm_sides import WORKS, Work

Pass = Literal["forward", "backward", "train"]
PASSES: dict[Pass, str] = {
    "forward": "forward, no gradients asked",
    "backward": "backward alone, with all parameter gradients",
    "train": "forward + backward, with all parameter gradients",
}
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
REFERENCES = {"copy": 2, "add": 3, "copy + add": 5}  # tensors that each moves
REFERENCE: dict[Pass, str] = {"forward": "copy", "backward": "add", "train": "copy + add"}
MOVED: dict[Work, dict[Pass, int]] = {
    "norm": {"forward": 2, "backward": 3, "train": 5},
    "add": {"forward": 4, "backward": 4, "train": 8},
}
BASELINE = ("layernorm", "torch")
COLUMNS = (
    *("norm", "side", "us", "least to most", "to LayerNorm", "to floor", "of copy", "GB/s"),
    *("saved B/el", "peak MiB", "error y", "error grad"),
)
MIB = 2**20


@dataclass
class Found:
    """Of one side. us: of one call, a round each, by pass; calls: how many a round timed together.
    saved: bytes an element that autograd keeps. peak: bytes that a call adds at its peak, by pass.
    errors: of the output ("y") and of each gradient. parameters: name -> elements."""

    norm: str
    kind: str
    parameters: dict[str, int]
    us: dict[Pass, list[float]] = field(default_factory=dict)
    calls: dict[Pass, int] = field(default_factory=dict)
    saved: float | None = None
    peak: dict[Pass, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        return self.norm, self.kind

    def moved(self, rows: int, dim: int, *, dtype: str, work: Work, which: Pass) -> int:
        """Bytes that must move."""
        all_of = sum(self.parameters.values())
        read = {"forward": all_of, "backward": all_of - self.parameters.get("bias", 0)}
        written = {"forward": 0, "backward": all_of}
        parts = [which] if which != "train" else ["forward", "backward"]
        extra = sum(read[part] + written[part] for part in parts)
        return SIZES[dtype] * (MOVED[work][which] * rows * dim + extra)


@dataclass
class Table:
    """All sides at one shape and dtype. references: name -> us a round, by pass. sets: how many
    inputs take turns, so that none is in the cache; working_set: their bytes."""

    rows: int
    dim: int
    dtype: str
    work: Work
    sets: int
    working_set: int
    references: dict[Pass, dict[str, list[float]]] = field(default_factory=dict)
    found: list[Found] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.rows} x {self.dim} {self.dtype}"

    def of(self, norm: str, kind: str) -> Found | None:
        """The side of that name, if it was measured."""
        return next((f for f in self.found if f.key == (norm, kind)), None)

    def ratios(self, which: Pass, one: tuple[str, str], other: tuple[str, str]) -> list[float]:
        """Time of one by that of the other in each round; empty where one is missing."""
        a, b = self.of(*one), self.of(*other)
        if a is None or b is None:
            return []
        if which not in a.us or which not in b.us:
            return []
        return [x / y for x, y in zip(a.us[which], b.us[which], strict=True)]

    def figures(self, side: Found, which: Pass) -> dict[str, Any]:
        """What is derived of one side in one pass; lists hold a value a round."""
        size = self.rows * self.dim * SIZES[self.dtype]
        moved = side.moved(self.rows, self.dim, dtype=self.dtype, work=self.work, which=which)
        times, timed = side.us[which], self.references[which]
        name = REFERENCE[which]
        floors = [moved * us / (REFERENCES[name] * size) for us in timed[name]]
        floor = [t / f for t, f in zip(times, floors, strict=True)]
        rates = [moved / t for t in times]  # bytes a microsecond: MB/s
        copies = [REFERENCES["copy"] * size / us for us in timed["copy"]]
        share = [r / c for r, c in zip(rates, copies, strict=True)]
        return {
            "bytes": moved,
            "us": middle(times),
            "to_layernorm": middle(self.ratios(which, side.key, BASELINE)),
            "to_floor": middle(floor),
            "of_copy": middle(share),
            "gb_per_s": statistics.median(rates) / 1e3,
        }

    def copy_rate(self, which: Pass) -> float:
        """GB/s of y.copy_(x) in the rounds of this pass."""
        size = REFERENCES["copy"] * self.rows * self.dim * SIZES[self.dtype]
        return size / statistics.median(self.references[which]["copy"]) / 1e3

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: every round, and what is derived."""
        sides = [
            {
                **vars(side),
                "figures": {which: self.figures(side, which) for which in side.us},
            }
            for side in self.found
        ]
        return {**vars(self), "found": sides}

    def lines(self, which: Pass) -> list[str]:
        """The Markdown table of a pass."""
        cells = [list(COLUMNS)]
        for name, us in self.references[which].items():
            rate = REFERENCES[name] * self.rows * self.dim * SIZES[self.dtype] / 1e3
            gb = rate / statistics.median(us)
            texts = ["", name, f"{statistics.median(us):.0f}", spread(us, "{:.0f}")]
            cells.append([*texts, "", "", "", f"{gb:.1f}", "", "", "", ""])
        cells += [self._cells(side, which) for side in self.found if which in side.us]
        widths = [max(len(row[k]) for row in cells) for k in range(len(COLUMNS))]
        rows = [" | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in cells]
        rows.insert(1, " | ".join("-" * w for w in widths))
        return [f"| {row} |" for row in rows]

    def _cells(self, side: Found, which: Pass) -> list[str]:
        f = self.figures(side, which)
        to = f["to_layernorm"]
        gradients = [e for name, e in side.errors.items() if name != "y"]
        peak = side.peak.get(which)
        return [
            side.norm,
            side.kind,
            f"{f['us']['median']:.0f}",
            spread(side.us[which], "{:.0f}"),
            "-" if to is None else f"{to['median']:.2f} ({to['min']:.2f} to {to['max']:.2f})",
            f"{f['to_floor']['median']:.2f}",
            f"{100 * f['of_copy']['median']:.0f} %",
            f"{f['gb_per_s']:.1f}",
            "-" if side.saved is None else f"{side.saved:.2f}",
            "-" if peak is None else f"{peak / MIB:.1f}",
            f"{side.errors['y']:.1e}" if "y" in side.errors else "-",
            f"{max(gradients):.1e}" if gradients else "-",
        ]


def middle(values: Sequence[float]) -> dict[str, float] | None:
    """Median, least and most; None of nothing."""
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def spread(values: Sequence[float], form: str) -> str:
    """Least to most."""
    return f"{form.format(min(values))} to {form.format(max(values))}"


@dataclass(frozen=True)
class Goal:
    """A ratio that was asked for. at_most: whether smaller is better."""

    what: str
    asked: float
    found: float
    at_most: bool

    @property
    def met(self) -> bool:
        return self.found <= self.asked if self.at_most else self.found >= self.asked

    def line(self) -> str:
        """For the page."""
        sign = "at most" if self.at_most else "at least"
        verdict = "met" if self.met else "**not met**"
        return f"- {self.what}: {sign} {self.asked:g}, found {self.found:.3g}: {verdict}"


CPU_SHAPES = ((6304, 768), (8192, 1024), (16384, 256))
MAPPED = (8192, 1024)  # float32: 32 MiB, so that every new output is mapped and faults
WIDE = 4096


def goals(tables: Sequence[Table], *, device: str, threads: int) -> list[Goal]:
    """The goals that can be judged from these tables: those of a CPU on one thread, or a GPU's."""
    found: list[Goal] = []
    for table in tables:
        if table.work != "norm":
            continue
        if device == "cuda" and table.dtype == "bfloat16":
            found += gpu_goals(table)
        elif device == "cpu" and threads == 1 and (table.rows, table.dim) in CPU_SHAPES:
            found += cpu_goals(table)
    return found


def _ratio(table: Table, which: Pass, one: tuple[str, str], other: tuple[str, str]) -> float | None:
    ratios = table.ratios(which, one, other)
    return statistics.median(ratios) if ratios else None


def cpu_goals(table: Table) -> list[Goal]:
    """Forward + backward against LayerNorm and eager DyT, and saved bytes."""
    single = table.dtype == "float32"
    mapped = single and (table.rows, table.dim) == MAPPED
    dyt, derf = ("dyt", "ours"), ("derf", "ours")
    limits = (0.95 + 0.05 * mapped, 1.05) if single else (0.65, 0.75)
    asked = [
        ("DyT forward + backward to LayerNorm", dyt, BASELINE, limits[0], True),
        ("Derf forward + backward to LayerNorm", derf, BASELINE, limits[1], True),
        ("eager DyT (published) to ours", ("dyt", "published"), dyt, 4.0 if mapped else 5.0, False),
    ]
    found = []
    for what, one, other, limit, at_most in asked:
        ratio = _ratio(table, "train", one, other)
        if ratio is not None and table.dtype in ("float32", "bfloat16"):
            found.append(Goal(f"{table.title}: {what}", limit, ratio, at_most))
    return found + saved_goals(table)


def saved_goals(table: Table) -> list[Goal]:
    """Saved bytes an element: the input's."""
    return [
        Goal(f"{table.title}: {norm} saved bytes an element", SIZES[table.dtype], side.saved, True)
        for norm in ("dyt", "derf")
        if (side := table.of(norm, "ours")) is not None and side.saved is not None
    ]


def gpu_goals(table: Table) -> list[Goal]:
    """Shares of the copy's bandwidth at wide rows, and ratios to LayerNorm, Liger and DyT."""
    dyt, found = ("dyt", "ours"), []
    side = table.of(*dyt)
    shares: list[tuple[Pass, float]] = [("forward", 0.8), ("backward", 0.65)]
    for which, share in shares:
        if side is not None and which in side.us and table.dim >= WIDE:
            got = table.figures(side, which)["of_copy"]["median"]
            found.append(Goal(f"{table.title}: DyT {which}, of copy", share, got, False))
    liger = {(50432, 768): 1.5, (8192, 4096): 1.2}.get((table.rows, table.dim))
    ratio = _ratio(table, "train", ("dyt", "liger"), dyt)
    if liger is not None and ratio is not None:
        found.append(Goal(f"{table.title}: Liger's DyT to ours", liger, ratio, False))
    passes: list[Pass] = ["forward", "train"]
    for which in passes:
        ratio = _ratio(table, which, dyt, BASELINE)
        if ratio is not None:
            found.append(Goal(f"{table.title}: DyT {which} to LayerNorm", 1.0, ratio, True))
    ratio = _ratio(table, "train", ("derf", "ours"), dyt)
    if ratio is not None:
        found.append(Goal(f"{table.title}: Derf to DyT", 1.15, ratio, True))
    return found + saved_goals(table)


def page(tables: Sequence[Table], goals: Sequence[Goal], notes: Sequence[str]) -> str:
    """The Markdown: a table for each shape, dtype, work and pass, then goals and notes."""
    parts = []
    for table in tables:
        for which in table.references:
            sets = f"{table.sets} input sets in turn" if table.sets > 1 else "one input set"
            held = f"{sets}, {table.working_set / MIB:.0f} MiB"
            title = f"### {table.title}: {WORKS[table.work]}, {PASSES[which]}"
            parts.append("\n".join([title, "", f"{held}.", "", *table.lines(which)]))
    if goals:
        parts.append("\n".join(["### Goals", "", *(goal.line() for goal in goals)]))
    if notes:
        parts.append("\n".join(["### Notes", "", *(f"- {note}" for note in notes)]))
    return "\n\n".join(parts)
