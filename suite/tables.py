"""A comparison as text: the cells of its tables, what stands beneath them, Markdown and CSV.

A table is made once, as heading -> text, so that the terminal and the page cannot disagree; CSV has
the numbers in full.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from suite.comparison import Block
from suite.records import plain
from suite.rows import SPLITS, Difference, Options, Row, Stat

SHOWN_DIFFERENCES = 300  # characters of what differs, in the terminal and Markdown; CSV has all


def figure(value: float | None, *, sign: str = "") -> str:
    """0.83123 -> "0.8312", 1234.5 -> "1234"; "-" for None. sign="+" writes the plus too."""
    if value is None:
        return "-"
    return f"{value:{sign}.4f}" if abs(value) < 100 else f"{value:{sign}.4g}"


def show_stat(stat: Stat | None) -> str:
    """Mean ± sample standard deviation, with the number of seeds."""
    if stat is None:
        return "-"
    spread = "" if stat.sd is None else f" ± {figure(stat.sd)}"
    return f"{figure(stat.mean)}{spread} (n={stat.n})"


def show_difference(found: Difference | None) -> str:
    """Mean difference ± standard error, with the number of pairs, or "unpaired"."""
    if found is None:
        return "-"
    error = "" if found.se is None else f" ± {figure(found.se)}"
    how = f"{found.n} pair{'s' * (found.n > 1)}" if found.paired else "unpaired"
    return f"{figure(found.mean, sign='+')}{error} ({how})"


def judged_split(block: Block, *, split: str | None) -> str:
    """The split on which the difference is shown: `split`, else test where there is a test
    figure."""
    return split or ("test" if any("test" in row.stats for row in block.rows) else "val")


def table_of(block: Block, *, options: Options, split: str | None) -> list[dict[str, str]]:
    """The rows of the table as heading -> text; all rows have the same headings."""
    judged = judged_split(block, split=split)
    several = any(row.group for row in block.rows)
    table = []
    for row in block.rows:
        cells = {options.by: row.label}
        if several:
            cells["what differs"] = shorten(row.differs)
        cells["runs"] = ", ".join(f"{n} {status}" for status, n in sorted(row.counts.items()))
        if options.select:
            chosen = ", ".join(f"{key}={plain(value)}" for key, value in row.chosen.items())
            cells["chosen on val"] = f"{chosen} (of {len(row.tried)})" if row.runs else "-"
        cells["val best" if block.is_primary else "val"] = show_stat(row.stats.get("val"))
        cells["test"] = show_stat(row.stats.get("test"))
        if options.reference:
            found = row.to_baseline.get(judged)
            text = "baseline" if row.is_baseline else show_difference(found)
            cells[f"{judged} - {options.reference}"] = text
        cells["parameters"] = _count(row.mean_of("parameters"))
        cells["of norms"] = _count(row.mean_of("norm_parameters"))
        step = row.mean_of("throughput", "step_ms")
        cells["ms/step"] = "-" if step is None else f"{step:.1f}"
        table.append(cells)
    return table


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def shorten(text: str) -> str:
    """At most SHOWN_DIFFERENCES characters, with a word on where the rest is."""
    if len(text) <= SHOWN_DIFFERENCES:
        return text
    return f"{text[:SHOWN_DIFFERENCES]}... (all of it: --format csv)"


def legend(block: Block, *, options: Options) -> str:
    """What the figures of a table are."""
    better = "higher" if block.direction == "max" else "lower"
    parts = [
        f"{block.metric}, {better} is better; mean ± sample standard deviation over n seeds",
        f"difference to {options.reference}: mean ± standard error" if options.reference else "",
    ]
    return "; ".join(part for part in parts if part)


def facts(block: Block) -> list[str]:
    """Data, seeds and machine behind a table, one line each."""
    runs = [run for row in block.rows for run in row.every]
    results = [run.result for run in runs]
    done = sum(run.done for run in runs)
    seeds = sorted({run.seed for run in runs})
    return [
        *(f"data: {text}" for text in _distinct(_data_line(result["data"]) for result in results)),
        f"runs: {len(runs)}, of which {done} done; seeds {', '.join(map(str, seeds))}",
        *(f"hardware: {text}" for text in _distinct(_hardware_line(result) for result in results)),
        *(f"software: {text}" for text in _distinct(_software_line(result) for result in results)),
    ]


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _data_line(data: Mapping[str, Any]) -> str:
    sizes = data.get("sizes") or {}
    parts = [
        str(data.get("name")),
        "SYNTHETIC" if data.get("synthetic") else "",
        f"licence {data.get('license') or 'unknown'}",
        ", ".join(f"{size} {split}" for split, size in sizes.items()),
        f"source {data['source']}" if data.get("source") else "",
        f"sha256 {str(data['sha256'])[:16]}" if data.get("sha256") else "",
    ]
    return "; ".join(part for part in parts if part)


def _hardware_line(result: Mapping[str, Any]) -> str:
    hardware = result.get("hardware") or {}
    gpus = hardware.get("gpus") or []
    parts = [
        f"{hardware.get('cpu', 'unknown CPU')} ({hardware.get('cpu_count', '?')} CPUs, "
        f"{hardware.get('threads', '?')} threads)",
        f"{len(gpus)} x {gpus[0]}" if gpus else "no GPU",
        f"{result.get('world_size', '?')} process(es)",
        f"precision {result.get('precision', '?')}",
    ]
    return ", ".join(parts)


def _software_line(result: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in (result.get("versions") or {}).items() if v)
    git = result.get("git")
    if not git:
        return versions or "unknown"
    changed = " with local changes" if git.get("dirty") else ""
    return f"{versions}; revision {str(git.get('revision'))[:12]}{changed}"


def notes_of(block: Block, *, options: Options) -> list[str]:
    """Everything that a reader must know before believing the table."""
    notes = [*block.notes]
    for row in block.rows:
        notes += [
            note if note.startswith(row.label) else f"{row.label}: {note}" for note in row.notes
        ]
        notes += [
            f"{row.label}: {run.folder} ended {run.result['status']}: "
            f"{' '.join(str(run.result.get('error') or 'no reason given').split())[:300]}"
            for run in row.every
            if not run.done
        ]
    if any(row.group for row in block.rows):
        notes.append(
            "rows that name what differs are other configurations: compare within one only"
        )
    groups = {row.group for row in block.rows}
    with_reference = {row.group for row in block.rows if row.is_baseline}
    if options.reference and groups - with_reference:
        notes.append(f"no {options.reference} with the same configuration for some rows (-)")
    hardware = {_hardware_line(run.result) for row in block.rows for run in row.runs}
    if len(hardware) > 1:
        notes.append("runs on different hardware: their ms/step do not compare")
    return _distinct(notes)


def overview(blocks: Sequence[Block], *, split: str | None) -> list[dict[str, str]]:
    """Norms by tasks: one column a block, of its largest group only; [] for a single block."""
    if len(blocks) < 2:
        return []
    labels = _distinct(row.label for block in blocks for row in block.rows)
    table = []
    for label in labels:
        cells = {"": label}
        for block in blocks:
            judged = judged_split(block, split=split)
            own = [row for row in block.rows if row.label == label and row.group == 0]
            stat = own[0].stats.get(judged) if own else None
            cells[f"{block.title}: {judged} {block.metric}"] = show_stat(stat)
        table.append(cells)
    return table


def markdown(
    blocks: Sequence[Block],
    *,
    options: Options,
    split: str | None,
    command: str,
    image: str | None = None,
) -> str:
    """The report as one Markdown page. image: the file with the curves, relative to the page."""
    lines = ["# Comparison of runs", "", f"Made by `{command}`.", ""]
    if overview(blocks, split=split):
        lines += ["## All tasks", "", *_pipe_table(overview(blocks, split=split)), ""]
    for block in blocks:
        lines += [f"## {block.title}", ""]
        lines += [*_pipe_table(table_of(block, options=options, split=split)), ""]
        lines += [f"{legend(block, options=options)}.", ""]
        lines += [f"- {fact}" for fact in facts(block)]
        lines += [f"- note: {note}" for note in notes_of(block, options=options)]
        commands = _distinct(
            str(run.result.get("command")) for row in block.rows for run in row.every
        )
        lines += ["", "The runs:", "", "```sh", *commands, "```", ""]
    if image:
        lines += [f"![validation curves]({image})", ""]
    return "\n".join(lines)


def _pipe_table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [
        line(list(rows[0])),
        "|" + "---|" * len(rows[0]),
        *(line(list(cells.values())) for cells in rows),
    ]


def csv_text(blocks: Sequence[Block], *, options: Options) -> str:
    """One line a row, every number in full, empty where there is none."""
    lines = [_csv_line(row, block=block, options=options) for block in blocks for row in block.rows]
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def _csv_line(row: Row, *, block: Block, options: Options) -> dict[str, Any]:
    line: dict[str, Any] = {
        "task": block.task,
        "model": block.model,
        "data": block.data,
        options.by if options.by not in ("task", "model", "data") else "row": row.label,
        "metric": block.metric,
        "direction": block.direction,
        "differs": row.differs,
        "seeds": " ".join(str(run.seed) for run in row.runs),
    }
    for status in ("done", "failed", "diverged", "interrupted"):
        line[status] = row.counts[status]
    line["selected"] = " ".join(f"{key}={plain(value)}" for key, value in row.chosen.items())
    line["tried"] = len(row.tried)
    for split in SPLITS:
        stat, found = row.stats.get(split), row.to_baseline.get(split)
        line[f"{split}_mean"] = stat.mean if stat else None
        line[f"{split}_sd"] = stat.sd if stat else None
        line[f"{split}_n"] = stat.n if stat else 0
        line[f"{split}_difference"] = found.mean if found else None
        line[f"{split}_difference_se"] = found.se if found else None
        line[f"{split}_difference_n"] = found.n if found else None
        line[f"{split}_difference_paired"] = found.paired if found else None
    line["baseline"] = options.reference
    for key in ("parameters", "norm_parameters"):
        count = row.mean_of(key)
        line[key] = None if count is None else round(count)
    line["step_ms"] = row.mean_of("throughput", "step_ms")
    return line
