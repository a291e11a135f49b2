"""Runs on GenomicBenchmarks beside the published figures.

    python -m tasks.dna.benchmark_table FOLDER [FOLDER ...]

reads the runs that a sweep over tasks and seeds has left (docs/recipes.md has its commands) and
prints, for each model, a row a task and a column a norm: mean test accuracy over seeds, and the
largest less the smallest, which is what the published +- is. A mean over tasks is printed only
where all eight are there, with whole test sets: tasks differ by 20 points, so that a mean over some
of them is no smaller evidence but another quantity.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from suite.errors import ConfigError
from suite.records import Run, comparable, differences, find_runs, in_section, plain

TASK, DATA, METRIC = "dna/classify", "genomic_benchmarks", "acc"
TESTS = {  # sequences of each test set, as published; also the order of the rows
    "dummy_mouse_enhancers_ensembl": 242,
    "demo_coding_vs_intergenomic_seqs": 25_000,
    "demo_human_or_worm": 25_000,
    "human_enhancers_cohn": 6_948,
    "human_enhancers_ensembl": 30_970,
    "human_ensembl_regulatory": 57_713,
    "human_ocr_ensembl": 34_952,
    "human_nontata_promoters": 9_034,
}
# Caduceus (arXiv 2403.03234), Table 1: top-1 accuracy in per cent, mean of 5 seeds and the largest
# less the smallest, in the order of TESTS.
PUBLISHED: Mapping[str, tuple[tuple[float, float], ...]] = {
    "CNN": (
        *((71.5, 8.7), (89.2, 0.8), (94.2, 0.2), (70.2, 2.1)),
        *((74.4, 12.2), (87.2, 0.5), (69.8, 1.3), (86.1, 0.9)),
    ),
    "HyenaDNA": (
        *((78.0, 2.5), (90.4, 0.5), (96.4, 0.2), (72.9, 1.4)),
        *((84.9, 0.6), (86.9, 1.2), (78.3, 0.7), (94.4, 0.2)),
    ),
    "Caduceus-Ph": (
        *((75.4, 7.4), (91.5, 0.3), (97.3, 0.1), (74.7, 0.4)),
        *((89.3, 0.8), (87.2, 1.1), (82.8, 0.6), (94.6, 0.7)),
    ),
    "Caduceus-PS": (
        *((79.3, 5.8), (91.0, 0.3), (96.8, 0.2), (74.5, 0.7)),
        *((90.0, 0.6), (87.3, 0.7), (81.8, 0.6), (94.5, 1.0)),
    ),
}
PARAMETERS = {"CNN": "264k", "HyenaDNA": "436k", "Caduceus-Ph": "470k", "Caduceus-PS": "470k"}
# Means over the eight tasks: DyT (arXiv 2503.10622, Table 6) and Derf (arXiv 2512.10938). Neither
# says which Caduceus it has; with its own norm the mean is that of PS in the table above.
OWN_NORM = {"HyenaDNA": "layernorm", "Caduceus-Ph": "rmsnorm", "Caduceus-PS": "rmsnorm"}
MEANS: Mapping[str, Mapping[str, float]] = {
    "HyenaDNA": {"layernorm": 85.2, "dyt": 85.2, "derf": 85.7},
    "Caduceus-PS": {"rmsnorm": 86.9, "dyt": 86.9, "derf": 87.3},
}
OF_A_TASK = ("seed", "data sha256", "data.task", "data.val_seed")  # differ without saying anything
LEGEND = """\
ours: mean test accuracy, +- the largest less the smallest over seeds (how many seeds)
published: Caduceus (arXiv 2403.03234), Table 1, 5 seeds, +- alike; means of the norms: DyT \
(arXiv 2503.10622), Derf (arXiv 2512.10938)"""
PIPED_WIDTH = 200  # characters; a pipe has no width
HELP = """\
examples:
  python -m tasks.dna.benchmark_table gb/layernorm gb/dyt
  python -m tasks.dna.benchmark_table gb --select optim.lr,optim.min_lr

Runs of one model, norm and task may differ in the seed alone. --select names what else differs: for
each task the values with the best mean accuracy on validation are taken.

exit codes: 0 printed, also where runs are missing; 2 a mistake in the command
"""


@dataclass(frozen=True)
class Cell:
    """The finished runs of one model, norm and task.

    tests: seed -> test accuracy in per cent. chosen: what `--select` took.
    """

    tests: Mapping[int, float]
    chosen: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        return fmean(self.tests.values())

    @property
    def spread(self) -> float:
        return max(self.tests.values()) - min(self.tests.values())


@dataclass
class Arm:
    """One model under one norm: a column. cells: task -> its runs. published: row of PUBLISHED."""

    model: str
    norm: str
    published: str | None
    parameters: set[int]
    cells: dict[str, Cell] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def mean(self) -> float | None:
        """Over all eight tasks; None where one is missing."""
        whole = len(self.cells) == len(TESTS)
        return fmean(cell.mean for cell in self.cells.values()) if whole else None


# --- runs -----------------------------------------------------------------------------------------


def task_of(run: Run) -> str | None:
    """Which of the eight tasks a run is of; None: of none."""
    folder, _, task = str(run.result["data"].get("name")).partition("/")
    return task if run.result["task"] == TASK and folder == DATA and task in TESTS else None


def row_of(run: Run) -> str | None:
    """The row of the published table that a run's model is to be held against; None: of none."""
    model = str(run.result["model"])
    if model.startswith("hyenadna"):
        return "HyenaDNA"
    if model.startswith("caduceus") and run.flat.get("model.bidirectional", True):
        return "Caduceus-PS" if run.flat.get("model.rcps") else "Caduceus-Ph"
    return None


def why_not(run: Run) -> str | None:
    """Why a run of one of the tasks has no figure; None: it has."""
    if not run.done:
        return str(run.result["status"])
    if run.figure("test", metric=METRIC) is None:
        return f"no test/{METRIC}"
    whole, found = TESTS[str(task_of(run))], run.result.get("metrics", {}).get("test/count")
    if found != whole:
        shown = f"{found:,.0f}" if isinstance(found, (int, float)) else "an unknown number of"
        return f"tested on {shown} sequences, the published test has {whole:,}"
    return None


def sort_out(runs: Iterable[Run]) -> tuple[list[Run], list[str]]:
    """The runs that have a figure, and a line for each that has none."""
    good, left_out = [], []
    for run in runs:
        if task_of(run) is None:
            what = f"{run.result['task']} on {run.result['data'].get('name')}"
            left_out.append(f"{run.folder}: not one of the eight tasks ({what})")
        elif reason := why_not(run):
            left_out.append(f"{run.folder}: not counted: {reason}")
        else:
            good.append(run)
    return good, left_out


def grouped(runs: Iterable[Run], key: Callable[[Run], str]) -> dict[str, list[Run]]:
    """Runs of equal key, in the order in which they came."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(key(run), []).append(run)
    return found


def settings(run: Run, *, without: Sequence[str] = OF_A_TASK) -> dict[str, Any]:
    """What was trained, but for what may differ."""
    flat = comparable(run.flat)
    return {k: v for k, v in flat.items() if not any(in_section(k, out) for out in without)}


def choose(runs: Sequence[Run], *, select: Sequence[str], what: str) -> tuple[list[Run], list[str]]:
    """The runs of one setting of `select`, by the best mean on validation, the last one of each
    seed; and a line for each of the others.

    Raises ConfigError where they differ in more than `select`.
    """
    first, without = runs[0], (*OF_A_TASK, *select)
    for other in runs[1:]:
        pairs = (settings(run, without=without) for run in (first, other))
        if differ := differences(*pairs):
            shown = ", ".join(f"{k} ({plain(a)}, {plain(b)})" for k, (a, b) in differ.items())
            raise ConfigError(
                f"{what}: {first.folder} and {other.folder} differ in {shown}; give folders of one "
                f"setting, or --select {','.join([*select, *differ])} to choose on validation"
            )
    kept, lines = [], []
    for some in grouped(runs, lambda run: plain([run.flat.get(key) for key in select])).values():
        seeds = grouped(some, lambda run: str(run.seed)).values()
        last = [max(same, key=lambda run: run.written) for same in seeds]
        kept.append(last)
        lines += [
            f"{r.folder}: not counted: there is a later run of its seed"
            for r in some
            if r not in last
        ]
    best = max(kept, key=lambda some: fmean(run.figure("val") or 0.0 for run in some))
    for run in (run for some in kept if some is not best for run in some):
        lines.append(f"{run.folder}: not counted: another {', '.join(select)} was chosen")
    return best, lines


def build_arms(runs: Sequence[Run], *, select: Sequence[str]) -> tuple[list[Arm], list[str]]:
    """A column for each model and norm, and a line for each run that is not in it."""
    arms: list[Arm] = []
    others: list[str] = []
    for found in grouped(runs, lambda r: plain([r.result["model"], r.result["norm"]])).values():
        model, norm = (str(found[0].result[key]) for key in ("model", "norm"))
        taken: list[Run] = []
        arm = Arm(model, norm, row_of(found[0]), set())
        by_task = grouped(found, lambda run: str(task_of(run)))
        for task in (name for name in TESTS if name in by_task):
            what = f"{model} {norm} on {task}"
            chosen, lines = choose(by_task[task], select=select, what=what)
            others += lines
            taken += chosen
            tests = {r.seed: 100 * (r.figure("test", metric=METRIC) or 0.0) for r in chosen}
            values = {key: chosen[0].flat.get(key) for key in select}
            arm.cells[task] = Cell(dict(sorted(tests.items())), values)
        arm.parameters.update(int(run.result.get("parameters") or 0) for run in taken)
        arm.notes = notes_of(arm, taken)
        arms.append(arm)
    arms.sort(key=lambda arm: (arm.model, arm.norm != OWN_NORM.get(arm.published or ""), arm.norm))
    return arms, others


def notes_of(arm: Arm, runs: Sequence[Run]) -> list[str]:
    """What a reader has to know of a column."""
    notes = []
    seeds = Counter(tuple(cell.tests) for cell in arm.cells.values())
    if len(seeds) > 1:
        shown = "; ".join(f"{','.join(map(str, some))} in {n} of them" for some, n in seeds.items())
        notes.append(f"{arm.norm}: not all tasks have the same seeds: {shown}")
    varied: dict[str, set[str]] = {}
    for run in runs:
        for key, pair in differences(settings(runs[0]), settings(run)).items():
            varied.setdefault(key, set()).update(map(plain, pair))
    for key, values in varied.items():
        notes.append(f"{arm.norm}: {key} differs between tasks: {', '.join(sorted(values))}")
    return notes


# --- what is shown --------------------------------------------------------------------------------


def figure(mean: float, spread: float, seeds: int | None = None) -> str:
    """ "79.3 +-5.8 (5)": mean, largest less smallest, how many seeds."""
    return f"{mean:.1f} +-{spread:.1f}" + (f" ({seeds})" if seeds is not None else "")


def mean_text(arm: Arm) -> str:
    """The mean over the eight tasks, or how many of them there are."""
    if arm.mean is None:
        return f"{len(arm.cells)} of {len(TESTS)} tasks"
    counts = sorted({len(cell.tests) for cell in arm.cells.values()})
    seeds = "-".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    return f"{arm.mean:.2f} ({seeds} seeds)"


def published_mean(row: str) -> float:
    """Over the eight tasks of the published table."""
    return fmean(mean for mean, _ in PUBLISHED[row])


def rows_of(arms: Sequence[Arm]) -> list[list[str]]:
    """The table of one model: heading, tasks, means, published means of the norms."""
    row = arms[0].published
    shown = ["CNN"] if row is None else [row, "CNN"]
    rows = [["top-1, %", *(arm.norm for arm in arms)]]
    rows[0] += [f"published: {name} ({PARAMETERS[name]})" for name in shown]
    for i, task in enumerate(TESTS):
        cells = [arm.cells.get(task) for arm in arms]
        ours = ["-" if c is None else figure(c.mean, c.spread, len(c.tests)) for c in cells]
        rows.append([task, *ours, *(figure(*PUBLISHED[name][i]) for name in shown)])
    means = [f"{published_mean(name):.2f}" for name in shown]
    rows.append([f"mean of {len(TESTS)} tasks", *map(mean_text, arms), *means])
    known = MEANS.get(row or "", {})
    if any(arm.norm in known for arm in arms):
        theirs = [f"{known[arm.norm]:.1f}" if arm.norm in known else "-" for arm in arms]
        rows.append(["published mean of the norm", *theirs, *("" for _ in shown)])
    return rows


def as_json(arms: Sequence[Arm], *, left_out: Sequence[str]) -> str:
    """The same, for a program."""

    def of_cell(arm: Arm, task: str, cell: Cell) -> dict[str, Any]:
        row = PUBLISHED.get(arm.published or "")
        published = row and dict(zip(("mean", "spread"), row[list(TESTS).index(task)], strict=True))
        found = {"mean": cell.mean, "spread": cell.spread, "tests": cell.tests}
        return {**found, "chosen": cell.chosen, "published": published}

    def of_arm(arm: Arm) -> dict[str, Any]:
        return {
            "model": arm.model,
            "norm": arm.norm,
            "parameters": sorted(arm.parameters),
            "tasks": {task: of_cell(arm, task, cell) for task, cell in arm.cells.items()},
            "mean": arm.mean,
            "published_row": arm.published,
            "published_mean": arm.published and published_mean(arm.published),
            "published_mean_of_norm": MEANS.get(arm.published or "", {}).get(arm.norm),
            "notes": arm.notes,
        }

    found = {"tasks": list(TESTS), "columns": [of_arm(arm) for arm in arms]}
    return json.dumps({**found, "left_out": list(left_out)}, indent=2, allow_nan=False)


def print_tables(arms: Sequence[Arm], *, console: Console) -> None:
    """A table for each model, with its notes."""
    for model in dict.fromkeys(arm.model for arm in arms):
        columns = [arm for arm in arms if arm.model == model]
        counts = sorted({n for arm in columns for n in arm.parameters})
        spans = " to ".join(f"{n:,}" for n in dict.fromkeys((counts[0], counts[-1])))
        table = Table(title=f"{model}, {spans} parameters", title_justify="left")
        heading, *rows = rows_of(columns)
        for number, text in enumerate(heading):
            table.add_column(escape(text), justify="right" if number else "left", overflow="fold")
        for cells in rows:
            table.add_row(*map(escape, cells), end_section=cells[0] == list(TESTS)[-1])
        console.print(table)
        lines = [f"note: {note}" for arm in columns for note in arm.notes]
        for task, arm in ((task, arm) for task in TESTS for arm in columns):
            if chosen := arm.cells.get(task, Cell({})).chosen:
                values = " ".join(f"{key}={plain(value)}" for key, value in chosen.items())
                lines.append(f"chosen on val: {task}, {arm.norm}: {values}")
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(LEGEND, markup=False, highlight=False, soft_wrap=True)


class _Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one ConfigError and not a usage text."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `python -m tasks.dna.benchmark_table --help`")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises ConfigError."""
    parser = _Parser(
        prog="python -m tasks.dna.benchmark_table",
        description="Runs on GenomicBenchmarks beside the published figures.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of runs")
    parser.add_argument("--select", action="append", default=[], metavar="KEY", help="see below")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        given = parse(argv)
        select = tuple(key for text in given.select for key in text.split(","))
        runs, unreadable = find_runs(given.folders)
        good, left_out = sort_out(runs)
        if not good:
            for line in (*unreadable, *left_out):
                print(f"warning: {line}", file=sys.stderr)
            raise ConfigError(
                f"{', '.join(map(str, given.folders))}: none of {len(runs) + len(unreadable)} runs "
                "is a finished one on one of the eight tasks of GenomicBenchmarks"
            )
        arms, others = build_arms(good, select=select)
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    left_out = [*unreadable, *left_out, *others]
    for line in left_out:
        print(f"warning: {line}", file=sys.stderr)
    total = len(runs) + len(unreadable)
    print(f"{total - len(left_out)} of {total} runs are in the figures", file=sys.stderr)
    if given.json:
        print(as_json(arms, left_out=left_out))
    else:
        print_tables(arms, console=Console(width=None if sys.stdout.isatty() else PIPED_WIDTH))
    return 0


if __name__ == "__main__":
    sys.exit(main())
