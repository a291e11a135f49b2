"""A run's folder: which one it is, its config.yaml, and what a resumed run goes on from.

An existing run is never overwritten; a resumed one stays where it is.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from suite.checkpoint import find_checkpoint, read_resumable
from suite.config import Config, check_run_dir, diff, to_dict, to_yaml
from suite.errors import ConfigError
from suite.metrics import is_main_process

FOLDER_VARIABLE = "SUITE_RUN_DIR"  # rank 0's choice, for the processes that Lightning starts


def choose_folder(config: Config) -> Path:
    """run.dir, the resumed run's, or the next free runs/<task>/<model>-<norm>-seed<k>-<n>."""
    if FOLDER_VARIABLE in os.environ and not is_main_process():
        return Path(os.environ[FOLDER_VARIABLE])
    if config.run.resume != "never":
        folder = run_folder(Path(config.run.resume))
        if config.run.dir is not None and Path(config.run.dir).resolve() != folder.resolve():
            raise ConfigError(
                f"run.dir={config.run.dir}: a resumed run goes on in its own folder, {folder}; "
                "leave run.dir out, or start a new run with model.init_from"
            )
        return folder
    if config.run.dir is not None:
        folder = Path(config.run.dir).expanduser()
    else:
        norm = config.norm_name.replace(":", ".")
        stem = f"{config.model_name}-{norm}-seed{config.seed}"
        parent = Path("runs") / config.task_name
        folder = next(p for n in range(1, 10**9) if not (p := parent / f"{stem}-{n}").exists())
    if is_main_process():
        check_run_dir(config)
    return folder


def open_folder(config: Config, folder: Path, *, fresh: bool) -> None:
    """Create the folder with its config.yaml, and tell the processes that will be started."""
    if not is_main_process():
        return
    try:
        folder.mkdir(parents=True, exist_ok=not fresh or config.run.dir is not None)
        # without the folder itself: config=FILE repeats the run elsewhere
        portable = replace(config, run=replace(config.run, dir=None, resume="never"))
        (folder / "config.yaml").write_text(to_yaml(portable))
    except FileExistsError as error:
        raise ConfigError(
            f"{folder}: another run took this folder just now; start again"
        ) from error
    except OSError as error:
        raise ConfigError(f"run.dir={folder}: cannot be written ({error.strerror})") from error
    os.environ[FOLDER_VARIABLE] = str(folder.resolve())


def run_folder(path: Path) -> Path:
    """The run that a folder or one of its checkpoints belongs to."""
    if path.is_dir():
        return path
    if path.resolve().parent.name != "checkpoints":
        raise ConfigError(
            f"run.resume={path}: not in a run's checkpoints folder; give the run's folder, or "
            f"start a new run with model.init_from={path}"
        )
    return path.parent.parent


def resumed_checkpoint(config: Config) -> Path:
    """The checkpoint that run.resume means. Raises ConfigError if the config is another one."""
    checkpoint = find_checkpoint(config.run.resume, key="run.resume", prefer="last")
    places = ("data.root", "data.cache", "data.download", "data.num_workers")
    means = ("norm.backend", "norm.recompute")  # of computing the same norm
    free = ("run.", "trainer.", "evaluate", "recipe", *places, *means)
    # the position in the data is a number of micro-batches of an epoch's length
    fixed = ("trainer.accumulate_grad_batches", "trainer.limit_train_batches")
    differing = diff(read_resumable(checkpoint), to_dict(config))
    changed = [key for key in differing if key in fixed or not key.startswith(free)]
    if changed:
        raise ConfigError(
            f"run.resume={config.run.resume}: this config differs from the run's in "
            f"{', '.join(changed)}; "
            "resume with the run's own, or start a new run with model.init_from"
        )
    return checkpoint
