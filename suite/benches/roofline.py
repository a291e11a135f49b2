"""How near each side of `suite.bench norms` comes to the speed of a copy, as a PNG.

One panel a pass. A group is a shape and dtype, with a column for each norm in it; the short line
over a group is what y.copy_(x) reached in the same rounds. The norm is read from the column and the
kind from the marker, so that the picture can be printed in grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from suite.benches.norm_figures import PASSES, Pass, Table
from suite.benches.norm_sides import KINDS, WORKS, Work
from suite.curves import COLOURS, DPI, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCHES_COLUMN, INCHES_REST, INCHES_HIGH = 0.27, 4.0, 4.2
GAP = 1.0  # between groups, in columns


def draw(tables: Sequence[Table], path: Path) -> None:
    """Write the picture of the tables to `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [
        (work, which, found)
        for work in WORKS
        for which in PASSES
        if (found := [t for t in tables if t.work == work and which in t.references])
    ]
    columns = max((sum(len(norms_of(t)) + GAP for t in ts) for _, _, ts in panels), default=1)
    size = (INCHES_REST + INCHES_COLUMN * columns, INCHES_HIGH * max(1, len(panels)))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    if panels:
        every = figure.subplots(len(panels), squeeze=False)[:, 0]
        for axes, (work, which, found) in zip(every, panels, strict=True):
            draw_panel(axes, found, work=work, which=which)
    figure.savefig(path, dpi=DPI)


def norms_of(table: Table) -> list[str]:
    """Its norms, in order."""
    return list(dict.fromkeys(side.norm for side in table.found))


def draw_panel(axes: Axes, tables: Sequence[Table], *, work: Work, which: Pass) -> None:
    """One pass: a group for each table."""
    at, ticks, labels = 0.0, [], []
    drawn: dict[str, tuple[list[float], list[float]]] = {}
    for table in tables:
        start = at
        for norm in norms_of(table):
            for side in table.found:
                if side.norm == norm and which in side.us:
                    xs, ys = drawn.setdefault(side.kind, ([], []))
                    xs.append(at)
                    ys.append(table.figures(side, which)["gb_per_s"])
            ticks.append(at)
            labels.append(norm)
            at += 1
        rate, middle = table.copy_rate(which), (start + at - 1) / 2
        name = "y.copy_(x)" if table is tables[0] else "_"  # matplotlib lists no "_"
        axes.hlines(rate, start - 0.5, at - 0.5, colors="black", linewidth=2, label=name)
        title = f"{table.rows} x {table.dim}\n{table.dtype}"
        axes.annotate(
            title,
            (middle, 1.0),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=7,
        )
        at += GAP
    for kind, (xs, ys) in drawn.items():
        number = list(KINDS).index(kind)
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number]
        fill = colour if kind in ("ours", "one-pass") else "none"
        axes.scatter(xs, ys, marker=marker, edgecolors=colour, facecolors=fill, label=kind, s=30)
    axes.set_xticks(ticks, labels, rotation=90, fontsize=7)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("GB/s of the bytes that must move")
    axes.set_title(f"{WORKS[work]}: {PASSES[which]}", loc="left", fontsize=10, pad=30)
    axes.grid(axis="y", alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=8)
