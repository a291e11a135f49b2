"""Markov rows: what is counted, what each position sees, and what is printed and kept."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from tasks.dna import markov, words
from tasks.dna.markov import (
    ADD_ONE,
    ADD_ONE_BOTH,
    BACKOFF,
    BACKOFF_BOTH,
    TWO_SIDED,
    Row,
    best,
    cached_rows,
    causal_rows,
    pick,
    table,
    two_sided_rows,
)
from tasks.dna.tokens import N, decode, encode, reverse_complement
from tasks.dna.yeast import load_genome

KINDS = (ADD_ONE, ADD_ONE_BOTH, BACKOFF, BACKOFF_BOTH)


def random_ids(length: int, *, seed: int, unknown: float = 0.0) -> np.ndarray:
    """Bases where A is often followed by T, and N in some places."""
    draw = np.random.default_rng(seed)
    ids = draw.choice([7, 8, 9, 10], length, p=[0.4, 0.1, 0.2, 0.3]).astype(np.uint8)
    ids[1:][(ids[:-1] == 7) & (draw.random(length - 1) < 0.6)] = 10
    ids[draw.random(length) < unknown] = N
    return ids


TRAIN = [random_ids(220, seed=1, unknown=0.02), random_ids(3, seed=2), random_ids(90, seed=3)]
TUNE = [random_ids(120, seed=4, unknown=0.02), random_ids(40, seed=5)]
TEST = [random_ids(70, seed=6, unknown=0.03), random_ids(2, seed=7), random_ids(50, seed=8)]
WINDOWS = np.array([(0, 0, 20), (0, 13, 70), (1, 0, 2), (2, 0, 50), (2, 5, 5)], np.int64)


# --- the same by plain loops ----------------------------------------------------------------------


def plain_counts(sequences, longest: int, *, both: bool) -> Counter:
    found: Counter = Counter()
    for ids in sequences:
        for one in (ids, reverse_complement(ids)) if both else (ids,):
            letters = decode(one)
            for w in range(1, longest + 1):
                for i in range(len(letters) - w + 1):
                    found[letters[i : i + w]] += 1
    return found


def plain_p(counts: Counter, context: str, base: str, *, strengths=None) -> float:
    """Of a base after a context of known bases; backoff if there are strengths."""
    n = counts[context + base]
    total = sum(counts[context + other] for other in "ACGT")
    if strengths is None:
        return (n + 1) / (total + 4)
    lower = plain_p(counts, context[1:], base, strengths=strengths) if context else 0.25
    b = strengths[len(context)]
    return (n + b * lower) / (total + b)


def known_before(letters: str, at: int, most: int) -> str:
    """The bases before a position, at most `most`, back to an N or the beginning."""
    return letters[max(at - most, 0) : at].rpartition("N")[2]


def plain_bits(counts: Counter, ids: np.ndarray, order: int, *, strengths=None) -> np.ndarray:
    letters = decode(ids)
    return np.array(
        [
            0.0
            if base == "N"
            else -math.log2(
                plain_p(counts, known_before(letters, at, order), base, strengths=strengths)
            )
            for at, base in enumerate(letters)
        ]
    )


def plain_windows(bits_of, windows=WINDOWS) -> list[float]:
    """The mean of each window over what is not N."""
    found = []
    for which, start, end in windows:
        real = int((TEST[which][start:end] != N).sum())
        found.append(bits_of(TEST[which])[start:end].sum() / real if real else math.nan)
    return found


def plain_strengths(*, both: bool, orders: int) -> list[float]:
    counts = plain_counts(TRAIN, orders, both=both)
    chosen: list[float] = []
    for order in range(orders):
        tries = []
        for b in markov.B_CHOICES:
            bits = [
                -math.log2(
                    plain_p(counts, letters[at - order : at], letters[at], strengths=[*chosen, b])
                )
                for letters in map(decode, TUNE)
                for at in range(order, len(letters))
                if "N" not in letters[at - order : at + 1]
            ]
            tries.append((sum(bits), b))
        chosen.append(min(tries)[1])
    return chosen


@pytest.fixture(params=[words.PIECE, 37])
def _piece(request, monkeypatch):
    """Whole texts, and pieces that cut contexts and windows."""
    monkeypatch.setattr(words, "PIECE", request.param)


# --- causal ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_piece")
@pytest.mark.parametrize("both", [False, True])
def test_add_one_rows_are_what_plain_loops_count(both):
    rows = causal_rows(TRAIN, TUNE, TEST, WINDOWS, orders=5)
    counts = plain_counts(TRAIN + TUNE, 5, both=both)
    for order in range(5):
        row = pick(rows, ADD_ONE_BOTH if both else ADD_ONE, order)
        expected = plain_windows(lambda ids, k=order: plain_bits(counts, ids, k))
        np.testing.assert_allclose(row.bits_B, expected, rtol=1e-12)


@pytest.mark.usefixtures("_piece")
@pytest.mark.parametrize("both", [False, True])
def test_backoff_tunes_without_the_tuning_counts_and_scores_with_them(both):
    rows = causal_rows(TRAIN, TUNE, TEST, WINDOWS, orders=4)
    strengths = plain_strengths(both=both, orders=4)
    counts = plain_counts(TRAIN + TUNE, 4, both=both)
    for order in range(4):
        row = pick(rows, BACKOFF_BOTH if both else BACKOFF, order)
        expected = plain_windows(
            lambda ids, k=order: plain_bits(counts, ids, k, strengths=strengths)
        )
        np.testing.assert_allclose(row.bits_B, expected, rtol=1e-12)
    assert len(set(strengths)) > 1


def test_rows_are_ordered_and_backoff_needs_tuning_sequences():
    rows = causal_rows(TRAIN, TUNE, TEST, WINDOWS, orders=3)
    assert [(row.kind, row.order) for row in rows] == list(itertools.product(KINDS, range(3)))
    without = causal_rows(TRAIN + TUNE, [], TEST, WINDOWS, orders=3)
    assert [row.kind for row in without] == [ADD_ONE] * 3 + [ADD_ONE_BOTH] * 3
    for row in without:
        np.testing.assert_array_equal(row.bits_B, pick(rows, row.kind, row.order).bits_B)


@pytest.mark.parametrize("kind", KINDS)
def test_the_probabilities_of_four_bases_sum_to_one_after_every_context(kind):
    contexts = ["".join(c) for k in range(4) for c in itertools.product("ACGT", repeat=k)]
    test = [encode(context + base) for context in contexts for base in "ACGT"]
    windows = np.array([(i, len(ids) - 1, len(ids)) for i, ids in enumerate(test)])
    for order in range(4):
        row = pick(causal_rows(TRAIN, TUNE, test, windows, orders=4), kind, order)
        total = (2.0**-row.bits_B).reshape(-1, 4).sum(axis=1)
        np.testing.assert_allclose(total, 1, rtol=1e-12)


def test_a_word_is_as_likely_as_its_reverse_complement_if_both_strands_are_counted():
    counts = words.Counts(3)
    counts.add(words.joined(TRAIN))
    plain = plain_counts(TRAIN, 3, both=True)
    for word in map("".join, itertools.product("ACGT", repeat=3)):
        other = decode(reverse_complement(encode(word)))
        found = []
        for one in (word, other):
            *_, (n, _) = counts.causal(words.Words(encode(one) - 7, 3), 2)
            found.append(n[-1])
        assert found == [plain[word]] * 2 == [plain[other]] * 2


def test_training_on_the_other_strand_changes_one_strand_rows_alone():
    turned = [reverse_complement(ids) for ids in TRAIN]
    here, there = (causal_rows(t, TUNE, TEST, WINDOWS, orders=4) for t in (TRAIN, turned))
    for a, b in zip(here, there, strict=True):
        same = np.allclose(a.bits_B, b.bits_B, rtol=1e-12, atol=0, equal_nan=True)
        assert same == (a.kind in (ADD_ONE_BOTH, BACKOFF_BOTH))


def test_a_sequence_is_not_continued_by_the_next_and_n_breaks_a_context():
    parts = [encode("ACGTTA"), encode("GGCATC")]
    test = [encode("ACNGTA")]
    windows = np.array([(0, 0, 6)])
    apart, broken, whole = (
        causal_rows(train, [], test, windows, orders=4)
        for train in (parts, [encode("ACGTTANGGCATC")], [encode("ACGTTAGGCATC")])
    )
    assert [row.bits for row in apart] == [row.bits for row in broken]
    assert [row.bits for row in apart] != [row.bits for row in whole]


def test_contexts_run_across_the_borders_of_windows():
    halves = np.array([(2, 0, 25), (2, 25, 50)])
    whole = np.array([(2, 0, 50)])
    for a, b in zip(
        causal_rows(TRAIN, TUNE, TEST, halves, orders=4),
        causal_rows(TRAIN, TUNE, TEST, whole, orders=4),
        strict=True,
    ):
        assert a.bits == pytest.approx(b.bits, rel=1e-12)


# --- two-sided ------------------------------------------------------------------------------------


def plain_two_sided(counts: Counter, ids: np.ndarray, order: int) -> np.ndarray:
    letters = decode(ids)
    bits = np.zeros(len(letters))
    for at, base in enumerate(letters):
        if base == "N":
            continue
        left = known_before(letters, at, order)
        right = letters[at + 1 : at + 1 + order].partition("N")[0]
        k = min(len(left), len(right))
        left, right = left[len(left) - k :], right[:k]
        total = sum(counts[left + other + right] for other in "ACGT")
        bits[at] = -math.log2((counts[left + base + right] + 1) / (total + 4))
    return bits


@pytest.mark.usefixtures("_piece")
def test_two_sided_rows_are_what_plain_loops_count():
    rows = two_sided_rows(TRAIN, TUNE, TEST, WINDOWS, orders=4)
    counts = plain_counts(TRAIN + TUNE, 7, both=True)
    for order, row in enumerate(rows):
        assert (row.kind, row.order) == (TWO_SIDED, order)
        expected = plain_windows(lambda ids, k=order: plain_two_sided(counts, ids, k))
        np.testing.assert_allclose(row.bits_B, expected, rtol=1e-12)


def test_two_sided_bits_of_a_sequence_and_of_its_other_strand_are_equal():
    turned = [reverse_complement(ids) for ids in TEST]
    windows = np.array([(0, 0, 70), (2, 0, 50)])
    for a, b in zip(
        two_sided_rows(TRAIN, TUNE, TEST, windows, orders=4),
        two_sided_rows(TRAIN, TUNE, turned, windows, orders=4),
        strict=True,
    ):
        np.testing.assert_allclose(a.bits_B, b.bits_B, rtol=1e-12)


# --- yeast ----------------------------------------------------------------------------------------


def test_a_chromosome_that_was_counted_takes_fewer_bits_with_every_order():
    chromosome = load_genome().sequences()[0]
    windows = np.array([(0, 0, len(chromosome))])
    rows = causal_rows([chromosome], [], [chromosome], windows, orders=10)
    for kind in (ADD_ONE, ADD_ONE_BOTH):
        bits = [row.bits for row in rows if row.kind == kind]
        assert bits == sorted(bits, reverse=True)
        assert 1.96 < bits[0] < 1.97
        assert bits[-1] < 1.5
    share = np.bincount(chromosome)[7:11] / len(chromosome)
    assert pick(rows, ADD_ONE, 0).bits == pytest.approx(-(share * np.log2(share)).sum(), abs=1e-6)


def test_backoff_overfits_less_than_add_one_on_another_chromosome():
    one, _, three, *_ = load_genome().sequences()
    windows = np.array([(0, 0, len(three))])
    rows = causal_rows([one[:200_000]], [one[200_000:]], [three], windows, orders=7)
    assert pick(rows, ADD_ONE, 6).bits > pick(rows, ADD_ONE, 0).bits
    for alone, backed in ((ADD_ONE, BACKOFF), (ADD_ONE_BOTH, BACKOFF_BOTH)):
        assert pick(rows, backed, 6).bits < pick(rows, alone, 6).bits - 0.01
        assert pick(rows, backed, 6).bits < pick(rows, backed, 1).bits


def test_the_rows_of_chromosomes_4_and_14_are_those_of_the_prototype():
    sequences = load_genome().sequences()
    test = [sequences[3], sequences[13]]
    train = [ids for i, ids in enumerate(sequences) if i not in (3, 13)]
    windows = np.array([(i, 12, len(ids)) for i, ids in enumerate(test)])
    rows = causal_rows(train, [], test, windows, orders=6)
    one, both = ([r.bits for r in rows if r.kind == kind] for kind in (ADD_ONE, ADD_ONE_BOTH))
    known = [1.9591, 1.9490, 1.9451, 1.9408]
    assert [round(bits, 4) for bits in one] == [*known, 1.9395, 1.9387]
    assert [round(bits, 4) for bits in both] == [*known, 1.9394, 1.9385]


# --- windows and rows -----------------------------------------------------------------------------


def test_the_mean_is_over_bases_and_the_novel_mean_over_theirs():
    novel = np.array([True, False, True, False, True])
    real = np.array([int((TEST[w][a:b] != N).sum()) for w, a, b in WINDOWS])
    assert real[4] == 0
    for row in causal_rows(TRAIN, TUNE, TEST, WINDOWS, novel=novel, orders=2):
        bits_B = np.nan_to_num(row.bits_B)
        assert np.isnan(row.bits_B).tolist() == [False] * 4 + [True]
        assert row.bits == pytest.approx((bits_B * real).sum() / real.sum(), rel=1e-12)
        unseen = (bits_B * real)[novel].sum() / real[novel].sum()
        assert row.bits_novel == pytest.approx(unseen, rel=1e-12)


def test_no_novel_window_with_a_base_is_no_novel_mean():
    novel = np.array([False] * 4 + [True])
    rows = causal_rows(TRAIN, TUNE, TEST, WINDOWS, novel=novel, orders=2)
    assert all(row.bits_novel is None for row in rows)
    assert best(rows, novel=True) is None


WRONG = {
    "orders": ({"orders": 14}, "^orders must be 1 to 13, got 14"),
    "beyond the end": ({"windows": np.array([[2, 0, 51]])}, r"^windows must lie .* \[2, 0, 51\]"),
    "no such sequence": ({"windows": np.array([[3, 0, 1]])}, r"^windows must lie .* \[3, 0, 1\]"),
    "backwards": ({"windows": np.array([[0, 9, 8]])}, r"^windows must lie .* \[0, 9, 8\]"),
    "shape": ({"windows": np.array([[0, 9]])}, r"^windows must be \[B, 3\], got \[1, 2\]"),
    "novel": ({"novel": np.array([True])}, r"^novel must be \[5\], got \[1\]"),
}


@pytest.mark.parametrize("kind", list(WRONG))
def test_arguments_that_do_not_fit_are_refused(kind):
    changes, message = WRONG[kind]
    given = {"windows": WINDOWS, "orders": 2} | changes
    with pytest.raises(ValueError, match=message):
        causal_rows(TRAIN, TUNE, TEST, given.pop("windows"), **given)


def row(kind: str, order: int, bits: float, unseen: float | None = None) -> Row:
    return Row(kind, order, bits, unseen, np.array([bits]))


ROWS = [
    row(ADD_ONE, 5, 1.9387, 1.9391),
    row(ADD_ONE, 7, 1.9365, 1.9405),
    row(ADD_ONE, 8, 1.9413, 1.9527),
    row(ADD_ONE_BOTH, 7, 1.9347, 1.9388),
    row(ADD_ONE_BOTH, 8, 1.9346, 1.9461),
    row(BACKOFF, 12, 1.9164, 1.9666),
    row(BACKOFF_BOTH, 7, 1.9342, 1.9374),
    row(BACKOFF_BOTH, 8, 1.9313, 1.9391),
    row(BACKOFF_BOTH, 12, 1.9058, 1.9659),
]


def test_the_best_rows_are_found_on_all_and_on_novel_windows():
    assert best(ROWS, ADD_ONE, ADD_ONE_BOTH).name == "order 8 add-one, both strands"
    assert best(ROWS, ADD_ONE).name == "order 7 add-one"
    assert best(ROWS, novel=True).name == "order 7 backoff, both strands"
    assert pick(ROWS, BACKOFF_BOTH) is ROWS[-1]
    assert pick(ROWS, BACKOFF_BOTH, 9) is None


def test_the_table_has_the_telling_rows_with_differences_to_four_decimals():
    lines = table(ROWS, 1.9029, 1.9043)
    assert [line.split("  ")[0] for line in lines] == [
        "bits per base",
        "network",
        "order 5 add-one",
        "order 7 add-one",
        "order 7 add-one, both strands",
        "order 8 add-one, both strands",
        "order 7 backoff, both strands",
        "order 8 backoff, both strands",
        "order 12 backoff, both strands",
    ]
    assert lines[1].split()[1:] == ["1.9029", "1.9043"]
    assert lines[2].split()[-4:] == ["1.9387", "-0.0358", "1.9391", "-0.0348"]
    assert lines[-1].split()[-4:] == ["1.9058", "-0.0029", "1.9659", "-0.0616"]
    assert max(map(len, lines)) <= 80


def test_the_table_leaves_novel_windows_out_where_the_network_has_none():
    lines = table(ROWS, 1.9029)
    assert "novel" not in lines[0]
    assert lines[-1].split()[-2:] == ["1.9058", "-0.0029"]


def test_the_table_of_a_masked_network_has_every_two_sided_row():
    lines = table([row(TWO_SIDED, k, 1.95 - 0.01 * k) for k in range(6)], 1.92)
    assert len(lines) == 8
    assert lines[5].split() == ["order", "3", "two-sided,", "both", "strands", "1.9200", "+0.0000"]


# --- the cache ------------------------------------------------------------------------------------


def assert_same(a: list[Row], b: list[Row]) -> None:
    for one, two in zip(a, b, strict=True):
        assert (one.kind, one.order, one.bits, one.bits_novel) == (
            two.kind,
            two.order,
            two.bits,
            two.bits_novel,
        )
        np.testing.assert_array_equal(one.bits_B, two.bits_B)


@pytest.mark.parametrize("two_sided", [False, True])
def test_rows_are_computed_once_and_then_recalled(tmp_path, monkeypatch, two_sided):
    novel = np.array([True, False, True, False, True])
    given = {"novel": novel, "orders": 3, "two_sided": two_sided, "cache": str(tmp_path)}
    rows = cached_rows(TRAIN, TUNE, TEST, WINDOWS, **given)
    make = two_sided_rows if two_sided else causal_rows
    assert_same(rows, make(TRAIN, TUNE, TEST, WINDOWS, novel=novel, orders=3))
    monkeypatch.setattr(markov, "Counts", None)  # cannot count
    assert_same(rows, cached_rows(TRAIN, TUNE, TEST, WINDOWS, **given))


def test_any_change_of_the_input_is_computed_anew(tmp_path):
    def files(*parts, **changes) -> int:
        given = {"orders": 2, "cache": str(tmp_path)} | changes
        cached_rows(*parts, **given)
        return len(list((tmp_path / "markov").iterdir()))

    assert files(TRAIN, TUNE, TEST, WINDOWS) == 1
    assert files(TRAIN, TUNE, TEST, WINDOWS) == 1
    assert files(TRAIN[:2], [*TUNE, TRAIN[2]], TEST, WINDOWS) == 2
    assert files(TRAIN, TUNE, TEST, WINDOWS[:3]) == 3
    assert files(TRAIN, TUNE, TEST, WINDOWS, novel=np.zeros(5, bool)) == 4
    assert files(TRAIN, TUNE, TEST, WINDOWS, orders=3) == 5
    assert files(TRAIN, TUNE, TEST, WINDOWS, two_sided=True) == 6
    # the same letters, cut elsewhere
    assert files([np.concatenate(TRAIN)], TUNE, TEST, WINDOWS) == 7


def test_a_damaged_file_is_a_note_and_computed_again(tmp_path, capsys):
    given = {"orders": 2, "cache": str(tmp_path)}
    rows = cached_rows(TRAIN, TUNE, TEST, WINDOWS, **given)
    (file,) = (tmp_path / "markov").iterdir()
    file.write_bytes(b"PK no more")
    assert_same(rows, cached_rows(TRAIN, TUNE, TEST, WINDOWS, **given))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: ")
    assert "is damaged" in line
    assert_same(rows, cached_rows(TRAIN, TUNE, TEST, WINDOWS, **given))
    assert capsys.readouterr().err == ""


def test_nothing_is_kept_where_the_cache_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached_rows(TRAIN, TUNE, TEST, WINDOWS, orders=2, cache="none")
    assert not list(tmp_path.iterdir())
    cached_rows(TRAIN, TUNE, TEST, WINDOWS, orders=2)
    assert len(list(tmp_path.rglob("*.npz"))) == 1
