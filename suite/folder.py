"""A run's folder: which one it is, its config.yaml, and what a resumed run goes on from.

An existing run is never overwritten, and no two processes train in one folder.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from suite.checkpoint import find_checkpoint, read_resumable
from suite.checks import holds_a_run
from suite.config import Config, check_run_dir, diff, load, to_dict, to_yaml
from suite.decision import job, restarted
from suite.errors import ConfigError, shown
from suite.metrics import is_main_process, write_text
from suite.records import read_result
from suite.saving import FOLDER, newest, problem, sweep_unfinished
from suite.sources import check_own_files

FOLDER_VARIABLE = "SUITE_RUN_DIR"  # rank 0's choice, for the processes that Lightning starts
CHECKPOINT_VARIABLE = "SUITE_RUN_CHECKPOINT"
PARENT_VARIABLE = "SUITE_RUN_PARENT"
LOCK = ".lock"
NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # a folder from elsewhere may have made it one
# What a resumed run may change, and what of that it may not: the position in the data is a number
# of micro-batches of an epoch's length.
PLACES = ("data.root", "data.cache", "data.download", "data.num_workers")
FREE = ("run.", "trainer.", "evaluate", "recipe", *PLACES, "norm.backend", "norm.recompute")
FIXED = ("trainer.accumulate_grad_batches", "trainer.limit_train_batches")
BUDGET = (
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.max_time",
)  # the same run to "auto" has the same


@dataclass(frozen=True)
class Place:
    """Where a run goes.

    checkpoint: what it goes on from; None: it begins. again: in the folder of a try that was ended
    before its first checkpoint. done: there is nothing left to do. notes: how this was found.
    """

    folder: Path
    checkpoint: Path | None = None
    again: bool = False
    done: bool = False
    notes: tuple[str, ...] = ()


def choose_place(config: Config) -> Place:
    """Folder and checkpoint that run.dir and run.resume mean; nothing is written.

    A job that SLURM or torchrun has started again goes on with its own run, whatever run.resume.
    Raises ConfigError for a folder that cannot be taken, and where the config is another one.
    """
    if os.environ.get(PARENT_VARIABLE) == str(os.getppid()) and not is_main_process():
        checkpoint = os.environ[CHECKPOINT_VARIABLE]
        return Place(Path(os.environ[FOLDER_VARIABLE]), Path(checkpoint) if checkpoint else None)
    try:
        return _chosen(config)
    except PermissionError as error:
        raise ConfigError(
            f"{error.filename}: closed to you ({error.strerror}); choose another run.dir"
        ) from None


def _chosen(config: Config) -> Place:
    resume = config.run.resume
    if resume == "auto":
        return _automatic(config)
    if resume != "never":
        return _named(config)
    if restarted() and (own := next(_of_this_job(config), None)) is not None:
        return _go_on(config, own)
    if is_main_process():
        _check_free(config)
    return Place(_new_folder(config))


def _named(config: Config) -> Place:
    """The run that run.resume=PATH names."""
    path = Path(config.run.resume).expanduser()
    folder = run_folder(path)
    check_own_files(folder)
    if (given := _given_folder(config)) is not None and given.resolve() != folder.resolve():
        raise ConfigError(
            f"run.dir={config.run.dir}: a resumed run goes on in its own folder, {folder}; "
            "leave run.dir out, or start a new run with model.init_from"
        )
    notes: tuple[str, ...] = ()
    if path.is_dir():
        checkpoint, skipped = newest(folder)
        notes = _skipped(skipped)
        if checkpoint is None and skipped:
            raise _none_verifies(config, folder, skipped)
    else:
        checkpoint = path
        if (reason := problem(path)) is not None:
            raise ConfigError(
                f"run.resume={path}: {reason}; give the run's folder to go on from its newest "
                "checkpoint that verifies"
            )
    checkpoint = checkpoint or find_checkpoint(folder, key="run.resume", prefer="last")
    _check_same(config, checkpoint, fixed=FIXED)
    _check_unlocked(folder, key="run.resume")
    return Place(folder, checkpoint, notes=notes)


def _automatic(config: Config) -> Place:
    """run.dir's run, or the newest of this very config that is not over; else a new one."""
    if (folder := _given_folder(config)) is not None:
        if not holds_a_run(folder):
            _check_free(config)
            return Place(folder)
        _check_unlocked(folder, key="run.dir")
        return _go_on(config, folder)
    notes = []
    for folder in _numbered(config):
        if locked_by(folder) is not None:
            notes.append(f"run.resume=auto: {folder} is being trained by another process")
        elif changed := _differs(config, folder):
            notes.append(f"run.resume=auto: {folder} differs in {', '.join(changed[:4])}")
        else:
            place = _go_on(config, folder)
            return replace(place, notes=(*notes, *place.notes))
    _check_free(config)
    return Place(_new_folder(config), notes=tuple(notes))


def _go_on(config: Config, folder: Path) -> Place:
    """The folder's newest checkpoint that verifies, or its beginning where it has none."""
    check_own_files(folder)
    resume = config.run.resume
    if _is_done(config, folder):
        return Place(folder, done=True, notes=(f"run.resume={resume}: {folder} is done",))
    checkpoint, skipped = newest(folder)
    if checkpoint is None and skipped:
        raise _none_verifies(config, folder, skipped)
    if checkpoint is None:
        if changed := _differs(config, folder):
            raise ConfigError(
                f"run.dir={folder}: not empty, and not a run of this config "
                f"({', '.join(changed[:4])}); choose another run.dir"
            )
        return Place(folder, again=True)
    _check_same(config, checkpoint, fixed=(*FIXED, *BUDGET))
    words = f"run.resume={resume}: {folder} goes on from {checkpoint.name}"
    return Place(folder, checkpoint, notes=(*_skipped(skipped), words))


def _skipped(skipped: list[tuple[Path, str]]) -> tuple[str, ...]:
    return tuple(f"skipped checkpoint {shown(path)}: {reason}" for path, reason in skipped)


def _none_verifies(config: Config, folder: Path, skipped: list[tuple[Path, str]]) -> ConfigError:
    listed = "; ".join(f"{path.name}: {reason}" for path, reason in skipped)
    return ConfigError(
        f"run.resume={config.run.resume}: no checkpoint of {folder} verifies ({listed}); begin "
        "anew in another run.dir, or take what can be read of one with model.init_from=FILE"
    )


def _is_done(config: Config, folder: Path) -> bool:
    """Whether a folder's result is the good end of this very config, with or without checkpoints.

    It stays while a run goes on by name for longer, and says nothing of that one.
    """
    try:
        result = read_result(folder)
    except ValueError:
        return False
    changed = _changed(result["config"], config, fixed=(*FIXED, *BUDGET))
    return result["status"] == "done" and not changed


# --- which folder ---


def _parent_and_stem(config: Config) -> tuple[Path, str]:
    norm = config.norm_name.replace(":", ".")
    return Path("runs") / config.task_name, f"{config.model_name}-{norm}-seed{config.seed}"


def _given_folder(config: Config) -> Path | None:
    """run.dir, where there is one; no shell expands the ~ in run.dir=~/mine."""
    return None if config.run.dir is None else Path(config.run.dir).expanduser()


def _check_free(config: Config) -> None:
    """Raise ConfigError unless a new run can have the folder."""
    given = _given_folder(config)
    run = replace(config.run, dir=None if given is None else str(given))
    check_run_dir(replace(config, run=run))


def _new_folder(config: Config) -> Path:
    """run.dir, or the next free runs/<task>/<model>-<norm>-seed<k>-<n>."""
    if (given := _given_folder(config)) is not None:
        return given
    parent, stem = _parent_and_stem(config)
    return next(p for n in range(1, 10**9) if not (p := parent / f"{stem}-{n}").exists())


def _numbered(config: Config) -> Iterator[Path]:
    """Folders of this model, norm and seed, the newest first."""
    parent, stem = _parent_and_stem(config)
    found = []
    for path in parent.glob(f"{stem}-*"):
        number = path.name.removeprefix(f"{stem}-")
        if number.isdigit() and path.is_dir():
            found.append((int(number), path))
    yield from (path for _, path in sorted(found, reverse=True))


def _of_this_job(config: Config) -> Iterator[Path]:
    """Folders that this very job has trained in before it was started again."""
    given = _given_folder(config)
    folders = [given] if given is not None else _numbered(config)
    for folder in folders:
        held = _lock_content(folder)
        if held.get("job") is not None and held["job"] == job() and not _differs(config, folder):
            yield folder


def run_folder(path: Path) -> Path:
    """The run that a folder or one of its checkpoints belongs to."""
    if path.is_dir():
        inner = path.absolute().name == FOLDER and not (path / FOLDER).is_dir()
        return path.absolute().parent if inner else path
    for file in (path.absolute(), path.resolve()):  # a checkpoint, or a link to one
        if file.parent.name == FOLDER:
            return path.parent.parent if path.parent.name == FOLDER else file.parent.parent
    raise ConfigError(
        f"run.resume={path}: not in a run's checkpoints folder; give the run's folder, or "
        f"start a new run with model.init_from={path}"
    )


# --- the same config ---


def _changed(
    saved: Mapping[str, Any] | Config, config: Config, *, fixed: tuple[str, ...]
) -> list[str]:
    differing = diff(saved, to_dict(config))
    return [key for key in differing if key in fixed or not key.startswith(FREE)]


def _check_same(config: Config, checkpoint: Path, *, fixed: tuple[str, ...]) -> None:
    if changed := _changed(read_resumable(checkpoint)["config"], config, fixed=fixed):
        longer = "" if set(changed) - set(BUDGET) else f" by name, run.resume={checkpoint}"
        raise ConfigError(
            f"run.resume={config.run.resume}: this config differs from the run's in "
            f"{', '.join(changed)}; resume with the run's own{longer}, or start a new run with "
            "model.init_from"
        )


def _differs(config: Config, folder: Path) -> list[str]:
    """The keys in which a folder's config.yaml is another one; ["config.yaml"] without one."""
    try:
        saved = load([f"config={folder / 'config.yaml'}"]).settled
    except ConfigError:
        return ["config.yaml"]
    return _changed(saved, config, fixed=(*FIXED, *BUDGET))


def check_data(checkpoint: Path, *, sha256: str, resume: str) -> None:
    """Raise ConfigError where the run was trained on other data than is there now."""
    saved = read_resumable(checkpoint).get("data_sha256")
    if saved is not None and saved != sha256:
        raise ConfigError(
            f"run.resume={resume}: the data is not what the run was trained on: its sha256 was "
            f"{saved[:12]}..., and is {sha256[:12]}... now; give it the same files, or start a new "
            "run with model.init_from"
        )


# --- taking it ---


class Hold:
    """This process's hold on a folder: a lock that the system gives back when the process ends.

    A POSIX record lock: the loader's workers do not inherit it, so that it ends with the trainer.
    """

    def __init__(self, folder: Path) -> None:
        self.file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | NO_LINK, 0o644)
        if not _lock(self.file, tries=10):  # who looks whether it is free holds it for a moment
            os.close(self.file)
            raise ConfigError(f"{folder}: another process took this folder just now; start again")
        content = {"pid": os.getpid(), "host": socket.gethostname(), "job": job()}
        os.ftruncate(self.file, 0)
        os.pwrite(self.file, json.dumps(content).encode(), 0)

    def release(self) -> None:
        """Let others have it."""
        os.close(self.file)


def _lock(file: int, *, tries: int = 1) -> bool:
    """Whether the lock is this process's now; True where there are no such locks (Windows)."""
    try:
        import fcntl
    except ImportError:
        return True
    for left in reversed(range(tries)):
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            time.sleep(0.02 if left else 0.0)
        except OSError:  # a file system without locks
            return True
        else:
            return True
    return False


def locked_by(folder: Path) -> Mapping[str, Any] | None:
    """Who trains in a folder just now; None if nobody does."""
    try:
        file = os.open(folder / LOCK, os.O_RDWR | NO_LINK)
    except OSError:
        return None
    try:
        return None if _lock(file) else _lock_content(folder)
    finally:
        os.close(file)


def _lock_content(folder: Path) -> Mapping[str, Any]:
    try:
        found = json.loads((folder / LOCK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_unlocked(folder: Path, *, key: str) -> None:
    if (holder := locked_by(folder)) is not None:
        raise ConfigError(
            f"{key}={folder}: process {holder.get('pid', '?')} on {holder.get('host', '?')} is "
            "training there; wait for it or end it, or choose another run.dir"
        )


def _take(place: Place) -> Hold:
    """The hold on a folder that is still as it was when it was chosen.

    Building takes a while, in which another process may have come and gone.
    """
    hold, folder = Hold(place.folder), place.folder
    begun = any((folder / FOLDER).glob("*.ckpt")) if place.again else holds_a_run(folder)
    if place.checkpoint is None and begun:
        hold.release()
        raise FileExistsError
    return hold


def open_folder(config: Config, place: Place) -> Hold | None:
    """Take the folder, write its config.yaml, tell the processes that will be started."""
    if not is_main_process():
        return None
    folder = place.folder
    fresh = place.checkpoint is None and not place.again
    try:
        folder.mkdir(parents=True, exist_ok=not fresh or config.run.dir is not None)
        hold = _take(place)
        sweep_unfinished(folder)
        if place.again:
            for name in ("metrics.jsonl", "result.json"):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        # without the folder itself: config=FILE repeats the run elsewhere
        portable = replace(config, run=replace(config.run, dir=None, resume="never"))
        write_text(folder / "config.yaml", to_yaml(portable))
    except FileExistsError as error:
        raise ConfigError(
            f"{folder}: another run took this folder just now; start again"
        ) from error
    except OSError as error:
        raise ConfigError(f"run.dir={folder}: cannot be written ({error.strerror})") from error
    os.environ[FOLDER_VARIABLE] = str(folder.resolve())
    os.environ[CHECKPOINT_VARIABLE] = (
        "" if place.checkpoint is None else str(place.checkpoint.resolve())
    )
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    return hold
