"""The list of the image files below a folder of class folders, and its cache.

ImageNet has 1.28 million files: listing them takes minutes on a network disk, and a Python object
for each takes memory in every worker. So an index is a few arrays, and it is kept in a file. That
file is used only while every folder has the modification and change time that it had: adding,
renaming or removing a file changes both, and no copying tool sets back the second. Writing other
content into a file of the same name does not; that is not noticed until the cache is removed.

Order: classes by name, files by folder and name: torchvision's ImageFolder. Names that begin with a
dot are passed over (a desktop's thumbnails are no class).

Shapes: N files, K classes.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from suite.cache import keep, recall, say_once
from suite.errors import ConfigError, shown
from tasks.vision.decode import EXTENSIONS

VERSION = 3
SUFFIXES = tuple(suffix.encode() for suffix in EXTENSIONS)
SETTLED_NS = 2_000_000_000  # a folder may change again within one tick of the file system's clock
TALK_S = 2.0  # between two lines of progress


@dataclass(frozen=True, eq=False)
class Index:
    """The image files below `root`, in order.

    labels: [N] the class of each. names: all paths relative to root, joined; ends: [N] where each
    ends in it. sha256: of (path, size) of every file.
    """

    root: str
    classes: tuple[str, ...]
    labels: npt.NDArray[np.int32]
    names: npt.NDArray[np.uint8]
    ends: npt.NDArray[np.int64]
    sha256: str

    def __len__(self) -> int:
        return len(self.labels)

    def relative(self, i: int) -> bytes:
        """The path of file i below root."""
        start = int(self.ends[i - 1]) if i else 0
        return self.names[start : int(self.ends[i])].tobytes()

    def path(self, i: int) -> str:
        """The whole path of file i."""
        return os.path.join(self.root, os.fsdecode(self.relative(i)))  # noqa: PTH118

    def counts(self) -> npt.NDArray[np.int64]:
        """[K] files of each class."""
        return np.bincount(self.labels, minlength=len(self.classes))


@dataclass(frozen=True)
class Folder:
    """One folder of the tree: its path relative to the root and what lies in it."""

    path: bytes
    mtime_ns: int
    ctime_ns: int
    identity: tuple[int, int]  # device and inode
    folders: list[bytes]
    files: list[tuple[bytes, int]]  # name and size


def load_index(root: Path, *, name: str, cache: Path | None) -> Index:
    """The index of `root`, from `cache` where it still holds, else read and put there.

    name: of the data set, for messages. Raises ConfigError for a folder that cannot be read.
    """
    root = root.absolute()
    file = cache / cache_name(root) if cache is not None else None
    index = read_cache(file, root) if file is not None else None
    if index is not None:
        return index
    try:
        index, folders = scan(root, name=name)
    except OSError as error:
        where = shown(os.fsdecode(error.filename or os.fspath(root)))
        raise ConfigError(
            f"data={name}: {where} cannot be read ({error.strerror}); every folder below "
            "data.root must be open to this user, with no links in a circle"
        ) from None
    now = time.time_ns()
    if file is not None and all(abs(now - f.mtime_ns) > SETTLED_NS for f in folders):
        write_cache(file, index, folders)
    return index


# --- reading the tree -----------------------------------------------------------------------------


def scan(root: Path, *, name: str) -> tuple[Index, list[Folder]]:
    """Read the whole tree. Returns the index and all folders, the root first. Raises OSError."""
    top = os.fsencode(root)
    first = read_folder(top, b"")
    classes, folders = sorted(first.folders), [first]
    digest, progress = hashlib.sha256(), Progress(name, root)
    names: list[bytes] = []  # of one class each, joined
    lengths: list[npt.NDArray[np.int64]] = []
    for class_ in classes:
        inside = list(walk(top, class_, above=(first.identity,)))
        inside.sort(key=lambda folder: folder.path)  # as torchvision, not folder by folder
        files = [(f.path + b"/" + file, size) for f in inside for file, size in sorted(f.files)]
        digest.update(b"".join(b"%b\0%d\0" % file for file in files))
        names.append(b"".join(path for path, _ in files))
        lengths.append(np.array([len(path) for path, _ in files], dtype=np.int64))
        folders += [replace(folder, files=[]) for folder in inside]
        progress.add(len(files))
    counts = [len(each) for each in lengths]
    index = Index(
        root=os.fspath(root),
        classes=tuple(os.fsdecode(class_) for class_ in classes),
        labels=np.repeat(np.arange(len(classes), dtype=np.int32), counts),
        names=np.frombuffer(b"".join(names), dtype=np.uint8),
        ends=np.cumsum(np.concatenate([np.zeros(0, np.int64), *lengths])),
        sha256=digest.hexdigest(),
    )
    return index, folders


def walk(top: bytes, path: bytes, *, above: tuple[tuple[int, int], ...]) -> Iterator[Folder]:
    """The folder `path` below `top` and all below it. Links are followed, but not in a circle."""
    folder = read_folder(os.path.join(top, path), path)  # noqa: PTH118
    if folder.identity in above:
        raise OSError(0, "a link in it leads back to a folder above", os.path.join(top, path))  # noqa: PTH118
    yield folder
    for inner in sorted(folder.folders):
        yield from walk(top, path + b"/" + inner, above=(*above, folder.identity))


def read_folder(where: bytes, path: bytes) -> Folder:
    """What lies in the folder `where`. Its time is taken first: a later change then shows."""
    status = os.stat(where)  # noqa: PTH116
    folders, files = [], []
    with os.scandir(where) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            if entry.name.lower().endswith(SUFFIXES) and entry.is_file():
                files.append((entry.name, entry.stat().st_size))
            elif entry.is_dir():
                folders.append(entry.name)
            elif entry.name.lower().endswith(SUFFIXES) and entry.is_symlink():
                files.append((entry.name, 0))  # a link to nothing: said when it is to be read
    times = (status.st_mtime_ns, status.st_ctime_ns)
    return Folder(path, *times, (status.st_dev, status.st_ino), folders, files)


class Progress:
    """Lines on stderr while a big tree is read."""

    def __init__(self, name: str, root: Path) -> None:
        self.what = f"data={name}: indexing {shown(os.fspath(root))}"
        self.files, self.folders, self.last = 0, 0, time.monotonic()

    def add(self, files: int) -> None:
        """One more class folder, with so many files."""
        self.files, self.folders = self.files + files, self.folders + 1
        if time.monotonic() - self.last > TALK_S:
            say_once(f"{self.what}: {self.files:,} files in {self.folders:,} class folders so far")
            self.last = time.monotonic()


# --- the cache ------------------------------------------------------------------------------------


def cache_name(root: Path) -> str:
    """The file's name for a root: readable, and different for every path."""
    return f"{ascii(root.name).strip(chr(39))}-{path_hash(root)}.npz".replace("\\", "_")


def path_hash(root: Path) -> str:
    return hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]


def write_cache(file: Path, index: Index, folders: list[Folder]) -> None:
    """Keep an index. A cache that cannot be written is a note: only the next start is slower."""
    meta = {"version": VERSION, "root": path_hash(Path(index.root)), "sha256": index.sha256}
    arrays: dict[str, Any] = {
        "classes": joined(os.fsencode(name) for name in index.classes),
        "folders": joined(folder.path for folder in folders),
        "times": np.array([(f.mtime_ns, f.ctime_ns) for f in folders], dtype=np.int64),
        "labels": index.labels,
        "names": index.names,
        "ends": index.ends,
    }
    if reason := keep(file, meta, arrays):
        say_once(
            f"note: the index of {shown(index.root)} cannot be kept in {shown(str(file.parent))} "
            f"({reason}); each start reads the whole tree. data.cache=FOLDER names another"
        )


def read_cache(file: Path, root: Path) -> Index | None:
    """The index that was kept, if no folder has changed since; a damaged file counts as none."""
    try:
        meta, arrays = recall(file)
        if meta["version"] != VERSION or meta["root"] != path_hash(root):
            return None
        folders, times = parted(arrays["folders"]), arrays["times"]
        classes = tuple(os.fsdecode(name) for name in parted(arrays["classes"]))
        labels, names, ends = arrays["labels"], arrays["names"], arrays["ends"]
        if not (
            len(folders) == len(times) and len(labels) == len(ends) and consistent(ends, names)
        ):
            raise ValueError("arrays of different lengths")
        index = Index(os.fspath(root), classes, labels, names, ends, meta["sha256"])
        if len(index.counts()) != len(classes):
            raise ValueError("a label that is no class")
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever a damaged archive makes of zipfile, NumPy and json
        reason = " ".join(str(error).split()) or type(error).__name__
        say_once(f"note: {shown(str(file))} is damaged ({reason}); the index is built again")
        return None
    return index if unchanged(os.fsencode(root), folders, times) else None


def consistent(ends: npt.NDArray[np.int64], names: npt.NDArray[np.uint8]) -> bool:
    """Whether `ends` cuts `names` into paths."""
    if not len(ends):
        return not len(names)
    return bool(ends[0] > 0 and (np.diff(ends) > 0).all() and ends[-1] == len(names))


def unchanged(top: bytes, folders: Iterable[bytes], times: npt.NDArray[np.int64]) -> bool:
    """Whether every folder still has its modification time."""
    try:
        statuses = [os.stat(os.path.join(top, folder)) for folder in folders]  # noqa: PTH116, PTH118
    except OSError:
        return False
    return [[s.st_mtime_ns, s.st_ctime_ns] for s in statuses] == times.tolist()


def joined(names: Iterable[bytes]) -> npt.NDArray[np.uint8]:
    """Names, each ended by a zero byte, which no file name can hold."""
    return np.frombuffer(b"".join(name + b"\0" for name in names), dtype=np.uint8)


def parted(array: npt.NDArray[np.uint8]) -> list[bytes]:
    """What `joined` was given."""
    return array.tobytes().split(b"\0")[:-1]
