"""LibriSpeech's folders: which clips and transcripts they give, and what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from suite.errors import ConfigError
from tasks.speech.clips import ZipClips
from tasks.speech.embedded import ASSETS
from tasks.speech.librispeech import LibriSpeechOptions, build_librispeech

TEXTS = ("CHAPTER ONE", "IT WASN'T SO", "HE SAID")


@pytest.fixture(scope="module")
def speech():
    """Real speech, 16,000 samples at 16 kHz."""
    clips = ZipClips(ASSETS / "asterisk_en.zip")
    return np.concatenate([clips.read(i) for i in range(4)])[:16_000]


def chapter(folder: Path, speech, *, speaker: int, number: int) -> None:
    """A chapter of three utterances, as the archives have it."""
    where = folder / str(speaker) / str(number)
    where.mkdir(parents=True)
    lines = []
    for i, text in enumerate(TEXTS):
        name = f"{speaker}-{number}-{i:04d}"
        soundfile.write(where / f"{name}.flac", speech[: 12_000 + 500 * i], 16_000)
        lines.append(f"{name} {text}\n")
    (where / f"{speaker}-{number}.trans.txt").write_text("".join(lines))


@pytest.fixture
def root(tmp_path, speech):
    """LibriSpeech with six training utterances, three of each evaluation split."""
    top = tmp_path / "LibriSpeech"
    chapter(top / "train-clean-100", speech, speaker=84, number=121550)
    chapter(top / "train-clean-100", speech, speaker=103, number=1240)
    for i, name in enumerate(("dev-other", "test-clean", "test-other")):
        chapter(top / name, speech, speaker=1000 + i, number=1)
    (top / "README.TXT").write_text("LibriSpeech")
    return tmp_path


def build(root: Path | None, *, words: bool = True, **changes):
    given = {"train": "train-clean-100", "cache": "none"} | changes
    options = LibriSpeechOptions(root=None if root is None else str(root), **given)
    return build_librispeech(options, seed=0, words=words)


def paths(part) -> list[str]:
    return [part.path_of(i) for i in range(len(part))]


@pytest.mark.parametrize("inner", ["", "LibriSpeech"])
def test_every_utterance_has_its_transcript_in_a_fixed_order(root, inner):
    splits = build(root / inner)
    assert splits.info.sizes == {"train": 6, "val": 3, "test": 3}
    assert [Path(path).stem for path in paths(splits.train)] == [
        *(f"103-1240-{i:04d}" for i in range(3)),
        *(f"84-121550-{i:04d}" for i in range(3)),
    ]
    assert [splits.train.text_of(i) for i in range(6)] == [*TEXTS, *TEXTS]
    assert splits.train.lengths.tolist() == [12_000, 12_500, 13_000] * 2
    assert "dev-other" in splits.val.path_of(0)
    assert "test-other" in splits.test.path_of(0)


def test_the_set_is_the_same_wherever_the_folder_lies(root):
    moved = shutil.copytree(root, root.parent / "another place")
    assert build(root).info.sha256 == build(moved).info.sha256


def test_splits_may_be_joined_and_the_other_test_set_named(root):
    splits = build(root, train="train-clean-100,test-other", test="test-clean")
    assert splits.info.sizes == {"train": 9, "val": 3, "test": 3}
    assert "test-clean" in splits.test.path_of(0)


def test_evaluation_alone_needs_no_training_folder(root):
    splits = build(root, train=None, test=None)
    assert splits.info.sizes == {"train": 0, "val": 3, "test": 3}
    assert any("the validation is the test too" in note for note in splits.info.extra["notes"])


def test_folders_of_any_depth_hold_chapters_as_libri_lights_limited_sets_do(root, speech):
    for part in ("1h/0/clean", "1h/1/other", "9h/clean"):
        chapter(
            root / "LibriSpeech" / "librispeech_finetuning" / part,
            speech,
            speaker=len(part),
            number=7,
        )
    splits = build(root, train="librispeech_finetuning/1h, librispeech_finetuning/9h/")
    assert len(splits.train) == 9


def test_another_number_of_clips_than_was_published_is_said(root):
    notes = build(root).info.extra["notes"]
    assert "train-clean-100 has 6 clips, the published set 28,539" in notes
    assert "dev-other has 3 clips, the published set 2,864" in notes


def test_a_transcript_without_its_file_is_counted(root):
    (root / "LibriSpeech/dev-other/1000/1/1000-1-0001.flac").unlink()
    splits = build(root)
    assert len(splits.val) == 2
    assert "dev-other: 1 transcripts have no audio file" in splits.info.extra["notes"]


def test_pretraining_needs_no_transcripts(root):
    for file in root.rglob("*.trans.txt"):
        file.unlink()
    assert build(root, words=False).info.sizes["train"] == 6


def test_wav_files_made_of_the_flac_files_are_taken_too(root, speech):
    for file in root.rglob("*.flac"):
        soundfile.write(file.with_suffix(".wav"), speech, 16_000)
        file.unlink()
    assert build(root).info.sizes["train"] == 6


CHAPTER = "LibriSpeech/train-clean-100/84/121550"


def drop_line(root: Path) -> None:
    file = root / CHAPTER / "84-121550.trans.txt"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))


def strange_letter(root: Path) -> None:
    file = root / CHAPTER / "84-121550.trans.txt"
    file.write_text(file.read_text().replace("HE SAID", "HE SAID 7"))


def damage(root: Path) -> None:
    (root / CHAPTER / "84-121550-0001.flac").write_bytes(b"fLaC no more")


def slow(root: Path) -> None:
    soundfile.write(root / CHAPTER / "84-121550-0001.flac", np.full(9000, 0.1), 8000)


WRONG = {
    "no root": (None, {"root": None}, r"needs data\.root=FOLDER, the one that holds LibriSpeech/"),
    "missing root": (None, {"root": "nowhere"}, "nowhere does not exist"),
    "a file": (None, {"root": "LibriSpeech/README.TXT"}, "README.TXT is no folder"),
    "no such split": (
        None,
        {"train": "train-clean-360"},
        "has no folder train-clean-360; it has dev-other, test-clean, test-other, train-clean-100",
    ),
    "nothing in it": (
        lambda root: shutil.rmtree(root / "LibriSpeech/dev-other/1000"),
        {},
        r"dev-other has no audio files \(\.flac, ",
    ),
    "no transcripts": (
        lambda root: (root / CHAPTER / "84-121550.trans.txt").unlink(),
        {},
        r"121550 has audio files and no \.trans\.txt",
    ),
    "no line": (drop_line, {}, r"121550 has no transcript of 84-121550-0002 in its \.trans\.txt"),
    "strange letter": (strange_letter, {}, r"0002\.flac: its transcript cannot be spelt: '7' is"),
    "damaged": (damage, {}, r"84-121550-0001\.flac: cannot be decoded .*; repair or remove it"),
    "8 kHz": (slow, {}, r"0001\.flac: is sampled at 8000 Hz, .* set data\.resample=true"),
    "trained on what is scored": (
        None,
        {"train": "train-clean-100,dev-other"},
        r"^data\.val=dev-other: it is in data\.train too",
    ),
    "trained on a folder around it": (
        None,
        {"train": "."},
        r"^data\.val=dev-other: \d+ of its clips are in data\.train too",
    ),
}


@pytest.mark.parametrize("kind", list(WRONG))
def test_folders_that_cannot_be_used_are_one_line(root, kind):
    harm, changes, message = WRONG[kind]
    if harm is not None:
        harm(root)
    changes = dict(changes)
    where = changes.pop("root", ".")
    with pytest.raises(ConfigError, match=message) as caught:
        build(None if where is None else root / where, **changes)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_left_out_and_counted_if_the_options_say_so(root):
    damage(root)
    splits = build(root, on_error="skip")
    assert len(splits.train) == 5
    assert any(note.startswith("train: 1 of 6 clips") for note in splits.info.extra["notes"])


@pytest.mark.parametrize("value", ["", " , ", "dev-clean,dev-clean"])
def test_folders_that_are_none_or_the_same_twice_are_refused(value):
    with pytest.raises(ValueError, match=r"^val must be different folders joined by commas"):
        LibriSpeechOptions(val=value)
