"""A network's bits per base beside Markov models of the same genome, on the same windows.

The models are counted on training and validation sequences together, the backoff's strengths tuned
on the latter (tasks/dna/markov.py): the network chose its weights on these too. Where the
validation is the test as well, only training sequences are counted, and there is no backoff.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from suite.cache import say_once
from suite.data import Splits
from tasks.dna.genome import GenomeSplit
from tasks.dna.markov import (
    ADD_ONE,
    ADD_ONE_BOTH,
    BACKOFF,
    BACKOFF_BOTH,
    TWO_SIDED,
    Row,
    best,
    cached_rows,
    table,
)

LARGEST = 64_000_000  # bases of all splits; counting them takes some seconds for every ten million


@dataclass(frozen=True)
class Found:
    """values: of the baselines, for result.json. lines: for a terminal."""

    values: dict[str, float] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def compare(splits: Splits, values: Mapping[str, float], *, causal: bool) -> Found:
    """Rows beside `values`, the metrics of the whole test split.

    causal: against models that see the left context; else, for the bases shown as [MASK], against
    two-sided ones, which see every neighbour unmasked. Nothing where a split's bases are not at
    hand, or too many.
    """
    name = "bits_per_base" if causal else "bits_per_base_hidden"
    if (bits := values.get(f"test/{name}")) is None:
        return Found()  # a masked network that nothing was hidden from
    parts = [splits.train, splits.val, splits.test]
    genome = [part for part in parts if isinstance(part, GenomeSplit)]
    if len(genome) < len(parts) or sum(part.bases for part in genome) > LARGEST:
        return Found()
    train, val, test = genome
    counted = [] if test.layout is val.layout else val.sequences()  # nothing that is scored
    say_once("counting words of the genome for the Markov baselines ...")
    rows = cached_rows(
        train.sequences(),
        counted,
        test.sequences(),
        test.window_places(),
        two_sided=not causal,
        novel=test.novel,
        cache=test.cache,
    )
    novel = values.get(f"test/{name}_novel")
    lines = table(rows, bits, novel)
    if not causal:
        lines.append("of the network: bases shown as [MASK]; the rows see every neighbour unmasked")
    return Found(chosen(rows), lines)


def chosen(rows: list[Row]) -> dict[str, float]:
    """The rows to beat: of plain counts and of backoff, on all windows and on the novel ones."""
    found = {}
    kinds = {"markov": (ADD_ONE, ADD_ONE_BOTH, TWO_SIDED), "backoff": (BACKOFF, BACKOFF_BOTH)}
    for name, of_name in kinds.items():
        if row := best(rows, *of_name):
            found[f"test/{name}_bits"] = row.bits
        row = best(rows, *of_name, novel=True)
        if row is not None and row.bits_novel is not None:
            found[f"test/{name}_bits_novel"] = row.bits_novel
    return found
