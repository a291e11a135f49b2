"""Text as ids: bytes, characters, or the tokens of a tokenizer.json.

An encoding also says how many bytes of UTF-8 each of its ids stands for. With that a loss in nats a
token becomes bits a byte, which can be compared between encodings; perplexity cannot.

Shapes: N ids of a text, V ids that there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from suite.errors import ConfigError, shown
from tasks.language.tokens import BYTE_END, BYTE_VOCAB


class Encoding(Protocol):
    """What all encodings have.

    vocab_size: V. end: the id that closes a document, None where there is none.
    """

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def end(self) -> int | None: ...

    def encode(self, text: str | bytes) -> np.ndarray:
        """ids [N], uint16 or uint32; nothing is put before or after the text."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids: broken UTF-8 is replaced, ids that stand for no text are passed over."""
        ...

    def token_bytes(self) -> np.ndarray | None:
        """int64 [V], bytes of UTF-8 of each id; None where that cannot be told."""
        ...

    def describe(self) -> dict[str, Any]:
        """Plain values from which `encoding_of` makes the encoding again."""
        ...


def id_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The smaller of uint16 and uint32 that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


class ByteEncoding:
    """The bytes of UTF-8, and 256 for the end of a document."""

    name = "bytes"
    vocab_size = BYTE_VOCAB
    end: int | None = BYTE_END

    def encode(self, text: str | bytes) -> np.ndarray:
        content = text.encode() if isinstance(text, str) else text
        return np.frombuffer(content, np.uint8).astype(np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if 0 <= i < BYTE_END).decode("utf-8", "replace")

    def token_bytes(self) -> np.ndarray | None:
        return (np.arange(BYTE_VOCAB) < BYTE_END).astype(np.int64)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name}


class CharEncoding:
    """An id for each of `characters`, in Unicode's order, and one for the end of a document."""

    name = "characters"

    def __init__(self, characters: str) -> None:
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise ValueError("characters must not be empty")
        self._points_V = code_points(self.characters)
        self.end: int | None = len(self.characters)
        self.vocab_size = len(self.characters) + 1

    def encode(self, text: str | bytes) -> np.ndarray:
        """Raises ValueError for a character that has no id."""
        points_N = code_points(text if isinstance(text, str) else text.decode())
        at_N = np.searchsorted(self._points_V, points_N)
        at_N = np.minimum(at_N, len(self._points_V) - 1)
        strange = np.flatnonzero(self._points_V[at_N] != points_N)
        if len(strange):
            found = chr(points_N[strange[0]])
            raise ValueError(
                f"the character {found!r} (U+{ord(found):04X}, at {strange[0]:,}) is none of the "
                f"{len(self.characters):,} that have an id; take it out of the text, or use "
                "data.encoding=bytes, which has an id for everything"
            )
        ids: np.ndarray = at_N.astype(id_dtype(self.vocab_size))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        known = len(self.characters)
        return "".join(self.characters[i] for i in map(int, ids) if 0 <= i < known)

    def token_bytes(self) -> np.ndarray | None:
        return np.array([*(len(c.encode()) for c in self.characters), 0], np.int64)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "characters": self.characters}


def code_points(text: str) -> np.ndarray:
    """uint32 [N], the number of each character in Unicode."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def encoding_of(description: dict[str, Any], *, folder: Path) -> Encoding:
    """The encoding that `describe` described; its tokenizer.json lies in `folder`.

    Raises ConfigError for a description or a file that is another one.
    """
    name = description.get("name")
    if name == ByteEncoding.name:
        return ByteEncoding()
    if name == CharEncoding.name:
        characters = description.get("characters")
        if not isinstance(characters, str) or not characters:
            raise ConfigError(
                f"{shown(folder)}: the encoding 'characters' needs its characters, a text that is "
                "not empty; write the folder again"
            )
        return CharEncoding(characters)
    if name == "tokenizer":
        from tasks.language.tokenizer_file import TOKENIZER_JSON, load_tokenizer

        file = folder / TOKENIZER_JSON
        tokenizer = load_tokenizer(file)
        if (wanted := description.get("sha256")) != tokenizer.sha256:
            raise ConfigError(
                f"{shown(file)} is not the tokenizer that the ids were made with (its sha256 is "
                f"{tokenizer.sha256[:12]}..., not {str(wanted)[:12]}...); put that file there"
            )
        return tokenizer
    raise ConfigError(
        f"{shown(folder)}: the encoding {name!r} is unknown; choose bytes, characters or tokenizer"
    )


def __getattr__(name: str) -> Any:
    """`load_tokenizer` and `TokenizerEncoding`, which lie in tokenizer_file."""
    if name in ("load_tokenizer", "TokenizerEncoding"):
        from tasks.language import tokenizer_file

        return getattr(tokenizer_file, name)
    raise AttributeError(name)
