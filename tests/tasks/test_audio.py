"""Audio files: what is read, how it is resampled, what is refused, and the cache of lengths."""

import io
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from suite.cache import cache_folder
from suite.errors import ConfigError
from tasks.speech import audio, index
from tasks.speech.audio import AudioError, UnreadableError, check_format, probe, read
from tasks.speech.clips import FileClips, Lines, ZipClips
from tasks.speech.embedded import ASSETS
from tasks.speech.index import load_headers

FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}
LONG_AGO = 1_000_000_000


@pytest.fixture(scope="module")
def speech():
    """A real clip, float32 at 16 kHz."""
    clips = ZipClips(ASSETS / "asterisk_en.zip")
    return clips.read(int(np.argmax(clips.lengths)))


def write(path: Path, samples, *, rate: int = 16_000, kind: str | None = None) -> Path:
    container, coding = FORMATS[kind or path.suffix[1:]]
    soundfile.write(path, samples, rate, format=container, subtype=coding)
    return path


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(FORMATS))
def test_every_format_has_its_length_before_it_is_decoded_and_a_part_is_a_part(
    tmp_path, speech, kind
):
    path = write(tmp_path / f"clip.{kind}", speech)
    assert probe(path) == (len(speech), 16_000, 1)
    whole = read(path)
    assert (whole.dtype, whole.shape) == (np.float32, speech.shape)
    assert np.corrcoef(whole, speech)[0, 1] > 0.95
    np.testing.assert_allclose(read(path, start=5000, count=9000), whole[5000:14000], atol=1e-6)
    np.testing.assert_allclose(read(path, start=len(speech) - 7), whole[-7:], atol=1e-6)


def test_a_wav_file_gives_the_samples_that_were_written(tmp_path, speech):
    assert np.array_equal(read(write(tmp_path / "clip.wav", speech)), speech)


def test_an_open_file_is_read_too(tmp_path, speech):
    content = write(tmp_path / "clip.wav", speech).read_bytes()
    assert np.array_equal(read(io.BytesIO(content), start=10, count=20), speech[10:30])


@pytest.mark.parametrize("name", ["with space.wav", "Grüße 音.wav", "quote'\".wav"])
def test_names_may_have_spaces_and_any_letters(tmp_path, speech, name):
    assert np.array_equal(read(write(tmp_path / name, speech)), speech)


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX alone")
def test_a_name_that_is_no_text_is_read_and_shown_in_one_line(tmp_path, speech):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n.wav")
    shutil.copy(write(tmp_path / "clip.wav", speech), path)
    assert probe(path)[0] == len(speech)
    assert "\n" not in str(AudioError(path, "is bad"))


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_resampling_gives_torchaudios_samples_and_the_length_said_before(tmp_path, speech, rate):
    import torch
    from torchaudio.functional import resample

    for samples in (8001, 12345):
        path = write(tmp_path / "clip.wav", speech[:samples], rate=rate)
        theirs = resample(torch.from_numpy(speech[:samples]), rate, 16_000).numpy()
        found = read(path)
        assert len(found) == len(theirs) == audio.resampled_length(samples, rate)
        np.testing.assert_allclose(found, theirs, atol=1e-4)
        assert np.array_equal(read(path, start=99, count=500), found[99:599])


def test_a_tone_keeps_its_pitch_when_it_is_resampled(tmp_path):
    tone = np.sin(2 * np.pi * 440 * np.arange(16_000) / 8000).astype(np.float32) * 0.5
    found = read(write(tmp_path / "tone.wav", tone, rate=8000))
    assert len(found) == 32_000
    assert np.argmax(np.abs(np.fft.rfft(found))) * 16_000 / len(found) == 440


def test_channels_are_averaged(tmp_path, speech):
    both = np.stack([speech, np.zeros_like(speech)], 1)
    path = write(tmp_path / "clip.wav", both)
    assert probe(path) == (len(speech), 16_000, 2)
    np.testing.assert_allclose(read(path), speech / 2, atol=1e-7)


# --- what is refused ------------------------------------------------------------------------------


def cut(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def make_folder(path: Path, _) -> Path:
    path.mkdir()
    return path


def text(path: Path, _) -> Path:
    path.write_text("this is no audio\n" * 50)
    return path


def mpeg4(path: Path, _) -> Path:
    path.write_bytes(b"\0\0\0\x20ftypM4A " + bytes(400))
    return path


def not_a_number(path: Path, speech) -> Path:
    samples = speech.copy()
    samples[7] = np.nan
    soundfile.write(path, samples, 16_000, subtype="FLOAT")
    return path


def without_length(path: Path, speech) -> Path:
    """An mp3 without its first frame, which says how many there are."""
    content = write(path, speech).read_bytes()
    path.write_bytes(content[content.index(content[:2], 100) :])
    return path


WRONG = {
    "text called wav": ("a.wav", text, "is no audio that libsndfile reads; wav, flac, ogg and mp3"),
    "empty": ("a.wav", lambda path, _: path.touch() or path, "is an empty file"),
    "missing": ("a.wav", lambda path, _: path, "does not exist"),
    "a folder": ("a.wav", make_folder, "is a folder, not an audio file"),
    "mpeg 4": ("a.m4a", mpeg4, "is m4a audio, which libsndfile does not read"),
    "cut wav": ("a.wav", lambda path, s: cut(write(path, s), 0.5), r"is cut short \(.* bytes\)"),
    "a wav's header": (
        "a.wav",
        lambda path, s: cut(write(path, s), 0.0003),
        r"is cut short \(38 of",
    ),
    "cut flac": ("a.flac", lambda path, s: cut(write(path, s), 0.5), r"cannot be decoded \(.+\)"),
    "cut mp3": ("a.mp3", lambda path, s: cut(write(path, s), 0.5), "is cut short or damaged"),
    "mp3 of unknown length": ("a.mp3", without_length, "is an mp3 without a Xing, Info or VBRI"),
    "no samples": ("a.wav", lambda path, s: write(path, s[:0]), "has no samples"),
    "not finite": ("a.wav", not_a_number, "has samples that are not finite"),
}


@pytest.mark.parametrize("kind", list(WRONG))
def test_a_file_that_is_no_audio_is_one_line_with_its_name(tmp_path, speech, kind):
    name, make, message = WRONG[kind]
    path = make(tmp_path / name, speech)
    with pytest.raises(AudioError, match=message) as caught:
        (probe(path), read(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_another_rate_and_stereo_are_refused_with_what_to_set():
    fine = {"rate": 16_000, "channels": 1, "resample": False, "mix_channels": False}
    check_format("speech.wav", **fine)
    check_format("a", **(fine | {"rate": 8000, "resample": True}))
    check_format("a", **(fine | {"channels": 2, "mix_channels": True}))
    with pytest.raises(AudioError) as caught:
        check_format("speech.wav", **(fine | {"rate": 8000}))
    assert str(caught.value) == (
        "speech.wav: is sampled at 8000 Hz, expected 16000; set data.resample=true to resample it"
    )
    with pytest.raises(AudioError, match=r"has 2 channels, expected 1; set data\.mix_channels=tr"):
        check_format("speech.wav", **(fine | {"channels": 2}))


def test_more_than_a_file_has_is_an_error_not_silence(tmp_path, speech):
    path = write(tmp_path / "a.wav", speech[:1000])
    with pytest.raises(AudioError, match="has 1000 samples, expected 1200 or more"):
        read(path, start=1000, count=200)
    slow = write(tmp_path / "b.wav", speech[:1000], rate=8000)
    with pytest.raises(AudioError, match="has 2000 samples at 16 kHz, expected 2100 or more"):
        read(slow, start=2000, count=100)


def test_an_mp3_may_begin_with_a_tag(tmp_path, speech):
    path = write(tmp_path / "a.mp3", speech)
    size = 5000
    tag = b"ID3\x04\0\0" + bytes([0, 0, size >> 7, size & 0x7F]) + bytes(size)
    path.write_bytes(tag + path.read_bytes())
    assert probe(path)[0] == len(read(path)) == len(speech)


def test_a_wav_of_unknown_length_from_a_pipe_is_not_taken_for_a_cut_one(tmp_path, speech):
    path = write(tmp_path / "a.wav", speech)
    content = bytearray(path.read_bytes())
    content[4:8] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert probe(path)[0] == len(speech)


def test_a_disk_that_fails_is_another_error_than_a_bad_file(tmp_path, speech, monkeypatch):
    import errno

    path = write(tmp_path / "a.wav", speech)

    def gone(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("builtins.open", gone)
    with pytest.raises(UnreadableError, match=r"cannot be read \(Input/output error\)"):
        probe(path)


@pytest.mark.parametrize(("module", "call"), [("soundfile", probe), ("soundfile", read)])
def test_soundfile_missing_says_how_to_get_it(tmp_path, monkeypatch, module, call):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match="pip install soundfile"):
        call(tmp_path / "a.wav")


def test_torchaudio_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio.transforms", None)
    audio.resampler.cache_clear()
    with pytest.raises(ConfigError, match="pip install torchaudio"):
        audio.resample(np.zeros(100, np.float32), 8000)


# --- lengths and their cache ----------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, speech):
    """Five files in two folders, each of another length, old enough to be cached."""
    paths = []
    for i in range(5):
        folder = tmp_path / "clips" / f"speaker {i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        paths.append(str(write(folder / f"{i}.wav", speech[: 9000 + 100 * i])))
    age(tmp_path / "clips")
    return paths


def age(root: Path) -> None:
    """Give every folder an old modification time: a fresh one may change again unseen."""
    for where, _, _ in os.walk(root):
        os.utime(where, ns=(LONG_AGO, LONG_AGO))


@pytest.fixture
def probes(monkeypatch):
    """The files whose headers have been read."""
    found = []
    real = index.probe

    def counted(path):
        found.append(path)
        return real(path)

    monkeypatch.setattr(index, "probe", counted)
    return found


def headers(files, cache: Path | None):
    return load_headers(files, name="manifest", label="train", cache=cache)


def test_a_second_start_reads_the_cache_alone_and_finds_the_same(files, tmp_path, probes):
    first = headers(files, tmp_path / "cache")
    assert sorted(probes) == sorted(files)
    assert first.samples.tolist() == [9000, 9100, 9200, 9300, 9400]
    second = headers(files, tmp_path / "cache")
    assert len(probes) == 5
    for field in ("samples", "rates", "channels"):
        assert np.array_equal(getattr(first, field), getattr(second, field))
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_new_file_another_list_and_a_replaced_file_are_noticed(files, tmp_path, probes, speech):
    cache = tmp_path / "cache"
    headers(files, cache)
    assert headers(files[:3], cache).samples.tolist() == [9000, 9100, 9200]
    assert len(probes) == 8
    Path(files[0]).unlink()
    write(Path(files[0]), speech[:9999])
    age(tmp_path / "clips")
    assert headers(files, cache).samples[0] == 9999
    assert len(probes) == 13


def test_folders_that_have_just_changed_are_not_cached(tmp_path, speech):
    path = write(tmp_path / "a.wav", speech)
    headers([str(path)], tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("harm", ["cut", "text", "nothing", "flip"])
def test_a_damaged_cache_is_a_note_and_is_built_again(files, tmp_path, probes, capsys, harm):
    cache = tmp_path / "cache"
    whole = headers(files, cache)
    (file,) = cache.glob("train-*.npz")
    content = file.read_bytes()
    at = content.index(b'"version"') + 2
    file.write_bytes(
        {
            "cut": content[: len(content) // 2],
            "text": b"no archive",
            "nothing": b"",
            "flip": content[:at] + b"\xff" + content[at + 1 :],
        }[harm]
    )
    assert np.array_equal(headers(files, cache).samples, whole.samples)
    assert len(probes) == 10
    assert "is damaged" in capsys.readouterr().err
    headers(files, cache)
    assert len(probes) == 10


def test_a_cache_of_another_version_is_not_used(files, tmp_path, probes, monkeypatch):
    headers(files, tmp_path / "cache")
    monkeypatch.setattr(index, "VERSION", index.VERSION + 1)
    headers(files, tmp_path / "cache")
    assert len(probes) == 10


def test_a_cache_that_cannot_be_written_is_a_note(files, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert len(headers(files, tmp_path / "file").samples) == 5
    assert "cannot be kept in" in capsys.readouterr().err


def test_a_faulty_file_is_looked_at_again_because_a_repair_shows_in_no_folder(
    files, tmp_path, probes, speech
):
    good = Path(files[2]).read_bytes()
    Path(files[2]).write_text("no audio")
    found = headers(files, tmp_path / "cache")
    assert list(found.faults) == [2]
    assert found.samples[2] == 0
    assert list(headers(files, tmp_path / "cache").faults) == [2]
    Path(files[2]).write_bytes(good)
    repaired = headers(files, tmp_path / "cache")
    assert not repaired.faults
    assert repaired.samples[2] == 9200
    assert len(probes) == 7


def test_long_lists_say_how_far_they_are(files, monkeypatch, capsys):
    monkeypatch.setattr(index, "TALK_S", -1.0)
    monkeypatch.setattr(index, "CHUNK", 2)
    headers(files, None)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "data=manifest: reading the lengths of train: 2 of 5 files"
    assert lines[-1].endswith("5 of 5 files")


def test_the_cache_lies_in_the_users_cache_folder_unless_the_option_says_another(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder(None, kind="audio-index") == Path("/somewhere/dyt-suite/audio-index")
    assert cache_folder("/other", kind="audio-index") == Path("/other/audio-index")
    assert cache_folder("none", kind="audio-index") is None


# --- clips ----------------------------------------------------------------------------------------


def test_lines_are_the_strings_that_they_were_made_of():
    strings = ["a", "", "Grüße", "\udcff", "last"]
    lines = Lines(strings)
    assert list(lines) == strings
    assert lines[-1] == "last"
    assert lines[1:3] == ["", "Grüße"]
    with pytest.raises(IndexError):
        lines[5]


def test_a_file_that_has_another_length_than_was_found_is_an_error(tmp_path, speech):
    path = write(tmp_path / "a.wav", speech[:8000])
    clips = FileClips(
        [str(path)], names=["a.wav"], samples=np.array([9000]), rates=np.array([16_000])
    )
    with pytest.raises(AudioError, match="has 8000 samples, expected 9000 or more"):
        clips.read(0)


def test_clips_of_a_zip_are_decoded_once_and_survive_a_pickle(monkeypatch):
    import pickle

    clips = ZipClips(ASSETS / "cards_synthetic.zip")
    reads = []
    real = clips.decode
    monkeypatch.setattr(clips, "decode", lambda i: reads.append(i) or real(i))
    whole = clips.read(5)
    assert len(whole) == clips.lengths[5]
    assert np.array_equal(clips.read(5, start=100, count=50), whole[100:150])
    assert reads == [5]
    monkeypatch.undo()
    assert np.array_equal(pickle.loads(pickle.dumps(clips)).read(5), whole)


def test_a_zip_that_is_not_one_of_clips_is_one_line(tmp_path):
    (tmp_path / "a.zip").write_text("no zip")
    with pytest.raises(ConfigError, match="is no zip of clips") as caught:
        ZipClips(tmp_path / "a.zip")
    assert "\n" not in str(caught.value)
