"""Runs compared: grouped by what they share, averaged over seeds, and set against the baseline
norm.

A mean is taken only over runs that differ in nothing but the seed. What else differs splits the
rows and is named in them, and a run that failed is counted where it would have stood: a comparison
of norms that drops the diverged seeds, or averages two learning rates, compares something else.
Learning rates may be chosen for each norm, on the validation split alone (`select`); how many were
tried is part of the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from suite.errors import ConfigError
from suite.records import Run, comparable, differences, flatten, in_section, plain
from suite.rows import Options, Row, make_row, set_against_baseline, unequal_trials

LOWER_IS_BETTER = ("loss", "perplexity", "wer", "cer", "ter", "bits_per_byte", "bits_per_base")
MISSING = "-"  # a key that a configuration does not have


@dataclasses.dataclass
class Block:
    """One table: a task with a model and a data set. direction: "max" or "min", of the metric.

    is_primary: the metric is the task's primary one, of which val has the best and not the last.
    """

    task: str
    model: str
    data: str
    metric: str
    direction: str
    is_primary: bool
    rows: list[Row]
    notes: list[str]

    @property
    def title(self) -> str:
        return " · ".join(name for name in (self.task, self.model, self.data) if name)


def norm_defaults(name: str) -> Mapping[str, Any] | None:
    """A norm's options as the suite's table has them, flat; None for a norm that is not in it."""
    from suite.norms import NORMS

    if name not in NORMS:
        return None
    options = NORMS[name].options
    instance = options() if isinstance(options, type) else options
    return flatten(dataclasses.asdict(instance))


def compare(
    runs: Sequence[Run],
    *,
    options: Options,
    defaults: Callable[[str], Mapping[str, Any] | None] = norm_defaults,
) -> list[Block]:
    """One block a (task, model, data set), the baseline's row first.

    defaults: name of a norm -> its default options, for the rows' labels.
    Raises ConfigError for a key, a metric or a baseline that no run has.
    """
    _check(runs, options=options)
    label = _labels(runs, options=options, defaults=defaults)
    by_block: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        by_block.setdefault(_block_key(run, by=options.by), []).append(run)
    blocks = [
        _block(key, runs=members, label=label, options=options)
        for key, members in sorted(by_block.items())
    ]
    rows = [row for block in blocks for row in block.rows]
    labels = {row.label for row in rows}
    if options.baseline and not any(row.is_baseline for row in rows):
        raise ConfigError(
            f"--baseline {options.baseline}: no such row; rows: {', '.join(sorted(labels))}"
        )
    return blocks


def _check(runs: Sequence[Run], *, options: Options) -> None:
    keys = {key for run in runs for key in run.flat}
    sections = {key.partition(".")[0] for key in keys if "." in key}
    for flag, key in (("--by", options.by), *(("--select", key) for key in options.select)):
        allowed = keys | sections if flag == "--by" else keys - {"seed"}
        if key not in allowed:
            near = get_close_matches(key, sorted(allowed), n=1)
            hint = f" Did you mean {near[0]}?" if near else " Their config.yaml shows the keys."
            raise ConfigError(f"{flag} {key}: no run has such a key.{hint}")
    if options.metric:
        names = {name.partition("/")[2] for run in runs for name in run.result.get("metrics", {})}
        names |= {str(run.result["primary"].get("name")) for run in runs}
        if options.metric not in names:
            shown = ", ".join(sorted(names))
            raise ConfigError(f"--metric {options.metric}: no run has it; choose one of: {shown}")


def _block_key(run: Run, *, by: str) -> tuple[str, ...]:
    result = run.result
    names = {"task": result["task"], "model": result["model"], "data": result["data"].get("name")}
    shown = ("" if by == key else str(name) for key, name in names.items())
    primary = result["primary"]
    return (*shown, str(primary.get("name")), str(primary.get("direction", "max")))


def _variant(run: Run, options: Options) -> dict[str, Any]:
    """What makes its row: the values of `by`, without the selected keys."""
    keys = [k for k in run.flat if in_section(k, options.by) and k not in options.select]
    return {key: run.flat[key] for key in keys}


def _labels(
    runs: Sequence[Run],
    *,
    options: Options,
    defaults: Callable[[str], Mapping[str, Any] | None],
) -> dict[str, str]:
    """Row key -> label: the value, or the entry's name and those options that are not its
    defaults."""
    variants = {plain(_variant(run, options)): _variant(run, options) for run in runs}
    name_key, labels = f"{options.by}.name", {}
    by_name: dict[str, list[dict[str, Any]]] = {}
    for variant in variants.values():
        by_name.setdefault(str(variant.get(name_key)), []).append(variant)
    for key, variant in variants.items():
        if name_key not in variant:
            labels[key] = " ".join(f"{_text(value)}" for value in variant.values()) or "(none)"
            continue
        name, siblings = str(variant[name_key]), by_name[str(variant[name_key])]
        usual = defaults(name) if options.by == "norm" else None
        if usual is None:
            usual = {k: v for k, v in siblings[0].items() if all(o.get(k) == v for o in siblings)}
        else:
            usual = {f"{options.by}.{k}": v for k, v in usual.items()}
        odd = [k for k, v in variant.items() if k != name_key and plain(usual.get(k)) != plain(v)]
        shown = (f"{k.partition('.')[2]}={_text(variant[k])}" for k in odd)
        labels[key] = " ".join([name, *shown])
    return labels


def _text(value: Any) -> str:
    return value if isinstance(value, str) else plain(value)


def _block(
    key: tuple[str, ...], *, runs: Sequence[Run], label: Mapping[str, str], options: Options
) -> Block:
    task, model, data, metric, direction = key
    shown, better = metric, direction
    if options.metric and options.metric != metric:
        shown = options.metric
        better = "min" if shown in LOWER_IS_BETTER else "max"
    block = Block(task, model, data, shown, better, shown == metric, [], [])
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(plain(_shared(run, options)), []).append(run)
    ordered = sorted(groups.values(), key=lambda members: -len(members))
    for number, members in enumerate(ordered):
        was, now = _shared(ordered[0][0], options), _shared(members[0], options)
        differs = ", ".join(
            f"{key} {_value(now, key)} (not {_value(was, key)})" for key in differences(was, now)
        )
        rows: dict[str, list[Run]] = {}
        for run in members:
            rows.setdefault(label[plain(_variant(run, options))], []).append(run)
        made = [
            make_row(name, runs=of_row, differs=differs, direction=direction, options=options)
            for name, of_row in rows.items()
        ]
        for row in made:
            row.group = number
        set_against_baseline(made, options=options)
        block.notes += unequal_trials(made, options=options)
        block.rows += sorted(made, key=lambda row: (not row.is_baseline, row.label))
    return block


def _value(flat: Mapping[str, Any], key: str) -> str:
    return plain(flat[key]) if key in flat else MISSING


def _shared(run: Run, options: Options) -> dict[str, Any]:
    """What runs must have in common to stand in one comparison."""
    return {
        key: value
        for key, value in comparable(run.flat).items()
        if key != "seed" and not in_section(key, options.by) and key not in options.select
    }
