"""What is done to text and files that come from elsewhere before anything believes them.

A checkpoint, a recipe or a run's folder may be somebody else's. Nothing in one is executed (see
suite.checkpoint); this is against what costs memory or time without end, or changes what a terminal
shows: archives that unpack to more than they are (Fifield 2019, usenix.org/conference/woot19),
values that name each other until they are billions ("billion laughs"), addresses, control
characters. Every limit is far above what an honest file has.
"""

from __future__ import annotations

import itertools
import json
import re
import struct
import unicodedata
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ADDRESS = re.compile(r"\s*([A-Za-z][\w+.-]*(?:://|::)|//|\\\\)")
LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # of a zip's entry: its last two are lengths that follow
PICKLE_BYTES = 1 << 28  # of data.pkl: names and shapes; 100,000 tensors have 15 MB
TEXT_BYTES = 1 << 26  # of a JSON file: the index of a model of 400 billion parameters has 0.2 MB
MOST_VALUES, MOST_DEPTH = 10_000_000, 64  # of a checkpoint; 100,000 tensors with AdamW have 1.5 M
SLACK = 1 << 30  # bytes that a tensor may have over its file: a mask that was expanded
HIDDEN = ("Cc", "Cs", "Cf", "Zl", "Zp")  # controls, half characters, directions, line separators
CONTAINERS = (Mapping, list, tuple, set, frozenset)


def address(text: str) -> str | None:
    """Why a text is no path but an address, in a few words; None for a path."""
    found = ADDRESS.match(text)
    if found is None:
        return None
    if found[1] in ("//", "\\\\"):
        return f"begins with {found[1]}, as an address does; nothing is fetched: write one slash"
    return "is an address, and nothing is fetched: download it first, and name the file"


def unsafe_character(text: str) -> str | None:
    """The first character that no name or option needs and that a terminal may obey; or None.

    Half characters too, which stand for bytes that are not UTF-8: no file of text can hold them.
    """
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t":
            return ascii(character)[1:-1]
    return None


def printable(text: str) -> str:
    """A text in which everything that a terminal may obey is spelled out; line ends are spaces."""
    if text.isprintable():
        return text
    return "".join(
        " " if c in "\n\t" else ascii(c)[1:-1] if unicodedata.category(c) in HIDDEN else c
        for c in text
    )


def printable_values(value: Any) -> Any:
    """Plain values with every text in them `printable`."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable_values(key): printable_values(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [printable_values(inner) for inner in value]
    return value


def read_json(file: Path, *, limit: int = TEXT_BYTES) -> Any:
    """What a JSON file holds. Raises OSError, and ValueError in one line for whatever else."""
    with file.open("rb") as opened:
        content = opened.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"has more than {limit >> 20} MB, which no such file needs")
    value = parse_json(content)
    check_values(value)
    return value


def parse_json(content: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError, in one line, for whatever else."""
    try:
        return json.loads(content, parse_int=_whole_number)
    except RecursionError:
        raise ValueError("is nested too deep") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text (byte {error.start})") from None


def _whole_number(text: str) -> int | float:
    """A JSON number; one of hundreds of digits as a float, which no arithmetic then trips over."""
    return int(text) if len(text) < 20 else float(text)


# --- values ---------------------------------------------------------------------------------------


def check_values(value: Any, *, most: int = MOST_VALUES, depth: int = MOST_DEPTH) -> None:
    """Raise ValueError for values that go on for ever, are nested too deep, or are too many.

    They are counted as they would be written out: a list that holds one list ten times, which holds
    one ten times, and so on, takes no memory until somebody prints or copies it.
    """
    sizes: dict[int, int] = {}  # of what has been counted, written out
    open_now: set[int] = set()
    stack = [(value, iter(inner_values(value)))]
    totals = [1]
    open_now.add(id(value))
    while stack:
        here, rest = stack[-1]
        for inner in rest:
            if not isinstance(inner, CONTAINERS):
                totals[-1] += 1
            elif id(inner) in sizes:
                totals[-1] += sizes[id(inner)]
            elif id(inner) in open_now:
                raise ValueError("it holds itself")
            else:
                stack.append((inner, iter(inner_values(inner))))
                totals.append(1)
                open_now.add(id(inner))
                break
            if totals[-1] > most:
                raise ValueError(f"it has more than {most:,} values")
        else:
            stack.pop()
            open_now.discard(id(here))
            total = totals.pop()
            sizes[id(here)] = total
            if totals:
                totals[-1] += total
            if total > most:
                raise ValueError(f"it has more than {most:,} values")
        if len(stack) > depth:
            raise ValueError(f"it is nested deeper than {depth} levels")


def unique_values(value: Any) -> Iterator[Any]:
    """Everything in a value that `check_values` has passed, each container once."""
    seen, waiting = {id(value)}, [value]
    while waiting:
        for inner in inner_values(waiting.pop()):
            if not isinstance(inner, CONTAINERS):
                yield inner
            elif id(inner) not in seen:
                seen.add(id(inner))
                waiting.append(inner)


def inner_values(value: Any) -> Iterator[Any]:
    """What a container holds: of a mapping its keys too; of anything else nothing."""
    if isinstance(value, Mapping):
        return itertools.chain(value.keys(), value.values())
    return iter(value) if isinstance(value, CONTAINERS) else iter(())


# --- archives -------------------------------------------------------------------------------------


def check_archive(file: Path) -> None:
    """Raise ValueError, in one line, unless a zip is as torch.save and np.savez write them.

    Entries are stored and not packed, lie one after the other within the file, and each has its
    own name: then no more can come out of it than its size.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
            begins = [_begin(archive, entry) for entry in entries]
            end = archive.start_dir
    except (zipfile.BadZipFile, OSError, ValueError, struct.error, NotImplementedError) as error:
        raise ValueError(f"is damaged or not whole ({printable(str(error))})") from None
    reached = 0
    for entry, begin in zip(entries, begins, strict=True):
        name = printable(entry.filename)[:60]
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ValueError(f"its part {name} is compressed; PyTorch and NumPy's savez store it")
        if entry.header_offset < reached or begin + entry.file_size > end:
            raise ValueError(f"its part {name} overlaps another or the end of the file")
        if name.endswith(".pkl") and entry.file_size > PICKLE_BYTES:
            raise ValueError(f"its part {name} has more than {PICKLE_BYTES >> 20} MB")
        reached = begin + entry.file_size
    if len({entry.filename for entry in entries}) < len(entries):
        raise ValueError("two of its parts have one name")


def _begin(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin, by the header in front of them."""
    opened: Any = archive.fp
    opened.seek(entry.header_offset)
    fields = LOCAL_HEADER.unpack(opened.read(LOCAL_HEADER.size))
    if fields[0] != b"PK\x03\x04":
        raise ValueError("a part does not begin where the table says")
    return int(entry.header_offset + LOCAL_HEADER.size + fields[-2] + fields[-1])
