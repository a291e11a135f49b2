"""Documents of text files and JSON lines, in order and in pieces that a process can work on.

A corpus may be larger than the memory and is read once, by one process, which hands out pieces of
some MB: whole lines of a file, or the names of a few files. A piece says where it ends, so that
reading can go on behind it; its documents are told apart where it is worked on. Where pieces are
cut changes no document.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

from suite.errors import ConfigError, DataError, shown
from tasks.language.magic import MAGIC, kind_of

PIECE = 4 << 20  # bytes of text that a process works on at a time
LONGEST = 1 << 30  # bytes of a line, of what stands between two blank lines, or of a document
LOOKED_AT = 1000  # files whose first bytes are looked at before anything is written
JSON_LINES = (".jsonl", ".ndjson")
BOM = b"\xef\xbb\xbf"
Cut = Literal["file", "line", "paragraph"]
Kind = Literal["json", "file", "line", "paragraph"]


@dataclass(frozen=True)
class Source:
    """A file of a corpus. name: below the corpus' folder. mtime: in nanoseconds."""

    path: Path
    name: str
    size: int
    mtime: int

    @property
    def json(self) -> bool:
        """Whether its documents are JSON lines."""
        return self.name.lower().removesuffix(".gz").endswith(JSON_LINES)


@dataclass(frozen=True)
class Position:
    """Where reading goes on: in which source, at which byte of it (unpacked), in which line."""

    source: int = 0
    offset: int = 0
    line: int = 1


@dataclass(frozen=True)
class Piece:
    """Documents to work on.

    content: whole lines of sources[0], from its line `line` on; None: all of each source, a
    document each. after: where the next piece begins. read: bytes of the files up to there.
    """

    kind: Kind
    sources: tuple[Source, ...]
    line: int
    content: bytes | None
    after: Position
    read: int


@dataclass(frozen=True)
class Document:
    """A text, or why it is broken. where: its file and line, for messages."""

    text: str
    where: str
    broken: str | None = None


# --- which files ----------------------------------------------------------------------------------


def list_sources(path: Path, *, suffixes: Sequence[str]) -> list[Source]:
    """The file, or the files of a folder by the ends of their names, in order of their names.

    What begins with a dot is passed over. Raises ConfigError for what is not there, for a folder
    without such files and for a file that is no text.
    """
    try:
        if path.is_dir():
            files = sorted(walk(path, suffixes), key=lambda file: file.relative_to(path).as_posix())
            found = [source_of(file, file.relative_to(path).as_posix()) for file in files]
        else:
            found = [source_of(path, path.name)]
    except OSError as error:
        name = path if error.filename is None else error.filename
        raise ConfigError(f"{shown(name)} cannot be read ({error.strerror})") from None
    if not found:
        raise ConfigError(
            f"{shown(path)} has no file whose name ends in {', '.join(suffixes)}; "
            "--suffix says which to take, such as --suffix .txt,.md"
        )
    for source in found[:LOOKED_AT]:
        if (kind := not_text(head_of(source))) is not None:
            raise ConfigError(f"{shown(source.path)} is no text but {kind}")
    if not any(source.size for source in found):
        raise ConfigError(f"{shown(path)} is empty: there is no text to make tokens of")
    return found


def walk(folder: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    """The files below a folder whose names end so."""
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(tuple(suffixes)) and not name.startswith("."):
                yield Path(where) / name


def source_of(file: Path, name: str) -> Source:
    """A file with its size and time. Raises ConfigError for one of JSON that has no lines."""
    if name.lower().removesuffix(".gz").endswith(".json"):
        raise ConfigError(
            f"{shown(file)}: JSON lines are needed, an object a line, in a file whose name ends in "
            ".jsonl or .jsonl.gz"
        )
    stat = file.stat()
    return Source(file, name, stat.st_size, stat.st_mtime_ns)


def open_source(source: Source) -> BinaryIO:
    """Its bytes, unpacked."""
    if source.name.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.open(source.path, "rb"))
    return source.path.open("rb")


def head_of(source: Source) -> bytes:
    """The first bytes of it, unpacked. Raises ConfigError."""
    try:
        with open_source(source) as opened:
            return opened.read(8192)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{shown(source.path)} cannot be read ({reason(error)})") from None


def not_text(head: bytes) -> str | None:
    """What a file is that is no text, by its first bytes; None: it may be text."""
    kind = kind_of(head)
    if kind == MAGIC[b"\x1f\x8b"]:
        return f"{kind} (its name must end in .gz)"
    if kind is not None:
        return kind
    return "binary (it has bytes of zero)" if b"\0" in head else None


def reason(error: Exception) -> str:
    """Why a file cannot be read."""
    if isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)):
        return "its gzip is damaged or not whole"
    return getattr(error, "strerror", None) or str(error)


# --- pieces ---------------------------------------------------------------------------------------


def pieces(sources: Sequence[Source], *, cut: Cut, start: Position) -> Iterator[Piece]:
    """The corpus from `start` on. cut: what a document of a text file is.

    Raises DataError for a file that cannot be read.
    """
    done = sum(source.size for source in sources[: start.source])
    at = start
    while at.source < len(sources):
        source = sources[at.source]
        if cut == "file" and not source.json:
            some = together(sources, at.source)
            done += sum(each.size for each in some)
            at = Position(at.source + len(some))
            yield Piece("file", some, 1, None, at, done)
        else:
            kind: Kind = "json" if source.json else cut
            try:
                yield from lines_of(source, kind, at=at, done=done)
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(f"{shown(source.path)} cannot be read ({reason(error)})") from None
            done += source.size
            at = Position(at.source + 1)


def together(sources: Sequence[Source], first: int) -> tuple[Source, ...]:
    """Text files from `first` on that make up a piece."""
    size, last = sources[first].size, first + 1
    while last < len(sources) and not sources[last].json and size + sources[last].size <= PIECE:
        size += sources[last].size
        last += 1
    return tuple(sources[first:last])


def lines_of(source: Source, kind: Kind, *, at: Position, done: int) -> Iterator[Piece]:
    """The pieces of one file, from `at` on."""
    with open_source(source) as opened:
        raw = getattr(opened, "fileobj", None) or opened  # of a .gz the file that is packed
        if at.offset == 0 and (found := not_text(opened.read(8192))) is not None:
            raise DataError(f"{shown(source.path)} is no text but {found}")
        opened.seek(at.offset)  # of a .gz by unpacking what is before
        offset, line = at.offset, at.line
        while content := whole_lines(opened, source, kind=kind, line=line):
            offset, begun = offset + len(content), line
            line += content.count(b"\n")
            read = done + min(raw.tell(), source.size)
            after = Position(at.source, offset, line)
            yield Piece(kind, (source,), begun, content, after, read)


def whole_lines(opened: BinaryIO, source: Source, *, kind: Kind, line: int) -> bytes:
    """The next lines, some MB of them; of paragraphs up to a blank line."""
    content = opened.read(PIECE)
    rest = opened.readline(LONGEST) if content and not content.endswith(b"\n") else b""
    parts, size = [content, rest], len(content) + len(rest)
    last = content[content.rfind(b"\n", 0, -1) + 1 :] + rest
    while kind == "paragraph" and last.strip() and size < LONGEST:
        last = opened.readline(LONGEST)
        parts.append(last)
        size += len(last)
    if size >= LONGEST:
        raise DataError(
            f"{shown(source.path)} after line {line:,} has more than {LONGEST >> 30} GiB without "
            f"{'a blank line' if kind == 'paragraph' else 'the end of a line'}"
        )
    return b"".join(parts)


# --- documents ------------------------------------------------------------------------------------


def documents(piece: Piece, *, text_key: str) -> Iterator[Document]:
    """The documents of a piece, in order. text_key: the field of JSON lines that holds the text.

    Raises DataError for a file that cannot be read.
    """
    if piece.content is None:
        for source in piece.sources:
            yield whole_file(source)
        return
    path = shown(piece.sources[0].path)
    content = piece.content.removeprefix(BOM) if piece.line == 1 else piece.content
    cut = paragraphs(content) if piece.kind == "paragraph" else enumerate(content.split(b"\n"))
    for number, part in cut:
        if part.strip(b" \t\r"):
            where = f"{path} line {piece.line + number:,}"
            text, broken = decoded(part.removesuffix(b"\r"))
            if piece.kind == "json" and broken is None:
                text, broken = field_of(text, text_key)
            yield Document(text, where, broken)


def whole_file(source: Source) -> Document:
    """A file that is a document."""
    try:
        with open_source(source) as opened:
            content = opened.read(LONGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        return Document("", shown(source.path), f"cannot be read ({reason(error)})")
    if len(content) > LONGEST:  # a .gz of a MB may unpack to as much
        return Document("", shown(source.path), f"has more than {LONGEST >> 30} GiB; divide it")
    if (kind := not_text(content[:8192])) is not None:
        return Document("", shown(source.path), f"is no text but {kind}")
    text, broken = decoded(content.removeprefix(BOM))
    return Document(text, shown(source.path), broken)


def paragraphs(content: bytes) -> Iterator[tuple[int, bytes]]:
    """(number of its first line, text) of what stands between blank lines."""
    first, lines = 0, list[bytes]()
    for number, line in enumerate(content.split(b"\n")):
        if line.strip():
            first = first if lines else number
            lines.append(line.removesuffix(b"\r"))
        elif lines:
            yield first, b"\n".join(lines)
            lines = []
    if lines:
        yield first, b"\n".join(lines)


def decoded(content: bytes) -> tuple[str, str | None]:
    """(text, why it is none)."""
    try:
        return content.decode(), None
    except UnicodeDecodeError as error:
        return "", f"is not UTF-8 text (byte {error.start:,})"


def field_of(line: str, key: str) -> tuple[str, str | None]:
    """(text of a JSON line, why it has none)."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return "", f"is not JSON ({getattr(error, 'msg', 'nested too deep')})"
    if not isinstance(record, dict):
        return "", f'is no object such as {{"{key}": "..."}}'
    text = record.get(key)
    if not isinstance(text, str):
        known = ", ".join(map(str, list(record)[:5])) or "no field"
        return "", f"has no text in the field {key!r} (it has {shown(known)[:100]})"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "", f"has half a character in {key!r} (a lone surrogate)"
    return text, None
