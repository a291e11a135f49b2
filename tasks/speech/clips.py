"""A sequence of clips: how long each is, what it is called and says, and its samples.

ZipClips are the sets inside the package: a zip with Ogg/Opus members and an index.tsv. FileClips
are files on the user's disk, whose lengths `tasks.speech.index` has found.

Names and transcripts are kept as one array each: LibriSpeech has 281,241 files, and a Python string
for each would be copied, page by page, into every worker that looks at it.

Shapes: N clips, S samples.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, overload

import numpy as np
import numpy.typing as npt

from suite.errors import ConfigError, shown
from tasks.speech.audio import (
    SAMPLE_RATE,
    AudioError,
    Wave,
    load_soundfile,
    part,
    read,
    resampled_length,
)

Lengths = npt.NDArray[np.int64]
INDEX, COLUMNS = "index.tsv", ("name", "split", "samples", "text", "speaker")


class Clips(Protocol):
    """Clips at 16 kHz, mono.

    lengths: [N] samples of each. names: relative paths, unique. texts: normalised transcripts, or
    None where there are none. faults: clips that are known to be unusable, and why.
    """

    @property
    def lengths(self) -> Lengths: ...

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def texts(self) -> Sequence[str] | None: ...

    @property
    def faults(self) -> Mapping[int, str]: ...

    def path(self, index: int) -> str: ...

    def read(self, index: int, *, start: int = 0, count: int | None = None) -> Wave: ...


class Lines(Sequence[str]):
    """Strings in one array of bytes."""

    def __init__(self, strings: Iterable[str]) -> None:
        parts = [os.fsencode(string) for string in strings]
        self.text = np.frombuffer(b"".join(parts), dtype=np.uint8)
        self.ends = np.cumsum(np.array([0, *map(len, parts)], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start, stop = self.ends[index % len(self)], self.ends[index % len(self) + 1]
        return os.fsdecode(self.text[start:stop].tobytes())


class FileClips:
    """Audio files below a folder.

    paths: of the files. names: what they are called in messages and hashes. samples, rates: [N], as
    the files have them; samples are 0 where `faults` says what is wrong.
    """

    def __init__(
        self,
        paths: Iterable[str],
        *,
        names: Iterable[str],
        samples: Lengths,
        rates: Lengths,
        texts: Iterable[str] | None = None,
        faults: Mapping[int, str] | None = None,
    ) -> None:
        self.paths, self.names = Lines(paths), Lines(names)
        self.texts = Lines(texts) if texts is not None else None
        self.samples, self.rates, self.faults = samples, rates, dict(faults or {})
        lengths = [resampled_length(int(s), int(r)) for s, r in zip(samples, rates, strict=True)]
        self.lengths = np.array(lengths, dtype=np.int64)

    def path(self, index: int) -> str:
        """The file of a clip."""
        return self.paths[index]

    def read(self, index: int, *, start: int = 0, count: int | None = None) -> Wave:
        """[S] samples of a clip from `start` on. Raises AudioError."""
        stop = int(self.lengths[index])
        return read(self.paths[index], start=start, count=stop - start if count is None else count)


class ZipClips:
    """The clips of a zip that holds index.tsv and `<name>.opus` of each.

    A clip is decoded once in each process and kept as int16. splits: of each clip, "train", "val"
    or "test".
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        rows = read_index(file)
        self.names = [row["name"] for row in rows]
        self.splits = [row["split"] for row in rows]
        self.texts = [row["text"] for row in rows]
        self.lengths = np.array([int(row["samples"]) for row in rows], dtype=np.int64)
        self.faults: dict[int, str] = {}
        self.decoded: dict[int, npt.NDArray[np.int16]] = {}
        self.archive: tuple[int, zipfile.ZipFile] | None = None  # and the process that opened it

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "archive": None, "decoded": {}}

    def path(self, index: int) -> str:
        """The zip and the member in it."""
        return f"{self.file}/{self.names[index]}.opus"

    def read(self, index: int, *, start: int = 0, count: int | None = None) -> Wave:
        """[S] samples of a clip from `start` on. Raises AudioError."""
        if index not in self.decoded:
            self.decoded[index] = self.decode(index)
        found = self.decoded[index]
        stop = len(found) if count is None else start + count
        wave: Wave = found[start:stop].astype(np.float32)
        wave /= 32768
        return part(wave, self.path(index), start=0, count=stop - start)

    def decode(self, index: int) -> npt.NDArray[np.int16]:
        """All of a clip."""
        soundfile, path = load_soundfile(), self.path(index)
        try:
            content = self.opened().read(f"{self.names[index]}.opus")
            # a file and no BytesIO: Ctrl-C in a callback from C is swallowed, with a traceback
            with tempfile.TemporaryFile() as file:
                file.write(content)
                file.seek(0)
                found, rate = soundfile.read(file.fileno(), dtype="int16", closefd=False)
        except (OSError, KeyError, zipfile.BadZipFile, soundfile.LibsndfileError) as error:
            raise AudioError(path, f"cannot be decoded ({' '.join(str(error).split())})") from None
        if rate != SAMPLE_RATE or found.ndim != 1 or len(found) != self.lengths[index]:
            raise AudioError(path, f"is not the {self.lengths[index]} samples that {INDEX} says")
        pcm: npt.NDArray[np.int16] = found
        return pcm

    def opened(self) -> zipfile.ZipFile:
        """The archive, opened by this process: a fork shares the position in the file."""
        if self.archive is None or self.archive[0] != os.getpid():
            self.archive = (os.getpid(), zipfile.ZipFile(self.file))
        return self.archive[1]


def read_index(file: Path) -> list[dict[str, str]]:
    """The rows of a zip's index.tsv. Raises ConfigError for a zip that is not of this kind."""
    try:
        with zipfile.ZipFile(file) as archive:
            lines = archive.read(INDEX).decode("utf-8").splitlines()
        if tuple(lines[0].split("\t")) != COLUMNS:
            raise ValueError(f"{INDEX} does not begin with {', '.join(COLUMNS)}")
        return [dict(zip(COLUMNS, line.split("\t"), strict=True)) for line in lines[1:]]
    except (OSError, KeyError, IndexError, ValueError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{shown(str(file))} is no zip of clips ({reason})") from None
