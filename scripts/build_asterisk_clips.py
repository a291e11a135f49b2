"""Build the embedded clips of real speech from two packages of Debian's asterisk-core-sounds.

    python -m scripts.build_asterisk_clips [ROOT] [--out FILE]

Needs the Debian packages `asterisk-core-sounds-en-g722` (the recordings) and
`asterisk-core-sounds-en` (the transcripts), installed or unpacked by `dpkg-deb -x` under ROOT, and
the PyPI packages `av` (decodes G.722) and `soundfile`. The choice of clips and their splits needs
no random numbers. The figures that are printed belong in tasks/speech/assets/DATA.md.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from scripts.clip_zip import RATE, Audio, Clip, report, write_zip

SOUNDS = Path("usr/share/asterisk/sounds/en_US_f_Allison")
TRANSCRIPTS = Path("usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
OUT = Path(__file__).parents[1] / "tasks" / "speech" / "assets" / "asterisk_en.zip"
SPEAKER = "allison_smith"
SHORTEST, LONGEST = 0.5, 4.0  # seconds
VAL_SHARE, TEST_SHARE = 0.09, 0.07
SOUND_ONLY = re.compile(r"[\[<].*[\]>]")  # a transcript that describes a tone or a noise
SIGN_NAMED = re.compile(r"\s*\[.\]$")  # "dot [.]": the sign that the word stands for, not spoken
NOT_SPOKEN = re.compile(r"[.,!?:\-\s]+")


def transcripts(path: Path) -> dict[str, str]:
    """The published text of each recording by its name."""
    texts = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            name, colon, text = line.strip().partition(":")
            if colon and not name.startswith(";"):
                texts[name.strip()] = text.strip()
    return texts


def letters(text: str) -> str:
    """Capital letters, apostrophes and single spaces; empty where a digit or a sign is read out."""
    plain = NOT_SPOKEN.sub(" ", SIGN_NAMED.sub("", text)).strip().upper()
    return plain if re.fullmatch(r"[A-Z' ]+", plain) else ""


def split_of(name: str) -> str:
    """A split by the name's hash, so that it never depends on which other clips there are."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    if place < VAL_SHARE:
        return "val"
    return "test" if place < VAL_SHARE + TEST_SHARE else "train"


def decode_g722(path: Path) -> Audio:
    """int16 samples at 16 kHz; two of them are one byte of the file, which has no header."""
    import av

    with av.open(str(path), format="g722") as container:
        parts = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
    audio = np.concatenate(parts)
    if audio.dtype != np.int16 or len(audio) != 2 * path.stat().st_size:
        raise ValueError(f"{path} decodes to {len(audio)} samples of {audio.dtype}")
    return audio


def choose(root: Path) -> Iterator[Clip]:
    """The clips between 0.5 and 4 seconds that are speech and that no other clip repeats."""
    texts = transcripts(root / TRANSCRIPTS)
    seen: set[str] = set()
    for path in sorted((root / SOUNDS).rglob("*.g722")):
        name = path.relative_to(root / SOUNDS).with_suffix("").as_posix()
        if name.startswith("silence/") or SOUND_ONLY.fullmatch(texts[name]):
            continue
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        seconds = 2 * path.stat().st_size / RATE
        if digest in seen or not SHORTEST <= seconds <= LONGEST:
            continue
        seen.add(digest)
        yield Clip(name, split_of(name), letters(texts[name]), SPEAKER, decode_g722(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "root", nargs="?", type=Path, default=Path("/"), help="folder that holds usr/share"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    for part in (SOUNDS, TRANSCRIPTS):
        if not (options.root / part).exists():
            parser.error(f"{options.root / part} does not exist; install or unpack both packages")
    clips = list(choose(options.root))
    report(options.out, write_zip(options.out, clips))
    print(f"{sum(not clip.text for clip in clips)} clips without a text")


if __name__ == "__main__":
    main()
