"""Without training: the metrics of what was trained, and a try-out that leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from suite.build import (
    build_callbacks,
    build_norm,
    build_parts,
    build_trainer,
    check_model,
    meta_size,
    quiet,
)
from suite.checkpoint import find_checkpoint, read_weights
from suite.children import Children
from suite.config import Config, check_devices
from suite.folder import choose_folder
from suite.metrics import is_main_process, plain
from suite.run import fit, initialise, introduce, measured, tell_unreadable
from suite.train import say


def evaluate(config: Config) -> int:
    """Metrics of a run, a checkpoint or a weights file on val or test; prints one JSON object."""
    quiet()
    assert config.evaluate is not None
    processes = check_devices(config)
    file = find_checkpoint(config.evaluate, key="evaluate", prefer="best")
    parts = build_parts(config, processes=processes)
    norm = build_norm(config).describe()
    model = parts.module.model
    for note in read_weights(model, file, norm=norm, key="evaluate", options=config.model):
        say(f"note: {note}")
    trainer = build_trainer(config, processes=processes, callbacks=[], folder=None)
    check_model(parts, trainer)
    introduce(parts, trainer, None)
    split = config.run.eval_split
    measure = trainer.validate if split == "val" else trainer.test
    with Children(trainer):
        measure(parts.module, datamodule=parts.data, verbose=False)
        tell_unreadable(parts)
    if is_main_process():
        unreadable = parts.data.unreadable_files()
        head = {"checkpoint": str(file), "split": split, "unreadable": unreadable}
        found = {**head, **measured(trainer, split)}
        print(json.dumps(plain(found), indent=2))
    return 0


def dry_run(config: Config) -> int:
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
        check_model(parts, trainer)
        introduce(parts, trainer, None)
        with Children(trainer):
            fit(parts, trainer, None)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    say(f"dry run: a training and a validation batch on {processes} process(es), nothing written")
    return 0


def available_memory() -> int:
    """Bytes that could still be taken: of the GPU where there is one, else of the machine."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return sys.maxsize
