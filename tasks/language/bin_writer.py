"""A folder of token files while it is written: it can be left at any moment and gone on with.

    FOLDER/parts/plan.json       what is being done: arguments, files, encoding
    FOLDER/parts/train.bin ...   ids so far, and perhaps some that progress.json does not know of
    FOLDER/parts/progress.json   up to where all is on the disk: sizes, and where to read on
    FOLDER/meta.json             written last; a folder that has it is done

Files grow, are synced, and only then is progress.json replaced, at once. After a kill or a power
cut what is beyond its sizes is cut off and made again, so the bytes are those of a run that was
never stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from suite.errors import ConfigError, DataError, shown
from tasks.language.bin_folder import FILES, META
from tasks.language.corpus import Position

FORMAT = "dyt-suite token_bin"
VERSION = 1
PARTS, PLAN, PROGRESS, LOCK = "parts", "plan.json", "progress.json", "lock"
TOKENIZER = "tokenizer.json"


@dataclass
class Encoded:
    """Documents as ids: by split their bytes, how many there are, and bytes of UTF-8 they had.

    empty: documents without text; broken: those that could not be read; both are left out.
    """

    ids: dict[str, list[bytes]] = field(default_factory=lambda: {split: [] for split in FILES})
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FILES, 0))
    text_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FILES, 0))
    empty: int = 0
    broken: int = 0


@dataclass
class Progress:
    """What is on the disk. sizes: bytes of each split's file. read: bytes of the corpus."""

    position: Position = field(default_factory=Position)
    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FILES, 0))
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FILES, 0))
    text_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FILES, 0))
    empty: int = 0
    broken: int = 0
    read: int = 0
    whole: bool = False


class Writer:
    """The parts of a folder, opened to go on at `progress`; one process at a time.

    Raises ConfigError if another one has the folder, or if it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.parts = folder, folder / PARTS
        self.progress = Progress()
        self._files: dict[str, BinaryIO] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Writer:
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
            self._lock()
        except OSError as error:
            raise ConfigError(
                f"{shown(self.folder)} cannot be written ({error.strerror}); choose another --out"
            ) from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # no POSIX: two processes at once are not noticed
            return
        held = self._stack.enter_context((self.parts / LOCK).open("wb"))
        try:
            fcntl.flock(
                held, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # the system frees it, whatever happens
        except BlockingIOError:
            self._stack.close()
            raise ConfigError(
                f"{shown(self.folder)} is being written by another process; wait for it"
            ) from None

    def plan(self) -> dict[str, Any] | None:
        """What is being done here; None: nothing yet."""
        return read_json(self.parts / PLAN)

    def set_plan(self, plan: Mapping[str, Any]) -> None:
        """Keep what is being done."""
        write_at_once(self.parts / PLAN, plan)

    def resume(self) -> None:
        """Open the files, as they were when progress.json was written. Raises ConfigError."""
        if (kept := read_json(self.parts / PROGRESS)) is not None:
            self.progress = Progress(**kept | {"position": Position(**kept["position"])})
        if self.progress.whole:
            return
        for split, name in FILES.items():
            file = self.parts / name
            file.touch()
            size = self.progress.sizes[split]
            if file.stat().st_size < size:
                raise ConfigError(
                    f"{shown(file)} is shorter than it was; delete {shown(self.folder)} to start "
                    "again"
                )
            opened = self._stack.enter_context(file.open("r+b"))
            opened.truncate(size)
            opened.seek(size)
            self._files[split] = opened

    def add(self, encoded: Encoded, *, after: Position, read: int) -> None:
        """The ids of the next piece. Raises DataError if they cannot be written."""
        was = self.progress
        now = Progress(after, dict(was.sizes), dict(was.documents), dict(was.text_bytes))
        now.empty, now.broken = was.empty + encoded.empty, was.broken + encoded.broken
        now.read = read
        try:
            for split, opened in self._files.items():
                for ids in encoded.ids[split]:
                    opened.write(ids)
                    now.sizes[split] += len(ids)
                now.documents[split] += encoded.documents[split]
                now.text_bytes[split] += encoded.text_bytes[split]
        except OSError as error:
            raise cannot_write(self.folder, error) from None
        self.progress = now  # last: Ctrl-C in between leaves the piece undone

    def save(self) -> None:
        """Let the disk have everything, and say so. Raises DataError."""
        try:
            for opened in self._files.values():
                opened.flush()
                os.fsync(opened.fileno())
            write_at_once(self.parts / PROGRESS, asdict(self.progress))
        except OSError as error:
            raise cannot_write(self.folder, error) from None

    def finish(self, about: Mapping[str, Any], *, itemsize: int) -> dict[str, Any]:
        """Put the files in their place and write meta.json; returns what it says.

        A kill in here is no harm either: files that have been moved are where they belong.
        """
        now = self.progress
        try:
            if not now.whole:
                now.whole = True
                self.save()
            self._files.clear()
            names = {split: name for split, name in FILES.items() if now.sizes[split]}
            for name in (*names.values(), TOKENIZER):
                if (self.parts / name).exists():
                    (self.parts / name).replace(self.folder / name)
            meta = {
                "format": FORMAT,
                "version": VERSION,
                **about,
                "tokens": {split: now.sizes[split] // itemsize for split in names},
                "documents": {split: now.documents[split] for split in names},
                "text_bytes": {split: now.text_bytes[split] for split in names},
                "empty": now.empty,
                "broken": now.broken,
                "sha256": {name: sha256_of(self.folder / name) for name in names.values()},
            }
            write_at_once(self.folder / META, meta)
            self.remove()
        except OSError as error:
            raise cannot_write(self.folder, error) from None
        return meta

    def remove(self) -> None:
        """Take the parts away."""
        shutil.rmtree(self.parts, ignore_errors=True)


def foreign_names(folder: Path) -> list[str]:
    """What is in a folder that no tokenization left there, if it has no meta.json of ours."""
    if not folder.exists():
        return []
    names = sorted(entry.name for entry in folder.iterdir())
    inside = folder / PARTS
    if not inside.is_dir():
        return names
    if (inside / PLAN).exists():
        ours = {PARTS, META, TOKENIZER, *FILES.values()}
        return [name for name in names if name not in ours and not name.endswith(".tmp")]
    known = {LOCK, TOKENIZER, f"{PLAN}.tmp"}
    strange = [f"{PARTS}/{each.name}" for each in inside.iterdir() if each.name not in known]
    return [*(name for name in names if name != PARTS), *strange]


def read_json(file: Path) -> dict[str, Any] | None:
    """An object in a file; None if there is no file. Raises ConfigError for a damaged one."""
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{shown(file)} cannot be read ({error.strerror})") from None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{shown(file)} is damaged; choose another --out, or delete its folder")
    return found


def write_at_once(file: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that, whatever happens, the file has the old content or all of the new."""
    temporary = file.with_name(f"{file.name}.tmp")
    with temporary.open("wb") as opened:
        opened.write(json.dumps(content, indent=1, ensure_ascii=True).encode() + b"\n")
        opened.flush()
        os.fsync(opened.fileno())
    temporary.replace(file)
    if os.name == "posix":  # the new name is on the disk too
        where = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(where)
        finally:
            os.close(where)


def cannot_write(folder: Path, error: OSError) -> DataError:
    """An error while writing."""
    return DataError(
        f"{shown(folder)} cannot be written ({error.strerror}); the same command goes on from "
        "where this one stopped"
    )


def sha256_of(file: Path) -> str:
    """Of a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()
