"""A grid of runs, one process a run: every `key=a,b` is a list, and the grid is their product.

Each cell is a `python -m suite.train ...` of its own, because runs that share one process share its
state (seeds, CUDA context, process groups), and because a crash must cost one cell and not the
rest. The same command, submitted again, skips the cells that are done and starts the others afresh,
so Ctrl-C, a crash and a lost machine cost no more than the cells that were running.

Folder: `--out`, or `runs/sweeps/<task>-<hash>`, where the hash is of the tokens that hold one
value. So adding a seed to `seed=0,1` finds the finished cells again, and another
`trainer.max_epochs=` is another folder. In it `<cell>/` is the run, `logs/<cell>.log` what it
printed, and `<cell>.failed-<k>` an attempt that was set aside.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from suite.cells import Cell, Outcome, is_finished, run_cells, show_seconds
from suite.errors import ConfigError, shown
from suite.safety import printable

TRAIN = (sys.executable, "-m", "suite.train")
NAME_LENGTH = 150  # bytes; file systems allow 255, and `.failed-<k>.log` is added
RESERVED = {
    "run.dir": "the sweep gives each cell its own folder; choose where with --out DIR",
    "run.resume": "finished cells are skipped and the others start afresh",
    "evaluate": "a sweep trains; use `python -m suite.train evaluate=RUN`",
}
HELP = """\
examples:
  python -m suite.sweep norm=layernorm,dyt seed=0,1,2
  python -m suite.sweep task=vision/classify norm=layernorm,dyt optim.lr=1e-3,2e-3 --jobs 2
  python -m suite.report runs/sweeps/<folder> --select optim.lr

Commas inside {..}, [..] or quotes do not split: "norm.alpha_init_by_site={attn: 0.8, ffn: 0.2}" is
one value.
The same command again skips what is done; a failed or interrupted cell starts afresh, its old
folder kept as <cell>.failed-<k>. Ctrl-C stops the running cells (twice: at once).

exit codes: 0 all done, 1 a cell failed, 2 a mistake in the command (nothing started), 130 stopped
"""

Resolve = Callable[[Sequence[str]], Mapping[str, Any]]


def resolve_config(tokens: Sequence[str]) -> Mapping[str, Any]:
    """The whole configuration that `tokens` give, as a plain nested dict. Raises ConfigError."""
    from suite.config import check_devices, load, to_dict

    config = load(list(tokens)).settled
    check_devices(config)
    return to_dict(config)


def split_values(token: str) -> tuple[str, list[str]]:
    """`key=a,b` -> ("key", ["a", "b"]); commas inside brackets, braces or quotes do not split.

    Raises ConfigError for a token without `=`, an empty value in a list, or a value named twice.
    """
    key, equals, text = token.partition("=")
    if not equals or not key:
        raise ConfigError(f"{token}: not key=value; write for example norm=layernorm,dyt")
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        elif character == "," and depth <= 0:
            values.append("")
            continue
        values[-1] += character
    values = [value.strip() for value in values]
    if len(values) > 1 and "" in values:
        raise ConfigError(f"{token}: an empty value in the list; remove the comma too many")
    twice = [value for value, n in Counter(values).items() if n > 1]
    if twice:
        raise ConfigError(f"{token}: {twice[0]} is named twice; name every value once")
    return key, values


def parse_tokens(tokens: Sequence[str]) -> dict[str, list[str]]:
    """Key -> its values, in the order given. Raises ConfigError for a key given twice or
    reserved."""
    axes: dict[str, list[str]] = {}
    for token in tokens:
        key, values = split_values(token)
        if key in RESERVED:
            raise ConfigError(f"{token}: not in a sweep: {RESERVED[key]}")
        if key in axes:
            raise ConfigError(f"{token}: {key} is given twice; write {key}=a,b for several values")
        axes[key] = values
    return axes


def cell_name(varied: Mapping[str, str]) -> str:
    """A readable, file-system-safe name: `{"norm": "dyt", "seed": "0"}` -> "norm-dyt_seed-0".

    Where a character had to be replaced or the name cut, a hash of the true values follows, so that
    two cells never share a name and a cell keeps its name when the grid grows.
    """
    plain = "_".join(f"{key}-{value}" for key, value in varied.items()) or "run"
    safe = re.sub(r"[^A-Za-z0-9._+-]+", "-", plain)[:NAME_LENGTH]
    if safe == plain:
        return safe
    return f"{safe.strip('-')}-{_short_hash(sorted(varied.items()), length=6)}"


def plan_cells(axes: Mapping[str, Sequence[str]], *, resolve: Resolve) -> list[Cell]:
    """Every cell of the grid, validated. Raises one ConfigError that lists all the bad cells."""
    cells: list[Cell] = []
    bad: dict[str, list[str]] = {}
    for combination in itertools.product(*axes.values()):
        chosen = dict(zip(axes, combination, strict=True))
        varied = {key: value for key, value in chosen.items() if len(axes[key]) > 1}
        tokens = tuple(f"{key}={value}" for key, value in chosen.items())
        try:
            cells.append(Cell(name=cell_name(varied), tokens=tokens, config=resolve(tokens)))
        except ConfigError as error:
            bad.setdefault(str(error), []).append(cell_name(varied))
    if bad:
        raise ConfigError("\n".join(_bad_line(names, error) for error, names in bad.items()))
    _check_distinct(cells)
    return cells


def _bad_line(names: Sequence[str], error: str) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return error if names[0] == "run" else f"cell {names[0]}{more}: {error}"


def _check_distinct(cells: Sequence[Cell]) -> None:
    """Two cells that are one run (optim.lr=1e-3,0.001) or one folder (on a case-blind disk)."""
    by_config: dict[str, str] = {}
    by_name: dict[str, str] = {}
    for cell in cells:
        config = json.dumps(cell.config, sort_keys=True, default=str)
        other = by_config.setdefault(config, cell.name)
        if other != cell.name:
            raise ConfigError(f"cells {other} and {cell.name} are the same run; keep one of them")
        other = by_name.setdefault(cell.name.casefold(), cell.name)
        if other != cell.name:
            raise ConfigError(f"cells {other} and {cell.name} differ only in upper and lower case")


def default_out(axes: Mapping[str, Sequence[str]], *, cells: Sequence[Cell]) -> Path:
    """`runs/sweeps/<task>-<hash of the tokens with one value, in any order>`."""
    tasks = {_task_name(cell.config) for cell in cells}
    task = tasks.pop().replace("/", "-") if len(tasks) == 1 else "tasks"
    fixed = sorted(f"{key}={values[0]}" for key, values in axes.items() if len(values) == 1)
    return Path("runs", "sweeps", f"{task}-{_short_hash(fixed, length=8)}")


def _task_name(config: Mapping[str, Any]) -> str:
    task = config.get("task", "task")
    return str(task["name"] if isinstance(task, Mapping) else task)


def _short_hash(value: Any, *, length: int) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:length]


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0: all done. 130: stopped by a signal. 1: a cell failed."""
    statuses = {outcome.status for outcome in outcomes}
    if "not started" in statuses or any(outcome.stopped for outcome in outcomes):
        return 130
    return 0 if statuses <= {"done", "skipped"} else 1


def print_summary(outcomes: Sequence[Outcome], *, out: Path, console: Console) -> None:
    """One row a cell, then what to type next."""
    table = Table(title=escape(f"sweep in {shown(out)}"), title_justify="left")
    for heading in ("cell", "status", "val best", "test", "time"):
        right = heading in ("val best", "test", "time")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for outcome in outcomes:
        primary = outcome.primary
        table.add_row(
            outcome.cell.name,
            outcome.status,
            *(_figure(primary.get(key)) for key in ("best", "test")),
            show_seconds(outcome.seconds) if outcome.seconds is not None else "",
        )
    console.print(table)
    for outcome in outcomes:
        if outcome.status in ("failed", "diverged"):
            line = printable(f"{outcome.cell.name}: {outcome.detail}")
            console.print(line, markup=False, soft_wrap=True)
    counts = Counter(outcome.status for outcome in outcomes)
    console.print(", ".join(f"{n} {status}" for status, n in counts.items()), highlight=False)
    again = "" if exit_code(outcomes) == 0 else "  (the same command again runs what is missing)"
    line = f"table: python -m suite.report {shlex.quote(shown(out))}{again}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _figure(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) else "-"


def print_plan(
    cells: Sequence[Cell], *, out: Path, command: Sequence[str], console: Console
) -> None:
    """What the sweep would do, cell by cell; nothing is written."""
    for cell in cells:
        state = "done, skipped" if is_finished(cell, out=out) else "to run"
        line = shlex.join([*command, *cell.tokens, f"run.dir={out / cell.name}"])
        console.print(f"{cell.name}  [{state}]\n    {line}", markup=False, soft_wrap=True)
    console.print(f"{len(cells)} cells in {out}; nothing was started", soft_wrap=True)


class _Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one ConfigError and not a usage text."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `python -m suite.sweep --help`")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m suite.sweep",
        description="Train every combination of the values given, one process a run.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("tokens", nargs="*", metavar="key=a,b", help="what suite.train takes")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="cells at once (default 1); they share the cores, so compare no ms/step then",
    )
    parser.add_argument("--out", type=Path, help="folder of the sweep (default runs/sweeps/...)")
    parser.add_argument("--dry-run", action="store_true", help="print the cells, start nothing")
    options = parser.parse_intermixed_args(list(argv))
    if options.jobs < 1:
        raise ConfigError(f"--jobs {options.jobs}: at least 1 cell at once")
    if not options.tokens:
        raise ConfigError("nothing to sweep: give a list, for example norm=layernorm,dyt seed=0,1")
    return options


def main(
    argv: Sequence[str] | None = None,
    *,
    command: Sequence[str] = TRAIN,
    resolve: Resolve = resolve_config,
) -> int:
    """The command line; returns the exit code. `command` and `resolve` stand in for suite.train."""
    console = Console()
    try:
        options = _parse(sys.argv[1:] if argv is None else argv)
        axes = parse_tokens(options.tokens)
        cells = plan_cells(axes, resolve=resolve)
        out: Path = options.out or default_out(axes, cells=cells)
        if options.dry_run:
            print_plan(cells, out=out, command=command, console=console)
            return 0
        outcomes = run_cells(cells, out=out, command=command, jobs=options.jobs)
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"error: {printable(line)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped before anything was started", file=sys.stderr)
        return 130
    print_summary(outcomes, out=out, console=console)
    return exit_code(outcomes)


if __name__ == "__main__":
    sys.exit(main())
