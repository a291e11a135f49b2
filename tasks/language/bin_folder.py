"""A folder of token files: train.bin, val.bin, perhaps test.bin, and perhaps meta.json.

The .bin files are nanoGPT's (github.com/karpathy/nanoGPT, data/*/prepare.py): ids of two or four
bytes, little-endian, nothing before or after them. Such a file does not say what it is, so a wrong
type reads as plausible numbers; what can be told from the bytes is told here, before training.
meta.json, which tasks.language.tokenize writes, says the rest. nanoGPT's own meta.pkl is never
opened: unpickling a file runs what is in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from suite.errors import ConfigError, shown
from suite.safety import parse_json

META = "meta.json"
FILES = {"train": "train.bin", "val": "val.bin", "test": "test.bin"}
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
MB = 1 << 20
BLOCKS, BLOCK = 64, 1 << 16  # of a large file: how many places are looked at, and bytes of each
SMALL = 15  # what the upper half of a 32-bit id is at most: no vocabulary has a million ids
LLM_C = (20240520, 20240801)  # first number of the .bin files of llm.c, which have a header


@dataclass(frozen=True)
class Meta:
    """What meta.json says; what it does not say is None or empty.

    tokens, documents: numbers by split. sha256: of each file, by its name. content: its bytes.
    """

    dtype: str | None = None
    vocab_size: int | None = None
    end: int | None = None
    encoding: Mapping[str, Any] | None = None
    tokens: Mapping[str, int] = field(default_factory=dict)
    documents: Mapping[str, int] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)
    content: bytes = b""


def wrong(path: Path, what: str) -> ConfigError:
    """An error about a file or folder of token files."""
    return ConfigError(f"data=token_bin: {shown(path)} {what}")


def read_meta(folder: Path) -> Meta:
    """What `folder`/meta.json says; of none, nothing. Raises ConfigError for a damaged one."""
    file = folder / META
    try:
        content = file.read_bytes()
        found = parse_json(content)
    except FileNotFoundError:
        return Meta()
    except OSError as error:
        raise wrong(file, f"cannot be read ({error.strerror})") from None
    except ValueError:
        raise wrong(
            file, "is not JSON: damaged, or not written to its end; write the folder again"
        ) from None
    kinds: dict[str, Any] = {
        "dtype": lambda v: v in DTYPES,
        "vocab_size": lambda v: is_count(v) and v > 0,
        "end": is_count,
        "encoding": lambda v: isinstance(v, dict),
        "tokens": is_counts,
        "documents": is_counts,
        "sha256": lambda v: isinstance(v, dict),
    }
    if not isinstance(found, dict):
        raise wrong(file, 'must hold an object such as {"vocab_size": 50257, "dtype": "uint16"}')
    said = {key: found[key] for key in kinds if found.get(key) is not None}
    for key, value in said.items():
        if not kinds[key](value):
            raise wrong(file, f"has {key}: {json.dumps(value)[:60]}, which it cannot be")
    meta = Meta(**said, content=content)
    if meta.end is not None and meta.vocab_size is not None and meta.end >= meta.vocab_size:
        raise wrong(file, f"has end: {meta.end}, which is not below its vocab_size")
    return meta


def is_count(value: object) -> bool:
    """Whether a value of JSON is a whole number, 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_counts(value: object) -> bool:
    """Whether a value of JSON is an object of such numbers."""
    return isinstance(value, dict) and all(map(is_count, value.values()))


def open_tokens(file: Path, dtype: np.dtype[Any]) -> np.ndarray:
    """The ids of a file, memory-mapped: only what is asked for is read."""
    return np.memmap(file, dtype=dtype, mode="r")


# --- what can be wrong with a file ----------------------------------------------------------------


def check_file(file: Path, dtype: np.dtype[Any], *, tokens: int | None, length: int) -> None:
    """Raise ConfigError unless `file` can be ids of this type.

    tokens: how many meta.json says it has, None where it does not say. length: of a row.
    """
    try:
        size = file.stat().st_size
        head, tail = ends_of(file, size)
    except IsADirectoryError:
        raise wrong(file, "is a folder, not a file of ids") from None
    except OSError as error:
        raise wrong(file, f"cannot be read ({error.strerror})") from None
    if not size:
        raise wrong(file, "is empty; write it again")
    if (kind := foreign(head, tail, size=size)) is not None:
        raise wrong(
            file,
            f"{kind}; ids must be raw uint16 or uint32, as python -m tasks.language.tokenize and "
            "NumPy's tofile write them",
        )
    check_dtype(file, head, dtype)
    count, rest = divmod(size, dtype.itemsize)
    if rest:
        raise wrong(
            file,
            f"has {size:,} bytes, which is no whole number of {dtype.name} ids of {dtype.itemsize} "
            "bytes: it is not whole, or data.dtype is another one",
        )
    if tokens is not None and count != tokens:
        raise wrong(
            file,
            f"has {count:,} ids and {META} beside it says {tokens:,}: the file is not whole or of "
            "another set; copy or write the folder again",
        )
    if count < length + 1:
        raise wrong(
            file,
            f"has {count:,} ids, and a row of data.length={length:,} needs {length + 1:,}; choose "
            "a smaller data.length or more text",
        )


def ends_of(file: Path, size: int) -> tuple[bytes, bytes]:
    """The first and the last MB of a file."""
    with file.open("rb") as opened:
        head = opened.read(MB)
        opened.seek(max(0, size - MB))
        return head, opened.read(MB)


def foreign(head: bytes, tail: bytes, *, size: int) -> str | None:
    """What a file is that holds no bare ids, as far as its bytes tell; None: it may hold them.

    Ids may be any bytes at all, so two bytes prove nothing: the token 1152 begins as a pickle does.
    """
    for magic, kind in (
        (b"\x93NUMPY", "is NumPy's .npy, which has a header; write the array with tofile"),
        (b"\x89PNG\r\n\x1a\n", "is a PNG picture"),
        (b"PK\x03\x04", "is a zip archive, as .npz and PyTorch's .pt are"),
        (b"\x1f\x8b\x08", "is compressed with gzip; unpack it"),
        (b"\x28\xb5\x2f\xfd", "is compressed with zstd; unpack it"),
        (b"%PDF-", "is a PDF"),
        (b"\x7fELF", "is a program"),
    ):
        if head.startswith(magic):
            return kind
    if is_pickle(head, tail, size=size):
        return "is a pickle, which is never opened"
    if head[:4] in [number.to_bytes(4, "little") for number in LLM_C]:
        return "has the header of llm.c's files; take its first 1,024 bytes away"
    if size >= 64 and all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head[:4096]):
        return "is text; python -m tasks.language.tokenize makes ids of it"
    return None


def is_pickle(head: bytes, tail: bytes, *, size: int) -> bool:
    """Whether a file begins and ends as a pickle of protocol 2 or later does."""
    if not tail.endswith(b".") or head[:1] != b"\x80":
        return False
    if head[2:3] == b"\x95" and head[1] in (4, 5):  # a frame, whose length follows
        return int.from_bytes(head[3:11], "little") <= size
    return head[1:2] in (b"\x02", b"\x03") and head[2:3] in b"}]c(X" and b"q\x00" in head[:4096]


def check_dtype(file: Path, head: bytes, dtype: np.dtype[Any]) -> None:
    """Raise ConfigError where the bytes are those of integers of another size.

    Ids of more bytes than are read show as columns of zeros or of very small numbers, since no
    vocabulary needs the upper bytes; ids of fewer bytes show as numbers beyond any vocabulary.
    """
    half_N4 = np.frombuffer(head[: len(head) // 8 * 8], "<u2").reshape(-1, 4)
    top = [int(column.max()) for column in half_N4.T] if len(half_N4) >= 8 else [0]
    if not any(top):
        return
    if not any(top[2:]) and top[1] <= (SMALL if top[0] > 4096 else 0):
        raise wrong(file, "holds integers of 64 bits; write them as uint16 or uint32")
    wide = max(top[1], top[3]) <= (SMALL if min(top[0], top[2]) > 4096 else 0)
    if wide and dtype.itemsize == 2:
        raise wrong(
            file,
            "reads as uint32: every second uint16 of it is (nearly) nought; set data.dtype=uint32",
        )
    if not wide and dtype.itemsize == 4 and np.median(half_N4[:, 1::2]) > SMALL:
        raise wrong(
            file,
            "does not read as uint32: its numbers are beyond any vocabulary; set data.dtype=uint16",
        )


# --- its ids --------------------------------------------------------------------------------------


def blocks(tokens: np.ndarray, *, size: int = 4 * MB) -> Iterator[tuple[int, np.ndarray]]:
    """(position, ids) over all ids, a block after another."""
    for start in range(0, len(tokens), size):
        yield start, np.asarray(tokens[start : start + size])


def samples(tokens: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(position, ids): the first and the last MB and 64 blocks of 64 kB between, or all of less."""
    item = tokens.dtype.itemsize
    ends, block = MB // item, BLOCK // item
    if len(tokens) <= 2 * ends + BLOCKS * block:
        yield from blocks(tokens)
        return
    yield 0, np.asarray(tokens[:ends])
    for start in np.linspace(ends, len(tokens) - ends - block, BLOCKS).astype(np.int64).tolist():
        yield start, np.asarray(tokens[start : start + block])
    yield len(tokens) - ends, np.asarray(tokens[-ends:])


def first_beyond(
    parts: Iterator[tuple[int, np.ndarray]], vocab_size: int
) -> tuple[int, int] | None:
    """(position, id) of the first id that is not below `vocab_size`."""
    for start, ids in parts:
        if len(ids) and int(ids.max()) >= vocab_size:
            at = int(np.argmax(ids >= vocab_size))
            return start + at, int(ids[at])
    return None


def document_starts(tokens: np.ndarray, end: int) -> np.ndarray:
    """int64: 0 and each position that follows the id `end`, but the one after the last id."""
    found = [np.zeros(1, np.int64)]
    found += [np.flatnonzero(ids == end) + (start + 1) for start, ids in blocks(tokens)]
    starts = np.concatenate(found)
    return starts[starts < len(tokens)]


def digest_of(files: list[Path], meta: bytes) -> str:
    """SHA-256 of meta.json's bytes and of each file's name, size and first and last MB.

    Not of whole files: they may have hundreds of GB, and a training starts with this. So a change
    in the middle of a file that keeps its size does not show here; `sha256sum` against meta.json
    finds it.
    """
    digest = hashlib.sha256(meta)
    for file in files:
        size = file.stat().st_size
        head, tail = ends_of(file, size)
        digest.update(f" {file.name} {size} ".encode())
        digest.update(head)
        digest.update(tail)
    return digest.hexdigest()
