"""The default labelled set: StatLog's splice junctions, as published."""

import numpy as np
import pytest

from suite.errors import ConfigError
from tasks.dna import splice
from tasks.dna.labelled import LABELLED_DATA, LabelledOptions
from tasks.dna.tokens import A, G, T


@pytest.fixture(scope="module")
def built():
    choice = LABELLED_DATA["splice"]
    return choice.build(choice.options, seed=0)


def all_rows(split) -> dict[str, np.ndarray]:
    batch = split.fetch(list(range(len(split))), epoch=0, train=False)
    return {name: value.numpy() for name, value in batch.items()}


def test_it_is_the_default_and_says_what_a_model_must_know(built):
    assert next(iter(LABELLED_DATA)) == "splice"
    info = built.info
    assert (info.name, info.classes, info.synthetic) == ("splice", 3, False)
    assert sum(info.sizes[part] for part in ("train", "val")) == 2000
    assert info.sizes["test"] == 1186
    assert info.extra["length"] == 60
    assert info.extra["strand_specific"] is True
    assert info.extra["class_names"] == ["ei", "ie", "n"]
    assert "82 of 1,186 test sequences are in the training set too" in info.extra["notes"]


def test_the_classes_have_the_published_sizes(built):
    test = all_rows(built.test)
    assert np.bincount(test["label"]).tolist() == [303, 280, 603]
    assert int(test["novel"].sum()) == 1104
    train = np.bincount(np.r_[all_rows(built.train)["label"], all_rows(built.val)["label"]])
    assert train.tolist() == [464, 485, 1051]


def test_introns_begin_with_gt_and_end_with_ag(built):
    rows = [all_rows(split) for split in (built.train, built.val, built.test)]
    ids, labels = (np.concatenate([row[key] for row in rows]) for key in ("ids", "label"))
    donor = (ids[:, 30] == G) & (ids[:, 31] == T)
    acceptor = (ids[:, 28] == A) & (ids[:, 29] == G)
    assert int(donor[labels == 0].sum()) == 759  # of 767
    assert int(acceptor[labels == 1].sum()) == 761  # of 765
    assert donor[labels == 2].mean() < 0.1


def test_no_example_is_turned_round_in_training(built):
    train = built.train
    indices = list(range(64))
    shown = train.fetch(indices, epoch=3, train=True)["ids"]
    assert (shown == train.fetch(indices, epoch=0, train=False)["ids"]).all()


def test_a_reverse_complement_is_refused():
    with pytest.raises(ConfigError, match=r"data\.rc_augment=true: .*data=splice"):
        splice.build_splice(LabelledOptions(rc_augment=True), seed=0)


@pytest.mark.parametrize("state", ["missing", "changed"])
def test_a_file_that_is_not_the_shipped_one_is_refused(tmp_path, monkeypatch, state):
    other = tmp_path / "splice.npz"
    if state == "changed":
        other.write_bytes(splice.FILE.read_bytes()[:-1] + b"!")
    monkeypatch.setattr(splice, "FILE", other)
    message = "cannot be read" if state == "missing" else "is not the file that was shipped"
    with pytest.raises(ConfigError, match=message):
        splice.build_splice(LabelledOptions(), seed=0)
