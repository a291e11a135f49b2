"""LibriSpeech (Panayotov et al., ICASSP 2015; OpenSLR 12): `data=librispeech`.

960 hours of read English in the folders that the archives unpack to:
`split/speaker/chapter/speaker-chapter-nnnn.flac` with `speaker-chapter.trans.txt` beside. Any
folder that holds such chapters at some depth may be named, so Libri-light's limited sets are
data.train=librispeech_finetuning/1h,librispeech_finetuning/9h: together the 10 hours.

As published, weights are chosen by dev-other, and test-clean and test-other are reported, each by
itself: data.test=test-clean gives the other.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from suite.data import Splits
from suite.errors import ConfigError, shown
from tasks.speech.audio import EXTENSIONS
from tasks.speech.sets import About, Listing, Part, file_clips, make_splits
from tasks.speech.split import AudioOptions

NAME = "librispeech"
SIZES = {
    "train-clean-100": 28_539,
    "train-clean-360": 104_014,
    "train-other-500": 148_688,
    "dev-clean": 2_703,
    "dev-other": 2_864,
    "test-clean": 2_620,
    "test-other": 2_939,
}
ABOUT = About(NAME, license="CC BY 4.0", source="https://www.openslr.org/12")


@dataclass(frozen=True)
class LibriSpeechOptions(AudioOptions):
    """Settings of LibriSpeech.

    root: the folder that holds LibriSpeech/, or the folders of the splits themselves.
    train, val, test: folders below it, joined by commas. Without test, the validation is the test
    too; without train, weights can be evaluated, not trained.
    """

    root: str | None = None
    train: str | None = "train-clean-100,train-clean-360,train-other-500"
    val: str = "dev-other"
    test: str | None = "test-other"

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("train", "val", "test"):
            value = getattr(self, field)
            folders = parted(value)
            if (value is not None and not folders) or len(set(folders)) < len(folders):
                raise ValueError(
                    f"{field} must be different folders joined by commas, got {value!r}"
                )


def parted(value: str | None) -> list[str]:
    """The folders that an option names."""
    return [name.strip().strip("/") for name in (value or "").split(",") if name.strip()]


def build_librispeech(options: LibriSpeechOptions, *, seed: int, words: bool) -> Splits:
    """The splits that the options name. Raises ConfigError for a folder that is not there."""
    root = find_root(options.root)
    named = {split: parted(getattr(options, split)) for split in ("train", "val", "test")}
    for split in ("val", "test"):
        for folder in set(named["train"]) & set(named[split]):
            raise ConfigError(f"data.{split}={folder}: it is in data.train too; leave one out")
    parts, notes = {}, []
    trained: set[str] = set()
    for split, folders in named.items():
        if folders:
            listing, more = read_folders(root, folders, words=words)
            if both := len(trained.intersection(listing.paths)):
                raise ConfigError(
                    f"data.{split}={','.join(folders)}: {both:,} of its clips are in data.train "
                    "too; leave their folder out of one"
                )
            trained |= set(listing.paths) if split == "train" else set()
            notes += more
            parts[split] = Part.whole(file_clips(listing, name=NAME, options=options, words=words))
    if "train" not in parts:
        parts["train"] = parts["val"].but(np.empty(0, np.int64))
        notes.append("there is no data.train: nothing to train on")
    if "test" not in parts:
        parts["test"] = parts["val"]
        notes.append("the validation is the test too: there is no data.test")
    parts = {split: parts[split] for split in named}
    return make_splits(parts, about=ABOUT, options=options, seed=seed, words=words, notes=notes)


def find_root(option: str | None) -> Path:
    """The folder that holds those of the splits. Raises ConfigError if there is none."""
    if option is None:
        raise ConfigError(
            "data=librispeech: needs data.root=FOLDER, the one that holds LibriSpeech/ with "
            "train-clean-100, dev-other and so on; they are at https://www.openslr.org/12"
        )
    root = Path(option).expanduser().absolute()
    if not root.is_dir():
        what = "is no folder" if root.exists() else "does not exist"
        raise ConfigError(f"data=librispeech: data.root={shown(str(root))} {what}")
    inner = root / "LibriSpeech"
    return inner if inner.is_dir() else root


def read_folders(root: Path, folders: Sequence[str], *, words: bool) -> tuple[Listing, list[str]]:
    """All audio files below some folders of the root, in order, and notes on what is unusual."""
    names: list[str] = []
    texts: list[str] = []
    notes = []
    for folder in folders:
        before = len(names)
        missing = 0
        for where, files in walk(root, folder):
            found = transcripts(where) if words else {}
            stems = [os.path.splitext(file)[0] for file in files]  # noqa: PTH122
            below = where.relative_to(root).as_posix()
            names += [f"{below}/{file}" for file in files]
            if words:
                texts += [transcript(found, stem, where=where) for stem in stems]
                missing += len(found.keys() - set(stems))
        if len(names) == before:
            raise ConfigError(
                f"data=librispeech: {shown(str(root / folder))} has no audio files "
                f"({', '.join(EXTENSIONS)}) in it; unpack the archive there"
            )
        if missing:
            notes.append(f"{folder}: {missing:,} transcripts have no audio file")
        count, wanted = len(names) - before, SIZES.get(folder, len(names) - before)
        if count != wanted:
            notes.append(f"{folder} has {count:,} clips, the published set {wanted:,}")
    paths = [f"{root}/{name}" for name in names]
    label = "+".join(folder.replace("/", "-") for folder in folders)
    return Listing(label, names, paths, texts if words else None), notes


def walk(root: Path, folder: str) -> list[tuple[Path, list[str]]]:
    """The folders below `folder` with audio files in them, and those, in order."""
    top = root / folder
    if not top.is_dir():
        there = sorted(path.name for path in root.iterdir() if path.is_dir())
        raise ConfigError(
            f"data=librispeech: {shown(str(root))} has no folder {shown(folder)}; it has "
            f"{shown(', '.join(there[:10])) or 'none'}. Name those that there are in data.train, "
            "data.val and data.test"
        )
    found = []
    try:
        for where, inner, files in os.walk(top, onerror=fail, followlinks=True):
            inner.sort()
            audio = sorted(f for f in files if f.lower().endswith(EXTENSIONS) and f[0] != ".")
            if audio:
                found.append((Path(where), audio))
    except OSError as error:
        raise ConfigError(
            f"data=librispeech: {shown(str(error.filename))} cannot be read ({error.strerror})"
        ) from None
    return found


def fail(error: OSError) -> None:
    """os.walk passes over folders that it cannot read unless it is told otherwise."""
    raise error


def transcripts(folder: Path) -> dict[str, str]:
    """The lines of a chapter's .trans.txt by utterance. Raises ConfigError if there is none."""
    files = sorted(folder.glob("*.trans.txt"))
    if not files:
        raise ConfigError(
            f"data=librispeech: {shown(str(folder))} has audio files and no .trans.txt with their "
            "transcripts; unpack the archive again"
        )
    found = {}
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise ConfigError(
                f"data=librispeech: {shown(str(file))} cannot be read ({reason})"
            ) from None
        for line in filter(str.strip, lines):
            utterance, _, text = line.strip().partition(" ")
            found[utterance] = text
    return found


def transcript(found: dict[str, str], stem: str, *, where: Path) -> str:
    """What an utterance says. Raises ConfigError if no line says it."""
    if not found.get(stem):
        raise ConfigError(
            f"data=librispeech: {shown(str(where))} has no transcript of {shown(stem)} in its "
            ".trans.txt; add the line or remove the audio file"
        )
    return found[stem]
