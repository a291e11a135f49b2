"""Token files as data: nanoGPT's folders and ours, where documents begin, and what is refused."""

from __future__ import annotations

import json
import pickle
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from suite.errors import ConfigError, DataError
from tasks.language import bin_folder
from tasks.language.encoding import ByteEncoding, CharEncoding
from tasks.language.shakespeare import load_plays
from tasks.language.token_bin import TokenBinOptions, build_token_bin, outline
from tasks.language.tokenize import main
from tasks.language.tokens import BYTE_END, IGNORE

LENGTH = 32


@pytest.fixture(scope="module")
def text() -> str:
    return load_plays()[0].text[:8000]


@pytest.fixture
def nano(tmp_path, text) -> Path:
    """nanoGPT's shakespeare_char: characters as uint16, the last tenth is the validation."""
    characters = sorted(set(text))
    ids = np.array([characters.index(c) for c in text], np.uint16)
    folder = tmp_path / "nano"
    folder.mkdir()
    ids[:7200].tofile(folder / "train.bin")
    ids[7200:].tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(characters)}))
    return folder


@pytest.fixture
def ours(tmp_path, text) -> Path:
    """What tasks.language.tokenize writes, of speeches."""
    (tmp_path / "play.txt").write_text(text)
    words = ["--out", str(tmp_path / "ours"), "--document", "paragraph", "--workers", "1"]
    assert main([str(tmp_path / "play.txt"), *words, "--val-share", "0.3"]) == 0
    return tmp_path / "ours"


def build(folder: Path, *, seed: int = 0, **changes: Any):
    given = {"length": LENGTH, "cache": "none"} | changes
    return build_token_bin(TokenBinOptions(root=str(folder), **given), seed=seed)


def asked(split, **where: Any) -> tuple[np.ndarray, np.ndarray]:
    """All inputs and targets of a split, in the order of its rows."""
    batch = split.fetch(list(range(len(split))), **({"epoch": 0, "train": False} | where))
    told = batch["target"] != IGNORE
    return batch["ids"][told].numpy(), batch["target"][told].numpy()


def test_a_folder_of_nanogpts_loads_and_asks_for_every_token_but_the_first(nano, text):
    splits = build(nano, vocab_size=100)
    ids = np.fromfile(nano / "val.bin", np.uint16)
    got, target = asked(splits.val)
    assert np.array_equal(got, ids[:-1])
    assert np.array_equal(target, ids[1:])
    assert splits.info.sizes["train"] == 7199 // LENGTH
    extra = splits.info.extra
    assert (extra["vocab_size"], extra["length"], extra["documents"]) == (100, LENGTH, "join")
    assert extra["decode"] is None
    assert extra["encode"] is None
    assert extra["token_bytes"] is None


def test_without_test_bin_the_validation_is_the_test_and_a_note_says_so(nano):
    splits = build(nano, vocab_size=100)
    assert splits.test is splits.val
    notes = splits.info.extra["notes"]
    assert "the validation is the test too: there is no test.bin" in notes
    (nano / "val.bin").rename(nano / "test.bin")
    (nano / "val.bin").write_bytes((nano / "train.bin").read_bytes())
    splits = build(nano, vocab_size=100)
    assert len(splits.test) < len(splits.val)
    assert not any("test.bin" in note for note in splits.info.extra["notes"])


def test_text_comes_back_from_our_folder(ours, text):
    splits = build(ours)
    extra = splits.info.extra
    ids = np.fromfile(ours / "val.bin", np.uint16)
    speeches = extra["decode"](ids.tolist())
    assert len(speeches) > 500
    ends = np.flatnonzero(ids == BYTE_END)
    for part in np.split(ids, ends + 1)[:-1]:
        assert extra["decode"](part.tolist()) in text
    assert extra["encode"]("To be") == list(b"To be")
    assert extra["end"] == BYTE_END
    assert extra["vocab_size"] == 257
    assert np.array_equal(extra["token_bytes"], ByteEncoding().token_bytes())


def test_nothing_is_read_into_memory(nano):
    splits = build(nano, vocab_size=100)
    assert isinstance(splits.train.tokens, np.memmap)


def test_a_split_goes_to_another_process_as_its_path(nano):
    split = build(nano, vocab_size=100).train
    sent = pickle.dumps(split)
    assert len(sent) < 2000
    there = pickle.loads(sent)
    assert isinstance(there.tokens, np.memmap)
    for key, value in split.fetch([3, 1], epoch=2, train=True).items():
        assert torch.equal(there.fetch([3, 1], epoch=2, train=True)[key], value)


def test_training_rows_move_from_epoch_to_epoch_and_not_with_another_start(ours):
    splits, again = build(ours, seed=3), build(ours, seed=3)
    first = splits.train.fetch([0, 1], epoch=1, train=True)["ids"]
    assert torch.equal(again.train.fetch([0, 1], epoch=1, train=True)["ids"], first)
    assert not torch.equal(splits.train.fetch([0, 1], epoch=2, train=True)["ids"], first)
    assert torch.equal(
        splits.val.fetch([0], epoch=1, train=True)["ids"],
        splits.val.fetch([0], epoch=2, train=True)["ids"],
    )


def test_documents_begin_after_each_end(ours, tmp_path):
    splits = build(ours, documents="mask", cache=str(tmp_path / "cache"))
    ids = np.fromfile(ours / "train.bin", np.uint16)
    wanted = [0, *(np.flatnonzero(ids[:-1] == BYTE_END) + 1)]
    assert splits.train.starts.tolist() == wanted
    batch = splits.train.fetch([1], epoch=0, train=False)
    number = torch.cumsum(batch["ids"] == BYTE_END, 1)
    assert torch.equal(batch["document"][:, 1:], number[:, :-1])


def test_places_of_documents_are_kept_until_the_file_changes(ours, tmp_path, monkeypatch):
    scans = []
    scan = bin_folder.document_starts
    monkeypatch.setattr(
        "tasks.language.token_bin.document_starts", lambda *a: scans.append(1) or scan(*a)
    )
    cache = str(tmp_path / "cache")
    first = build(ours, documents="pad", cache=cache)
    assert len(scans) == 2
    again = build(ours, documents="pad", cache=cache)
    assert len(scans) == 2
    assert np.array_equal(first.train.starts, again.train.starts)
    for kept in (tmp_path / "cache").rglob("*.npz"):
        kept.write_bytes(kept.read_bytes()[:-30])
    assert np.array_equal(
        build(ours, documents="pad", cache=cache).train.starts, first.train.starts
    )
    assert len(scans) == 4
    build(ours, documents="pad", cache=cache, end=ord(" "))
    assert len(scans) == 6


def test_starts_found_in_blocks_are_those_of_the_whole():
    ids = np.random.default_rng(0).integers(0, 4, 1000).astype(np.uint16)
    wanted = [0, *(np.flatnonzero(ids[:-1] == 3) + 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bin_folder.blocks, "__kwdefaults__", {"size": 7})
        assert bin_folder.document_starts(ids, 3).tolist() == wanted


def test_uint32_files_load_where_it_is_said(nano):
    for file in nano.glob("*.bin"):
        (np.fromfile(file, np.uint16).astype(np.uint32)).tofile(file)
    splits = build(nano, vocab_size=100, dtype="uint32")
    assert splits.train.tokens.dtype == np.uint32
    (nano / "meta.json").write_text('{"dtype": "uint32", "vocab_size": 90}')
    assert build(nano).info.extra["vocab_size"] == 90


def test_the_digest_sees_sizes_ends_and_meta_json(nano):
    first = build(nano, vocab_size=100).info.sha256
    assert build(nano, vocab_size=100).info.sha256 == first
    ids = np.fromfile(nano / "train.bin", np.uint16)
    ids[-1] += 1
    ids.tofile(nano / "train.bin")
    changed = build(nano, vocab_size=100).info.sha256
    (nano / "meta.json").write_text('{"vocab_size": 100}')
    assert len({first, changed, build(nano).info.sha256}) == 3


def test_a_model_can_be_built_without_files():
    info = outline(TokenBinOptions(vocab_size=32_000, length=4096, documents="mask"))
    assert info.extra["vocab_size"] == 32_000
    assert info.extra["length"] == 4096
    assert set(info.sizes.values()) == {0}
    with pytest.raises(ConfigError, match="vocab_size must be given"):
        outline(TokenBinOptions(root="anywhere"))


def test_the_outline_says_what_the_built_data_says(nano):
    splits = build(nano, vocab_size=100, end=3)
    said = outline(TokenBinOptions(vocab_size=100, end=3, length=LENGTH)).extra
    built = splits.info.extra
    assert {k: v for k, v in said.items() if k != "notes"} == {
        k: v for k, v in built.items() if k != "notes"
    }


# --- ids beyond the vocabulary --------------------------------------------------------------------


def test_an_id_that_the_samples_missed_is_found_in_training(nano, monkeypatch):
    for size, name in (("MB", 256), ("BLOCK", 8), ("BLOCKS", 4)):
        monkeypatch.setattr(bin_folder, size, name)
    ids = np.fromfile(nano / "train.bin", np.uint16)
    tokens = bin_folder.open_tokens(nano / "train.bin", bin_folder.DTYPES["uint16"])
    seen = np.concatenate([np.arange(s, s + len(i)) for s, i in bin_folder.samples(tokens)])
    bad = int(np.setdiff1d(np.arange(len(ids)), seen)[100])
    ids[bad] = 60_000
    ids.tofile(nano / "train.bin")
    splits = build(nano, vocab_size=100)
    (note,) = [note for note in splits.info.extra["notes"] if "checked in every batch" in note]
    assert "are below 100" in note
    splits.train.fetch([bad // LENGTH + 2], epoch=0, train=False)
    with pytest.raises(DataError, match=rf"train.bin has the id 60,000.*at position {bad:,};"):
        splits.train.fetch([bad // LENGTH], epoch=0, train=False)


def test_the_samples_of_a_large_file_are_its_ends_and_places_between(tmp_path):
    file = tmp_path / "train.bin"
    with file.open("wb") as opened:
        opened.truncate(40 << 20)
    tokens = bin_folder.open_tokens(file, bin_folder.DTYPES["uint16"])
    places = [(start, start + len(ids)) for start, ids in bin_folder.samples(tokens)]
    assert places[0] == (0, 1 << 19)
    assert places[-1] == (len(tokens) - (1 << 19), len(tokens))
    assert len(places) == 66
    assert all(before[1] <= after[0] for before, after in pairwise(places))


# --- what is refused ------------------------------------------------------------------------------


def as_(kind: str):
    """train.bin, written as another type of integers."""

    def write(folder: Path) -> None:
        ids = np.fromfile(folder / "train.bin", np.uint16)
        ids.astype(kind).tofile(folder / "train.bin")

    return write


def large_ids(folder: Path) -> None:
    """Ids of a vocabulary of 128,000, as LLaMA 3 has, in 32 bits."""
    ids = np.random.default_rng(0).integers(0, 128_000, 4000)
    ids.astype(np.uint32).tofile(folder / "train.bin")


def png(folder: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64)).save(folder / "train.bin", format="PNG")


def npy(folder: Path) -> None:
    with (folder / "train.bin").open("wb") as opened:
        np.save(opened, np.arange(1000, dtype=np.uint16))


def zipped(folder: Path) -> None:
    with zipfile.ZipFile(folder / "train.bin", "w") as opened:
        opened.writestr("a", b"b" * 500)


def pickled(protocol: int):
    def write(folder: Path) -> None:
        content = pickle.dumps({"ids": list(range(500)), "name": "a"}, protocol=protocol)
        (folder / "train.bin").write_bytes(content)

    return write


def llm_c(folder: Path) -> None:
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, 7200
    body = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(header.tobytes() + body)


def cut(folder: Path) -> None:
    file = folder / "train.bin"
    file.write_bytes(file.read_bytes()[:-1])


def put(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def say(**meta: Any):
    return put("meta.json", json.dumps(meta).encode())


WRONG = {
    "no train.bin": (lambda f: (f / "train.bin").unlink(), {}, "train.bin is missing"),
    "no val.bin": (lambda f: (f / "val.bin").unlink(), {}, "val.bin is missing"),
    "not finished": (
        lambda f: ((f / "val.bin").unlink(), (f / "parts").mkdir()),
        {},
        "a tokenization that has not ended",
    ),
    "an empty file": (put("train.bin", b""), {}, "train.bin is empty"),
    "an odd number of bytes": (cut, {}, "has 14,399 bytes, which is no whole number of uint16"),
    "too short": (
        put("val.bin", bytes(64)),
        {},
        "has 32 ids, and a row of data.length=32 needs 33",
    ),
    "uint32 as uint16": (as_("<u4"), {}, "reads as uint32"),
    "large uint32 as uint16": (large_ids, {"vocab_size": 128_000}, "set data.dtype=uint32"),
    "int64 as uint16": (as_("<i8"), {}, "holds integers of 64 bits"),
    "int64 as uint32": (as_("<i8"), {"dtype": "uint32"}, "holds integers of 64 bits"),
    "uint16 as uint32": (lambda f: None, {"dtype": "uint32"}, "set data.dtype=uint16"),
    "a PNG": (png, {}, "train.bin is a PNG picture"),
    "an .npy": (npy, {}, "is NumPy's .npy"),
    "a zip": (zipped, {}, "is a zip archive"),
    "a pickle": (pickled(4), {}, "is a pickle, which is never opened"),
    "an old pickle": (pickled(2), {}, "is a pickle, which is never opened"),
    "llm.c's": (llm_c, {}, "has the header of llm.c's files"),
    "text": (put("train.bin", b"To be, or not to be: " * 50), {}, "is text;"),
    "no vocabulary": (lambda f: None, {"vocab_size": None}, "set data.vocab_size: GPT-2 has 50257"),
    "too small a vocabulary": (lambda f: None, {"vocab_size": 20}, "the vocabulary has 20"),
    "damaged meta.json": (put("meta.json", b'{"dtype": "uint'), {}, "meta.json is not JSON"),
    "a list": (put("meta.json", b"[1]"), {}, "must hold an object"),
    "a strange dtype": (say(dtype="int8"), {}, 'meta.json has dtype: "int8"'),
    "a strange number": (say(vocab_size=-3), {}, "meta.json has vocab_size: -3"),
    "an end beyond": (say(vocab_size=100, end=100), {}, "not below its vocab_size"),
    "another size": (say(tokens={"train": 9000}), {}, "has 7,200 ids and meta.json beside it says"),
    "another dtype": (say(dtype="uint32"), {"dtype": "uint16"}, "leave data.dtype out"),
    "another vocabulary": (say(vocab_size=99), {}, "says vocab_size 99, and data.vocab_size=100"),
    "no end": (lambda f: None, {"documents": "mask"}, "which id closes a document"),
    "the wrong end": (lambda f: None, {"documents": "pad", "end": 99}, "the id 99 closes none"),
    "no folder": (lambda f: None, {"root": "nowhere"}, "nowhere does not exist"),
    "no root": (lambda f: None, {"root": None}, "needs data.root=FOLDER"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_folder_that_cannot_be_used_is_one_line(nano, kind):
    spoil, changes, said = WRONG[kind]
    spoil(nano)
    given = {"root": str(nano), "vocab_size": 100, "length": LENGTH, "cache": "none"} | changes
    with pytest.raises(ConfigError) as error:
        build_token_bin(TokenBinOptions(**given), seed=0)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "int64"}, "dtype must be one of auto, uint16, uint32, got 'int64'"),
        ({"vocab_size": 1}, "vocab_size must be at least 2, got 1"),
        ({"end": -1}, "end must not be negative, got -1"),
        ({"end": 256, "vocab_size": 256}, "end must be below vocab_size=256, got 256"),
        ({"documents": "cut"}, "documents must be one of"),
    ],
)
def test_options_out_of_range_are_named(options, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        TokenBinOptions(**options)


@pytest.mark.parametrize("first", [(1152, 5), (640, 3), (20_048, 1), (35_615, 2)])
def test_ids_whose_bytes_begin_as_other_files_do_are_ids(nano, first):
    ids = np.fromfile(nano / "train.bin", np.uint16)
    ids[:2] = first
    ids[-1] = 0x2E2E
    ids.tofile(nano / "train.bin")
    assert len(build(nano, vocab_size=50_257).train) == 7199 // LENGTH


def test_a_tokenizer_that_is_gone_leaves_training_and_is_said(ours):
    meta = json.loads((ours / "meta.json").read_text())
    meta["encoding"] = {"name": "tokenizer", "file": "tokenizer.json", "sha256": "0" * 64}
    (ours / "meta.json").write_text(json.dumps(meta))
    splits = build(ours)
    assert splits.info.extra["decode"] is None
    assert any("no bits per byte" in note for note in splits.info.extra["notes"])
    assert splits.info.extra["end"] == BYTE_END


def test_an_encoding_of_another_size_is_not_used(ours):
    meta = json.loads((ours / "meta.json").read_text())
    meta["encoding"] = CharEncoding("abc").describe()
    (ours / "meta.json").write_text(json.dumps(meta))
    splits = build(ours)
    assert splits.info.extra["decode"] is None
    assert any("has 4 ids" in note for note in splits.info.extra["notes"])
