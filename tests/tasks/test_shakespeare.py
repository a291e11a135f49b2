"""The plays inside the package: whole, of one author alone, and split by play."""

import hashlib
import importlib.util
import lzma
from pathlib import Path

import numpy as np
import pytest

from suite.errors import ConfigError
from tasks.language import shakespeare
from tasks.language.shakespeare import (
    ASSET,
    ASSET_SHA256,
    HELD_OUT,
    ShakespeareOptions,
    build_shakespeare,
    load_plays,
)
from tasks.language.tokens import BYTE_END, IGNORE

DATA_MD = (ASSET.parent / "DATA.md").read_text()


@pytest.fixture(scope="module")
def splits():
    return build_shakespeare(ShakespeareOptions(), seed=0)


@pytest.fixture(scope="module")
def builder():
    """scripts/build_shakespeare.py."""
    file = Path(__file__).parents[2] / "scripts" / "build_shakespeare.py"
    spec = importlib.util.spec_from_file_location("build_shakespeare", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_37_plays_whole_and_without_boilerplate(builder):
    plays = load_plays()
    assert len(plays) == len({play.title for play in plays}) == 37
    assert [play.title for play in plays] == sorted(play.title for play in plays)
    for play in plays[::6]:  # searching all of them takes seconds
        assert builder.clean(play.title, play.text) == play.text
    for play in plays:
        assert 88_000 < len(play.text) < 176_000
        assert "\r" not in play.text
    hamlet = next(play for play in plays if play.title == "Hamlet")
    assert "To be, or not to be,--that is the question:--" in hamlet.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("HAMLET\n\nby William Shakespeare\n\n\nThis Etext is\n\n[Exeunt.]\n", "has 'Etext' at"),
        ("HAMLET\n\nby William Shakespeare\n\n\nWho's there\n\nPage 3\n", "does not end as a play"),
        ("Who's there?\n\n[Exeunt.]\n", "does not begin with a title"),
    ],
)
def test_the_builder_refuses_a_text_that_is_no_play_alone(builder, text, message):
    with pytest.raises(ValueError, match=message):
        builder.clean("hamlet", text)


def test_the_builder_refuses_another_archive(builder, tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"another")
    with pytest.raises(ValueError, match="expected f393d09d07"):
        builder.read_plays(tmp_path / "a.tar.gz")


def test_what_two_texts_share_is_found_whole(builder):
    one, two = load_plays()[0].text[:4000].encode(), load_plays()[1].text[:4000].encode()
    both = load_plays()[2].text[3000:3100].encode()
    found = builder.shared_runs(one[:900] + both + one[900:], two[:70] + both + two[70:])
    assert [both in run for run in found] == [True]
    assert len(found[0]) < len(both) + 10
    assert builder.shared_runs(one, two) == []


def test_the_file_is_the_one_that_data_md_describes():
    content = ASSET.read_bytes()
    assert hashlib.sha256(content).hexdigest() == ASSET_SHA256
    assert ASSET_SHA256 in DATA_MD
    assert f"Size: {len(content):,} bytes" in DATA_MD
    assert hashlib.sha256(lzma.decompress(content)).hexdigest() in DATA_MD
    for split in ("train", "val", "test"):
        total = sum(len(play.text) for play in load_plays() if play.split == split)
        assert f"{total:,} (" in DATA_MD
    for title in HELD_OUT:
        assert title in DATA_MD


def test_whole_plays_are_held_out(splits):
    texts = {
        name: split.tokens[split.tokens != BYTE_END].astype(np.uint8).tobytes().decode()
        for name, split in (("train", splits.train), ("val", splits.val), ("test", splits.test))
    }
    for play in load_plays():
        for name, text in texts.items():
            assert (play.text in text) == (name == play.split)
    for name, wanted in (("val", 3), ("test", 3), ("train", 31)):
        split = getattr(splits, name)
        assert len(split.starts) == (split.tokens == BYTE_END).sum() == wanted
        assert 0.06 < len(texts[name]) / 4_850_344 < 0.072 or name == "train"


def test_every_byte_of_the_held_out_plays_is_asked_once(splits):
    for name in ("val", "test"):
        split = getattr(splits, name)
        target = split.fetch(list(range(len(split))), epoch=0, train=False)["target"]
        asked = target[target != IGNORE].numpy()
        assert asked.tolist() == split.tokens[1:].tolist()


def test_a_model_learns_the_alphabet_and_where_the_plays_are_from(splits):
    info = splits.info
    assert (info.name, info.license, info.synthetic) == ("shakespeare", "public domain", False)
    assert info.sizes == {"train": 16_385, "val": 1222, "test": 1339}
    assert (info.extra["vocab_size"], info.extra["end"]) == (257, 256)
    assert info.sha256 == ASSET_SHA256


def test_characters_are_those_of_training_and_none_is_missing():
    splits = build_shakespeare(ShakespeareOptions(encoding="characters"), seed=0)
    assert splits.info.extra["vocab_size"] == 84
    assert splits.info.extra["decode"](splits.val.tokens[:18]) == "KING JOHN\n\nby Will"


def test_another_encoding_is_refused():
    with pytest.raises(ValueError, match="encoding must be bytes or characters, got 'words'"):
        ShakespeareOptions(encoding="words")


def test_a_damaged_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "shakespeare.xz").write_bytes(ASSET.read_bytes()[:-1])
    monkeypatch.setattr(shakespeare, "ASSET", tmp_path / "shakespeare.xz")
    load_plays.cache_clear()
    with pytest.raises(ConfigError, match=r"data=shakespeare: .* is not the file that"):
        build_shakespeare(ShakespeareOptions(), seed=0)
