"""One audio file -> mono float32 samples at 16 kHz, or one line that says why not.

soundfile (libsndfile) reads wav, flac, ogg (vorbis and opus) and mp3; torchaudio.load needs
torchcodec and FFmpeg, so it is not used. A speech model that is given another sample rate
hears another pitch and tempo, and nothing else shows it: so a file of another rate, or with two
channels, is refused unless the options say that it is wanted.

libsndfile takes a wav file that was cut short for a shorter one; its own header tells. Of a cut Ogg
file nothing does: it is as long as what is left of it.

Shapes: S samples.
"""

from __future__ import annotations

import errno
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from suite.errors import ConfigError, shown

SAMPLE_RATE = 16_000
# Names that count as audio in a folder, in lower case.
EXTENSIONS = (".flac", ".wav", ".ogg", ".opus", ".oga", ".mp3")
# libsndfile 1.2.2 seeks to other samples in the last second of Ogg/Vorbis, and at places of MP3.
SEEKABLE = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "FLAC")
SLACK = 64  # bytes by which writers of wav files are known to miscount
UNKNOWN_SIZE = 0x7FFF_0000  # what a program writes into a wav header when it writes to a pipe

Wave = npt.NDArray[np.float32]


class AudioError(Exception):
    """A file that cannot be used. path: of the file; reason: what is wrong and what to do."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{shown(self.path)}: {self.reason}"


class UnreadableError(AudioError):
    """A file that the disk or the system does not give: that is no matter of one clip."""


def probe(path: str | os.PathLike[str]) -> tuple[int, int, int]:
    """(samples of a channel, sample rate, channels), as the header says. Raises AudioError."""
    name = os.fspath(path)
    soundfile = load_soundfile()
    check_file(name)
    try:
        info = soundfile.info(encoded(name))
    except soundfile.LibsndfileError as error:
        raise AudioError(name, why_not(name, error)) from None
    if info.frames < 1:
        raise AudioError(name, "has no samples")
    return int(info.frames), int(info.samplerate), int(info.channels)


def check_format(
    path: str, *, rate: int, channels: int, resample: bool, mix_channels: bool
) -> None:
    """Raise AudioError for a rate or a number of channels that the options do not allow."""
    if rate != SAMPLE_RATE and not resample:
        raise AudioError(
            path,
            f"is sampled at {rate} Hz, expected {SAMPLE_RATE}; set data.resample=true to resample "
            "it",
        )
    if channels != 1 and not mix_channels:
        raise AudioError(
            path, f"has {channels} channels, expected 1; set data.mix_channels=true to average them"
        )


def resampled_length(samples: int, rate: int) -> int:
    """Samples at 16 kHz of a file of `samples` at `rate`."""
    return -(-samples * SAMPLE_RATE // rate)


def read(
    path: str | os.PathLike[str] | BinaryIO, *, start: int = 0, count: int | None = None
) -> Wave:
    """[S] samples from `start` on, at 16 kHz, channels averaged, in -1 to 1.

    start, count: in samples at 16 kHz; count=None: to the end. A file of another rate is resampled
    as a whole first, so that a part of it is a part of the whole.
    Raises AudioError for a file that cannot be decoded or has fewer samples.
    """
    soundfile = load_soundfile()
    if isinstance(path, (str, os.PathLike)):
        name = os.fspath(path)
        check_file(name)
        source: Any = encoded(name)
    else:
        name, source = str(getattr(path, "name", "audio")), path
    try:
        with soundfile.SoundFile(source) as file:
            rate = file.samplerate
            direct = rate == SAMPLE_RATE
            audio = decode(
                file, name, start=start if direct else 0, count=count if direct else None
            )
    except soundfile.LibsndfileError as error:
        raise AudioError(name, why_not(name, error)) from None
    wave: Wave = audio[:, 0] if audio.shape[1] == 1 else audio.mean(axis=1)
    if not np.isfinite(wave).all():
        raise AudioError(name, "has samples that are not finite")
    return wave if direct else part(resample(wave, rate), name, start=start, count=count)


def decode(file: Any, name: str, *, start: int, count: int | None) -> Wave:
    """[S, channels] samples of an open SoundFile, at its own rate."""
    whole = file.frames
    wanted = whole - start if count is None else count
    if start + wanted > whole:
        raise AudioError(name, f"has {whole} samples, expected {start + wanted} or more")
    passed_over = start
    if start and file.format in SEEKABLE:
        passed_over = 0
        file.seek(start)
    audio: Wave = file.read(passed_over + wanted, dtype="float32", always_2d=True)[passed_over:]
    if len(audio) < wanted:
        raise AudioError(name, f"is cut short or damaged ({start + len(audio)} of {whole} samples)")
    return audio


def part(wave: Wave, path: str, *, start: int, count: int | None) -> Wave:
    """`count` samples of `wave` from `start` on. Raises AudioError if it has fewer."""
    stop = len(wave) if count is None else start + count
    if stop > len(wave) or start > stop:
        raise AudioError(path, f"has {len(wave)} samples at 16 kHz, expected {stop} or more")
    return wave[start:stop]


def resample(wave: Wave, rate: int) -> Wave:
    """[S] samples at `rate` -> at 16 kHz, by torchaudio's windowed sinc."""
    wanted = resampled_length(len(wave), rate)
    with torch.inference_mode():
        found: Wave = resampler(rate)(torch.from_numpy(np.ascontiguousarray(wave))).numpy()
    # torchaudio computes its length in float32: of half an hour and more it may be one sample off
    return found[:wanted] if len(found) >= wanted else np.pad(found, (0, wanted - len(found)))


@lru_cache(maxsize=16)
def resampler(rate: int) -> Any:
    """torchaudio's resampling from one rate, whose kernel takes longer to make than to use."""
    try:
        from torchaudio.transforms import Resample
    except ImportError as error:
        raise ConfigError(
            f"data.resample=true needs torchaudio, which cannot be imported ({first_line(error)}): "
            "pip install torchaudio==2.11.*"
        ) from None
    return Resample(rate, SAMPLE_RATE)


def load_soundfile() -> Any:
    """The module soundfile. Raises ConfigError if it cannot be imported."""
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: its library libsndfile is missing
        raise ConfigError(
            f"audio files need soundfile, which cannot be imported ({first_line(error)}): "
            "pip install soundfile"
        ) from None
    return soundfile


# --- why a file is refused ------------------------------------------------------------------------


def check_file(name: str) -> None:
    """Raise AudioError for what libsndfile would give a wrong or no reason for."""
    try:
        with open(name, "rb") as file:  # noqa: PTH123
            head, size = file.read(12), os.fstat(file.fileno()).st_size
            guessed = is_mp3(head) and not says_length(file, head)
    except IsADirectoryError:
        raise AudioError(name, "is a folder, not an audio file") from None
    except FileNotFoundError:
        raise AudioError(name, "does not exist") from None
    except OSError as error:
        kind = UnreadableError if error.errno in (errno.EIO, errno.ESTALE) else AudioError
        raise kind(name, f"cannot be read ({error.strerror or error})") from None
    if not size:
        raise AudioError(name, "is an empty file")
    if guessed:
        raise AudioError(
            name,
            "is an mp3 without a Xing, Info or VBRI header, whose length can only be guessed; "
            "write it again, with ffmpeg or lame, or as flac",
        )
    if head[:4] == b"RIFF" and head[8:] == b"WAVE":
        said = int.from_bytes(head[4:8], "little")
        if size + SLACK < said < UNKNOWN_SIZE:
            raise AudioError(name, f"is cut short ({size:,} of {said + 8:,} bytes)")


def is_mp3(head: bytes) -> bool:
    """Whether a file's first bytes are an ID3 tag's or an MPEG audio frame's, layer 1 to 3."""
    return head[:3] == b"ID3" or (
        len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 0x06 != 0
    )


def says_length(file: BinaryIO, head: bytes) -> bool:
    """Whether the first frame of an mp3 says how many there are.

    Without that libsndfile takes the first frame's bit rate for all, and of a variable one it then
    reads some of the file, or more than there is.
    """
    tag = 0
    for byte in head[6:10] if head[:3] == b"ID3" else b"":  # its size: seven bits a byte
        tag = tag << 7 | byte & 0x7F
    file.seek(tag + 10 if tag else 0)
    first = file.read(4096)
    return any(mark in first for mark in (b"Xing", b"Info", b"VBRI"))


def why_not(name: str, error: Any) -> str:
    """Words for an error of libsndfile."""
    text = " ".join(str(getattr(error, "error_string", error)).split()).rstrip(".")
    if "not recognised" not in text:
        return f"cannot be decoded ({text})"
    what = "is no audio that libsndfile reads"
    if Path(name).suffix.lower() in (".m4a", ".mp4", ".aac", ".wma", ".g722", ".amr"):
        what = f"is {Path(name).suffix[1:]} audio, which libsndfile does not read"
    return f"{what}; wav, flac, ogg and mp3 it does"


def first_line(error: Exception) -> str:
    """An error's text, in one line that is not long."""
    return " ".join(str(error).split())[:200]


def encoded(name: str) -> str | bytes:
    """A path as soundfile needs it: its own encoding fails for bytes that are no text."""
    return os.fsencode(name) if os.name == "posix" else name
