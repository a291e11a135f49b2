"""Without training: the metrics of what was trained, and a try-out that leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from suite.build import (
    build_callbacks,
    build_data,
    build_norm,
    build_parts,
    build_trainer,
    check_model,
    quiet,
)
from suite.checkpoint import find_checkpoint, read_weights
from suite.children import Children
from suite.config import Config, check_devices
from suite.errors import ConfigError
from suite.folder import choose_place
from suite.memory import Need, available_memory, data_outline, gib, need
from suite.metrics import is_main_process, plain
from suite.registry import load_task
from suite.run import fit, initialise, introduce, measured, tell_unreadable
from suite.signals import Signals
from suite.train import say


def evaluate(config: Config, signals: Signals) -> int:
    """Metrics of a run, a checkpoint or a weights file on val or test; prints one JSON object."""
    quiet()
    assert config.evaluate is not None
    processes = check_devices(config)
    file = find_checkpoint(config.evaluate, key="evaluate", prefer="best")
    parts = build_parts(config, processes=processes)
    norm = build_norm(config).describe()
    model = parts.module.model
    sharding = parts.module.sharding
    later = None if sharding is None else sharding.weights
    meaning = parts.data.splits.info.extra.get("meaning")
    given: Any = {"options": config.model, "meaning": meaning, "later": later}
    for note in read_weights(model, file, norm=norm, key="evaluate", **given):
        say(f"note: {note}")
    split = config.run.eval_split
    # in a job of SLURM's Lightning loads an hpc_ckpt_<n>.ckpt from its folder, the current one
    with tempfile.TemporaryDirectory(prefix="suite-evaluate-") as empty:
        given = {"callbacks": [], "folder": None, "default_root_dir": empty}
        trainer = build_trainer(config, processes=processes, **given)
        check_model(parts, trainer)
        introduce(parts, trainer, None)
        measure = trainer.validate if split == "val" else trainer.test
        with Children(trainer, signals):
            measure(parts.module, datamodule=parts.data, verbose=False)
            tell_unreadable(parts)
    if is_main_process():
        unreadable = parts.data.unreadable_files()
        head = {"checkpoint": str(file), "split": split, "unreadable": unreadable}
        found = {**head, **measured(trainer, split)}
        print(json.dumps(plain(found), indent=2))
    return 0


def dry_run(config: Config, signals: Signals) -> int:
    """Build all, one training and one validation batch in a temporary folder; nothing stays.

    A model over the available memory is built on the meta device only, and that is said.
    """
    quiet()
    if outlined(config):
        return 0
    processes = check_devices(config)
    choose_place(config)  # says whether run.dir could be used; writes nothing
    parts = build_parts(config, processes=processes)
    initialise(parts)
    folder = Path(tempfile.mkdtemp(prefix="suite-dry-run-"))
    try:
        callbacks = build_callbacks(config, parts.spec, None, signals)
        trainer = build_trainer(
            config,
            processes=processes,
            callbacks=callbacks,
            folder=None,
            fast_dev_run=1,
            default_root_dir=folder,
        )
        check_model(parts, trainer)
        introduce(parts, trainer, None)
        with Children(trainer, signals):
            fit(parts, trainer, None)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    say(f"dry run: a training and a validation batch on {processes} process(es), nothing written")
    return 0


def outlined(config: Config) -> bool:
    """Whether the run cannot be here; then what it needs is said, and nothing is allocated."""
    spec, factory = load_task(config.task_name), build_norm(config)
    info, no_data = data_outline(config, spec, lambda: build_data(config, spec))
    known = processes_here(config)
    found = need(config, spec, factory, info, activations=False, processes=known)
    reason = why_not_here(config, found)
    if reason is None:
        return False
    found = need(config, spec, factory, info, activations=True, processes=known)
    if no_data is not None:
        say(f"note: the data was not looked at: {no_data}")
    say(
        f"dry run: model={config.model_name} with norm={config.norm_name}: "
        f"{found.parameters:,} parameters ({found.of_norms:,} in norms), on the meta device only"
    )
    if found.activations is not None:
        say("forward and backward of a micro-batch on the meta device: every shape fits")
    say(f"memory over {found.processes} process(es): {found.text()}")
    if found.largest:
        others = ", ".join(f"{n}: {gib(found.over(n).total)}" for n in (8, 64, 256))
        say(f"trainer.strategy=fully_shard, an example at a time, a process of {others}")
    say(f"{reason}: nothing was allocated, no batch was run, nothing was written")
    return True


def processes_here(config: Config) -> int | None:
    """Processes that the config gives on this machine; None where it cannot be run on it."""
    try:
        return check_devices(config)
    except ConfigError:
        return None


def why_not_here(config: Config, found: Need) -> str | None:
    """Why this machine cannot try the run out; None where it can."""
    available = available_memory(config)
    if found.total > available:
        return f"only {gib(available)} are available here"
    if not found.sharded:
        return None
    try:
        check_devices(config)
    except ConfigError as error:
        return str(error)
    return None
