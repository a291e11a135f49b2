"""Validation curves as a PNG: a line a norm, the mean over its seeds, in a band from the lowest to
the highest.

The band is the range and not a standard error, because three seeds have no distribution to speak
of. Colours are Okabe and Ito's, which people with colour-blindness tell apart (Wong, Nature Methods
2011, doi:10.1038/nmeth.1618); line styles and markers say the same again for print.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from suite.comparison import Block
from suite.records import read_curve
from suite.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito without the yellow, which is too light for a line on white.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")
INCHES = (9.0, 4.6)  # width and height of one panel
DPI = 150
MOST_PIXELS = 60_000  # in height; matplotlib refuses 65,536
LABEL_WIDTH = 34  # characters


def draw_curves(blocks: Sequence[Block], path: Path, *, metric: str | None = None) -> str | None:
    """Write one panel for each group of each block to `path`; returns why not, in one line, or
    None.

    metric: drawn instead of the primary one, from `val/<metric>` in the runs' metrics.jsonl.
    """
    panels = [
        (block, [row for row in block.rows if row.group == group])
        for block in blocks
        for group in sorted({row.group for row in block.rows})
    ]
    panels = [(block, rows) for block, rows in panels if any(_curves(row, block) for row in rows)]
    if not panels:
        keys = ", ".join(sorted({f"val/{block.metric}" for block in blocks}))
        return f"{path.name} was not made: no run has {keys} in its metrics.jsonl"
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        return f"{path.name} was not made: {error}; install it with: pip install matplotlib"
    figure = Figure(figsize=(INCHES[0], INCHES[1] * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    # One look a label in all panels, so that a norm is recognised from one to the next.
    labels = list(dict.fromkeys(row.label for _, rows in panels for row in rows))
    for axes, (block, rows) in zip(all_axes, panels, strict=True):
        _draw_panel(axes, block=block, rows=rows, labels=labels)
    figure.savefig(path, dpi=min(DPI, MOST_PIXELS / figure.get_figheight()))
    return None


def _curves(row: Row, block: Block) -> list[dict[int, float]]:
    """Step -> figure for each averaged run that has logged any."""
    found = (read_curve(run.folder, key=f"val/{block.metric}") for run in row.runs)
    return [curve for curve in found if curve]


def _draw_panel(axes: Axes, *, block: Block, rows: Sequence[Row], labels: Sequence[str]) -> None:
    for row in rows:
        _draw_row(axes, row=row, curves=_curves(row, block), number=labels.index(row.label))
    title = block.title
    if rows[0].differs:
        title += f"\n{textwrap.shorten(rows[0].differs, 100)}"
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(
        f"{block.metric} on val ({'higher' if block.direction == 'max' else 'lower'} is better)"
    )
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    # Beside the axes: inside them a legend covers one curve or another.
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        frameon=False,
        fontsize=9,
        title="mean, and range over seeds",
        title_fontsize=9,
        alignment="left",
    )


def _draw_row(axes: Axes, *, row: Row, curves: Sequence[dict[int, float]], number: int) -> None:
    if not curves:
        axes.plot([], [], " ", label=_wrap(f"{row.label}: no curve ({_runs_text(row)})"))
        return
    # Steps that every seed has: a mean over fewer would jump where a shorter run ends.
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    colour = COLOURS[number % len(COLOURS)]
    style = STYLES[number % len(STYLES)]
    values = [[curve[step] for curve in curves] for step in steps]
    axes.fill_between(
        steps,
        [min(of_step) for of_step in values],
        [max(of_step) for of_step in values],
        color=colour,
        alpha=0.15,
        linewidth=0,
    )
    axes.plot(
        steps,
        [fmean(of_step) for of_step in values],
        color=colour,
        linestyle=style,
        linewidth=1.8,
        marker=MARKERS[number % len(MARKERS)],
        markersize=4.5,
        markevery=max(1, len(steps) // 10),
        label=_wrap(f"{row.label} ({_runs_text(row)})"),
    )


def _wrap(label: str) -> str:
    """Fold a long label, which would otherwise push the axes together."""
    return "\n".join(textwrap.wrap(label, LABEL_WIDTH))


def _runs_text(row: Row) -> str:
    seeds = f"{len(row.runs)} seed{'s' * (len(row.runs) != 1)}"
    failed = sum(not run.done for run in row.every)
    return f"{seeds}, {failed} failed" if failed else seeds
