"""Text as ids and back, and the bytes that each id stands for."""

import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from suite.errors import ConfigError
from tasks.language.encoding import ByteEncoding, CharEncoding, encoding_of
from tasks.language.shakespeare import load_plays
from tasks.language.tokenizer_file import load_tokenizer

STRANGE = "  naïve café, ß 你好 😀\r\n\tžluť  [x] <y>\n\n\nend "


def bytes_in(encoding, text: str) -> int:
    """What the encoding says the text's bytes are."""
    return int(encoding.token_bytes()[encoding.encode(text).astype(np.int64)].sum())


# --- bytes and characters -------------------------------------------------------------------------


@given(st.text())
@settings(max_examples=50, deadline=None)
def test_bytes_are_the_text_in_utf8(text):
    encoding = ByteEncoding()
    ids = encoding.encode(text)
    assert ids.tolist() == list(text.encode())
    assert encoding.decode(ids) == text
    assert bytes_in(encoding, text) == len(text.encode())


def test_the_end_of_a_document_is_an_id_of_no_bytes():
    encoding = ByteEncoding()
    assert (encoding.vocab_size, encoding.end) == (257, 256)
    assert encoding.token_bytes()[256] == 0
    assert encoding.decode([72, 256, 105]) == "Hi"
    assert encoding.decode([0xC3, 72, 300]) == "\ufffdH"


@given(st.text(min_size=1))
@settings(max_examples=100, deadline=None)
def test_characters_are_counted_in_the_order_of_unicode(text):
    encoding = CharEncoding(text)
    ids = encoding.encode(text)
    assert encoding.characters == "".join(sorted(set(text)))
    assert [encoding.characters[i] for i in ids] == list(text)
    assert encoding.decode([*ids, encoding.end]) == text
    assert bytes_in(encoding, text) == len(text.encode())
    assert encoding.vocab_size == len(set(text)) + 1


@pytest.mark.parametrize("strange", ["€", "a", "\x00", "😀"])
def test_a_character_without_an_id_is_named(strange):
    encoding = CharEncoding("bcd\n")
    with pytest.raises(ValueError, match=rf"U\+{ord(strange):04X}, at 2.* data.encoding=bytes"):
        encoding.encode(f"bc{strange}")


def test_no_characters_are_no_encoding():
    with pytest.raises(ValueError, match="characters must not be empty"):
        CharEncoding("")


def test_ids_are_as_small_as_they_can_be():
    many = "".join(map(chr, range(0x10000, 0x10000 + 70_000)))
    assert ByteEncoding().encode("x").dtype == np.uint16
    assert CharEncoding(many[:65_535]).encode(many[:5]).dtype == np.uint16
    assert CharEncoding(many[:65_536]).encode(many[:5]).dtype == np.uint32


@pytest.mark.parametrize("encoding", [ByteEncoding(), CharEncoding("Hamlet \n'é")])
def test_a_description_as_json_makes_the_encoding_again(encoding, tmp_path):
    again = encoding_of(json.loads(json.dumps(encoding.describe())), folder=tmp_path)
    assert again.encode("Hamlet").tolist() == encoding.encode("Hamlet").tolist()
    assert again.vocab_size == encoding.vocab_size


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({}, "the encoding None is unknown"),
        ({"name": "words"}, "the encoding 'words' is unknown; choose bytes, characters or tok"),
        ({"name": "characters"}, "needs its characters"),
        ({"name": "tokenizer", "sha256": "0"}, "tokenizer.json cannot be read"),
    ],
)
def test_a_description_of_nothing_is_refused(description, message, tmp_path):
    pytest.importorskip("tokenizers")
    with pytest.raises(ConfigError, match=message):
        encoding_of(description, folder=tmp_path)


# --- tokenizer.json -------------------------------------------------------------------------------

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def text() -> str:
    return load_plays()[0].text[:12_000]


def save(path, text, *, model="BPE", pre=None, normalizer=None, decoder=None, fallback=False):
    """A tokenizer.json of 400 tokens that was trained on the text."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(getattr(tokenizers.models, model)())
    if pre is not None:
        made.pre_tokenizer = pre(tokenizers.pre_tokenizers)
    if normalizer is not None:
        made.normalizer = normalizer(tokenizers.normalizers)
    if decoder is not None:
        made.decoder = decoder(tokenizers.decoders)
    given = {"vocab_size": 400, "special_tokens": [END, "<unk>"], "show_progress": False}
    if model == "BPE" and not fallback:
        given["initial_alphabet"] = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = getattr(tokenizers.trainers, f"{model.replace('BPE', 'Bpe')}Trainer")
    made.train_from_iterator([text], trainer(**given))
    spec = json.loads(made.to_str())
    if fallback:
        spec["model"]["byte_fallback"] = True
        spec["model"]["unk_token"] = "<unk>"
        first = 1 + max(spec["model"]["vocab"].values())
        for byte in range(256):
            spec["model"]["vocab"][f"<0x{byte:02X}>"] = first + byte
    path.write_text(json.dumps(spec))
    return path


BYTE_LEVEL = {
    "pre": lambda p: p.ByteLevel(add_prefix_space=False),
    "decoder": lambda d: d.ByteLevel(),
}
LLAMA = {
    "normalizer": lambda n: n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")]),
    "decoder": lambda d: d.Sequence(
        [d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)]
    ),
    "fallback": True,
}


def words_and_digits(p):
    """As LLaMA 3 has it: a pattern, and then bytes."""
    import tokenizers

    words = p.Split(tokenizers.Regex(r"\s+|\S+"), "isolated")
    return p.Sequence([words, p.Digits(True), p.ByteLevel(add_prefix_space=False, use_regex=False)])


EXACT = {
    "GPT-2": BYTE_LEVEL,
    "a space in front": BYTE_LEVEL | {"pre": lambda p: p.ByteLevel(add_prefix_space=True)},
    "LLaMA 3": BYTE_LEVEL | {"pre": words_and_digits},
    "LLaMA 2": LLAMA,
    "Metaspace": {
        "pre": lambda p: p.Metaspace(prepend_scheme="first"),
        "decoder": lambda d: d.Sequence(
            [d.ByteFallback(), d.Metaspace(prepend_scheme="first"), d.Fuse()]
        ),
        "fallback": True,
    },
}


@pytest.mark.parametrize("kind", EXACT)
def test_bytes_of_tokens_add_up_to_the_bytes_of_the_text(kind, text, tmp_path):
    encoding = load_tokenizer(save(tmp_path / "t.json", text, **EXACT[kind]))
    play = load_plays()[20].text[:20_000]
    for each in (text, play, play[1:], STRANGE, " x", "x", ""):
        assert bytes_in(encoding, each) == len(each.encode())
    assert len(encoding.encode(text)) < 0.7 * len(text.encode())
    assert encoding.token_bytes()[encoding.end] == 0


@pytest.mark.parametrize("kind", EXACT)
def test_a_text_comes_back_from_its_tokens(kind, text, tmp_path):
    encoding = load_tokenizer(save(tmp_path / "t.json", text, **EXACT[kind]))
    for each in (text, STRANGE, "x", " x"):
        assert encoding.decode(encoding.encode(each)) == each
    assert encoding.decode([encoding.end, *encoding.encode("x"), 60_000]) == "x"


LOSSY = {
    "words": {"model": "WordLevel", "pre": lambda p: p.Whitespace()},
    "pieces of words": {"model": "WordPiece", "pre": lambda p: p.Whitespace()},
    "lower case": BYTE_LEVEL | {"normalizer": lambda n: n.Lowercase()},
    "other forms of letters": BYTE_LEVEL | {"normalizer": lambda n: n.NFKC()},
    "blanks are dropped": BYTE_LEVEL
    | {"pre": lambda p: p.Sequence([p.WhitespaceSplit(), p.ByteLevel(add_prefix_space=False)])},
    "no byte for what is in no token": LLAMA | {"fallback": False},
}


@pytest.mark.parametrize("kind", LOSSY)
def test_where_bytes_cannot_be_told_none_are(kind, text, tmp_path):
    assert load_tokenizer(save(tmp_path / "t.json", text, **LOSSY[kind])).token_bytes() is None


def test_a_byte_without_a_token_makes_the_count_unknown(text, tmp_path):
    file = save(tmp_path / "t.json", text, **BYTE_LEVEL)
    spec = json.loads(file.read_text())
    del spec["model"]["vocab"]["ÿ"]
    file.write_text(json.dumps(spec))
    assert load_tokenizer(file).token_bytes() is None


def test_a_special_token_that_a_text_spells_out_does_not_end_it(text, tmp_path):
    encoding = load_tokenizer(save(tmp_path / "t.json", text, **BYTE_LEVEL))
    page = f"It says {END} here."
    assert encoding.end == 0
    assert encoding.end not in encoding.encode(page)
    assert bytes_in(encoding, page) == len(page)
    assert encoding.decode(encoding.encode(page)) == page


def test_what_would_cut_or_fill_a_text_or_draw_at_random_is_undone(text, tmp_path):
    file = save(tmp_path / "t.json", text, **BYTE_LEVEL)
    wanted = load_tokenizer(file).encode(text)
    spec = json.loads(file.read_text())
    spec["model"]["dropout"] = 0.5
    spec["truncation"] = {
        "direction": "Right",
        "max_length": 8,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    spec["padding"] = {
        "strategy": {"Fixed": 90_000},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": END,
    }
    file.write_text(json.dumps(spec))
    for _ in range(2):
        assert load_tokenizer(file).encode(text).tolist() == wanted.tolist()


def test_added_tokens_that_are_text_count_their_bytes(text, tmp_path):
    file = save(tmp_path / "t.json", text, **BYTE_LEVEL)
    spec = json.loads(file.read_text())
    added = spec["added_tokens"][0] | {"id": 400, "content": "    ", "special": False}
    spec["added_tokens"].append(added)
    file.write_text(json.dumps(spec))
    encoding = load_tokenizer(file)
    assert 400 in encoding.encode("a    b")
    assert encoding.vocab_size == 401
    assert bytes_in(encoding, "a    b") == 6
    added["lstrip"] = True
    file.write_text(json.dumps(spec))
    assert load_tokenizer(file).token_bytes() is None


def test_a_tokenizer_is_known_by_its_bytes(text, tmp_path):
    file = save(tmp_path / "tokenizer.json", text, **BYTE_LEVEL)
    described = json.loads(json.dumps(load_tokenizer(file).describe()))
    again = encoding_of(described, folder=tmp_path)
    assert again.encode(STRANGE).tolist() == load_tokenizer(file).encode(STRANGE).tolist()
    file.write_text(file.read_text() + " ")
    with pytest.raises(ConfigError, match="is not the tokenizer that the ids were made with"):
        encoding_of(described, folder=tmp_path)


WRONG = {
    "missing": (None, "cannot be read"),
    "no JSON": (b"\x89PNG\r\n\x1a\n\x00", "is not JSON"),
    "a config.json": (b'{"model_type": "llama"}', "no tokenizer.json of Hugging Face"),
    "a list": (b"[1]", "no tokenizer.json of Hugging Face"),
    "another model": (b'{"model": {"type": "Tiktoken"}}', "this version of tokenizers reads"),
    "no tokens": (b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "tokens|reads"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_is_no_tokenizer_is_one_clear_line(case, tmp_path):
    pytest.importorskip("tokenizers")
    content, message = WRONG[case]
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_tokenizer(tmp_path / "tokenizer.json")
    assert "tokenizer.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_is_no_tokenizer(tmp_path):
    pytest.importorskip("tokenizers")
    with pytest.raises(ConfigError, match=r"is a folder; name the tokenizer\.json in it"):
        load_tokenizer(tmp_path)


def test_without_the_package_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r'pip install "dyt-suite\[tokenizers\]"'):
        load_tokenizer(tmp_path / "tokenizer.json")
