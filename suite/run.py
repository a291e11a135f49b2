"""One run: train, validate, test, and the record that it leaves (result.json).

Nothing is written before the parts are built and agree; afterwards every end, good or bad, leaves a
result.json whose status says which.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import lightning as L

from suite.backends import BackendProof, backend_lines
from suite.build import (
    Parts,
    audit_line,
    build_callbacks,
    build_parts,
    build_trainer,
    check_model,
    parameter_count,
    quiet,
)
from suite.callbacks import PrimaryTracker
from suite.checkpoint import read_checkpoint
from suite.children import Children
from suite.config import (
    Config,
    check_devices,
    comparable_hash,
    to_dict,
)
from suite.data import lost_worker
from suite.decision import decided
from suite.errors import ConfigError, DataError, DivergedError, RankError, Stopped
from suite.folder import Hold, Place, check_data, choose_place, open_folder
from suite.metrics import (
    SCHEMA,
    git_state,
    hardware,
    is_main_process,
    peak_memory,
    versions,
    write_json,
)
from suite.nonfinite import NonFiniteGuard
from suite.norms import Kept, Replaced, swap_rows, swap_table
from suite.ranks import lost_rank
from suite.records import read_result
from suite.sharding import NAME as SHARDED
from suite.sharding import share_weights
from suite.signals import Signals, requeue
from suite.throughput import Throughput
from suite.train import say

C = TypeVar("C")
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
                "unreadable": self.parts.data.unreadable_files(),
                "notes": list(info.extra.get("notes", ())),
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
            "norm_backend": find(trainer, BackendProof).summary(),
            "nonfinite": find(trainer, NonFiniteGuard).summary(),
            "norm_swaps": swap_rows(*(swapped(parts) or ([], []))),
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "wall_seconds": round(time.time() - self.started, 2),
            "throughput": speed.summary(),
            "peak_memory_bytes": peak_memory(),
            "world_size": trainer.world_size,
            "precision": trainer.precision,  # 16-mixed is bf16-mixed on a CPU
            "hardware": hardware(),
            "versions": versions(),
            "git": git_state(Path(__file__).parent),
            "config_hash": comparable_hash(config),
            "config": to_dict(config),
            "run_dir": str(self.folder),
            "command": self.command,
        }


def train(config: Config, *, command: str, signals: Signals) -> int:
    """Train, evaluate the best checkpoint on test once, leave the record. Returns the exit code."""
    quiet()
    started = time.time()
    processes = check_devices(config)
    accelerator, timeout = config.trainer.accelerator, config.run.dist_timeout
    place = decided(lambda: choose_place(config), accelerator=accelerator, timeout=timeout)
    for note in place.notes:
        say(f"note: {note}")
    if place.done:
        say_done(place)
        return 0
    parts = build_parts(config, processes=processes)
    if place.checkpoint is not None:
        sha256 = parts.data.splits.info.sha256
        check_data(place.checkpoint, sha256=sha256, resume=config.run.resume)
    callbacks = build_callbacks(config, parts.spec, place.folder, signals)
    trainer = build_trainer(config, processes=processes, callbacks=callbacks, folder=place.folder)
    check_model(parts, trainer)
    record = Record(config, parts, trainer, place.folder, command, started, {})
    if place.checkpoint is None:
        initialise(parts)
    signals.check()
    hold = open_folder(config, place)
    try:
        introduce(parts, trainer, place.folder)
        parts.module.folder = place.folder
        with Children(trainer, signals, failed=record.write) as children:
            follow(record, place.checkpoint, children)
        result = record.write("done")
    finally:
        release(hold)
    if result is not None:
        summarise(result, place.folder)
    return 0


def release(hold: Hold | None) -> None:
    """Give the folder back, where this process had it."""
    if hold is not None:
        hold.release()


def say_done(place: Place) -> None:
    """The summary of a run that has nothing left to do."""
    if is_main_process():
        summarise(read_result(place.folder), place.folder)


def follow(record: Record, resume: Path | None, children: Children) -> None:
    """Train, validate and test; a bad end is written into the record and passed on."""
    parts, trainer = record.parts, record.trainer
    try:
        fit(parts, trainer, resume)
        validate_the_end(parts, trainer)
        record.test = test(parts, trainer, record.folder)
        tell_unreadable(parts)
    except DivergedError as error:
        record.write("diverged", str(error))
        raise
    except DataError as error:
        record.write("failed", str(error))
        raise
    except Stopped as error:
        children.signals.held = True  # another one must cost neither the record nor the requeue
        record.write("interrupted", str(error))
        if error.requeue and is_main_process() and (said := requeue()):
            say(said)
        raise
    except (KeyboardInterrupt, SystemExit) as error:
        record.write("interrupted", "interrupted by the user")
        raise KeyboardInterrupt from error
    except BaseException as error:
        known = understood(error, children, timeout=record.config.run.dist_timeout)
        status = "interrupted" if isinstance(known, Stopped) else "failed"
        record.write(status, str(known or f"{type(error).__name__}: {error}"))
        if known is not None:
            raise known from None
        raise


def understood(
    error: BaseException, children: Children, *, timeout: int
) -> DataError | RankError | Stopped | None:
    """The error in words, where another process is what is behind it."""
    lost = lost_rank(error, timeout=timeout, known=children.ended)
    number = children.stopped_by()
    if lost is not None and number is not None:
        return Stopped(number)  # it alone was sent a signal, where nothing is agreed on
    return lost or lost_worker(error)


def tell_unreadable(parts: Parts) -> None:
    """Count over all processes what could not be read, and say it."""
    parts.data.gather_unreadable()
    for split, found in parts.data.unreadable_files().items():
        count, first = found["count"], found["files"][0]
        share = f"{count:,} of {found['of']:,} examples of {split} ({count / found['of']:.1%})"
        say(f"note: {share} could not be read and were left out, such as {first}")


def fit(parts: Parts, trainer: L.Trainer, resume: Path | None) -> None:
    """Train; compiled if asked for."""
    mode = parts.config.run.compile
    if mode and parts.module.sharding is None:  # a sharded one is compiled block by block
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
        # torchrun's other ranks may have numbered another folder, or not see rank 0's disk
        state = read_checkpoint(best, lazy=True)["state_dict"] if is_main_process() else {}
        share_weights(parts.module, state, trainer.strategy.root_device)
    trainer.test(parts.module, datamodule=parts.data, verbose=False)
    return measured(trainer, "test")


def measured(trainer: L.Trainer, split: str) -> dict[str, float]:
    """The metrics of the evaluation that has just ended."""
    return {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(f"{split}/")}


def initialise(parts: Parts) -> None:
    """Data-dependent initialisation, the same on every rank."""
    config = parts.config
    if config.model.init_from or not parts.module.initialises:
        return
    if parts.module.sharding is not None:
        raise ConfigError(
            f"norm.alpha_init=calibrated: needs the whole model in one process, which "
            f"trainer.strategy={SHARDED} never has; give a number, or model.init_from=FILE of a "
            "model that was calibrated"
        )
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
    by_length = getattr(config.data, "batch_text", None)
    say(f"task   {config.task_name}   seed {config.seed}")
    say(f"model  {config.model_name}, {count:,} parameters ({of_norms:,} in norms)")
    say(f"norms  {audit_line(parts)}")
    for line in backend_lines(parts.module.backends):
        say(f"       {line}")
    if swaps := swapped(parts):
        say("\n".join(f"       {line}" for line in swap_table(*swaps).splitlines()))
    say(f"data   {info.name}, {sizes} examples{', SYNTHETIC' if info.synthetic else ''}")
    device = type(trainer.accelerator).__name__.removesuffix("Accelerator")
    world, accumulate = trainer.world_size, trainer.accumulate_grad_batches
    ways = world * accumulate
    share = f" = {world} x {batch // ways}" if ways > 1 and not by_length else ""
    share += f" x {accumulate} accumulated" if accumulate > 1 else ""
    say(f"where  {world} x {device}, {trainer.precision}, global batch {by_length or batch}{share}")
    if folder is not None:
        say(f"run    {folder}")
    for note in (*parts.notes, *info.extra.get("notes", ())):
        say(f"note: {note}")


def swapped(parts: Parts) -> tuple[list[Replaced], list[Kept]] | None:
    """What was replaced and kept in somebody else's model; None for the suite's own."""
    model: Any = parts.module.model
    return (model.replaced, model.kept) if hasattr(model, "replaced") else None


def summarise(result: Mapping[str, Any], folder: Path) -> None:
    """The end of a good run, on stdout."""
    primary, norm = result["primary"], result["norm"]
    name, split = primary["name"], primary["split"]
    found = []
    if primary["best"] is not None:
        found.append(f"best {split}/{name} {primary['best']:.4f} (step {primary['best_step']})")
    if primary["test"] is not None:
        found.append(f"test/{name} {primary['test']:.4f}")
    speed = result["throughput"]
    if speed["per_s"]:
        found.append(f"{speed['per_s']:.0f} {speed['unit']}/s")
    found.append(f"{result['wall_seconds']:.0f} s")
    head = f"{result['task']} {result['model']} {norm} seed {result['seed']}"
    print(f"{head}: {', '.join(found)}")
    print(f"result: {folder / 'result.json'}")
