"""The two zips of speech are what DATA.md says they are."""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import tasks.speech

soundfile = pytest.importorskip("soundfile")

ASSETS = Path(tasks.speech.__file__).parent / "assets"
LIMITS = {"asterisk_en": 2_500_000, "cards_synthetic": 1_600_000}  # bytes
SPLITS = ("train", "val", "test")
REAL_CARDS = "TEN OF CLUBS FOUR QUEEN OF CLUBS SEVEN OF CLUBS FIVE FIVE EIGHT OF SPADES OF HEARTS"


class Row(NamedTuple):
    name: str
    split: str
    samples: str
    text: str
    speaker: str


def rows_of(name: str) -> list[Row]:
    with zipfile.ZipFile(ASSETS / f"{name}.zip") as archive:
        header, *lines = archive.read("index.tsv").decode().splitlines()
    assert tuple(header.split("\t")) == Row._fields
    return [Row(*line.split("\t")) for line in lines]


def section_of(name: str) -> str:
    """The part of DATA.md on one zip."""
    text = (ASSETS / "DATA.md").read_text(encoding="utf-8")
    return text.split(f"# {name}.zip\n")[1].split("\n# ")[0]


each_zip = pytest.mark.parametrize("name", sorted(LIMITS))


@each_zip
def test_data_md_has_the_digest_and_the_size_of_the_zip(name: str) -> None:
    content = (ASSETS / f"{name}.zip").read_bytes()
    documented = section_of(name)
    assert f"- sha256: `{hashlib.sha256(content).hexdigest()}`" in documented
    assert f"- Size: {len(content):,} bytes" in documented
    assert len(content) <= LIMITS[name]


@each_zip
def test_data_md_has_the_clips_and_the_seconds_of_each_split(name: str) -> None:
    rows = rows_of(name)
    assert {row.split for row in rows} == set(SPLITS)
    for split in SPLITS:
        samples = [int(row.samples) for row in rows if row.split == split]
        assert f"| {split} | {len(samples)} | {sum(samples) / 16_000:.1f} |" in section_of(name)


@each_zip
def test_the_index_and_the_stored_members_are_the_same_clips(name: str) -> None:
    names = [row.name for row in rows_of(name)]
    assert len(set(names)) == len(names)
    with zipfile.ZipFile(ASSETS / f"{name}.zip") as archive:
        infos = archive.infolist()
    assert {info.filename for info in infos} == {"index.tsv", *(f"{n}.opus" for n in names)}
    assert len(infos) == len(names) + 1
    assert {info.compress_type for info in infos} == {zipfile.ZIP_STORED}


@each_zip
def test_a_clip_decodes_to_the_samples_of_the_index_and_is_neither_silent_nor_clipped(
    name: str,
) -> None:
    with zipfile.ZipFile(ASSETS / f"{name}.zip") as archive:
        for row in rows_of(name)[::40]:
            content = io.BytesIO(archive.read(f"{row.name}.opus"))
            audio, rate = soundfile.read(content, dtype="float32")
            assert (rate, audio.shape) == (16_000, (int(row.samples),)), row.name
            assert np.sqrt(np.mean(audio**2)) > 0.02, row.name
            assert np.abs(audio).max() < 1.0, row.name


@each_zip
def test_texts_are_capital_letters_and_lengths_are_those_of_speech(name: str) -> None:
    for row in rows_of(name):
        assert re.fullmatch(r"(?:[A-Z']+(?: [A-Z']+)*)?", row.text), row.name
        assert 0.5 <= int(row.samples) / 16_000 <= 4.0, row.name
        # 28 letters a second is faster than anyone speaks
        assert int(row.samples) / 16_000 >= 0.035 * len(row.text), row.name


def test_no_voice_of_the_cards_is_in_two_splits() -> None:
    variants: dict[str, set[str]] = {split: set() for split in SPLITS}
    for row in rows_of("cards_synthetic"):
        variants[row.split].add(row.speaker.partition("+")[2])
    assert all(variants.values())
    assert not variants["train"] & variants["val"]
    assert not variants["train"] & variants["test"]
    assert not variants["val"] & variants["test"]


def test_every_card_clip_has_a_text_and_training_hears_every_word_often() -> None:
    rows = rows_of("cards_synthetic")
    assert all(row.text for row in rows)
    heard = [word for row in rows if row.split == "train" for word in row.text.split()]
    words = {word for row in rows for word in row.text.split()}
    assert len(words) == 22
    assert words >= set(REAL_CARDS.split())
    assert min(heard.count(word) for word in words) >= 20


def test_the_notice_of_the_recordings_names_author_licence_and_changes() -> None:
    notice = (ASSETS / "LICENSE-asterisk-sounds.txt").read_text(encoding="utf-8")
    for part in (
        "Allison Smith",
        "https://creativecommons.org/licenses/by-sa/3.0/",
        "has been modified",
        "8. Miscellaneous.",
    ):
        assert part in notice
