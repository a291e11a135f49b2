"""Rows of a long array of ids: what is asked, how often, and in which document."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from suite.errors import ConfigError
from tasks.language.encoding import ByteEncoding
from tasks.language.tokens import BYTE_END, IGNORE
from tasks.language.windows import (
    About,
    LanguageDataOptions,
    Part,
    TokenSplit,
    join_documents,
    token_splits,
)

ABOUT = About("some", license="none", source="nowhere", sha256="0")


def make(total=1000, *, length=16, documents="join", shift=False, starts=(0,), seed=3):
    """A split whose ids are their own places."""
    tokens = np.arange(total, dtype=np.uint32)
    return TokenSplit(
        tokens,
        starts=np.array(starts, np.int64),
        length=length,
        documents=documents,
        shift=shift,
        seed=seed,
    )


def whole(split, *, epoch=0, train=False):
    return split.fetch(list(range(len(split))), epoch=epoch, train=train)


def asked(batch) -> np.ndarray:
    """The targets that are asked for, in order."""
    target = batch["target"].numpy().ravel()
    return np.sort(target[target != IGNORE])


# --- evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("documents", ["join", "mask"])
@pytest.mark.parametrize("total", [2, 16, 17, 18, 32, 33, 34, 1000])
def test_an_evaluation_asks_every_token_but_the_first_once(total, documents):
    split = make(total, documents=documents)
    assert asked(whole(split)).tolist() == list(range(1, total))
    assert split.asked == total - 1


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    length=st.integers(2, 20),
    epoch=st.integers(0, 5),
    train=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_padding_keeps_documents_apart_and_asks_each_token_once(sizes, length, epoch, train):
    starts = np.cumsum([0, *sizes])[:-1]
    split = make(sum(sizes), length=length, documents="pad", shift=True, starts=starts)
    batch = whole(split, epoch=epoch, train=train)
    assert asked(batch).tolist() == sorted(set(range(sum(sizes))) - set(starts.tolist()))
    assert split.asked == sum(sizes) - len(sizes)
    document_BT = np.searchsorted(starts, batch["ids"].numpy(), side="right")
    assert (document_BT == document_BT[:, :1]).all()
    kept = batch["target"] != IGNORE
    assert (batch["target"][kept] == batch["ids"][kept] + 1).all()
    assert kept.any(1).all()  # no row asks for nothing


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    length=st.integers(2, 20),
    epoch=st.integers(0, 5),
)
@settings(max_examples=150, deadline=None)
def test_masked_documents_are_counted_from_0_in_every_row(sizes, length, epoch):
    starts = np.cumsum([0, *sizes])[:-1]
    split = make(sum(sizes), length=length, documents="mask", shift=True, starts=starts)
    if len(split) == 0:
        return
    batch = whole(split, epoch=epoch, train=True)
    truth = np.repeat(np.arange(len(sizes)), sizes)[batch["ids"].numpy()]
    assert (batch["document"].numpy() == truth - truth[:, :1]).all()
    joined = make(sum(sizes), length=length, shift=True, starts=starts)
    assert torch.equal(whole(joined, epoch=epoch, train=True)["target"], batch["target"])
    assert "document" not in whole(joined)


def test_a_target_is_the_token_after_its_input():
    batch = whole(make(100))
    kept = batch["target"] != IGNORE
    assert torch.equal(batch["target"][kept], batch["ids"][kept] + 1)
    assert batch["ids"].dtype == batch["target"].dtype == torch.int64


def test_a_padded_position_holds_an_id_that_there_is():
    batch = whole(make(20))
    assert batch["ids"].shape == (2, 16)
    assert batch["ids"].max() == 19
    assert (batch["target"][1] == IGNORE).sum() == 13


# --- training -------------------------------------------------------------------------------------


def test_training_rows_are_whole_and_lie_apart_in_every_epoch():
    split = make(1000, shift=True)
    for epoch in range(20):
        batch = whole(split, epoch=epoch, train=True)
        targets = asked(batch)
        assert len(targets) == len(split) * 16
        assert len(np.unique(targets)) == len(targets)


@pytest.mark.parametrize("total", [17, 18, 33, 47, 100, 113])
def test_over_the_epochs_a_shift_asks_every_token_at_every_place_that_it_can(total):
    split = make(total, shift=True)
    rows = [whole(split, epoch=epoch, train=True) for epoch in range(400)]
    assert set(np.concatenate([asked(each) for each in rows]).tolist()) == set(range(1, total))
    firsts = {int(each["ids"][0, 0]) for each in rows}
    assert firsts == set(range(total - len(split) * 16))


def test_rows_depend_on_the_seed_and_the_epoch_alone():
    one, same, other = (make(shift=True, seed=seed) for seed in (3, 3, 4))
    firsts = [int(one.fetch([0], epoch=e, train=True)["ids"][0, 0]) for e in range(12)]
    assert firsts == [int(same.fetch([0], epoch=e, train=True)["ids"][0, 0]) for e in range(12)]
    assert firsts != [int(other.fetch([0], epoch=e, train=True)["ids"][0, 0]) for e in range(12)]
    assert len(set(firsts)) > 4


def test_evaluation_and_training_without_a_shift_begin_at_0_in_every_epoch():
    shifted, still = make(shift=True), make(shift=False)
    for epoch in range(5):
        assert shifted.fetch([0], epoch=epoch, train=False)["ids"][0, 0] == 0
        assert still.fetch([0], epoch=epoch, train=True)["ids"][0, 0] == 0


@pytest.mark.parametrize("documents", ["join", "mask", "pad"])
def test_a_row_does_not_depend_on_the_others_of_its_batch(documents):
    split = make(500, documents=documents, shift=True, starts=[0, 5, 90, 300, 301])
    alone = split.fetch([7], epoch=2, train=True)
    among = split.fetch([20, 3, 7, 7], epoch=2, train=True)
    for name, rows in alone.items():
        assert torch.equal(rows[0], among[name][2])
        assert torch.equal(rows[0], among[name][3])


# --- where ids lie --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_a_memory_map_gives_what_an_array_gives(tmp_path, dtype):
    ids = np.random.default_rng(0).integers(0, 60_000, 3000).astype(dtype)
    ids.tofile(tmp_path / "train.bin")
    mapped = np.memmap(tmp_path / "train.bin", dtype, "r")
    settings = {"starts": np.array([0]), "length": 32, "documents": "join", "shift": True}
    for epoch in range(3):
        one, two = (
            whole(TokenSplit(tokens, **settings, seed=0), epoch=epoch, train=True)
            for tokens in (ids, mapped)
        )
        assert torch.equal(one["ids"], two["ids"])
        assert torch.equal(one["target"], two["target"])


class Watched:
    """An array that says how much of it was asked for."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids, self.read = ids, 0

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, where):
        self.read += np.size(where)
        return self.ids[where]


def test_only_the_rows_that_are_asked_for_are_read():
    ids = Watched(np.zeros(100_000, np.uint16))
    split = TokenSplit(
        ids, starts=np.array([0, 70]), length=32, documents="mask", shift=True, seed=0
    )
    assert ids.read == 0
    split.fetch([5, 900], epoch=1, train=True)
    assert ids.read == 2 * 33


def test_ids_above_32767_and_above_65535_stay_what_they_are():
    for dtype, top in ((np.uint16, 65_535), (np.uint32, 4_000_000_000)):
        ids = np.array([0, top, 1, top], dtype)
        split = TokenSplit(
            ids, starts=np.array([0]), length=3, documents="join", shift=False, seed=0
        )
        assert whole(split)["target"].tolist() == [[top, 1, top]]


def test_documents_that_begin_outside_the_tokens_are_refused():
    with pytest.raises(ValueError, match="starts must lie within the 10 tokens"):
        make(10, starts=[0, 10])


# --- splits ---------------------------------------------------------------------------------------


def parts(**sizes) -> dict:
    return {
        split: join_documents([np.arange(n - 1, dtype=np.uint16) % 256], encoding=ByteEncoding())
        for split, n in sizes.items()
    }


def built(given, **changes):
    options = LanguageDataOptions(length=8, **changes)
    return token_splits(
        given, about=ABOUT, options=options, seed=0, encoding=ByteEncoding(), vocab_size=257
    )


def test_documents_are_closed_by_the_end_and_begin_after_it():
    encoding = ByteEncoding()
    part = join_documents([encoding.encode("ab"), encoding.encode("c")], encoding=encoding)
    assert part.tokens.tolist() == [97, 98, BYTE_END, 99, BYTE_END]
    assert part.starts.tolist() == [0, 3]


def test_no_row_holds_tokens_of_two_splits():
    given = {
        split: Part(np.full(100, number, np.uint16), np.array([0]))
        for number, split in enumerate(("train", "val", "test"))
    }
    splits = built(given)
    for number, split in enumerate((splits.train, splits.val, splits.test)):
        for epoch in range(5):
            batch = whole(split, epoch=epoch, train=True)
            assert set(batch["ids"].unique().tolist()) == {number}
            assert set(batch["target"].unique().tolist()) <= {number, IGNORE}


def test_only_training_is_shifted():
    splits = built(parts(train=100, val=100, test=100))
    assert (splits.train.shift, splits.val.shift, splits.test.shift) == (True, False, False)
    assert splits.info.sizes == {"train": 11, "val": 13, "test": 13}


def test_a_model_learns_what_the_ids_mean():
    extra = built(parts(train=100, val=100, test=100), documents="pad").info.extra
    assert (extra["vocab_size"], extra["length"], extra["end"]) == (257, 8, 256)
    assert extra["documents"] == "pad"
    assert extra["decode"](extra["encode"]("Wért")) == "Wért"
    assert extra["token_bytes"].sum() == 256


def test_a_split_of_fewer_tokens_than_a_row_is_refused():
    with pytest.raises(ConfigError, match=r"val has 8 tokens, and a row of data.length=8 needs 9"):
        built(parts(train=100, val=8, test=100))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 1}, "length must be at least 2, got 1"),
        ({"documents": "mix"}, "documents must be one of join, mask, pad, got 'mix'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LanguageDataOptions(**changes)
