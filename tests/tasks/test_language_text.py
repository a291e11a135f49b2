"""The user's own texts: which documents go where, and what is refused."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from suite.errors import ConfigError
from tasks.language.encoding import CharEncoding
from tasks.language.shakespeare import load_plays
from tasks.language.text import Document, TextOptions, build_text, by_documents, cut
from tasks.language.tokens import BYTE_END

PLAY = load_plays()[5].text


def build(root, **changes):
    given = {"root": None if root is None else str(root), "length": 16} | changes
    return build_text(TextOptions(**given), seed=0)


def all_of(parts: dict) -> list:
    """The documents of every split."""
    return [each for part in parts.values() for each in part]


def texts(splits) -> dict[str, list[str]]:
    """The documents of each split, as text."""
    found = {}
    for name in ("train", "val", "test"):
        split = getattr(splits, name)
        ends = [*split.starts[1:].tolist(), len(split.tokens)]
        decode = splits.info.extra["decode"]
        found[name] = [
            decode(split.tokens[start:end])
            for start, end in zip(split.starts.tolist(), ends, strict=True)
        ]
    return found


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twenty documents of a play, some in folders."""
    root = tmp_path / "texts"
    for i in range(20):
        file = root / ("" if i % 2 else f"part{i % 4}") / f"{i:02d}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(PLAY[i * 1000 : i * 1000 + 700 + 20 * i])
    return root


# --- one file -------------------------------------------------------------------------------------


def test_one_file_is_cut_at_lines_ends_in_its_order(tmp_path):
    (tmp_path / "play.txt").write_text(PLAY)
    splits = build(tmp_path / "play.txt", val_share=0.1, test_share=0.2)
    found = texts(splits)
    assert "".join(all_of(found)) == PLAY
    assert all(part[0].endswith("\n") for part in found.values())
    assert [round(len(part[0]) / len(PLAY), 2) for part in found.values()] == [0.7, 0.1, 0.2]
    assert texts(build(tmp_path, val_share=0.1, test_share=0.2)) == found


@given(
    text=st.text(alphabet="aé你😀\n", min_size=30, max_size=400),
    val=st.floats(0.05, 0.45),
    test=st.floats(0.05, 0.45),
)
@settings(max_examples=150, deadline=None)
def test_a_cut_is_never_inside_a_character_and_nothing_is_lost(text, val, test):
    document = Document("a.txt", text.encode())
    parts = cut(document, TextOptions(root="a.txt", val_share=val, test_share=test))
    joined = [each.content.decode() for split in ("train", "val", "test") for each in parts[split]]
    assert "".join(joined) == text


def test_a_text_without_lines_is_cut_all_the_same(tmp_path):
    (tmp_path / "a.txt").write_text("é" * 5000)
    found = texts(build(tmp_path / "a.txt"))
    assert [len(part[0]) for part in found.values()] == [4500, 250, 250]


def test_without_a_share_for_it_the_test_is_the_validation(tmp_path):
    (tmp_path / "play.txt").write_text(PLAY)
    splits = build(tmp_path / "play.txt", test_share=0)
    assert texts(splits)["val"] == texts(splits)["test"]
    assert "".join(texts(splits)["train"] + texts(splits)["val"]) == PLAY
    assert any("the validation is the test too" in note for note in splits.info.extra["notes"])


# --- many files -----------------------------------------------------------------------------------


def test_documents_are_found_in_all_folders_and_go_to_one_split_whole(folder):
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / ".hidden.txt").write_text("not looked at")
    (folder / "empty.txt").write_text("")
    splits = build(folder, val_share=0.1, test_share=0.2)
    found = texts(splits)
    wanted = [file.read_text() for file in folder.rglob("[0-9]*.txt")]
    assert sorted(all_of(found)) == sorted(wanted)
    total = sum(map(len, wanted))
    shares = [sum(map(len, part)) / total for part in found.values()]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.03)
    assert "1 empty files are left out" in splits.info.extra["notes"]


def test_a_split_depends_on_its_seed_and_the_paths_and_not_on_the_runs_seed(folder, tmp_path):
    first = texts(build(folder))
    moved = folder.rename(tmp_path / "elsewhere")
    assert texts(build(moved)) == first
    options = TextOptions(root=str(moved), length=16)
    assert texts(build_text(options, seed=9)) == first
    seeds = {str(texts(build(moved, split_seed=seed))["val"]) for seed in range(8)}
    assert len(seeds) > 3


@given(
    sizes=st.lists(st.integers(1, 3000), min_size=3, max_size=30),
    val=st.floats(0.01, 0.45),
    test=st.floats(0.01, 0.45),
)
@settings(max_examples=150, deadline=None)
def test_every_split_has_a_document_and_every_document_a_split(sizes, val, test):
    documents = [Document(f"{i}", f"{i} ".encode() + b"x" * size) for i, size in enumerate(sizes)]
    options = TextOptions(val_share=val, test_share=test)
    parts, _ = by_documents(documents, options, where=Path("here"))
    assert all(parts.values())
    assert sorted(all_of(parts)) == sorted(documents)


def test_copies_of_a_document_stay_together(folder):
    for i in range(20):
        for file in list(folder.rglob(f"{i:02d}.txt")):
            (folder / f"copy{i}.txt").write_bytes(file.read_bytes())
    for seed in range(5):
        splits = build(folder, split_seed=seed)
        found = {name: set(part) for name, part in texts(splits).items()}
        assert not found["train"] & found["val"]
        assert not found["train"] & found["test"]
        assert not found["val"] & found["test"]
    assert any("20 documents are copies of others" in n for n in splits.info.extra["notes"])


def test_an_added_byte_or_another_name_changes_the_digest(folder):
    first = build(folder).info
    assert (first.name, first.license, first.source) == ("text", "of the user's files", str(folder))
    assert build(folder, length=8).info.sha256 == first.sha256
    (folder / "01.txt").rename(folder / "1.txt")
    second = build(folder).info.sha256
    (folder / "1.txt").write_text((folder / "1.txt").read_text() + ".")
    assert len({first.sha256, second, build(folder).info.sha256}) == 3


def test_other_suffixes_can_be_asked_for(folder):
    for i in range(3):
        (folder / f"{i}.PY").write_text(f"print({i})\n" * 40)
    assert sum(map(len, texts(build(folder, suffixes="py")).values())) == 3
    assert sum(map(len, texts(build(folder, suffixes=".txt, .py")).values())) == 23


def test_a_name_that_is_no_unicode_is_read(tmp_path):
    for i in range(3):
        (tmp_path / f"x\udce9{i}.txt").write_text(PLAY[i * 500 : i * 500 + 500])
    assert sum(map(len, texts(build(tmp_path)).values())) == 3


# --- folders that say the split -------------------------------------------------------------------


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_folders_with_names_of_splits_are_the_splits(tmp_path, val):
    for i, name in enumerate(("train/a", val, "test")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.txt").write_text(PLAY[i * 500 : i * 500 + 400])
    (tmp_path / "README.md").write_text("what this is")
    splits = build(tmp_path)
    assert [part[0] for part in texts(splits).values()] == [
        PLAY[i : i + 400] for i in (0, 500, 1000)
    ]
    assert any("1 documents in none of" in note for note in splits.info.extra["notes"])


def test_without_a_folder_val_it_is_taken_out_of_train(tmp_path):
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "play.txt").write_text(PLAY if name == "train" else PLAY[:500])
    splits = build(tmp_path)
    found = texts(splits)
    assert "".join(found["train"] + found["val"]) == PLAY
    assert found["test"] == [PLAY[:500]]
    assert any("0.05 of train is the validation" in note for note in splits.info.extra["notes"])


def test_a_document_on_both_sides_is_reported(tmp_path):
    for name in ("train", "val", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(PLAY[:400])
    notes = build(tmp_path).info.extra["notes"]
    for name in ("val", "test"):
        assert (
            f"1 documents of {name} are in train too, the first {name}/a.txt: {name} is not unseen"
        ) in notes


# --- encodings ------------------------------------------------------------------------------------


def test_characters_are_those_of_training(tmp_path):
    (tmp_path / "play.txt").write_text(PLAY)
    splits = build(tmp_path / "play.txt", encoding="characters")
    assert "".join(all_of(texts(splits))) == PLAY
    alphabet = CharEncoding("".join(texts(splits)["train"]))
    assert splits.info.extra["vocab_size"] == alphabet.vocab_size


def test_a_tokenizer_splits_the_same_texts(folder, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([PLAY[:20_000]], vocab_size=400, show_progress=False)
    made.save(str(tmp_path / "tokenizer.json"))
    splits = build(folder, encoding="tokenizer", tokenizer=str(tmp_path / "tokenizer.json"))
    assert splits.info.extra["vocab_size"] == 400
    found = {name: "".join(part) for name, part in texts(splits).items()}
    assert found == {name: "".join(part) for name, part in texts(build(folder)).items()}


def test_a_tokenizer_that_hides_its_bytes_is_noted(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 0, "<unk>": 1}, "<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    (tmp_path / "words.json").write_text(made.to_str())
    (tmp_path / "a.txt").write_text(PLAY)
    splits = build(tmp_path / "a.txt", encoding="tokenizer", tokenizer=str(tmp_path / "words.json"))
    assert splits.info.extra["token_bytes"] is None
    assert any("bits per byte is not reported" in note for note in splits.info.extra["notes"])


def test_bytes_need_no_utf8_and_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"caf\xe9\n" * 200)
    splits = build(tmp_path / "a.txt")
    tokens = splits.train.tokens.tolist()
    assert tokens[:5] == list(b"caf\xe9\n")
    assert tokens[-1] == BYTE_END


# --- what is refused ------------------------------------------------------------------------------


def make(content: bytes, name: str = "a.txt"):
    return lambda root: (root / name).write_bytes(content)


def folders(*names: str):
    def fill(root: Path) -> None:
        for name in names:
            (root / name).mkdir()
            (root / name / "a.txt").write_text(PLAY[:400])

    return fill


def two_files(root: Path) -> None:
    for i in range(2):
        (root / f"{i}.txt").write_text(PLAY[i * 500 : i * 500 + 500])


def empty_train(root: Path) -> None:
    folders("train", "val")(root)
    (root / "val" / "a.txt").unlink()


GREEK = (PLAY[:2000] + "\n" + "αβγ\n" * 30).encode()
WRONG = {
    "nothing there": (lambda root: root.rmdir(), {}, r"data.root=.* is not there"),
    "an empty folder": (lambda root: None, {}, r"no files that end in .txt,.md,.text \(no files"),
    "no such suffix": (make(b"x", "a.csv"), {}, r"\(1 other files\); set data.root, or data.suff"),
    "only empty files": (make(b""), {}, "has no text: 1 files, all empty"),
    "a PNG": (make(b"\x89PNG\r\n\x1a\n1234"), {}, "is no text but a PNG image; take it out"),
    "a GIF": (make(b"GIF89a\x00\x01"), {}, "is no text but a GIF image"),
    "a zip": (make(b"PK\x03\x04abc"), {}, "is no text but a zip archive"),
    "UTF-16": (make("text".encode("utf-16")), {}, "iconv -f UTF-16 -t UTF-8"),
    "NUL": (make(b"abc\x00def"), {}, "is no text: byte 3 is NUL"),
    "Latin-1": (
        make(b"caf\xe9 " * 90),
        {"encoding": "characters"},
        r"is not UTF-8: byte 3 is 0xe9; convert it .* or use data.encoding=bytes",
    ),
    "too short": (make(b"To be\n"), {}, r"tokens, and a row of data.length=16 needs 17"),
    "strange letters": (
        make(GREEK),
        {"encoding": "characters"},
        r"val has 3 characters that training does not have, the first 'α' \(U\+03B1\) in a.txt",
    ),
    "two documents": (two_files, {}, "has 2 different documents, and a split by documents needs 3"),
    "val alone": (folders("val"), {}, "has a folder val and none that is called train"),
    "val twice": (folders("train", "val", "valid"), {}, "has val and valid; keep one of them"),
    "val is empty": (empty_train, {}, "val has no text in files of .txt,.md,.text"),
    "no tokenizer": (
        make(PLAY.encode()),
        {"encoding": "tokenizer", "tokenizer": "/nowhere/tokenizer.json"},
        "data.tokenizer=/nowhere/tokenizer.json cannot be read",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_used_is_one_clear_line(case, tmp_path):
    fill, changes, message = WRONG[case]
    if "tokenizer" in changes:
        pytest.importorskip("tokenizers")
    root = tmp_path / "texts"
    root.mkdir()
    fill(root)
    with pytest.raises(ConfigError, match=message) as error:
        build(root, **changes)
    assert str(error.value).startswith("data")
    assert "\n" not in str(error.value)


def test_without_a_root_the_error_says_what_it_is():
    with pytest.raises(
        ConfigError, match=r"needs data\.root=PATH, a text file or a folder of them"
    ):
        build(None)


def test_a_text_that_begins_as_some_pictures_do_is_a_text(tmp_path):
    (tmp_path / "a.txt").write_text("RIFFRAFF. " * 100)
    assert texts(build(tmp_path / "a.txt"))["train"][0].startswith("RIFFRAFF. ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoding": "words"}, "encoding must be one of bytes, characters, tokenizer"),
        ({"encoding": "tokenizer"}, "tokenizer must name a tokenizer.json"),
        ({"tokenizer": "t.json"}, "tokenizer is for data.encoding=tokenizer, got encoding='bytes'"),
        ({"val_share": 0}, "val_share must be above 0 and below 1, got 0"),
        ({"val_share": 0.5, "test_share": 0.5}, "test_share must be at least 0 and with val_share"),
        ({"suffixes": ","}, r"suffixes must be like '.txt,.md', got ','"),
        ({"suffixes": ".txt,."}, r"suffixes must be like '.txt,.md', got"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        TextOptions(**changes)


def test_what_a_task_reports_of_the_data_is_plain_but_for_what_a_model_needs(folder):
    extra = dict(build(folder).info.extra)
    for name in ("token_bytes", "encode", "decode"):
        extra.pop(name)
    assert json.loads(json.dumps(extra)) == extra
