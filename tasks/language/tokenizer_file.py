"""Hugging Face's tokenizer.json as an encoding, and how many bytes each of its tokens stands for.

A file is read with three settings of its own undone, which would make ids depend on more than the
text: truncation and padding; BPE's dropout, which is random; and the space that many files put in
front of a text, which the text does not have. Special tokens that are spelt out in a text are read
as text: a page that says "<|endoftext|>" does not end a document.

Two families tell the bytes of a token. GPT-2's ByteLevel writes each byte as one character
(Radford et al., 2019); sentencepiece's writes a space as U+2581 and a byte that is in no token as
<0x0A> (Kudo & Richardson, arXiv 1808.06226; LLaMA). What a file says is not believed: a text with
every kind of trouble is encoded, and its bytes are counted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from suite.errors import ConfigError, shown
from suite.safety import parse_json
from tasks.language.encoding import id_dtype

TOKENIZER_JSON = "tokenizer.json"  # what it is called beside a token_bin
BLANK = "\u2581"
# of the specials that a file has the first of these ends a document
ENDS = (
    "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eos|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>", "[SEP]",
)  # fmt: skip
HEX = re.compile(r"<0x([0-9A-F]{2})>")
# a pre-tokenizer that is none of these may drop characters
KEEPS = {"ByteLevel", "Metaspace", "Digits", "Split", "Punctuation", "UnicodeScripts"}
PROBES = (
    "To be, or not to be:\n\n  that is\tthe question. 1603, 3.14\r\n",
    " caf\u00e9 na\u00efve \u00df \u0161 \u03b1\u03b2 \u0436 \u4f60\u597d",
    "\u0e01 \U0001f600 \u00a0 !?<>{}|~ \x01",
    "   three spaces, AND CAPITALS   ",
    "x",
)


class TokenizerEncoding:
    """The tokens of a tokenizer.json; made by `load_tokenizer`."""

    name = "tokenizer"

    def __init__(self, tokenizer: Any, *, spec: dict[str, Any], path: Path, sha256: str) -> None:
        self._tokenizer, self._spec, self.path, self.sha256 = tokenizer, spec, path, sha256
        ids = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1
        special = {each["content"] for each in spec.get("added_tokens") or [] if each["special"]}
        self.end: int | None = next((ids[name] for name in ENDS if name in special), None)
        self._bytes_V = self._counted()

    def encode(self, text: str | bytes) -> np.ndarray:
        given = text if isinstance(text, str) else text.decode()
        ids = self._tokenizer.encode(given, add_special_tokens=False).ids
        return np.array(ids, id_dtype(self.vocab_size))

    def decode(self, ids: Iterable[int]) -> str:
        known = [i for i in map(int, ids) if 0 <= i < self.vocab_size]
        return str(self._tokenizer.decode(known, skip_special_tokens=True))

    def token_bytes(self) -> np.ndarray | None:
        return None if self._bytes_V is None else self._bytes_V.copy()

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "file": TOKENIZER_JSON, "sha256": self.sha256}

    def _counted(self) -> np.ndarray | None:
        """The bytes of each id, or None if what they add up to is not what a text has."""
        bytes_V = bytes_by_id(self._spec, self._tokenizer, vocab_size=self.vocab_size)
        if bytes_V is None:
            return None
        for probe in PROBES:
            if bytes_V[self.encode(probe).astype(np.int64)].sum() != len(probe.encode()):
                return None
        return bytes_V


def load_tokenizer(path: str | Path) -> TokenizerEncoding:
    """The encoding of a tokenizer.json. Raises ConfigError for a file that is none."""
    file = Path(path).expanduser()
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ConfigError(
            f"{shown(file)}: a tokenizer.json is read by the package tokenizers, which is not "
            'installed; pip install "dyt-suite[tokenizers]", or use data.encoding=bytes'
        ) from None
    try:
        content = file.read_bytes()
    except IsADirectoryError:
        raise wrong(file, f"is a folder; name the {TOKENIZER_JSON} in it") from None
    except OSError as error:
        raise wrong(file, f"cannot be read ({error.strerror})") from None
    try:
        spec = parse_json(content)
    except ValueError:  # of JSON or of UTF-8
        raise wrong(file, "is not JSON; a tokenizer.json of Hugging Face is needed") from None
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise wrong(
            file, "is JSON, but no tokenizer.json of Hugging Face: it has no object `model`"
        )
    try:
        tokenizer = Tokenizer.from_str(json.dumps(plain(spec)))
    except Exception as error:  # tokenizers raises Exception itself
        raise wrong(
            file, f"is no tokenizer.json that this version of tokenizers reads ({one_line(error)})"
        ) from None
    tokenizer.encode_special_tokens = True
    if not tokenizer.get_vocab_size(with_added_tokens=True):
        raise wrong(file, "has no tokens; a trained tokenizer is needed")
    digest = hashlib.sha256(content).hexdigest()
    return TokenizerEncoding(tokenizer, spec=spec, path=file, sha256=digest)


def plain(spec: dict[str, Any]) -> dict[str, Any]:
    """The file's settings without those that the module's docstring names."""
    changed = json.loads(json.dumps(spec))
    changed["truncation"] = changed["padding"] = None
    if changed["model"].get("dropout") is not None:
        changed["model"]["dropout"] = None
    for part in parts_of(changed.get("pre_tokenizer")):
        if part["type"] in ("ByteLevel", "Metaspace") and "add_prefix_space" in part:
            part["add_prefix_space"] = False
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
    for part in parts_of(changed.get("decoder")):
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
            if "add_prefix_space" in part:
                part["add_prefix_space"] = False
    prepends = [part for part in parts_of(changed.get("normalizer")) if part["type"] == "Prepend"]
    if prepends:
        changed["normalizer"] = without(changed["normalizer"], "Prepend")
        changed["decoder"] = without(changed["decoder"], "Strip")  # of the space put in front
    return changed


def parts_of(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder, or what a Sequence of them has."""
    if part is None:
        return
    if part.get("type") != "Sequence":
        yield part
        return
    for inner in ("normalizers", "pretokenizers", "decoders"):
        for each in part.get(inner) or []:
            yield from parts_of(each)


def without(part: dict[str, Any] | None, kind: str) -> dict[str, Any] | None:
    """The same without parts of a kind."""
    if part is None or part.get("type") == kind:
        return None
    for inner in ("normalizers", "pretokenizers", "decoders"):
        if inner in part:
            kept = (without(each, kind) for each in part[inner])
            part = part | {inner: [each for each in kept if each is not None]}
    return part


# --- bytes of tokens ------------------------------------------------------------------------------


def bytes_by_id(spec: dict[str, Any], tokenizer: Any, *, vocab_size: int) -> np.ndarray | None:
    """int64 [V], or None where the file's parts do not tell: see the module's docstring."""
    model = spec["model"]
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    splits = list(parts_of(spec.get("pre_tokenizer")))
    if any(each["type"] not in KEEPS or each.get("behavior") == "Removed" for each in splits):
        return None
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    if any(each["type"] == "ByteLevel" for each in splits):
        sizes = byte_level_sizes(vocab) if normalizers_keep(spec, blanks=False) else None
    elif model.get("byte_fallback"):
        sizes = sentencepiece_sizes(vocab) if normalizers_keep(spec, blanks=True) else None
    else:
        sizes = None
    if sizes is None:
        return None
    bytes_V = np.zeros(vocab_size, np.int64)
    bytes_V[list(sizes)] = list(sizes.values())
    for each in spec.get("added_tokens") or []:
        if not each["special"] and (each["lstrip"] or each["rstrip"]):
            return None  # it takes blanks around it along, now more, now fewer
        bytes_V[each["id"]] = 0 if each["special"] else len(each["content"].encode())
    return bytes_V


def normalizers_keep(spec: dict[str, Any], *, blanks: bool) -> bool:
    """Whether the text stays what it is, but for Unicode's composed form, in which it then counts.

    blanks: whether a space may become U+2581.
    """
    for part in parts_of(spec.get("normalizer")):
        kind = part["type"]
        blank = part.get("pattern") == {"String": " "} and part.get("content") == BLANK
        if kind not in ("NFC", "Prepend") and not (blanks and kind == "Replace" and blank):
            return False
    return True


def byte_level_sizes(vocab: dict[str, int]) -> dict[int, int] | None:
    """Bytes of each id, where a character is a byte; None if a byte has no token of its own."""
    alphabet = byte_characters()
    if not alphabet <= vocab.keys():
        return None
    # a token with another character cannot come from a text; it is a special one
    return {i: len(token) if alphabet.issuperset(token) else 0 for token, i in vocab.items()}


def byte_characters() -> set[str]:
    """The 256 characters that GPT-2 writes bytes as.

    A byte that Latin-1 prints is that character; the others are U+0100 and on, in their order.
    """
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    return {chr(byte) for byte in printed} | {chr(0x100 + i) for i in range(256 - len(printed))}


def sentencepiece_sizes(vocab: dict[str, int]) -> dict[int, int] | None:
    """Bytes of each id, where U+2581 is a space; None if a byte has no token of its own."""
    if any(f"<0x{byte:02X}>" not in vocab for byte in range(256)):
        return None
    return {
        i: 1 if HEX.fullmatch(token) else len(token.replace(BLANK, " ").encode())
        for token, i in vocab.items()
    }


def one_line(error: Exception) -> str:
    """The first line of an error, shortened."""
    lines = str(error).splitlines() or [type(error).__name__]
    return shown(lines[0])[:120]


def wrong(file: Path, what: str) -> ConfigError:
    """An error about a tokenizer.json."""
    return ConfigError(f"data.tokenizer={shown(file)} {what}")
