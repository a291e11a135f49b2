"""Real files that are broken in the ways in which files break, for tests.

`PICTURES` and `CLIPS` say how a good file becomes a broken one. Each is (what it does, words that
the message about it holds); `KNOWN_BEFORE` are those of CLIPS that a header shows, so that they are
found before training.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

from tasks.speech.clips import ZipClips
from tasks.speech.embedded import ASSETS

Harm = Callable[[Path], object]


def keep_share(share: float) -> Harm:
    """Cut a file short."""
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def png_chunk(kind: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def bomb(side: int) -> Harm:
    """A PNG of a few bytes that says it has side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"")
    return lambda path: path.write_bytes(content)


def float_pixels(path: Path) -> None:
    """A mode of which nothing says what is white."""
    from PIL import Image

    Image.fromarray(np.ones((8, 8), np.float32)).save(path, "TIFF")


def link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("moved away.jpg")


PICTURES: dict[str, tuple[Harm, str]] = {
    "cut to 2 %": (keep_share(0.02), "cannot be decoded"),
    "cut to half": (keep_share(0.5), "truncated"),
    "cut to 97 %": (keep_share(0.97), "truncated"),
    "empty": (lambda path: path.write_bytes(b""), "empty file"),
    "text": (lambda path: path.write_text("<html>404 Not Found</html>"), "none of JPEG, PNG"),
    "zeros": (lambda path: path.write_bytes(bytes(path.stat().st_size)), "none of JPEG, PNG"),
    "bomb": (bomb(60_000), "decompression bomb"),
    "floats": (float_pixels, "32-bit float pixels"),
    "link to nothing": (link_to_nothing, "cannot be read (No such file or directory)"),
}


def corrupt_exif(path: Path) -> None:
    """Put an EXIF block of nonsense into a JPEG, whose pixels stay as they are."""
    content, block = path.read_bytes(), b"Exif\0\0II*\0" + b"\xff" * 40
    path.write_bytes(
        content[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + content[2:]
    )


# --- speech ---------------------------------------------------------------------------------------


def speech() -> np.ndarray:
    """A minute or so of recorded speech, float32 at 16 kHz."""
    clips = ZipClips(ASSETS / "asterisk_en.zip")
    return np.concatenate([clips.read(i) for i in range(60)])


def write_clip(path: Path, samples: np.ndarray, *, rate: int = 16_000) -> None:
    soundfile.write(path, samples, rate)


def samples_become(value: float) -> Harm:
    """A float wav of which one sample in the middle is `value`."""

    def harm(path: Path) -> None:
        samples, rate = soundfile.read(path, dtype="float32")
        samples[len(samples) // 2] = value
        out = io.BytesIO()
        soundfile.write(out, samples, rate, format="WAV", subtype="FLOAT")
        path.write_bytes(out.getvalue())

    return harm


def wav_of(count: int, *, rate: int = 16_000) -> Harm:
    """So many samples of silence, at a rate."""

    def harm(path: Path) -> None:
        out = io.BytesIO()
        soundfile.write(out, np.zeros(count, np.float32), rate, format="WAV")
        path.write_bytes(out.getvalue())

    return harm


CLIPS: dict[str, tuple[Harm, str]] = {
    "empty": (lambda path: path.write_bytes(b""), "is an empty file"),
    "header alone": (lambda path: path.write_bytes(path.read_bytes()[:44]), "cut short"),
    "no samples": (wav_of(0), "has no samples"),
    "cut to half": (keep_share(0.5), "cut short"),
    "text": (lambda path: path.write_text("404"), "is no audio"),
    "8 kHz": (wav_of(16_000, rate=8_000), "is sampled at 8000 Hz"),
    "gone": (lambda path: path.unlink(), "does not exist"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "is a folder"),
    "nan": (samples_become(np.nan), "not finite"),
    "inf": (samples_become(np.inf), "not finite"),
}
KNOWN_BEFORE = tuple(name for name in CLIPS if name not in ("nan", "inf"))


# --- bases ----------------------------------------------------------------------------------------


def write_genome(folder: Path, *, bases: int, broken: dict[int, bytes]) -> None:
    """folder/g.fa, a piece of yeast's first chromosome in lines of 50, and g.bed.

    Three quarters are for training, the rest for validation. broken: what stands at some places
    instead of a base.
    """
    from tasks.dna.tokens import decode
    from tasks.dna.yeast import load_genome

    letters = bytearray(decode(load_genome().ids[0][20_000 : 20_000 + bases]).encode())
    for place, byte in broken.items():
        letters[place : place + 1] = byte
    lines = [bytes(letters[at : at + 50]) + b"\n" for at in range(0, bases, 50)]
    (folder / "g.fa").write_bytes(b">chrI\n" + b"".join(lines))
    cut = bases * 3 // 4
    (folder / "g.bed").write_text(f"chrI\t0\t{cut}\ttrain\nchrI\t{cut}\t{bases}\tvalid\n")
