"""Labelled sequences: what a batch holds, what is held back for validation, and what is refused."""

import numpy as np
import pytest
import torch

from suite.data import SuiteDataModule
from suite.errors import ConfigError
from tasks.dna.sequences import LabelledOptions, LabelledSplit, Sequences
from tasks.dna.sets import About, make_splits
from tasks.dna.tokens import PAD, decode, encode, reverse_complement

CLASSES = ("coding", "intergenic")
START = "ATGACTGAATTCAAGGCCGGTTCTGCTAAGAAAGGTGCTACACTTTTCAAGACTAGATGTCTACAATGCCACACCGTGGAA"  # CYC1


def rows(count: int, *, seed: int = 0, length: int = 30) -> list[np.ndarray]:
    """Different sequences, each a piece of a gene with its last bases drawn at random."""
    draw = np.random.default_rng(seed)
    pieces = []
    for i in range(count):
        tail = draw.integers(7, 11, 12).astype(np.uint8)
        pieces.append(np.concatenate([encode(START)[i % 20 : i % 20 + length - 12], tail]))
    return pieces


def labelled(count: int, *, seed: int = 0, length: int = 30) -> Sequences:
    return Sequences.listed(rows(count, seed=seed, length=length), np.arange(count) % 2)


def splits(train=None, test=None, *, seed=0, strand_specific=False, classes=CLASSES, **changes):
    about = About("some", "none", "here", classes=classes, strand_specific=strand_specific)
    return make_splits(
        labelled(60) if train is None else train,
        labelled(20, seed=1) if test is None else test,
        about=about,
        options=LabelledOptions(**changes),
        seed=seed,
    )


def texts(split: LabelledSplit) -> list[str]:
    return [decode(split.sequences[i]) for i in range(len(split))]


# --- batches --------------------------------------------------------------------------------------


def test_rows_are_padded_at_their_end_up_to_the_longest_of_the_batch():
    pieces = [encode("ACGTN"), encode("AC"), encode("acgtryswkm")]
    split = LabelledSplit(Sequences.listed(pieces, [0, 1, 1]))
    batch = split.fetch([1, 0], epoch=0, train=False)
    assert batch["ids"].tolist() == [[7, 8, PAD, PAD, PAD], [7, 8, 9, 10, 11]]
    assert batch["ids"].dtype == batch["label"].dtype == torch.int64
    assert batch["label"].tolist() == [1, 0]
    assert split.fetch([2], epoch=0, train=False)["ids"].tolist() == [[7, 8, 9, 10, *[11] * 6]]


def test_training_shows_about_half_of_the_examples_as_their_reverse_complement():
    found = splits(labelled(400), rc_augment=True).train
    indices = list(range(len(found)))
    batch = found.fetch(indices, epoch=3, train=True)["ids"].numpy()
    turned = 0
    for i in indices:
        here, other = found.sequences[i], reverse_complement(found.sequences[i])
        assert (batch[i] == here).all() or (batch[i] == other).all()
        turned += int((batch[i] == other).all())
    assert 130 < turned < 230  # of 360; six standard deviations are 57


def test_which_strand_is_shown_depends_on_the_seed_the_epoch_and_the_sample_alone():
    first, other_seed = splits().train, splits(seed=1, val_seed=0).train
    assert texts(first) == texts(other_seed)
    indices = list(range(len(first)))
    whole = first.fetch(indices, epoch=1, train=True)["ids"]
    alone = torch.cat([first.fetch([i], epoch=1, train=True)["ids"] for i in indices])
    assert torch.equal(whole, alone)
    assert not torch.equal(whole, first.fetch(indices, epoch=2, train=True)["ids"])
    assert not torch.equal(whole, other_seed.fetch(indices, epoch=1, train=True)["ids"])


def test_the_other_strand_is_shown_in_training_alone():
    found = splits()
    for split, train in ((found.train, False), (found.val, True), (found.test, True)):
        batch = split.fetch(list(range(len(split))), epoch=0, train=train)
        assert [decode(row) for row in batch["ids"].numpy()] == texts(split)


def test_longer_sequences_are_cut_and_counted():
    train = Sequences.listed([*rows(40), *rows(4, length=70)], np.arange(44) % 2)
    found = splits(train, max_length=32)
    assert found.info.extra["length"] == 32
    assert found.info.extra["notes"] == [
        "data.max_length=32 cuts 4 of 64 sequences (the longest has 70 bases)"
    ]
    assert max(map(len, texts(found.train))) == 32
    assert splits(train, max_length=70).info.extra["notes"] == []


def test_the_augmentation_may_be_switched_off():
    found = splits(rc_augment=False).train
    batch = found.fetch(list(range(len(found))), epoch=0, train=True)
    assert [decode(row) for row in batch["ids"].numpy()] == texts(found)


# --- validation -----------------------------------------------------------------------------------


def test_a_tenth_of_each_class_is_held_back_and_nothing_is_lost():
    train = Sequences.listed(rows(100), [0] * 70 + [1] * 30)
    found = splits(train)
    assert np.bincount(found.val.sequences.labels).tolist() == [7, 3]
    assert sorted(texts(found.train) + texts(found.val)) == sorted(texts(LabelledSplit(train)))
    assert found.info.sizes == {"train": 90, "val": 10, "test": 20}


def test_the_batch_that_norms_are_compared_on_has_some_of_each_class():
    train = Sequences.listed(rows(100), [0] * 90 + [1] * 10)
    module = SuiteDataModule(splits(train), options=LabelledOptions(), seed=0)
    assert np.bincount(module.fixed_batch(30)["label"]).tolist() == [27, 3]


def test_what_is_held_back_follows_the_runs_seed_unless_val_seed_is_given():
    assert texts(splits(seed=1).val) == texts(splits(seed=1).val)
    assert texts(splits(seed=1).val) != texts(splits(seed=2).val)
    assert texts(splits(seed=1, val_seed=7).val) == texts(splits(seed=2, val_seed=7).val)


@pytest.mark.parametrize("strand_specific", [True, False])
def test_equal_sequences_stay_on_one_side(strand_specific):
    pieces = rows(30)
    twins = pieces if strand_specific else [reverse_complement(piece) for piece in pieces]
    train = Sequences.listed(
        [*pieces, *twins, *pieces], [i % 2 for _ in range(3) for i in range(30)]
    )
    for seed in range(5):
        found = splits(train, seed=seed, strand_specific=strand_specific, val_share=0.3)
        keys = [
            set(s.sequences.keys(both_strands=not strand_specific))
            for s in (found.train, found.val)
        ]
        assert not keys[0] & keys[1]
        assert len(keys[1]) == 8  # 4.5 of 15 in each class, in threes: 4
        assert found.info.sizes["val"] == 24


def test_the_test_sequences_that_training_has_too_are_not_novel():
    pieces = rows(40)
    test = [pieces[3], reverse_complement(pieces[4]), *rows(4, seed=9)]
    train = Sequences.listed(pieces, np.arange(40) % 2)
    both = splits(train, Sequences.listed(test, [1, 0] * 3))
    novel = both.test.fetch(list(range(6)), epoch=0, train=False)["novel"]
    assert novel.tolist() == [False, False, True, True, True, True]
    assert both.info.extra["test_novel"] == 4
    assert both.info.extra["notes"] == [
        "2 of 6 test sequences are, or as their reverse complement, in the training set too"
    ]
    one = splits(train, Sequences.listed(test, [1, 0] * 3), strand_specific=True)
    novel = one.test.fetch(list(range(6)), epoch=0, train=False)["novel"]
    assert novel.tolist() == [False, True, True, True, True, True]
    assert both.val.fetch([0, 1], epoch=0, train=False)["novel"].all()
    assert "novel" not in both.train.fetch([0], epoch=0, train=False)


def test_sequences_of_two_classes_are_counted():
    pieces = rows(20)
    train = Sequences.listed([*pieces, pieces[0]], [*(i % 2 for i in range(20)), 1])
    assert "1 training sequences occur under two classes" in splits(train).info.extra["notes"]


def test_the_digest_tells_other_bases_other_labels_and_other_divisions_apart():
    pieces, labels = rows(20), np.arange(20) % 2
    digest = splits(Sequences.listed(pieces, labels)).info.sha256
    assert digest == splits(Sequences.listed(pieces, labels), seed=5).info.sha256
    assert digest != splits(Sequences.listed(pieces, 1 - labels)).info.sha256
    assert digest != splits(Sequences.listed(pieces[::-1], labels)).info.sha256
    ids = np.concatenate(pieces)
    lengths = [29, 31, *[30] * 18]
    assert digest != splits(Sequences.joined(ids, lengths, labels)).info.sha256


# --- what is refused ------------------------------------------------------------------------------

WRONG = {
    "one class": (
        {"train": Sequences.listed(rows(9), [0] * 9), "classes": ("coding",)},
        "one class alone",
    ),
    "empty class": (
        {"train": Sequences.listed(rows(9), [0] * 9)},
        "train has no sequence of the class 'intergenic'",
    ),
    "empty class in test": (
        {"test": Sequences.listed(rows(9), [1] * 9)},
        "test has no sequence of the class 'coding'",
    ),
    "too few": (
        {"train": Sequences.listed(rows(9), [0] * 8 + [1])},
        r"1 different sequence\(s\) of the class 'intergenic', too few to hold one back",
    ),
    "copies": (
        {"train": Sequences.listed([*rows(8), *[encode(START)] * 4], [0] * 8 + [1] * 4)},
        r"1 different sequence\(s\) of the class 'intergenic'",
    ),
    "empty sequence": (
        {"test": Sequences.listed([*rows(2), encode("")], [0, 1, 1])},
        "sequence 3 of test is empty",
    ),
    "strand": (
        {"strand_specific": True, "rc_augment": True},
        r"data\.rc_augment=true: the classes of data=some are defined on one strand",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_used_is_one_line(name):
    changes, message = WRONG[name]
    with pytest.raises(ConfigError, match=message) as caught:
        splits(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"val_share": 0.0}, r"val_share must be above 0 and below 1, got 0\.0"),
        ({"val_share": 1.0}, r"val_share must be above 0 and below 1, got 1\.0"),
        ({"val_seed": -1}, "val_seed must not be negative, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_options_out_of_range_name_their_field(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        LabelledOptions(**changes)


def test_a_small_class_keeps_one_of_its_two_sequences_for_training():
    train = Sequences.listed(rows(12), [0] * 10 + [1] * 2)
    found = splits(train, val_share=0.9)
    assert np.bincount(found.train.sequences.labels).tolist() == [1, 1]
    assert np.bincount(found.val.sequences.labels).tolist() == [9, 1]
