"""Text files of a user: which there are, and that they are text.

A picture that is read as text trains a model without a word, so what is no text is refused by its
name and the first bytes of it that show what it is.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from suite.data import SKIP_LIMIT, too_many
from suite.errors import ConfigError, shown
from tasks.language.magic import kind_of

BOM = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """A file, or a part of one. name: its path below the root, with slashes."""

    name: str
    content: bytes


class Texts(NamedTuple):
    """What was read: the documents by name, notes, the files that are no text, of how many."""

    documents: list[Document]
    notes: list[str]
    left_out: list[str]
    listed: int


def read_all(
    root: Path, *, suffixes: str, utf8: bool, on_error: str = "fail", limit: float = SKIP_LIMIT
) -> Texts:
    """The documents. Raises ConfigError for what is no text, or for too much of it.

    on_error: "skip" leaves it out. limit: the largest share of the files that may be.
    """
    if not root.exists():
        raise ConfigError(
            f"data=text: data.root={shown(root)} is not there; name a text file or a folder of them"
        )
    if root.is_file():
        names = {root.name: root}
    else:
        names = find_texts(root, suffixes=suffixes)
    documents, left_out, faults = [], [], []
    for name, file in sorted(names.items(), key=lambda item: name_bytes(item[0])):
        try:
            documents.append(Document(name, read_text(file, utf8=utf8)))
        except ConfigError as error:
            if on_error == "fail":
                raise
            left_out.append(str(file))
            faults.append(str(error))
    if faults and (why := too_many(len(faults), len(names), limit=limit)):
        raise ConfigError(f"{faults[0]}; {why}")
    found = [each for each in documents if each.content]
    if not found:
        raise ConfigError(f"data=text: {shown(root)} has no text: {len(names)} files, all empty")
    empty = len(documents) - len(found)
    notes = [f"{empty:,} empty files are left out"] if empty else []
    return Texts(found, notes, left_out, len(names))


def find_texts(root: Path, *, suffixes: str) -> dict[str, Path]:
    """Files with the suffixes, by their path below root; hidden ones are not looked at."""
    wanted, names, others = endings(suffixes), {}, 0
    for folder, inner, files in os.walk(root, onerror=refuse):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in files:
            file = Path(folder, name)
            if name.startswith("."):
                continue
            if file.suffix.lower() in wanted:
                names[file.relative_to(root).as_posix()] = file
            else:
                others += 1
    if not names:
        has = f"{others:,} other files" if others else "no files at all"
        raise ConfigError(
            f"data=text: {shown(root)} has no files that end in {suffixes} ({has}); set "
            "data.root, or data.suffixes=.txt,.py,..."
        )
    return names


def refuse(error: OSError) -> None:
    """Say that a folder cannot be listed, where os.walk would pass over it."""
    raise ConfigError(f"data=text: {shown(error.filename)} cannot be read ({error.strerror})")


def endings(suffixes: str) -> tuple[str, ...]:
    """The option as lower-case suffixes with their dots."""
    given = (each.strip().lower() for each in suffixes.split(","))
    return tuple(each if each.startswith(".") else f".{each}" for each in given if each)


def read_text(file: Path, *, utf8: bool) -> bytes:
    """A file's bytes without a byte order mark. utf8: refuse what is none. Raises ConfigError."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"data=text: {shown(file)} cannot be read ({error.strerror})") from None
    at = content.find(b"\0")
    if kind := kind_of(content):
        raise ConfigError(f"data=text: {shown(file)} is no text but {kind}; take it out")
    if at >= 0:
        raise ConfigError(
            f"data=text: {shown(file)} is no text: byte {at:,} is NUL; take the file out, or "
            "convert it to UTF-8"
        )
    if utf8:
        try:
            content.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"data=text: {shown(file)} is not UTF-8: byte {error.start:,} is "
                f"0x{content[error.start]:02x}; convert it (iconv -f LATIN1 -t UTF-8), or use "
                "data.encoding=bytes"
            ) from None
    return content.removeprefix(BOM)


def name_bytes(name: str) -> bytes:
    """A file's name as the bytes that the system has."""
    return name.encode("utf-8", "surrogateescape")
