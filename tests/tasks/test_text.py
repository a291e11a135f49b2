"""Letters of transcripts, and what frames spell."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch

from tasks.speech.text import (
    LABELS,
    collapse,
    decode,
    decode_rows,
    encode,
    frames_needed,
    greedy,
    normalise,
)


def test_the_labels_are_torchaudios_so_that_its_heads_fit() -> None:
    bundle = pytest.importorskip("torchaudio").pipelines.WAV2VEC2_ASR_BASE_960H
    assert tuple(LABELS) == bundle.get_labels()


def test_a_transcript_comes_back_in_upper_case_with_single_spaces() -> None:
    assert normalise("  Don’t \t panic\n") == "DON'T PANIC"
    assert decode(encode("  Don’t \t panic\n")) == "DON'T PANIC"
    assert encode("A B") == [LABELS.index("A"), 1, LABELS.index("B")]
    assert encode(" ") == []
    assert decode([]) == ""


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("2 clubs", "'2'"),
        ("café", "'é'"),
        ("straße", "'ß'"),
        ("a|b", "'|'"),
        ("a-b", "'-'"),
        ("well, yes", "','"),
    ],
)
def test_what_is_no_letter_is_named(text: str, wrong: str) -> None:
    for function in (normalise, encode):
        with pytest.raises(ValueError, match="is none of the letters A-Z") as caught:
            function(text)
        assert str(caught.value).startswith(wrong)


def test_separators_make_no_empty_words() -> None:
    assert decode([1, 1, *encode("A"), 1, 1, *encode("B"), 1, 0, 0]) == "A B"


def test_rows_are_decoded_without_their_padding() -> None:
    assert decode_rows(torch.tensor([[*encode("LL"), 0], [0, 0, 0]])) == ["LL", ""]


def test_equal_letters_need_a_blank_between_them() -> None:
    assert frames_needed(encode("BOOKKEEPER")) == 13
    assert frames_needed(encode("CAT")) == 3
    assert frames_needed([]) == 0


def test_collapsing_equals_the_plain_rule() -> None:
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, 4, (50, 12), generator=generator)
    frames_B = torch.randint(1, 13, (50,), generator=generator)
    collapsed_BT = collapse(ids_BT, frames_B)
    assert collapsed_BT.shape == ids_BT.shape
    for row_T, ids_T, frames in zip(collapsed_BT, ids_BT.tolist(), frames_B.tolist(), strict=True):
        expected = [label for label, _ in groupby(ids_T[:frames]) if label]
        assert row_T.tolist() == expected + [0] * (12 - len(expected))


def test_greedy_keeps_letters_that_a_blank_parts() -> None:
    letter = LABELS.index("L")
    ids_BT = torch.tensor([[letter, letter, 0, letter, 0], [letter, letter, letter, 0, 7]])
    assert greedy(ids_BT, torch.tensor([5, 4])) == ["LL", "L"]
