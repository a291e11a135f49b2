"""A FASTA file read at random: `Fasta(file).fetch("chr1", 1000, 2000)` -> ids.

pyfaidx reads it, by the index (.fai) that samtools has too. What is added here: the index is
written beside the file or, where that folder is not writable, in the user's cache, at once or not
at all, since several processes start together; it is written anew if the file changed; each process
opens the file for itself, as two that share an offset read each other's bases; and what is wrong is
one line. A compressed file is refused: pyfaidx reads none without Biopython.

One byte that is no text makes pyfaidx refuse the whole genome. With on_error=skip such a byte is a
letter that is no base, so that it costs the window that holds it.
"""

from __future__ import annotations

import atexit
import hashlib
import io
import os
import re
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np

from suite.cache import cache_folder, say_once
from suite.errors import ConfigError, DataError, shown
from tasks.dna.tokens import AMBIGUOUS, BASES, encode

START = 65_536  # bytes in which a file shows whether it is FASTA
PACKED = (".gz", ".bgz", ".bz2", ".zip")  # what pyfaidx takes for compressed, by the name
NO_TEXT = "\x1a"  # ASCII's substitute character, in the place of a byte that is not ASCII
TO_ASCII = bytes([*range(128), *NO_TEXT.encode() * 128])  # for bytes.translate
NOT_IUPAC = re.compile(f"[^{BASES}U{AMBIGUOUS}]", re.IGNORECASE)


class LetterError(DataError):
    """A letter that is no base: a matter of the window that holds it, not of the file."""


class Fasta:
    """A FASTA file; `lengths` has the bases of every sequence, by name, in the file's order.

    name: what messages call the data. cache: where an index goes whose file's folder is not
    writable; None: the user's cache folder; "none": a temporary one. on_error: whether bytes that
    are not ASCII end the run when the file is indexed, or are letters that are no base.

    Raises ConfigError for a file that is not there, compressed, empty or not FASTA, whose lines are
    uneven, or in which two sequences have one name.
    """

    def __init__(
        self,
        file: Path,
        *,
        name: str = "genome",
        cache: str | None = None,
        on_error: Literal["fail", "skip"] = "fail",
    ) -> None:
        self.file, self.name = Path(os.path.abspath(file)), name  # noqa: PTH100
        self.on_error = on_error
        check_start(self.file, name)
        self.index = self._make_index(cache)
        self._reader: Any = None
        self._process = -1
        self.lengths: dict[str, int] = {
            key: record.rlen for key, record in self._open().index.items()
        }

    def fetch(self, chrom: str, start: int, end: int) -> np.ndarray:
        """The ids of chrom[start:end], 0-based, uint8; lower case is read as upper case.

        Raises LetterError for one that is not IUPAC, DataError for what cannot be read.
        """
        letters = self._letters(chrom, start, end)
        try:
            return encode(letters)
        except ValueError:
            found = NOT_IUPAC.search(letters)
            assert found is not None, "encode refuses what IUPAC has"
            what = "a byte that is not ASCII" if found[0] == NO_TEXT else repr(found[0])
            raise LetterError(
                self._at(chrom, start + found.start(), f"has {what}, which is not an IUPAC base")
            ) from None

    def masked(self, chrom: str, start: int, end: int) -> np.ndarray:
        """As fetch, with N for every letter that is not IUPAC. Raises DataError."""
        return encode(NOT_IUPAC.sub("N", self._letters(chrom, start, end)))

    def _letters(self, chrom: str, start: int, end: int) -> str:
        """chrom[start:end] as it is in the file, without line ends. Raises DataError."""
        try:
            letters: str = self._open().from_file(chrom, start + 1, end) if end > start else ""
        except (OSError, ValueError) as error:  # also what is not UTF-8
            what = f"cannot be read ({one_line(error)})"
            raise DataError(self._at(chrom, start, what)) from None
        if len(letters) != end - start:
            what = f"has {len(letters)} letters where its index has more"
            raise DataError(self._at(chrom, start, what))
        return letters

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None, "_process": -1}

    def _at(self, chrom: str, at: int, what: str) -> str:
        return f"data={self.name}: {shown(self.file)}: {chrom} position {at + 1:,} {what}"

    def _open(self) -> Any:
        """pyfaidx's reader of this process."""
        if self._process != os.getpid():
            self._reader = open_indexed(self.file, self.index, on_error=self.on_error)
            self._process = os.getpid()
        return self._reader

    # --- the index --------------------------------------------------------------------------------

    def _make_index(self, cache: str | None) -> Path:
        """An index that fits the file, made if there is none. Raises ConfigError."""
        where = self._places(cache)
        for index in where:
            if fits(self.file, index):
                return index
        for index in where:
            if self._write(index):
                return index
        index = temporary_folder() / f"{self.file.name}.fai"
        say_once(f"note: the index of {shown(self.file)} could not be kept; it is made each time")
        if not self._write(index):
            raise self._wrong("cannot be indexed: no folder, not even a temporary one, is writable")
        return index

    def _places(self, cache: str | None) -> list[Path]:
        """Where an index may lie: beside the file and in the cache."""
        beside = self.file.with_name(f"{self.file.name}.fai")
        folder = cache_folder(cache, kind="fasta")
        if folder is None:
            return [beside]
        path = hashlib.sha256(os.fsencode(self.file)).hexdigest()[:16]
        return [beside, folder / f"{path}.fai"]

    def _write(self, index: Path) -> bool:
        """Index the file; False if this place cannot be written. Raises ConfigError."""
        import pyfaidx

        try:
            index.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=index.parent, prefix=".fai-"))
        except OSError:
            return False
        try:
            new = folder / "new.fai"
            open_indexed(self.file, new, on_error=self.on_error).close()
            latest = max(new.stat().st_mtime_ns, self.file.stat().st_mtime_ns)
            os.utime(new, ns=(latest, latest))  # of a file from the future none would be new enough
            new.replace(index)  # at once: another process sees all of it or none
        except pyfaidx.FastaIndexingError as error:
            raise self._wrong(f"is not FASTA that can be indexed: {one_line(error)}") from None
        except UnicodeDecodeError:
            raise self._wrong(
                f"is not FASTA: it holds bytes that are not text, {no_text(self.file)}; convert it "
                "to ASCII, or with data.on_error=skip leave out the windows that hold them"
            ) from None
        except ValueError as error:
            raise self._wrong(f"has two sequences of one name: {one_line(error)}") from None
        except OSError:
            return False
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return True

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(f"data={self.name}: {shown(self.file)} {what}")


def check_start(file: Path, name: str) -> None:
    """Raise ConfigError unless `file` can be read, is not compressed, and starts as FASTA does."""
    try:
        with file.open("rb") as opened:
            start = opened.read(START)
    except OSError as error:
        raise ConfigError(
            f"data={name}: {shown(file)} cannot be read ({error.strerror}); set data.fasta=FILE to "
            "an uncompressed FASTA file"
        ) from None
    where = f"data={name}: {shown(file)}"
    if start[:2] == b"\x1f\x8b":
        out = file.with_suffix("") if file.suffix in (".gz", ".bgz") else f"{file}.fa"
        packed, unpacked = shlex.quote(shown(file)), shlex.quote(shown(out))  # to be copied
        raise ConfigError(
            f"{where} is gzip-compressed, and windows are read at random; unpack it: gzip -dc "
            f"{packed} > {unpacked}"
        )
    if file.name.lower().endswith(PACKED):
        raise ConfigError(f"{where} has a compressed file's name; unpack it, or rename it to .fa")
    if not start:
        raise ConfigError(f"{where} is empty; a FASTA file has '>NAME' and lines of bases")
    lines = [line for line in start.splitlines() if line.strip() and not line.startswith(b";")]
    if not lines or not lines[0].startswith(b">"):
        raise ConfigError(f"{where} is not FASTA: its first line does not start with '>'")


class AsciiFile(io.BufferedReader):
    """A FASTA file whose sequences have NO_TEXT for each byte that is not ASCII."""

    def __next__(self) -> bytes:
        line = super().__next__()
        return line if line.isascii() or line.startswith(b">") else line.translate(TO_ASCII)

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        return found if found.isascii() else found.translate(TO_ASCII)


def open_indexed(file: Path, index: Path, *, on_error: str) -> Any:
    """pyfaidx's reader; it writes the index if there is none."""
    import pyfaidx

    class Reader(pyfaidx.Faidx):  # type: ignore[misc]
        def build_index(self) -> None:
            if on_error == "skip":
                self.file: Any = AsciiFile(self.file.detach())
            super().build_index()

    reader = Reader(str(file), indexname=str(index), rebuild=False, as_raw=True)
    if on_error == "skip" and not isinstance(reader.file, AsciiFile):
        reader.file = AsciiFile(reader.file.detach())
    return reader


def no_text(file: Path) -> str:
    """The line of a file that is not UTF-8 first."""
    with file.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"the first, 0x{line[error.start]:02x}, in line {number:,}"
    return "which are gone now"


def fits(file: Path, index: Path) -> bool:
    """Whether an index is of this file: not older, and each record lies where it says.

    The time alone misses a file that was replaced by an older one.
    """
    try:
        if index.stat().st_mtime_ns < file.stat().st_mtime_ns:
            return False
        rows = [line.split("\t") for line in index.read_text("utf-8").splitlines()]
        size = file.stat().st_size
        with file.open("rb") as opened:
            for name, *numbers in rows:
                length, offset, bases, width = map(int, numbers)
                end = offset + length + (length // bases * (width - bases) if bases else 0)
                opened.seek(max(0, offset - len(name.encode()) - 1_000))
                header = opened.read(offset - opened.tell())
                header = header[header.rfind(b">") + 1 :]
                if end > size + width or not header.endswith(b"\n"):
                    return False
                if header.split()[:1] != [name.encode()]:
                    return False
        return bool(rows) and end + 2 * width >= size
    except (OSError, ValueError):
        return False


def temporary_folder() -> Path:
    """A folder that goes when the process that asked for it ends."""
    folder, process = tempfile.mkdtemp(prefix="dyt-suite-"), os.getpid()

    def remove() -> None:
        if os.getpid() == process:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return Path(folder)


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    text = " ".join(str(error).split())
    return text if text.isprintable() else ascii(text)
