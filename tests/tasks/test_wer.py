"""Error rates against torchmetrics', and sums over batches."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torchmetrics.text import CharErrorRate, WordErrorRate

from suite.errors import DataError
from tasks.speech.text import encode
from tasks.speech.wer import CharErrors, WordErrors, edit_distances


def ids(*texts: str) -> Tensor:
    rows = [encode(text) for text in texts]
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows]).reshape(len(rows), -1)


def slow_distance(a: str, b: str) -> int:
    """The recursive definition."""
    if not a or not b:
        return len(a) + len(b)
    if a[-1] == b[-1]:
        return slow_distance(a[:-1], b[:-1])
    return 1 + min(
        slow_distance(a[:-1], b), slow_distance(a, b[:-1]), slow_distance(a[:-1], b[:-1])
    )


def sentences(count: int, *, seed: int) -> list[str]:
    draw = random.Random(seed)
    words = ["ACE", "OF", "CLUBS", "TEN", "JACK", "QUEEN'S", "A"]
    return [" ".join(draw.choices(words, k=draw.randint(0, 6))) for _ in range(count)]


def test_the_distance_is_that_of_the_recursive_definition() -> None:
    draw = random.Random(1)
    texts = ["".join(draw.choices("ABC", k=draw.randint(0, 6))) for _ in range(80)]
    hypotheses, references = texts[:40], texts[40:]
    expected = [slow_distance(a, b) for a, b in zip(hypotheses, references, strict=True)]
    assert edit_distances(hypotheses, references).tolist() == expected
    assert len(set(expected)) > 4


def test_the_distance_of_nothing_is_the_length_of_the_other() -> None:
    assert edit_distances(["", "AB", ""], ["ABC", "", ""]).tolist() == [3, 2, 0]
    assert edit_distances([], []).tolist() == []


@pytest.mark.parametrize(
    ("ours", "theirs"), [(WordErrors, WordErrorRate), (CharErrors, CharErrorRate)]
)
def test_the_rate_equals_torchmetrics_whatever_the_batches(ours: type, theirs: type) -> None:
    hypotheses, references = sentences(60, seed=2), sentences(60, seed=3)
    reference = theirs()
    reference.update(hypotheses, references)
    expected = float(reference.compute())
    assert 0.5 < expected < 2
    for size in (60, 7, 1):
        metric = ours()
        for i in range(0, 60, size):
            metric.update(ids(*hypotheses[i : i + size]), ids(*references[i : i + size]))
        assert float(metric.compute()) == pytest.approx(expected, abs=1e-6)


def test_it_is_no_mean_of_the_rates_of_utterances() -> None:
    metric = WordErrors()
    metric.update(ids("TEN", "ACE OF CLUBS"), ids("TWO", "ACE OF CLUBS"))
    assert float(metric.compute()) == 0.25  # the mean of the two rates is 0.5


def test_states_are_sums_over_processes() -> None:
    assert set(WordErrors()._reductions) == {"errors", "total"}
    assert all(
        how is torch.sum or how.__name__ == "dim_zero_sum"
        for how in WordErrors()._reductions.values()
    )


@pytest.mark.parametrize(("metric", "what"), [(WordErrors(), "word"), (CharErrors(), "character")])
def test_a_set_without_any_word_is_an_error_and_not_nan(
    metric: WordErrors | CharErrors, what: str
) -> None:
    metric.update(ids("TEN"), ids(""))
    with pytest.raises(DataError, match=f"^no {what} in any transcript of this split"):
        metric.compute()


def test_the_first_pairs_of_a_set_outlive_its_reset() -> None:
    metric = WordErrors(shown=2)
    for text in ("ACE", "TEN", "TWO"):
        metric.update(ids("A"), ids(text))
    metric.compute()
    metric.reset()
    assert metric.pairs == [("ACE", "A"), ("TEN", "A")]
    metric.update(ids("B"), ids("JACK"))
    assert metric.pairs == [("JACK", "B")]
