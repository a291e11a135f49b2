"""Speech that needs no download: two sets inside the package, and one that Debian has.

`asterisk_en` is recorded speech, one speaker's telephone prompts; `cards_synthetic` is synthesised
speech, whose few words a small model learns in minutes, marked as synthetic in every result.
`cards_real` are five recordings of people naming cards, to score what was trained on the synthetic
ones; nothing can be trained on them. assets/DATA.md has the sources, licences and how they were
made.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from suite.data import Splits
from suite.errors import ConfigError, shown
from suite.shipped import check_shipped
from tasks.speech.clips import ZipClips
from tasks.speech.sets import About, Listing, Part, file_clips, make_splits
from tasks.speech.split import AudioOptions

ASSETS = Path(__file__).parent / "assets"
SPLITS = ("train", "val", "test")

ASTERISK = About(
    "asterisk_en",
    license="CC BY-SA 3.0 (Allison Smith; funded by Digium, Inc.)",
    source="Debian package asterisk-core-sounds-en-g722 1.6.1-1",
)
ASTERISK_SHA256 = "82d932f73bb99f46da8f5f26904f3e405716973b55adfbb0ae44c21da2bc441e"

CARDS = About(
    "cards_synthetic",
    license="MIT",
    source="scripts/build_card_speech.py, synthesised by espeak-ng",
    synthetic=True,
)
CARDS_SHA256 = "99a0311a7c28fd0f551959ae24bd9302c013aaa5d7ec1b72feb4ef9895845557"

REAL = About(
    "cards_real",
    license="BSD-2-Clause (Carnegie Mellon University)",
    source="Debian package pocketsphinx-testdata",
)
DEBIAN_ROOT = Path("/usr/share/pocketsphinx/test/data/cards")
SPOKEN = re.compile(r"(?:<s>)?\s*(.*?)\s*(?:</s>)?\s*\((\S+)\)")  # CMU Sphinx: <s> WORDS </s> (ID)


@dataclass(frozen=True)
class CardsRealOptions(AudioOptions):
    """Settings of the five recordings.

    root: the folder with cards.transcription and the wav files; None: where Debian's package puts
    them.
    """

    root: str | None = None


def build_asterisk(options: AudioOptions, *, seed: int, words: bool) -> Splits:
    """Recorded prompts. Raises ConfigError if the file is not the one that was shipped."""
    return from_zip(ASTERISK, ASTERISK_SHA256, options=options, seed=seed, words=words)


def build_cards(options: AudioOptions, *, seed: int, words: bool) -> Splits:
    """Synthesised sentences about cards; the voices of val and test are not in train.

    Raises ConfigError if the file is not the one that was shipped.
    """
    return from_zip(CARDS, CARDS_SHA256, options=options, seed=seed, words=words)


def from_zip(about: About, sha256: str, *, options: AudioOptions, seed: int, words: bool) -> Splits:
    """The splits of a zip inside the package."""
    file = ASSETS / f"{about.name}.zip"
    check_shipped(file, sha256, name=about.name)
    clips = ZipClips(file)
    parts = {
        split: Part(clips, np.flatnonzero([part == split for part in clips.splits]))
        for split in SPLITS
    }
    return make_splits(parts, about=about, options=options, seed=seed, words=words)


def build_cards_real(options: CardsRealOptions, *, seed: int, words: bool) -> Splits:
    """Five recordings as validation and test. Raises ConfigError if they are not there."""
    root = Path(options.root).expanduser() if options.root is not None else DEBIAN_ROOT
    clips = file_clips(read_cards(root), name=REAL.name, options=options, words=words)
    part = Part.whole(clips)
    parts = {"train": part.but(np.empty(0, np.int64)), "val": part, "test": part}
    return make_splits(
        parts,
        about=REAL,
        options=options,
        seed=seed,
        words=words,
        notes=["five recordings to evaluate on; there is nothing to train on"],
    )


def read_cards(root: Path) -> Listing:
    """The recordings that cards.transcription names. Raises ConfigError if it cannot be read."""
    file = root.absolute() / "cards.transcription"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(
            f"data=cards_real: {shown(str(file))} cannot be read ({reason}). Get it with `apt "
            "install pocketsphinx-testdata`, or name its folder with data.root=FOLDER"
        ) from None
    found = [(n, SPOKEN.fullmatch(line.strip())) for n, line in enumerate(lines, 1) if line.strip()]
    for number, match in found:
        if match is None:
            raise ConfigError(
                f"data=cards_real: {shown(str(file))} line {number} is not <s> WORDS </s> (NAME)"
            )
    matches = [match for _, match in found if match is not None]
    names = [f"{match[2]}.wav" for match in matches]
    return Listing(
        "cards",
        names,
        [str(file.with_name(name)) for name in names],
        [match[1] for match in matches],
        [f"{file.name} line {number}" for number, _ in found],
    )
