"""From a config to its parts: data, network, module, trainer.

Raises ConfigError before anything is written.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from suite.backends import BackendProof, backends, recomputing
from suite.callbacks import (
    NormStatistics,
    PrimaryTracker,
    ProgressLines,
    SuiteProgressBar,
)
from suite.checkpoint import init_from
from suite.config import Config, to_dict
from suite.data import DataInfo, Splits, SuiteDataModule
from suite.divergence import DivergenceWatch
from suite.ema import WeightEMA
from suite.errors import ConfigError
from suite.memory import check_memory
from suite.metrics import JsonlLogger
from suite.module import SuiteModule
from suite.nonfinite import NonFiniteGuard
from suite.norms import NormFactory, foreign_norms, make_norm, norm_modules
from suite.optim import layer_scales
from suite.registry import TaskSpec, load_task
from suite.saving import CheckpointFiles
from suite.sharding import NAME as SHARDED
from suite.sharding import ShardedStrategy, Sharding, check_precision, check_shardable
from suite.signals import Signals
from suite.stopping import StopTogether
from suite.throughput import NoProfiler, Throughput
from suite.train import say

QUIET = (
    r".*sync_dist=True.*",
    r".*does not have many workers.*",
    r".*smaller than the logging interval.*",
    r".*dataloader is not resumable.*",
    r".*dirpath has changed from.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*Total length of .* across ranks is zero.*",
    r".*could not find the monitored key.*",
    r".*treespec.*",
    r".*LeafSpec.*",
    r".*lr_scheduler.step\(\).*",
    r".*is in eval mode.*",
    r".*GPU available but not used.*",
    r".*No positive samples in targets.*",
)


@dataclass(frozen=True)
class Parts:
    """What a run is made of."""

    config: Config
    spec: TaskSpec
    factory: NormFactory
    module: SuiteModule
    data: SuiteDataModule
    notes: list[str]


def quiet() -> None:
    """Keep Lightning's advice on things that this suite has decided out of the output."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in QUIET:
        warnings.filterwarnings("ignore", message=pattern)


def build_norm(config: Config) -> NormFactory:
    """The factory of the config's norm."""
    try:
        return make_norm(config.norm_name, config.norm)
    except ValueError as error:
        raise ConfigError(f"norm={config.norm_name}: {error}") from error


def build_data(config: Config, spec: TaskSpec) -> Splits:
    """The splits that data= names."""
    splits: Splits = spec.data[config.data_name].build(config.data, seed=config.seed)
    return splits


def build_model(config: Config, spec: TaskSpec, factory: NormFactory, splits: Splits) -> nn.Module:
    """The seeded network, audited: every norm is the chosen one or on the task's keep list.

    The same seed with another norm gives the same non-norm parameters, since norms draw no numbers.
    """
    L.seed_everything(config.seed, verbose=False)
    sharded = config.trainer.strategy == SHARDED
    try:
        with torch.device("meta") if sharded else nullcontext():
            model: nn.Module = spec.models[config.model_name].build(
                config.model, norm=factory, data=splits.info
            )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(
            f"model={config.model_name} with norm={config.norm_name}: {error}"
        ) from error
    if getattr(model, "causal", False) and not factory.causal:
        raise ConfigError(
            f"{factory.across_positions()}: its statistics look across positions, so that "
            f"model={config.model_name} would see what it has to predict; take a norm of each "
            "position such as layernorm, rmsnorm, dyt or derf"
        )
    kept = [path for path, _ in getattr(model, "kept", ())]  # model.keep, as replace_norms took it
    sites = kept_sites(config, spec)
    leftover = foreign_norms(model, factory, keep_sites=sites, keep=kept)
    if leftover:
        listed = ", ".join(f"{path} ({kind})" for path, kind in leftover[:5])
        raise ConfigError(
            f"norm={config.norm_name}: {len(leftover)} norms of model={config.model_name} "
            f"are not it: {listed}"
        )
    if not any(True for _ in norm_modules(model)):
        raise ConfigError(
            f"model={config.model_name}: has no norm that norm={config.norm_name} could be"
        )
    if sharded:
        check_shardable(model, name=config.model_name)
    return model


def kept_sites(config: Config, spec: TaskSpec) -> tuple[str, ...]:
    """Sites that keep their published norm: the model's keep_sites where it has that, else the
    task's.
    """
    return tuple(getattr(config.model, "keep_sites", spec.keep_sites))


def build_parts(config: Config, *, processes: int) -> Parts:
    """Everything but the trainer, for one of `processes`.

    Uses no accelerator and writes nothing.
    """
    torch.set_float32_matmul_precision(config.run.matmul_precision)
    spec, factory = load_task(config.task_name), build_norm(config)
    splits = build_data(config, spec)
    if not config.evaluate:
        check_memory(config, spec, factory, splits.info, processes=processes)
    model = build_model(config, spec, factory, splits)
    if config.optim.layer_decay is not None:
        layer_scales(model, config.optim.layer_decay)  # refuses a model without layers
    sharding, notes = build_sharding(config), []
    if config.model.init_from and not config.evaluate:
        across = config.model.init_across_norms
        norm = factory.describe()
        notes += init_from(
            model,
            config.model.init_from,
            norm=norm,
            across_norms=across,
            options=config.model,
            meaning=splits.info.extra.get("meaning"),
            later=None if sharding is None else sharding.weights,
        )
    trainer = config.trainer
    accumulate = trainer.accumulate_grad_batches
    data = SuiteDataModule(
        splits,
        options=config.data,
        seed=config.seed,
        accumulate=accumulate,
        limits={
            "train": trainer.limit_train_batches,
            "val": trainer.limit_val_batches,
            "test": trainer.limit_test_batches,
        },
    )
    batches = 0 if config.evaluate else epoch_batches(config, data, processes=processes)
    module: SuiteModule = spec.module(
        model,
        options=config.task,
        info=splits.info,
        optim=config.optim,
        identity=identity(config, factory, splits.info),
        seed=config.seed,
        nominal=max(1, config.data.batch_size // (processes * accumulate)),
        steps_per_epoch=max(1, batches // accumulate),
        padded=not config.data.drop_last or data.skips or getattr(config.data, "by_length", False),
    )
    module.sharding = sharding
    if getattr(config.norm, "recompute", False):
        module.saving = recomputing(config, model)
    return Parts(config, spec, factory, module, data, notes)


def check_model(parts: Parts, trainer: L.Trainer) -> None:
    """Raise ConfigError where the model or a norm's backend cannot run on the trainer's device.

    A model may have check_device(device), which raises ValueError.
    """
    device, compiled = trainer.strategy.root_device, bool(parts.config.run.compile)
    chosen = backends(parts.module.model, device, compiled=compiled)
    parts.module.backends = chosen
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BackendProof):
            callback.chosen = chosen
    check = getattr(parts.module.model, "check_device", None)
    if check is None:
        return
    try:
        check(device)
    except ValueError as error:
        raise ConfigError(f"model={parts.config.model_name}: {error}") from error


def epoch_batches(config: Config, data: SuiteDataModule, *, processes: int) -> int:
    """Micro-batches of an epoch. Raises ConfigError where the data has not one whole batch."""
    trainer, found = config.trainer, len(data.train_sampler(rank=0, world_size=processes))
    every = trainer.val_check_interval
    if isinstance(every, int) and every > found > 0 and trainer.check_val_every_n_epoch:
        raise ConfigError(
            f"trainer.val_check_interval={every}: an epoch has only {found} batches; take "
            "at most that, or trainer.check_val_every_n_epoch=null to count over epochs"
        )
    parts = trainer.accumulate_grad_batches
    if isinstance(every, int) and every % parts:
        raise ConfigError(
            f"trainer.val_check_interval={every}: counts batches, and an optimizer step takes "
            f"trainer.accumulate_grad_batches={parts} of them; take a multiple"
        )
    return found


def identity(config: Config, factory: NormFactory, info: DataInfo) -> dict[str, Any]:
    """What travels in every checkpoint: plain values, which weights_only loading reads."""
    return {
        "schema": 1,
        "task": config.task_name,
        "model": config.model_name,
        "data": config.data_name,
        "norm": factory.describe(),
        "meaning": info.extra.get("meaning"),
        "data_sha256": info.sha256,
        "config": to_dict(config),
    }


def audit_line(parts: Parts) -> str:
    """`9 dyt (attn 4, ffn 4, final 1), ...`: what the audit saw."""
    by_name: dict[str, Counter[str]] = {}
    for _, norm in norm_modules(parts.module.model):
        made: Any = norm
        by_name.setdefault(made.norm_name, Counter())[made.site] += 1
    listed = [
        f"{sum(sites.values())} {name} ({', '.join(f'{s} {n}' for s, n in sites.items())})"
        for name, sites in by_name.items()
    ]
    kept = ", ".join(kept_sites(parts.config, parts.spec)) or "none"
    by_user = len(getattr(parts.module.model, "kept", ()))
    return f"{'; '.join(listed)}; sites kept: {kept}" + f", norms kept: {by_user}" * bool(by_user)


def warn(text: str) -> None:
    """One line on stderr."""
    say(f"warning: {text}")


def build_callbacks(
    config: Config, spec: TaskSpec, folder: Path | None, signals: Signals
) -> list[Callback]:
    """Observers, progress and, with a folder, checkpoints: the best on val and the last epoch."""
    name, direction, split = spec.primary
    best = None if folder is None else folder / "checkpoints" / "best.ckpt"
    callbacks: list[Callback] = [
        NonFiniteGuard(config.run.nonfinite, limit=config.run.nonfinite_limit),
        Throughput(spec.unit),
        BackendProof(warn=warn),
        PrimaryTracker(f"{split}/{name}", direction, best, patience=config.run.patience),
    ]
    if config.run.norm_stats:
        callbacks.append(NormStatistics(warn=warn, inputs=not config.run.compile))
    callbacks.append(DivergenceWatch(warn=warn))
    if config.trainer.enable_progress_bar and folder is not None:
        callbacks.append(SuiteProgressBar() if sys.stderr.isatty() else ProgressLines())
    if config.optim.ema_decay is not None:
        callbacks.append(WeightEMA(config.optim.ema_decay))
    last = None if folder is None else folder / "checkpoints" / "last.ckpt"
    callbacks.append(StopTogether(signals, last))  # after all that a checkpoint is to hold
    if folder is not None:
        place: dict[str, Any] = {"dirpath": folder / "checkpoints", "enable_version_counter": False}
        callbacks.append(ModelCheckpoint(filename="last", save_on_train_epoch_end=True, **place))
        if config.run.save_every_n_steps is not None:
            every = config.run.save_every_n_steps
            callbacks.append(ModelCheckpoint(filename="last", every_n_train_steps=every, **place))
    return callbacks


def build_trainer(
    config: Config,
    *,
    processes: int,
    callbacks: list[Callback],
    folder: Path | None,
    **overrides: Any,
) -> L.Trainer:
    """Lightning's Trainer from trainer.*; sampling, logging and progress are the suite's."""
    t = config.trainer
    loggers: list[Logger] = []
    if folder is not None:
        loggers.append(JsonlLogger(folder / "metrics.jsonl"))
        if config.run.tensorboard:
            loggers.append(TensorBoardLogger(folder, name="tensorboard", version=""))
    arguments: dict[str, Any] = {
        "max_epochs": t.max_epochs if t.max_epochs is not None else -1,
        "max_steps": t.max_steps,
        "max_time": t.max_time,
        "accelerator": t.accelerator,
        "devices": t.devices,
        "num_nodes": t.num_nodes,
        "strategy": build_strategy(config, processes=processes),
        "precision": t.precision,
        "accumulate_grad_batches": t.accumulate_grad_batches,
        "gradient_clip_val": t.gradient_clip_val,
        "gradient_clip_algorithm": t.gradient_clip_algorithm,
        "val_check_interval": t.val_check_interval,
        "check_val_every_n_epoch": t.check_val_every_n_epoch,
        "log_every_n_steps": t.log_every_n_steps,
        "deterministic": t.deterministic,
        "benchmark": t.benchmark,
        "profiler": t.profiler or NoProfiler(),
        "num_sanity_val_steps": t.num_sanity_val_steps,
        "detect_anomaly": t.detect_anomaly,
        "logger": loggers or False,
        "callbacks": callbacks,
        "plugins": [CheckpointFiles()],
        "default_root_dir": folder,  # in the current one Lightning would look for SLURM's files
        "enable_progress_bar": any(isinstance(c, SuiteProgressBar) for c in callbacks),
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "inference_mode": t.strategy != SHARDED,  # whose gathered weights would be of no use after
    }
    if t.limit_val_batches == 0:
        arguments["limit_val_batches"] = 0
    try:
        return L.Trainer(**{**arguments, **overrides})
    except (MisconfigurationException, ValueError, RuntimeError, TypeError) as error:
        raise ConfigError(f"trainer: {error}") from error


def build_sharding(config: Config) -> Sharding | None:
    """How the model is cut over the processes; None where each has a whole one."""
    if config.trainer.strategy != SHARDED:
        return None
    check_precision(config.trainer.precision)
    return Sharding(config.seed, compile=config.run.compile)


def build_strategy(config: Config, *, processes: int) -> Strategy | str:
    """DDP or shards with the run's time-out; anything else by its name."""
    name = config.trainer.strategy
    timeout = timedelta(seconds=config.run.dist_timeout)
    if name == SHARDED:
        return ShardedStrategy(processes=processes, timeout=timeout)
    unused = name == "ddp_find_unused_parameters_true"
    if processes > 1 and (unused or name in ("auto", "ddp")):
        return DDPStrategy(
            timeout=timeout, find_unused_parameters=unused, gradient_as_bucket_view=True
        )
    return name


def parameter_count(parts: Parts) -> tuple[int, int]:
    """All parameters, and those that norms own."""
    norms = {id(p) for _, m in norm_modules(parts.module.model) for p in m.parameters()}
    sizes: Mapping[int, int] = {id(p): p.numel() for p in parts.module.model.parameters()}
    return sum(sizes.values()), sum(n for key, n in sizes.items() if key in norms)
