"""Checkpoint files that a kill, a full disk or a power cut cannot break, and how they are verified.

Lightning's own writer builds a second copy of the checkpoint in memory, writes it where TMPDIR is,
and moves it without an fsync: on another file system a kill leaves half a file under the name of
the newest checkpoint, and an orphan in TMPDIR. Here torch writes into a file beside the folder of
checkpoints, which is fsynced and then renamed, so that a name is at every moment that of a whole
file; its sha256 is computed on the way. Beside NAME.ckpt lies NAME.ckpt.json:

    {"sha256": [...], "bytes": [...], "step": n}

Two files cannot be renamed as one. So before the checkpoint is replaced its sidecar accepts the old
and the new one, afterwards the new one alone: whenever the process dies, what lies there verifies.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor

from suite.checkpoint import read_checkpoint
from suite.errors import ConfigError, DataError, shown
from suite.safety import address, check_archive, inner_values, printable, read_json

FOLDER = "checkpoints"
UNFINISHED = ".tmp"  # beside FOLDER: what is being written
MARGIN = 1 << 20  # bytes of a checkpoint that are not tensors: names, options, the zip's directory
BLOCK = 1 << 20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REMEDY = (
    "The checkpoint before it is kept: make room, or move the run to a larger disk, and go on with "
    "run.resume"
)
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM)


class SaveError(DataError):
    """A checkpoint that could not be written; the one before it is as it was. Exit code 1."""


class CheckpointFiles(CheckpointIO):
    """Lightning's way to checkpoint files: durable, hashed, local, and read as plain data.

    Only the first process saves. Each method refuses an address such as s3://.
    """

    def save_checkpoint(
        self, checkpoint: Mapping[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write `checkpoint` under `path`, or leave what is there as it is.

        No second copy is held in memory. Raises SaveError.
        """
        if storage_options is not None:
            raise TypeError("a checkpoint is a file on this machine, without storage_options")
        path = local_path(path)
        step = checkpoint.get("global_step")
        with one_line(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            check_space(path, needed=size_of(checkpoint) + MARGIN)
            with draft_of(path) as draft:
                written = write_hashed(checkpoint, draft)
                new = {**written, "step": step if isinstance(step, int) else None}
                replace_verified(draft, path, new)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """What a file holds: tensors, on the CPU and on the disk until they are looked at.

        Lightning gives no map_location. Whatever weights_only is, no code from the file is run.
        Raises ConfigError.
        """
        return read_checkpoint(local_path(path), lazy=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a file and its sidecar; one that is not there is no error."""
        path = local_path(path)
        sidecar_of(path).unlink(missing_ok=True)  # first: alone it would speak of a later file
        path.unlink(missing_ok=True)


# -- what verifies ---------------------------------------------------------------------------------


def problem(path: Path) -> str | None:
    """Why a checkpoint must not be trusted, in a few words; None if it verifies.

    With a sidecar by size and sha256, else by the checksums of a zip's members. Nothing is
    unpickled, and no more than a block is in memory.
    """
    if not path.is_file():
        return "no such file"
    try:
        known = read_sidecar(path)
    except ValueError as error:
        return str(error)
    try:
        if known is None:
            return zip_problem(path)
        size = path.stat().st_size
        if size not in known["bytes"]:
            expected = " or ".join(map(str, known["bytes"]))
            return f"it has {size} bytes, where {sidecar_of(path).name} says {expected}"
        if (size, sha256_of(path)) not in zip(known["bytes"], known["sha256"], strict=True):
            return f"its sha256 is not the one in {sidecar_of(path).name}"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def newest(folder: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint of a run that verifies, and what was passed over, with the reasons.

    folder: the run's, or its folder of checkpoints. The newest has the highest step; of two with
    the same one it is last.ckpt.
    """
    place = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    found, skipped = [], []
    for path in sorted(place.glob("[!.]*.ckpt")):
        try:
            found.append((step_of(path), path.name == "last.ckpt", path))
        except (ValueError, OSError):  # of a ConfigError too: `problem` says it in fewer words
            reason = problem(path) or "it is not a readable checkpoint of tensors and plain values"
            skipped.append((path, reason))
    for _, _, path in sorted(found, reverse=True):
        wrong = problem(path)
        if wrong is None:
            return path, skipped
        skipped.append((path, wrong))
    return None, skipped


def step_of(path: Path) -> int:
    """Optimizer steps that a checkpoint was taken after; -1 if it does not say.

    Raises ValueError or ConfigError for a damaged sidecar or file.
    """
    known = read_sidecar(path)
    if known is None or len(known["sha256"]) > 1:  # a kill left two: which one is it?
        step = read_checkpoint(path, lazy=True).get("global_step")
    else:
        step = known.get("step")
    return step if isinstance(step, int) else -1


def sweep_unfinished(folder: Path) -> None:
    """Remove what killed saves left in a run's folder. For the first process, before training."""
    drafts = folder / UNFINISHED
    for place in (drafts, folder / FOLDER, folder):
        for draft in place.glob(".*.unfinished"):
            draft.unlink(missing_ok=True)
    with suppress(OSError):  # not there, or holds other people's files
        drafts.rmdir()


def zip_problem(path: Path) -> str | None:
    """Why a file without a sidecar is not whole; None if all checksums in it are right."""
    try:
        check_archive(path)
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except ValueError as error:
        return f"it has no sidecar and {error}"
    return None if broken is None else f"it has no sidecar and is damaged in {printable(broken)}"


# -- sidecars --------------------------------------------------------------------------------------


def sidecar_of(path: Path) -> Path:
    """Where a checkpoint's size and sha256 are written."""
    return path.with_name(f"{path.name}.json")


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """What the sidecar of the checkpoint `path` says; None if it has none.

    Raises ValueError, in a few words, for one that is damaged.
    """
    sidecar = sidecar_of(path)
    try:
        found = read_json(sidecar)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{sidecar.name} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{sidecar.name} is damaged ({error})") from None
    known = found if isinstance(found, dict) else {}
    lists = [known.get("sha256"), known.get("bytes")]
    lengths = {len(x) if isinstance(x, list) else 0 for x in lists}
    if len(lengths) > 1 or 0 in lengths:
        raise ValueError(f"{sidecar.name} is damaged (it does not say a size and a sha256)")
    return known


def write_sidecar(path: Path, content: Mapping[str, Any]) -> None:
    """Replace the sidecar of the checkpoint `path`, durably; a reader sees the old or the new."""
    sidecar = sidecar_of(path)
    with draft_of(sidecar) as draft:
        with draft.open("w", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")
            file.flush()
            sync(file.fileno())
        draft.replace(sidecar)
        sync_folder(sidecar.parent)


def replace_verified(draft: Path, path: Path, new: Mapping[str, Any]) -> None:
    """Rename the whole file `draft` to `path`, with a sidecar that is right all the time."""
    after = {"sha256": [new["sha256"]], "bytes": [new["bytes"]], "step": new["step"]}
    if sidecar_of(path).exists():
        old: dict[str, Any] = {"sha256": [], "bytes": []}
        with suppress(ValueError):  # damaged: nothing verifies by it
            old = read_sidecar(path) or old
        size = path.stat().st_size if path.exists() else None
        kept = [s for s, n in zip(old["sha256"], old["bytes"], strict=True) if n == size]
        both = {"sha256": kept + after["sha256"], "bytes": [size] * len(kept) + after["bytes"]}
        write_sidecar(path, {**both, "step": new["step"]})
    # without a sidecar the old one and the new one verify as whole zips
    draft.replace(path)
    sync_folder(path.parent)
    write_sidecar(path, after)


# -- writing ---------------------------------------------------------------------------------------


class HashedFile:
    """What torch.save writes to: a file, its sha256 and its size, in one pass.

    torch writes from the first byte to the last and hands out its own memory, no copies. A large
    tensor is hashed by a second thread while it is written. torch puts an error of its own in place
    of one that is raised here; `error` keeps it.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash, self.bytes = file, hashlib.sha256(), 0
        self.error: BaseException | None = None
        self._thread = ThreadPoolExecutor(1)

    def write(self, data: Any) -> int:
        if self.error is not None:  # torch tries to end its zip all the same
            raise self.error
        try:
            hashing = self._thread.submit(self.hash.update, data) if len(data) >= BLOCK else None
            try:
                self.file.write(data)
            finally:
                if hashing is not None:
                    hashing.result()  # before torch takes its memory back
            if hashing is None:
                self.hash.update(data)
        except BaseException as error:
            self.error = error
            raise
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing: the file is flushed and fsynced once, at the end."""

    def close(self) -> None:
        self._thread.shutdown()


def write_hashed(checkpoint: Mapping[str, Any], draft: Path) -> dict[str, Any]:
    """Write a checkpoint to a new file, down to the disk. Returns its sha256 and size."""
    with draft.open("wb") as file:
        hashed = HashedFile(file)
        target: Any = hashed  # it has what torch asks of an open file
        try:
            torch.save(checkpoint, target)
        except Exception as error:
            raise hashed.error or error from None
        finally:
            hashed.close()
        file.flush()
        sync(file.fileno())
    return {"sha256": hashed.hash.hexdigest(), "bytes": hashed.bytes}


def drafts_folder(path: Path) -> Path:
    """Where the file `path` is written before it is renamed: on the same file system.

    A folder of checkpoints that is a link or a mount holds its own drafts.
    """
    folder = path.parent
    linked = folder.is_symlink() or folder.stat().st_dev != folder.absolute().parent.stat().st_dev
    if folder.name != FOLDER or linked:
        return folder
    return folder.absolute().parent / UNFINISHED


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """The name of a new file that is to become `path`; nothing of that name is there afterwards."""
    folder = drafts_folder(path)
    folder.mkdir(exist_ok=True)
    draft = folder / f".{path.name}.{os.getpid()}.unfinished"
    try:
        yield draft
    finally:
        with suppress(OSError):  # another draft is there; or the disk is gone, and has said so
            draft.unlink(missing_ok=True)
            if folder.name == UNFINISHED:
                folder.rmdir()


def check_space(path: Path, *, needed: int) -> None:
    """Raise SaveError if the file system of `path` has fewer bytes free than `needed`."""
    usage = shutil.disk_usage(path.parent)
    if usage.total and usage.free < needed:  # some network file systems say 0 of 0
        raise SaveError(
            f"{shown(path)}: a new checkpoint needs {needed / 1e6:,.1f} MB beside the old one, and "
            f"its disk has {usage.free / 1e6:,.1f} MB free. {REMEDY}"
        )


@contextmanager
def one_line(path: Path) -> Iterator[None]:
    """Turn what the system says of saving `path` into a SaveError."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            what = f"there is no room for a new checkpoint beside the old one ({error.strerror})"
            raise SaveError(f"{shown(path)}: {what}. {REMEDY}") from error
        where = f" {shown(error.filename)}" if error.filename else ""
        raise SaveError(
            f"{shown(path)}: cannot be written ({error.strerror or error}{where}). Nothing that "
            "was saved before has changed: make the folder writable, or take another run.dir"
        ) from error


def size_of(content: Any) -> int:
    """Bytes of the tensors in a checkpoint; those that share their memory are written once."""
    storages: dict[Any, int] = {}

    def look(value: Any) -> None:
        if isinstance(value, Tensor):
            try:
                held = value.untyped_storage()
                storages[value.device, held.data_ptr()] = held.nbytes()
            except (NotImplementedError, RuntimeError):  # sparse tensors have no storage
                storages[id(value)] = value.numel() * value.element_size()
        for inner in inner_values(value):
            look(inner)

    look(content)
    return sum(storages.values())


def local_path(path: str | Path) -> Path:
    """A path on this machine. Raises ConfigError for an address."""
    if (reason := address(str(path))) is not None:
        raise ConfigError(f"{shown(path)}: {reason}")
    return Path(path)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, read block by block."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def sync(number: int) -> None:
    """fsync an open file or folder, on file systems that can."""
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, on file systems that can."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            sync(number)
        finally:
            os.close(number)
