"""One run: train, evaluate or try out, and the record that it leaves (result.json).

Nothing is written before the parts are built and agree; afterwards every end, good or bad, leaves a
result.json whose status says which.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch.distributed as dist

from suite.build import (
    Children,
    Parts,
    audit_line,
    build_callbacks,
    build_norm,
    build_parts,
    build_trainer,
    meta_size,
    parameter_count,
    quiet,
)
from suite.callbacks import PrimaryTracker, Throughput
from suite.checkpoint import find_checkpoint, read_checkpoint, read_resumable, read_weights
from suite.config import (
    Config,
    check_devices,
    check_run_dir,
    comparable_hash,
    diff,
    to_dict,
    to_yaml,
)
from suite.errors import ConfigError, DivergedError
from suite.metrics import (
    SCHEMA,
    git_state,
    hardware,
    is_main_process,
    peak_memory,
    plain,
    versions,
    write_json,
)
from suite.train import say

C = TypeVar("C")
FOLDER_VARIABLE = "SUITE_RUN_DIR"  # rank 0's choice, for the processes that Lightning starts
CALIBRATION_EXAMPLES = 256


@dataclass
class Record:
    """What a run will say of itself."""

    config: Config
    parts: Parts
    trainer: L.Trainer
    folder: Path
    command: str
    started: float
    test: Mapping[str, float]

    def write(self, status: str, error: str | None = None) -> dict[str, Any] | None:
        """Write result.json (rank 0 only) and return it."""
        if not is_main_process():
            return None
        result = self.content(status, error)
        write_json(self.folder / "result.json", result)
        return result

    def content(self, status: str, error: str | None) -> dict[str, Any]:
        """result.json, schema 1."""
        config, parts, trainer = self.config, self.parts, self.trainer
        tracker, speed = find(trainer, PrimaryTracker), find(trainer, Throughput)
        name, direction, split = parts.spec.primary
        info, (parameters, of_norms) = parts.data.splits.info, parameter_count(parts)
        return {
            "schema": SCHEMA,
            "status": status,
            "error": error,
            "task": config.task_name,
            "model": config.model_name,
            "data": {
                "name": info.name,
                "license": info.license,
                "source": info.source,
                "sha256": info.sha256,
                "synthetic": info.synthetic,
                "sizes": dict(info.sizes),
            },
            "norm": config.norm_name,
            "norm_options": to_dict(config)["norm"],
            "seed": config.seed,
            "primary": {
                "name": name,
                "direction": direction,
                "split": split,
                "best": tracker.best,
                "best_step": tracker.best_step,
                "last": tracker.last,
                "test": self.test.get(f"test/{name}"),
            },
            "metrics": {**tracker.metrics, **self.test},
            "loss": {"train": parts.module.train_loss, "val": tracker.metrics.get("val/loss")},
            "parameters": parameters,
            "norm_parameters": of_norms,
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "wall_seconds": round(time.time() - self.started, 2),
            "throughput": speed.summary(),
            "peak_memory_bytes": peak_memory(),
            "world_size": trainer.world_size,
            "precision": config.trainer.precision,
            "hardware": hardware(),
            "versions": versions(),
            "git": git_state(Path(__file__).parent),
            "config_hash": comparable_hash(config),
            "config": to_dict(config),
            "run_dir": str(self.folder),
            "command": self.command,
        }


def train(config: Config, *, command: str) -> int:
    """Train, evaluate the best checkpoint on test once, leave the record. Returns the exit code."""
    quiet()
    started = time.time()
    processes = check_devices(config)
    resume = None if config.run.resume == "never" else resumed_checkpoint(config)
    folder = choose_folder(config)
    parts = build_parts(config, processes=processes)
    callbacks = build_callbacks(config, parts.spec, folder)
    trainer = build_trainer(config, processes=processes, callbacks=callbacks, folder=folder)
    record = Record(config, parts, trainer, folder, command, started, {})
    if resume is None:
        initialise(parts)
    open_folder(config, folder, fresh=resume is None)
    introduce(parts, trainer, folder)
    with Children(trainer, failed=lambda text: record.write("failed", text)):
        follow(record, resume)
    result = record.write("done")
    if result is not None:
        summarise(result, folder)
    return 0


def follow(record: Record, resume: Path | None) -> None:
    """Train, validate and test; a bad end is written into the record and passed on."""
    parts, trainer = record.parts, record.trainer
    try:
        fit(parts, trainer, resume)
        validate_the_end(parts, trainer)
        record.test = test(parts, trainer, record.folder)
    except DivergedError as error:
        record.write("diverged", str(error))
        raise
    except (KeyboardInterrupt, SystemExit) as error:
        record.write("interrupted", "interrupted by the user")
        raise KeyboardInterrupt from error
    except BaseException as error:
        record.write("failed", f"{type(error).__name__}: {error}")
        raise


def fit(parts: Parts, trainer: L.Trainer, resume: Path | None) -> None:
    """Train; compiled if asked for."""
    mode = parts.config.run.compile
    if mode:
        parts.module.model.compile(mode=None if mode == "default" else mode)
    trainer.fit(
        parts.module,
        datamodule=parts.data,
        ckpt_path=None if resume is None else str(resume),
        weights_only=True,
    )


def validate_the_end(parts: Parts, trainer: L.Trainer) -> None:
    """Validate a run that max_steps ended in mid-epoch, which Lightning does not."""
    tracker = find(trainer, PrimaryTracker)
    if parts.config.trainer.limit_val_batches == 0 or tracker.last_step == trainer.global_step:
        return
    trainer.validate(parts.module, datamodule=parts.data, verbose=False)
    tracker.note(trainer)


def find(trainer: L.Trainer, kind: type[C]) -> C:
    """The trainer's callback of that class."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next(c for c in callbacks if isinstance(c, kind))


def test(parts: Parts, trainer: L.Trainer, folder: Path) -> Mapping[str, float]:
    """Metrics of the best checkpoint on the test split, which is touched here and nowhere else."""
    if parts.config.trainer.limit_test_batches == 0:
        return {}
    best = folder / "checkpoints" / "best.ckpt"
    if trainer.strategy.broadcast(best.is_file()):
        if is_main_process():
            parts.module.load_state_dict(read_checkpoint(best)["state_dict"])
        # torchrun's other ranks may have numbered another folder, or not see rank 0's disk
        share_weights(parts, trainer)
    trainer.test(parts.module, datamodule=parts.data, verbose=False)
    return measured(trainer, "test")


def share_weights(parts: Parts, trainer: L.Trainer) -> None:
    """Give every process the first one's weights and buffers, one tensor at a time."""
    if trainer.world_size == 1:
        return
    for held in parts.module.state_dict().values():
        sent = held.to(trainer.strategy.root_device)
        dist.broadcast(sent, src=0)
        held.copy_(sent)


def measured(trainer: L.Trainer, split: str) -> dict[str, float]:
    """The metrics of the evaluation that has just ended."""
    return {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(f"{split}/")}


def initialise(parts: Parts) -> None:
    """Data-dependent initialisation, the same on every rank."""
    config = parts.config
    if config.model.init_from:
        return
    batch = parts.data.fixed_batch(CALIBRATION_EXAMPLES)
    try:
        alphas = parts.module.initialise(batch)
    except ValueError as error:
        raise ConfigError(f"norm={config.norm_name}: {error}") from error
    if alphas:
        low, high = min(alphas.values()), max(alphas.values())
        say(
            f"calibrated {len(alphas)} alphas on {len(batch['valid'])} examples: "
            f"{low:.3g} to {high:.3g}"
        )


def introduce(parts: Parts, trainer: L.Trainer, folder: Path | None) -> None:
    """A few lines on what is about to run."""
    config, info = parts.config, parts.data.splits.info
    count, of_norms = parameter_count(parts)
    sizes = " / ".join(f"{n:,}" for n in info.sizes.values())
    batch = config.data.batch_size
    say(f"task   {config.task_name}   seed {config.seed}")
    say(f"model  {config.model_name}, {count:,} parameters ({of_norms:,} in norms)")
    say(f"norms  {audit_line(parts)}")
    say(f"data   {info.name}, {sizes} examples{', SYNTHETIC' if info.synthetic else ''}")
    device = type(trainer.accelerator).__name__.removesuffix("Accelerator")
    say(f"where  {trainer.world_size} x {device}, {config.trainer.precision}, global batch {batch}")
    if folder is not None:
        say(f"run    {folder}")
    for note in parts.notes:
        say(f"note: {note}")


def summarise(result: Mapping[str, Any], folder: Path) -> None:
    """The end of a good run, on stdout."""
    primary, norm = result["primary"], result["norm"]
    name, split = primary["name"], primary["split"]
    line = f"{result['task']} {result['model']} {norm} seed {result['seed']}: "
    if primary["best"] is not None:
        line += f"best {split}/{name} {primary['best']:.4f} (step {primary['best_step']})"
    if primary["test"] is not None:
        line += f", test/{name} {primary['test']:.4f}"
    speed = result["throughput"]
    if speed["per_s"]:
        line += f", {speed['per_s']:.0f} {speed['unit']}/s"
    print(f"{line}, {result['wall_seconds']:.0f} s")
    print(f"result: {folder / 'result.json'}")


# -- the folder
# ---------------------------------------------------------------------------------------


def choose_folder(config: Config) -> Path:
    """run.dir, the resumed run's folder, or the next free
    runs/<task>/<model>-<norm>-seed<k>-<n>."""
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
    free = ("run.", "trainer.", "evaluate", "recipe", "data.root", "data.num_workers")
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


# -- without training
# ---------------------------------------------------------------------------------


def evaluate(config: Config, *, command: str) -> int:
    """Metrics of a run, a checkpoint or a weights file on val or test; prints one JSON object."""
    quiet()
    assert config.evaluate is not None
    processes = check_devices(config)
    file = find_checkpoint(config.evaluate, key="evaluate", prefer="best")
    parts = build_parts(config, processes=processes)
    norm = build_norm(config).describe()
    for note in read_weights(parts.module.model, file, norm=norm, key="evaluate"):
        say(f"note: {note}")
    trainer = build_trainer(config, processes=processes, callbacks=[], folder=None)
    introduce(parts, trainer, None)
    split = config.run.eval_split
    measure = trainer.validate if split == "val" else trainer.test
    with Children(trainer):
        measure(parts.module, datamodule=parts.data, verbose=False)
    if is_main_process():
        found = {"checkpoint": str(file), "split": split, **measured(trainer, split)}
        print(json.dumps(plain(found), indent=2))
    return 0


def dry_run(config: Config, *, command: str) -> int:
    """Build all, one training and one validation batch in a temporary folder; nothing stays.

    A model over the available memory is built on the meta device only, and that is said.
    """
    quiet()
    processes = check_devices(config)
    choose_folder(config)  # says whether run.dir could be used; writes nothing
    count, needed = meta_size(config)
    available = available_memory()
    if needed > available:
        need, have = (f"{n / 2**30:.1f} GiB" for n in (needed, available))
        say(
            f"dry run: model={config.model_name} has {count:,} parameters; training needs at least "
            f"{need} for weights, gradients and optimizer, {have} are available: "
            "built on the meta device only, no batch was run"
        )
        return 0
    parts = build_parts(config, processes=processes)
    initialise(parts)
    folder = Path(tempfile.mkdtemp(prefix="suite-dry-run-"))
    try:
        callbacks = build_callbacks(config, parts.spec, None)
        trainer = build_trainer(
            config,
            processes=processes,
            callbacks=callbacks,
            folder=None,
            fast_dev_run=1,
            default_root_dir=folder,
        )
        introduce(parts, trainer, None)
        with Children(trainer):
            fit(parts, trainer, None)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    say(f"dry run: a training and a validation batch on {processes} process(es), nothing written")
    return 0


def available_memory() -> int:
    """Bytes that could still be taken: of the GPU where there is one, else of the machine."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return sys.maxsize
