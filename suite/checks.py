"""Mistakes that only show when sections are seen together, or against the machine.

`check` needs nothing but the config; `check_devices` and `check_run_dir` look at the machine and
are called by the train command before anything is built or written.
"""

from __future__ import annotations

import os
from pathlib import Path

from suite.errors import ConfigError
from suite.settings import Config


def world_size(config: Config) -> int | None:
    """Processes of the whole run, or None where `trainer.devices=auto` leaves it to the machine."""
    devices = config.trainer.devices
    if devices == "auto":
        return None
    local = len(devices.strip(",").split(",")) if isinstance(devices, str) else devices
    return local * config.trainer.num_nodes


def check(config: Config, *, processes: int | None = None) -> None:
    """Raise ConfigError for values that do not go together.

    processes: how many there will be; None takes what the config says.
    """
    trainer = config.trainer
    if trainer.max_epochs is None and trainer.max_steps == -1 and trainer.max_time is None:
        raise ConfigError(
            "trainer: no end is set; give trainer.max_epochs, trainer.max_steps or trainer.max_time"
        )
    endless = trainer.max_epochs is None and trainer.max_steps == -1
    if endless and config.optim.schedule != "constant":
        raise ConfigError(
            f"optim.schedule={config.optim.schedule}: needs trainer.max_epochs or "
            "trainer.max_steps; with trainer.max_time alone use optim.schedule=constant"
        )
    if config.optim.fused and trainer.precision == "16-mixed":
        raise ConfigError(
            "optim.fused=true: with trainer.precision=16-mixed it unscales gradients itself, after "
            "they were clipped; leave optim.fused out, or take bf16-mixed"
        )
    if config.optim.ema_decay is not None:
        _check_average(config)
    known = processes or world_size(config) or 1
    _check_batch(config, known)
    if trainer.accelerator == "cpu":
        _check_batchnorm(config, known)


def _check_average(config: Config) -> None:
    precision, strategy = config.trainer.precision, config.trainer.strategy
    if precision in ("bf16-true", "16-true"):
        raise ConfigError(
            f"optim.ema_decay={config.optim.ema_decay}: with trainer.precision={precision} the "
            "average is rounded so coarsely that it stands still; take bf16-mixed"
        )
    if strategy == "fsdp" or strategy.startswith("deepspeed"):
        raise ConfigError(
            f"optim.ema_decay={config.optim.ema_decay}: no average is kept of weights that "
            f"trainer.strategy={strategy} divides; take ddp, or leave optim.ema_decay out"
        )


def _check_batch(config: Config, processes: int) -> None:
    accumulate = config.trainer.accumulate_grad_batches
    parts = processes * accumulate
    batch = getattr(config.data, "batch_size", None)
    if getattr(config.data, "by_length", False):
        return  # as many examples as their length allows; suite.buckets deals them to all
    if batch is not None and batch % parts:
        low, high = batch // parts * parts, (batch // parts + 1) * parts
        nearest = f"{low} or {high}" if low else f"{high}"
        raise ConfigError(
            f"data.batch_size={batch}: the examples of one step over all processes; "
            f"must be a multiple of {processes} processes x trainer.accumulate_grad_batches="
            f"{accumulate}, such as {nearest}"
        )
    if batch is not None and getattr(config.data, "in_pairs", False) and batch // parts % 2:
        raise ConfigError(
            f"data.batch_size={batch}: examples are mixed in pairs, so that each of {processes} "
            f"processes x trainer.accumulate_grad_batches={accumulate} must get an even number, "
            f"such as data.batch_size={batch + parts}"
        )


def _check_batchnorm(config: Config, processes: int) -> None:
    sites = [
        site for site, name in getattr(config.norm, "by_site", {}).items() if name == "batchnorm"
    ]
    synced = config.norm_name == "batchnorm" and getattr(config.norm, "sync", True)
    if processes > 1 and (synced or (sites and config.norm_name != "batchnorm")):
        where = "norm=batchnorm" if synced else f"norm.by_site.{sites[0]}=batchnorm"
        way_out = ", norm.sync=false" if synced else ""
        raise ConfigError(
            f"{where}: statistics over {processes} processes need GPUs; use "
            f"trainer.devices=1{way_out} or another norm"
        )


def check_devices(config: Config) -> int:
    """Processes that this config gives here. Raises ConfigError for more than the machine has.

    Imports torch unless the accelerator is cpu.
    """
    trainer = config.trainer
    on_cpu, there = _machine(trainer.accelerator)
    wanted = world_size(config)
    local = wanted // trainer.num_nodes if wanted is not None else 1 if on_cpu else there
    thing = "CPU cores" if on_cpu else "GPUs"
    if local > there:
        raise ConfigError(f"trainer.devices={trainer.devices}: this machine has {there} {thing}")
    if not on_cpu and isinstance(trainer.devices, str) and trainer.devices != "auto":
        ids = trainer.devices.strip(",").split(",")
        bad = [number for number in ids if int(number) >= there]
        if bad or len(set(ids)) < len(ids):
            raise ConfigError(
                f"trainer.devices={trainer.devices}: GPU ids are 0 to {there - 1}, each once"
            )
    processes = local * trainer.num_nodes
    check(config, processes=processes)
    if on_cpu:
        _check_batchnorm(config, processes)
    return processes


def _machine(accelerator: str) -> tuple[bool, int]:
    """(on CPU?, how many devices) of an accelerator on this machine."""
    cores = os.cpu_count() or 1
    if accelerator == "cpu":
        return True, cores
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if accelerator in ("gpu", "cuda") and not gpus and not _has_mps(accelerator):
        raise ConfigError(
            f"trainer.accelerator={accelerator}: this machine has no GPU that torch can use"
        )
    if accelerator == "mps" and not _has_mps("gpu"):
        raise ConfigError(
            "trainer.accelerator=mps: this machine has no Apple GPU that torch can use"
        )
    if accelerator == "tpu":
        return False, 2**31
    if gpus and accelerator != "mps":
        return False, gpus
    return (False, 1) if _has_mps("gpu") else (True, cores)


def _has_mps(accelerator: str) -> bool:
    import torch

    return accelerator == "gpu" and torch.backends.mps.is_available()


def holds_a_run(folder: Path) -> bool:
    """Whether a folder has more in it than what is left of a start that was killed at once."""
    found = folder.iterdir() if folder.is_dir() else ()
    return any(path.name != ".lock" and not path.name.startswith(".tmp") for path in found)


def check_run_dir(config: Config) -> None:
    """Raise ConfigError unless the run's folder is new, empty or resumed, and can be written."""
    chosen = config.run.dir
    folder = Path(chosen or "runs")
    say = f"run.dir={chosen}" if chosen else f"{folder.resolve()}"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{say}: is a file, not a folder")
    if chosen and holds_a_run(folder) and config.run.resume == "never":
        raise ConfigError(
            f"{say}: not empty, and a run is never overwritten; choose another, or go on with it: "
            f"run.resume={chosen}"
        )
    parent = folder
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise ConfigError(f"{say}: cannot be made, {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{say}: {parent} is not writable; choose another folder with run.dir=PATH"
        )
