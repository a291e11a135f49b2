"""Markov models beside a network: which rows, on which windows, and where there are none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_dna_runs import CADUCEUS, HYENA, PRETRAIN, fasta
from test_run import main, result

from suite.data import Splits
from tasks.dna import baselines
from tasks.dna.baselines import chosen, compare
from tasks.dna.genome import GenomeOptions, build_genome
from tasks.dna.markov import Row, best, causal_rows, two_sided_rows
from tasks.dna.tokens import decode
from tasks.dna.yeast import load_genome

LENGTH = 50
NETWORK = {"test/bits_per_base": 1.9, "test/bits_per_base_novel": 1.95}
TAKEN = 3_000  # bases of each chromosome


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SUITE_RUN_DIR", raising=False)
    torch.set_num_threads(1)
    root = Path("corpus")
    root.mkdir()
    pieces = [decode(ids[50_000 : 50_000 + TAKEN]) for ids in load_genome().sequences()[:3]]
    pieces[2] = pieces[0][:500] + pieces[2][500:]  # so that some of the test is not new
    names = ("chrI", "chrII", "chrIII")
    fasta(root / "small.fa", dict(zip(names, pieces, strict=True)))
    splits = zip(names, ("train", "valid", "test"), strict=True)
    (root / "small.bed").write_text("".join(f"{c}\t0\t{TAKEN}\t{s}\n" for c, s in splits))


def genome(**options: object) -> Splits:
    files = {"fasta": "corpus/small.fa", "bed": "corpus/small.bed"}
    return build_genome(replace(GenomeOptions(length=LENGTH), **files, **options), seed=0)


def direct(splits: Splits, *, causal: bool) -> list[Row]:
    """The rows without baselines.py and without a cache."""
    train, val, test = splits.train, splits.val, splits.test
    make = causal_rows if causal else two_sided_rows
    where = test.window_places()
    return make(train.sequences(), val.sequences(), test.sequences(), where, novel=test.novel)


def network(lines: list[str]) -> list[str]:
    """The cells of the network's line."""
    (line,) = [line for line in lines if line.startswith("network")]
    return line.split()[1:]


def test_a_causal_network_stands_beside_models_of_the_left_context() -> None:
    splits = genome()
    found = compare(splits, NETWORK, causal=True)
    rows = direct(splits, causal=True)
    markov = best([row for row in rows if row.kind.startswith("add-one")])
    backoff = best([row for row in rows if row.kind.startswith("backoff")])
    assert markov is not None
    assert backoff is not None
    assert found.values["test/markov_bits"] == pytest.approx(markov.bits, rel=1e-12)
    assert found.values["test/backoff_bits"] == pytest.approx(backoff.bits, rel=1e-12)
    assert found.values.keys() == {
        f"test/{kind}_bits{novel}" for kind in ("markov", "backoff") for novel in ("", "_novel")
    }
    text = "\n".join(found.lines)
    assert "two-sided" not in text
    assert f"{NETWORK['test/bits_per_base'] - markov.bits:+.4f}" in text
    assert network(found.lines) == ["1.9000", "1.9500"]


def test_a_masked_network_stands_beside_models_of_both_sides() -> None:
    splits = genome()
    hidden = {"test/bits_per_base_hidden": 1.8, "test/bits_per_base_hidden_novel": 1.85}
    found = compare(splits, NETWORK | hidden, causal=False)
    assert network(found.lines) == ["1.8000", "1.8500"]
    assert compare(splits, NETWORK, causal=False).lines == []  # nothing was hidden from it
    row = best(direct(splits, causal=False))
    assert row is not None
    assert found.values.keys() == {"test/markov_bits", "test/markov_bits_novel"}
    assert found.values["test/markov_bits"] == pytest.approx(row.bits, rel=1e-12)
    rows = found.lines[2:-1]
    assert "shown as [MASK]" in found.lines[-1]
    assert len(rows) == 6
    assert all("two-sided" in line for line in rows)


def test_a_test_that_is_the_validation_is_not_counted() -> None:
    bed = Path("corpus/small.bed")
    bed.write_text("".join(bed.read_text().splitlines(keepends=True)[:2]))
    splits = genome()
    found = compare(splits, NETWORK, causal=True)
    where = splits.test.window_places()
    rows = causal_rows(
        splits.train.sequences(), [], splits.test.sequences(), where, novel=splits.test.novel
    )
    expected = best(rows)
    assert expected is not None
    assert found.values["test/markov_bits"] == pytest.approx(expected.bits, rel=1e-12)
    assert "test/backoff_bits" not in found.values


def test_the_copied_windows_are_cheaper_and_left_out_of_the_novel_rows() -> None:
    """Backoff to 11 bases knows what it has counted before."""
    found = compare(genome(), NETWORK, causal=True).values
    assert found["test/backoff_bits"] < found["test/backoff_bits_novel"] - 0.02


def test_without_novel_windows_there_is_one_column() -> None:
    splits = genome(novel="off")
    found = compare(splits, {"test/bits_per_base": 1.9}, causal=True)
    assert found.values.keys() == {"test/markov_bits", "test/backoff_bits"}
    assert "novel" not in "\n".join(found.lines)
    assert network(found.lines) == ["1.9000"]


def test_where_no_window_is_novel_the_novel_rows_are_missing() -> None:
    splits = genome()
    splits.test.novel = np.zeros(len(splits.test), bool)
    found = compare(splits, {"test/bits_per_base": 1.9}, causal=True)
    assert found.values.keys() == {"test/markov_bits", "test/backoff_bits"}


def test_other_data_and_large_genomes_have_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = genome()
    other = Splits(splits.train, splits.val, [], splits.info)  # type: ignore[arg-type]
    assert compare(other, NETWORK, causal=True) == baselines.Found()
    monkeypatch.setattr(baselines, "LARGEST", 3 * TAKEN)
    assert compare(splits, NETWORK, causal=True).values
    monkeypatch.setattr(baselines, "LARGEST", 3 * TAKEN - 1)
    assert compare(splits, NETWORK, causal=True) == baselines.Found()


def test_the_rows_to_beat_are_the_best_of_each_kind() -> None:
    bits = np.array([2.0])
    rows = [
        Row("add-one", 3, 1.97, 1.99, bits),
        Row("add-one", 4, 1.96, 2.01, bits),
        Row("add-one, both strands", 3, 1.98, 1.98, bits),
        Row("backoff, both strands", 8, 1.95, None, bits),
    ]
    found = {"markov_bits": 1.96, "markov_bits_novel": 1.98, "backoff_bits": 1.95}
    assert chosen(rows) == {f"test/{name}": value for name, value in found.items()}


@pytest.mark.parametrize("cache", [None, "mine", "none"])
def test_rows_are_counted_once_and_kept_where_the_data_keeps_things(cache: str | None) -> None:
    splits = genome(cache=cache)
    first = compare(splits, NETWORK, causal=True)
    kept = list(Path.cwd().glob("**/markov/*.npz"))
    assert len(kept) == (0 if cache == "none" else 1)
    if cache == "mine":
        assert kept[0].parent == Path("mine/markov").absolute()
    again = compare(splits, NETWORK, causal=True)
    assert (again.values, again.lines) == (first.values, first.lines)


def test_other_masks_leave_the_rows_alone() -> None:
    """A row scores every base of the windows, whatever a network is asked for."""
    short = [*PRETRAIN, *CADUCEUS, "trainer.max_steps=1"]
    for prob in (0.15, 0.5):
        assert main([*short, f"task.mask_prob={prob}", f"run.dir=p{prob}"]) == 0
    a, b = (result(f"p{prob}")["metrics"] for prob in (0.15, 0.5))
    assert a["test/markov_bits"] == b["test/markov_bits"]
    assert a["test/count"] < b["test/count"]


def test_a_network_that_sees_what_it_is_asked_for_is_no_match_for_one_that_does_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of the bases that are asked for some are not hidden: those would be counted as foreseen."""
    tokens = ["task.mask_share=0", "task.random_share=0", "trainer.max_steps=1", "run.dir=a"]
    assert main([*PRETRAIN, *CADUCEUS, *tokens]) == 0
    assert "two-sided" not in capsys.readouterr().err
    assert "test/markov_bits" not in result("a")["metrics"]


def test_a_run_of_one_test_batch_is_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    tokens = ["data.eval_batch_size=16", "trainer.max_steps=1", "trainer.limit_test_batches=1"]
    assert main([*PRETRAIN, *HYENA, *tokens, "run.dir=a"]) == 0
    assert result("a")["metrics"]["test/count"] == 16 * 64
    assert "add-one" not in capsys.readouterr().err
    share = [t for t in tokens if "limit" not in t] + ["trainer.limit_test_batches=1.0"]
    assert main([*PRETRAIN, *HYENA, *share, "run.dir=b"]) == 0
    assert "add-one" in capsys.readouterr().err
