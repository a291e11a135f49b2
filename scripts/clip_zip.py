"""Write speech clips as the zip that `tasks.speech.clips.ZipClips` reads.

A zip with stored members: `index.tsv` (name, split, samples at 16 kHz, text, speaker) and an
Ogg/Opus file `<name>.opus` of each clip. Opus because a minute takes 0.18 MB and soundfile
decodes it; RFC 7845 is its Ogg form. libsndfile gives each stream a random serial number and
reserves 700 bytes for comments; both are rewritten, so that equal audio and equal versions of
libsndfile and libopus give equal bytes.
"""

from __future__ import annotations

import hashlib
import io
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile

RATE = 16_000
COMPRESSION_LEVEL = 0.936  # on libsndfile's scale, 0 is 256 and 1 is 6 kbit/s: 22 kbit/s
MIDNIGHT_1980 = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip archive can hold
COLUMNS = ("name", "split", "samples", "text", "speaker")
SPLITS = ("train", "val", "test")
PAGE = struct.Struct("<4sBBqIIIB")  # RFC 3533, up to the number of segments

Audio = npt.NDArray[np.int16]


@dataclass(frozen=True)
class Clip:
    """One clip to write. audio: int16 [samples] at 16 kHz; text: letters, or empty if unknown."""

    name: str
    split: str
    text: str
    speaker: str
    audio: Audio


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        crc = value << 24
        for _ in range(8):
            crc = (crc << 1) ^ (0x04C11DB7 if crc & 0x80000000 else 0)
        table.append(crc & 0xFFFFFFFF)
    return table


CRC_TABLE = _crc_table()


def ogg_crc(page: bytes) -> int:
    """The checksum of an Ogg page whose checksum field is zero (RFC 3533, section 6)."""
    crc = 0
    for byte in page:
        crc = ((crc << 8) & 0xFFFFFFFF) ^ CRC_TABLE[(crc >> 24) ^ byte]
    return crc


def _without_padding(tags: bytes) -> bytes:
    """An OpusTags packet that holds the encoder's name and no comments (RFC 7845, section 5.2)."""
    if not tags.startswith(b"OpusTags"):
        raise ValueError("the second Ogg page does not begin with OpusTags")
    (vendor,) = struct.unpack_from("<I", tags, 8)
    return tags[: 12 + vendor] + struct.pack("<I", 0)


def plain_pages(opus: bytes, *, serial: int) -> bytes:
    """The same Opus stream under another serial number and with the shortest comment header."""
    out, at = [], 0
    while at < len(opus):
        magic, version, kind, granule, _, number, _, segments = PAGE.unpack_from(opus, at)
        if magic != b"OggS":
            raise ValueError(f"no Ogg page at byte {at}")
        lacing = opus[at + PAGE.size : at + PAGE.size + segments]
        start = at + PAGE.size + segments
        at = start + sum(lacing)
        body = opus[start:at]
        if number == 1:
            body = _without_padding(body)
            lacing = bytes([255] * (len(body) // 255) + [len(body) % 255])
        fields = (magic, version, kind, granule, serial, number)
        blank = PAGE.pack(*fields, 0, len(lacing)) + lacing + body
        out.append(PAGE.pack(*fields, ogg_crc(blank), len(lacing)) + lacing + body)
    return b"".join(out)


def encode(audio: Audio, *, name: str) -> bytes:
    """An Ogg/Opus file of the samples; its serial number is made of the name."""
    buffer = io.BytesIO()
    soundfile.write(
        buffer, audio, RATE, format="OGG", subtype="OPUS", compression_level=COMPRESSION_LEVEL
    )
    serial = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return plain_pages(buffer.getvalue(), serial=serial)


def decode(opus: bytes) -> npt.NDArray[np.float32]:
    """The samples that soundfile gives; a ValueError if they are not mono at 16 kHz."""
    audio, rate = soundfile.read(io.BytesIO(opus), dtype="float32")
    if rate != RATE or audio.ndim != 1:
        raise ValueError(f"decodes to {rate} Hz and {audio.ndim} dimensions, not to mono 16 kHz")
    return audio


def write_zip(path: Path, clips: Sequence[Clip]) -> dict[str, tuple[int, float]]:
    """Write the clips in the order of their names; returns each split's clips and seconds."""
    sizes = dict.fromkeys(SPLITS, (0, 0.0))
    rows, members = ["\t".join(COLUMNS)], []
    for clip in sorted(clips, key=lambda clip: clip.name):
        opus = encode(clip.audio, name=clip.name)
        samples = len(decode(opus))
        rows.append("\t".join((clip.name, clip.split, str(samples), clip.text, clip.speaker)))
        members.append((f"{clip.name}.opus", opus))
        count, seconds = sizes[clip.split]
        sizes[clip.split] = (count + 1, seconds + samples / RATE)
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in [("index.tsv", "\n".join([*rows, ""]).encode()), *members]:
            entry = zipfile.ZipInfo(name, date_time=MIDNIGHT_1980)
            entry.external_attr = 0o644 << 16
            entry.create_system = 3  # or zipfile writes the system that it runs on
            archive.writestr(entry, content)
    return sizes


def report(path: Path, sizes: dict[str, tuple[int, float]]) -> None:
    """Print the figures that belong in tasks/speech/assets/DATA.md."""
    print(f"{path}: {path.stat().st_size:,} bytes")
    print(f"sha256  {hashlib.sha256(path.read_bytes()).hexdigest()}")
    for split, (count, seconds) in sizes.items():
        print(f"{split:6}  {count} clips, {seconds:.1f} s")
    versions = f"libsndfile {soundfile.__libsndfile_version__}, soundfile {soundfile.__version__}"
    print(f"made by {versions}")
