"""Runs into one task x norm table: terminal, Markdown, CSV, and a PNG of the validation curves.

A table must stand alone: it says how many seeds stand behind each figure, which runs failed, how
many learning rates were tried, on which data and hardware, and with which commands, so that a
difference between two norms can be told from a difference between two setups. Names and notes of
runs are somebody's text: on the page they are text too, and neither HTML nor links.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from suite.comparison import Block, compare
from suite.curves import draw_curves
from suite.errors import ConfigError
from suite.records import Run, find_runs
from suite.rows import SPLITS, Options
from suite.safety import printable
from suite.tables import csv_text, facts, legend, markdown, notes_of, overview, table_of

PIPED_WIDTH = 200  # characters; a pipe has no width, and 80 would fold every figure
HELP = """\
examples:
  python -m suite.report runs/sweeps/vision-classify-1a2b3c4d --out report
  python -m suite.report runs --select optim.lr --metric loss
  python -m suite.report runs --by model --baseline vit_tiny --format markdown

A mean is over seeds only: runs that differ in anything else get rows of their own, which say what
differs. --select takes, for each norm, the value with the best mean primary metric on the
validation split; the test figure is that of the chosen value alone.
Failed and diverged runs are counted in the table and are in no mean.
"""


def print_terminal(
    blocks: Sequence[Block], *, options: Options, split: str | None, console: Console
) -> None:
    """The tables with their notes."""
    tables = [
        (block.title, table_of(block, options=options, split=split), block) for block in blocks
    ]
    for title, rows, block in tables:
        _print_table(title, rows, console=console)
        lines = [legend(block, options=options), *facts(block)]
        lines += [f"note: {note}" for note in notes_of(block, options=options)]
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
        console.print()
    if overview(blocks, split=split):
        _print_table("all tasks", overview(blocks, split=split), console=console)


def inert(value: Any) -> Any:
    """Plain values whose texts a Markdown page shows as they stand: no tag, link, picture or fence.

    Only what begins one of them is changed, so that an honest name looks as it did.
    """
    if isinstance(value, Run):
        return dataclasses.replace(value, result=inert(value.result), flat=inert(value.flat))
    if isinstance(value, str):
        text = value.replace("&", "&amp;").replace("<", "&lt;").replace("](", "]\\(")
        return text.replace("```", "` ` `").replace("~~~", "~ ~ ~")
    if isinstance(value, Mapping):
        return {inert(key): inert(inner) for key, inner in value.items()}
    return [inert(inner) for inner in value] if isinstance(value, list) else value


def _print_table(title: str, rows: Sequence[Mapping[str, str]], *, console: Console) -> None:
    table = Table(title=escape(title), title_justify="left")
    for number, heading in enumerate(rows[0]):
        text = number == 0 or heading in ("what differs", "runs", "chosen on val")
        table.add_column(escape(heading), justify="left" if text else "right", overflow="fold")
    for cells in rows:
        table.add_row(*(escape(cell) for cell in cells.values()))
    console.print(table)


class _Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one ConfigError and not a usage text."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `python -m suite.report --help`")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m suite.report",
        description="Compare finished runs: one task x norm table.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUNS", help="run folders, or folders of them")
    add("--by", default="norm", help="section or key whose values are the rows (default norm)")
    add("--baseline", help="row that the others are compared with (default layernorm)")
    add("--select", action="append", default=[], metavar="KEY", help="chosen on val for each row")
    add("--metric", help="show this metric in place of the task's primary one")
    add("--split", choices=SPLITS, help="split of the difference (default test, if measured)")
    add("--out", type=Path, metavar="DIR", help="write report.md, report.csv and curves.png there")
    add("--format", choices=("terminal", "markdown", "csv"), default="terminal")
    return parser.parse_intermixed_args(list(argv))


def write_files(
    out: Path,
    *,
    blocks: Sequence[Block],
    on_page: Sequence[Block],
    options: Options,
    split: str | None,
    command: str,
) -> tuple[list[str], list[str]]:
    """Write report.md, report.csv and curves.png to `out`. on_page: the blocks of `inert` runs.

    Returns the names written, and a line for what could not be made. Raises ConfigError when `out`
    cannot be written.
    """
    image = out / "curves.png"
    try:
        out.mkdir(parents=True, exist_ok=True)
        image.unlink(missing_ok=True)  # an older one would be taken for this report's
        problem = _draw(blocks, image)
        name = None if problem else image.name
        page = markdown(on_page, options=options, split=split, command=command, image=name)
        (out / "report.csv").write_text(csv_text(blocks, options=options), encoding="utf-8")
        (out / "report.md").write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{out}: cannot be written ({error.strerror}); choose another --out"
        ) from None
    written = ["report.md", "report.csv", *([name] if name else [])]
    return written, [problem] if problem else []


def _draw(blocks: Sequence[Block], image: Path) -> str | None:
    """draw_curves; why not also where matplotlib takes a name's dollar signs for a formula."""
    try:
        return draw_curves(blocks, path=image)
    except ValueError as error:
        return f"{image.name} was not made: {' '.join(str(error).split())[:200]}"


def main(
    argv: Sequence[str] | None = None,
    *,
    defaults: Callable[[str], Mapping[str, Any] | None] | None = None,
) -> int:
    """The command line; returns the exit code. defaults: see `suite.comparison.compare`."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = shlex.join(["python", "-m", "suite.report", *words])
    try:
        given = _parse(words)
        runs, skipped = find_runs(given.runs)
        select = tuple(key for text in given.select for key in text.split(","))
        options = Options(given.by, given.baseline, select, given.metric)
        usual: Any = {"defaults": defaults} if defaults else {}
        blocks = compare(runs, options=options, **usual)
        on_page = compare([inert(run) for run in runs], options=options, **usual)
        written: list[str] = []
        if given.out:
            written, problems = write_files(
                given.out,
                blocks=blocks,
                on_page=on_page,
                options=options,
                split=given.split,
                command=command,
            )
            skipped += problems
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"error: {printable(line)}", file=sys.stderr)
        return error.exit_code
    for line in skipped:
        print(f"warning: {printable(line)}", file=sys.stderr)
    if given.format == "markdown":
        print(markdown(on_page, options=options, split=given.split, command=command))
    elif given.format == "csv":
        print(csv_text(blocks, options=options), end="")
    else:
        console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
        print_terminal(blocks, options=options, split=given.split, console=console)
    if given.out:
        print(f"written to {given.out}: {', '.join(written)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
