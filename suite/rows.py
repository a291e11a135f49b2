"""One row of a table: the seeds of a norm averaged, its learning rate chosen, its difference to the
baseline.

Spread is the sample standard deviation over seeds. The difference to the baseline is paired by seed
where both have the seed, because a seed fixes the initial weights of everything but the norm and
the order of the data, so much of the spread is common to the two and cancels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from suite.records import Run, plain

SPLITS = ("val", "test")


@dataclass(frozen=True)
class Options:
    """What is compared, and how.

    by: a section (norm, model, data) or a key; its values are the rows. baseline: a row's label.
    select: keys whose best value, by mean primary metric on val, is taken for each row.
    metric: shown instead of the primary one.
    """

    by: str = "norm"
    baseline: str | None = None
    select: tuple[str, ...] = ()
    metric: str | None = None

    @property
    def reference(self) -> str | None:
        """The baseline's label: layernorm, where norms are compared and none was named."""
        return self.baseline or ("layernorm" if self.by == "norm" else None)


@dataclass(frozen=True)
class Stat:
    """Mean over n seeds, and sample standard deviation (n - 1; None for one seed)."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """Mean difference to the baseline and its standard error (None where one seed gives none).

    paired: over the n seeds that both have; else of two means over different seeds, n the smaller.
    """

    mean: float
    se: float | None
    n: int
    paired: bool


@dataclass
class Row:
    """A norm (or another value of `by`) in one configuration.

    runs: the done runs that are averaged, one a seed. others: what failed, or was tried and not
    chosen.
    chosen: the selected keys' values. tried: how many values; differs: against the block's first
    group.
    """

    label: str
    runs: list[Run]
    others: list[Run]
    group: int
    differs: str
    chosen: Mapping[str, Any]
    tried: list[tuple[Any, ...]]
    notes: list[str]
    stats: dict[str, Stat] = field(default_factory=dict)
    to_baseline: dict[str, Difference] = field(default_factory=dict)
    is_baseline: bool = False

    @property
    def every(self) -> list[Run]:
        return [*self.runs, *self.others]

    @property
    def counts(self) -> Counter[str]:
        """Runs by status, the tried and not chosen among them."""
        return Counter(run.result["status"] for run in self.every)

    def mean_of(self, *path: str) -> float | None:
        """Mean over the averaged runs of a number in result.json."""
        values = []
        for run in self.runs:
            value: Any = run.result
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            if isinstance(value, (int, float)) and math.isfinite(value):
                values.append(float(value))
        return fmean(values) if values else None


def summarise(values: Sequence[float]) -> Stat:
    """Mean and sample standard deviation of at least one value."""
    return Stat(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def difference(row: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Mean difference of two seed -> figure tables; None where one of them is empty.

    Paired over the common seeds: d_i = row_i - baseline_i, standard error sd(d) / sqrt(n). Without
    a common seed: difference of the means, standard error sqrt(sd_a^2 / n_a + sd_b^2 / n_b)
    (Welch).
    """
    if not row or not baseline:
        return None
    common = sorted(row.keys() & baseline.keys())
    if common:
        pairs = summarise([row[seed] - baseline[seed] for seed in common])
        se = None if pairs.sd is None else pairs.sd / math.sqrt(pairs.n)
        return Difference(pairs.mean, se, pairs.n, paired=True)
    a, b = summarise(list(row.values())), summarise(list(baseline.values()))
    se = None
    if a.sd is not None and b.sd is not None:
        se = math.sqrt(a.sd**2 / a.n + b.sd**2 / b.n)
    return Difference(a.mean - b.mean, se, min(a.n, b.n), paired=False)


def make_row(
    label: str, *, runs: Sequence[Run], differs: str, direction: str, options: Options
) -> Row:
    """A row of `runs`, which differ in the seed and the selected keys only.

    direction: "max" or "min" of the primary metric, by which a selected key's value is chosen.
    """
    by_value: dict[str, list[Run]] = {}
    for run in runs:
        by_value.setdefault(plain(_values(run, options)), []).append(run)
    notes: list[str] = []
    kept = [_one_a_seed(of_value, notes=notes) for of_value in by_value.values()]
    best = _choose(kept, direction=direction, options=options, notes=notes)
    averaged = sorted((run for run in best if run.done), key=lambda run: run.seed)
    row = Row(
        label=label,
        runs=averaged,
        others=[run for of_value in kept for run in of_value if run not in averaged],
        group=0,
        differs=differs,
        chosen=dict(zip(options.select, _values(best[0], options), strict=True)),
        tried=sorted((_values(of_value[0], options) for of_value in kept), key=plain),
        notes=notes,
    )
    for split in SPLITS:
        figures = figures_of(row, split=split, options=options)
        if figures:
            row.stats[split] = summarise(list(figures.values()))
        if figures and len(figures) < len(row.runs):
            missing = [str(run.seed) for run in row.runs if run.seed not in figures]
            notes.append(f"{label}: no {split} figure for seed {', '.join(missing)}")
    return row


def figures_of(row: Row, *, split: str, options: Options) -> dict[int, float]:
    """Seed -> figure of the runs that are averaged; a seed without a finite one is left out."""
    figures = {run.seed: run.figure(split, metric=options.metric) for run in row.runs}
    return {seed: figure for seed, figure in figures.items() if figure is not None}


def set_against_baseline(rows: Sequence[Row], *, options: Options) -> None:
    """Fill in each row's difference to the baseline's row, if there is one among `rows`."""
    baseline = _find_baseline(rows, label=options.reference)
    if baseline is None:
        return
    baseline.is_baseline = True
    for split in SPLITS:
        theirs = figures_of(baseline, split=split, options=options)
        for row in rows:
            ours = figures_of(row, split=split, options=options)
            found = difference(ours, theirs) if row is not baseline else None
            if found:
                row.to_baseline[split] = found


def _find_baseline(rows: Sequence[Row], *, label: str | None) -> Row | None:
    """The row of that label, or the only one of that name ("layernorm eps=1e-6")."""
    exact = [row for row in rows if row.label == label]
    named = [row for row in rows if row.label.split()[:1] == [label]]
    return exact[0] if exact else named[0] if len(named) == 1 else None


def _values(run: Run, options: Options) -> tuple[Any, ...]:
    return tuple(run.flat.get(key) for key in options.select)


def _one_a_seed(runs: Sequence[Run], *, notes: list[str]) -> list[Run]:
    """The newest done run of each seed, else the newest; the others are named in the notes."""
    by_seed: dict[int, list[Run]] = {}
    for run in runs:
        by_seed.setdefault(run.seed, []).append(run)
    kept = []
    for seed, same in sorted(by_seed.items()):
        *older, newest = sorted(same, key=lambda run: (run.done, run.written))
        kept.append(newest)
        for run in older:
            status = run.result["status"]
            what = "an older run" if run.done else f"an attempt that ended {status}"
            notes.append(
                f"seed {seed} has two runs: {newest.folder} is used, {run.folder} is {what}"
            )
    return kept


def _choose(
    candidates: Sequence[list[Run]], *, direction: str, options: Options, notes: list[str]
) -> list[Run]:
    """The candidate with the best mean primary metric on val.

    A value of which a seed failed, or was not run, is taken only if there is no other: the mean of
    the seeds that lived would favour it.
    """
    if len(candidates) == 1:
        return candidates[0]
    most = max(len(runs) for runs in candidates)
    complete = [
        runs
        for runs in candidates
        if len(runs) == most and all(run.figure("val") is not None and run.done for run in runs)
    ]
    if len(complete) < len(candidates):
        left = [runs for runs in candidates if runs not in complete]
        shown = ", ".join(_show_choice(_values(runs[0], options), options) for runs in left)
        notes.append(f"not chosen from, as a seed failed or is missing: {shown}")
    if not complete:
        notes.append("chosen by the seeds that are done, as no value has all of them")
    sign = 1 if direction == "max" else -1

    def score(runs: Sequence[Run]) -> float:
        figures = [run.figure("val") for run in runs if run.done]
        known = [figure for figure in figures if figure is not None]
        return sign * fmean(known) if known else -math.inf

    best = max(complete or candidates, key=score)
    _note_edge(best, candidates=candidates, options=options, notes=notes)
    return best


def _note_edge(
    best: Sequence[Run],
    *,
    candidates: Sequence[Sequence[Run]],
    options: Options,
    notes: list[str],
) -> None:
    """Say so where the best of three or more numbers is the smallest or the largest of them."""
    for key in options.select:
        values = [runs[0].flat.get(key) for runs in candidates]
        numbers = {value for value in values if isinstance(value, (int, float))}
        value = best[0].flat.get(key)
        if len(numbers) > 2 and value in (min(numbers), max(numbers)):
            notes.append(f"the best {key}, {value:g}, is at the edge of what was tried")


def _show_choice(values: Sequence[Any], options: Options) -> str:
    return " ".join(f"{k}={plain(v)}" for k, v in zip(options.select, values, strict=True))


def unequal_trials(rows: Sequence[Row], *, options: Options) -> list[str]:
    """A line where one row had more, or other, values to choose from than another."""
    if not options.select or len({plain(row.tried) for row in rows}) < 2:
        return []
    counts = "; ".join(f"{row.label} {len(row.tried)}" for row in rows)
    keys = ", ".join(options.select)
    if len({len(row.tried) for row in rows}) > 1:
        return [f"not an equal choice: values of {keys} tried: {counts}"]
    return [f"not the same choice: other values of {keys} were tried for some rows ({counts})"]
