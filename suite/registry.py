"""Names to tasks: the only file of `suite` that imports `tasks`, the chosen one, lazily."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from suite.errors import ConfigError

DEFAULT_TASK = "vision/classify"
MOST_LISTED = 30  # names in an error: all norms, models and data of a task, but not all recipes


@dataclass(frozen=True)
class ModelOptions:
    """What every model's options have.

    init_from: weights to start from (.safetensors, .pt, .ckpt or a run's folder).
    init_across_norms: load weights that were trained with another norm, keeping what both have.
    """

    init_from: str | None = None
    init_across_norms: bool = False


@dataclass(frozen=True)
class NoOptions:
    """The options of a task that has none."""


@dataclass(frozen=True)
class Choice:
    """One entry that `model=` or `data=` may name.

    options: a frozen dataclass instance that holds the entry's defaults.
    causal: of a model: by default no position of it may see a later one, so that norms that look
        across positions are refused (suite.build).
    build: model: build(options, *, norm, data) -> nn.Module; data: build(options, *, seed) ->
    Splits.
    help: one line for `--list`.
    outline: of a data set: outline(options) -> DataInfo, what a model must know of it, from the
        options alone; so that a model can be tried out where its data is not.
    """

    options: Any
    build: Callable[..., Any]
    help: str = ""
    causal: bool = False
    outline: Callable[..., Any] | None = None


@dataclass(frozen=True)
class TaskSpec:
    """What `tasks/<domain>/<task>.py` exports as SPEC.

    module: the LightningModule class, a SuiteModule.
    models, data: what `model=` and `data=` may name; the first of each is the default.
    primary: (metric, direction, split) of the number that a run is judged by.
    unit: what throughput counts besides examples ("images", "tokens", "seconds of audio", "bases").
    keep_sites: sites that keep the norm that the model was published with, whatever `norm=` says.
    options: defaults of the task's own settings (`task.label_smoothing=0.1`).
    plain_loader: plain_loader(data options, *, seed) -> the batches of an epoch, read by the loop
        that everyone writes: what `suite.bench loading` compares with.
    reference: reference() -> the field's own implementation of a training step, a
        suite.reference.Reference: what `suite.bench reference` compares with.
    outline_batch: outline_batch(info, rows) -> a batch of the data's shapes with nothing in it, on
        which a model is tried out where there is no memory or no data for it.
    """

    name: str
    module: type
    models: Mapping[str, Choice]
    data: Mapping[str, Choice]
    primary: tuple[str, Literal["max", "min"], Literal["val"]]
    unit: str
    keep_sites: tuple[str, ...] = ()
    options: Any = NoOptions()
    plain_loader: Callable[..., Any] | None = None
    reference: Callable[[], Any] | None = None
    outline_batch: Callable[..., Any] | None = None


def task_names() -> tuple[str, ...]:
    """The names that `task=` may take. Imports no task."""
    from tasks import NAMES

    return NAMES


def benches() -> dict[str, tuple[str, str]]:
    """Commands of suite.bench that a domain brings: name -> (module, help). Imports no task."""
    from tasks import BENCHES

    return dict(BENCHES)


def load_bench(name: str) -> Callable[[Sequence[str]], int]:
    """Import the module behind a command of `benches` and return its run(argv) -> exit code."""
    run: Callable[[Sequence[str]], int] = importlib.import_module(benches()[name][0]).run
    return run


def load_task(name: str) -> TaskSpec:
    """Import the task that is called `name` and return its SPEC.

    Raises ConfigError for a name that is not in `tasks.NAMES`.
    """
    check_choice("task", name, task_names())
    spec: TaskSpec = importlib.import_module("tasks." + name.replace("/", ".")).SPEC
    return spec


def check_choice(key: str, name: str, allowed: Iterable[str]) -> None:
    """Raise a ConfigError that names the nearest match unless `name` is one of `allowed`."""
    names = list(allowed)
    if name in names:
        return
    near = get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean {key}={near[0]}?" if near else ""
    few = ", ".join(names[:MOST_LISTED])
    more = f" and {len(names) - MOST_LISTED} more, see --list" if len(names) > MOST_LISTED else ""
    raise ConfigError(f"{key}={name}: no such {key}.{hint} Choose one of: {few}{more}")
