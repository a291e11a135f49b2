"""From the command line to a read-only config: `load(argv)`. The only file that touches OmegaConf.

Two phases: the choices (task, model, data, norm) say which options dataclasses there are; then
their defaults, one YAML file (the task's own, a recipe, or a resolved config.yaml) and the command
line are laid over each other, key by key, each value checked against its field's type. Plain
dataclasses leave this file. What can be refused without importing torch is refused first.

A recipe starts from the dataclass defaults, not from its task's embedded YAML. In any YAML a
section with `name:` belongs to that entry and is left out, with a note, when the command line picks
another; a section without `name:` gives defaults to whichever entry is chosen, for the fields that
it has.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from suite import __version__, cli, registry, sources
from suite.checks import check, check_devices, check_run_dir, world_size
from suite.cli import BASE, CHOICES, SECTIONS, Setting
from suite.errors import ConfigError
from suite.fields import (
    changed,
    field_names,
    is_group,
    is_text_literal,
    members,
    no_such_key,
    out_of_range,
    shared,
    under,
    wrong_type,
)
from suite.safety import printable
from suite.settings import Action, Config, Loaded, OptimConfig, RunConfig, TrainerConfig

__all__ = [
    "Action",
    "Config",
    "Loaded",
    "OptimConfig",
    "RunConfig",
    "TrainerConfig",
    "check",
    "check_devices",
    "check_run_dir",
    "comparable_hash",
    "diff",
    "load",
    "to_dict",
    "to_yaml",
    "world_size",
]

# Where a run goes and how it is watched, not what it computes: left out of `comparable_hash`.
INCOMPARABLE = (
    *("norm", "seed", "recipe", "data.num_workers", "data.eval_batch_size"),
    *("data.root", "data.cache", "data.download"),  # data.sha256 says what was read
    *("data.fasta", "data.bed", "model.scan", "model.conv", "model.checkpoint"),
    *("run.dir", "run.resume", "run.save_every_n_steps", "run.dist_timeout", "run.compile"),
    *("run.eval_split", "run.tensorboard", "run.norm_stats", "run.nonfinite_limit"),
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy"),
    *("trainer.enable_progress_bar", "trainer.log_every_n_steps", "trainer.profiler"),
    *("trainer.num_sanity_val_steps", "trainer.detect_anomaly", "run.nonfinite"),
)


@dataclasses.dataclass(frozen=True)
class _Source:
    """A YAML file, taken apart: names of its choices, a flat list of its values."""

    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    settings: tuple[Setting, ...] = ()
    path: str = ""
    recipe: str | None = None


def load(argv: Sequence[str]) -> Loaded:
    """Turn command-line tokens (without the program's name) into a config and what to do with it.

    Raises ConfigError, one line, for the first mistake. Reads files and the environment; writes
    nothing.
    """
    try:
        return _load(cli.parse(argv))
    except ConfigError as error:
        raise ConfigError(printable(" ".join(str(error).split()))) from error


def _load(request: cli.Request) -> Loaded:
    if request.action == "help":
        return Loaded("help", text=cli.help_text())
    if request.action == "version":
        return Loaded("version", text=f"dyt-suite {__version__}")
    for setting in request.settings:
        if setting.path[0] not in SECTIONS and setting.path != ("seed",):
            raise cli.unknown_key(setting)
    task = request.choices.get("task")
    if task is not None:
        registry.check_choice("task", task, registry.task_names())
    if request.action == "list":
        return Loaded("list", text=_list(task or registry.DEFAULT_TASK))
    config, notes = _resolve(request)
    text = to_yaml(config).rstrip() if request.action == "print_config" else ""
    return Loaded(request.action, config, text, tuple(notes))


def _resolve(request: cli.Request) -> tuple[Config, list[str]]:
    """Lay defaults, file, command line and torchrun's environment over each other."""
    source = _read_source(request)
    names = {"task": registry.DEFAULT_TASK, **source.names, **request.choices}
    if names["task"] != source.names.get("task", names["task"]):
        other = f"not task={names['task']}; leave task= out"
        raise ConfigError(f"{source.path} is for task={source.names['task']}, {other}")
    registry.check_choice("task", names["task"], registry.task_names())
    sources.refuse_code(source.path, source.names, request.choices)
    surroundings, notes = sources.from_torchrun(request.settings, os.environ)
    given = [*source.settings, *request.settings, *surroundings]
    base: dict[str, Any] = {
        key: _fill(key, kind(), under(key, given)) for key, kind in BASE.items()
    }
    seed = _fill("", _Seed(), under("seed", given)).seed
    chosen, left_out = _choose(names, source, request.settings)
    named: dict[str, Any] = {f"{key}_name": name for key, (name, _) in chosen.items()}
    options = {key: options for key, (_, options) in chosen.items()}
    evaluate = request.sources.get("evaluate")
    config = Config(**named, **options, **base, seed=seed, recipe=source.recipe, evaluate=evaluate)
    check(config)
    return config, [*notes, *left_out]


@dataclasses.dataclass(frozen=True)
class _Seed:
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to 4294967295, got {self.seed}")


# --- choices --------------------------------------------------------------------------------------


def _choose(
    names: Mapping[str, str], source: _Source, command_line: Sequence[Setting]
) -> tuple[dict[str, tuple[str, Any]], list[str]]:
    """Import the task and the norms; name and options of each choice, and what was left out."""
    spec = registry.load_task(names["task"])
    tables: dict[str, dict[str, Any]] = {
        "task": {spec.name: spec.options},
        "model": {name: choice.options for name, choice in spec.models.items()},
        "data": {name: choice.options for name, choice in spec.data.items()},
        "norm": {name: norm.options for name, norm in _norm_table().items()},
    }
    chosen, notes = {}, []
    for key, table in tables.items():
        name = names.get(key) or ("dyt" if key == "norm" else next(iter(table)))
        if key == "norm" and ":" in name:
            table = {**table, name: _dotted_options(name)}
        elif key != "task":
            registry.check_choice(key, name, table)
        options = table[spec.name if key == "task" else name]
        from_file = under(key, source.settings)
        owner = source.names.get(key)
        if owner not in (None, name) and from_file:
            if keys := ", ".join(changed(from_file, table.get(str(owner)))):
                notes.append(f"{source.path}: left out, since they are for {key}={owner}: {keys}")
            from_file = []
        elif owner is None:
            from_file = list(shared(from_file, options, table))
        settings = [*from_file, *under(key, command_line)]
        chosen[key] = (name, _fill(f"{key}={name}", options, settings, table=table))
    _try_norm(*chosen["norm"])
    return chosen, notes


def _norm_table() -> Mapping[str, Any]:
    table: Mapping[str, Any] = importlib.import_module("suite.norms").NORMS
    return table


def _dotted_options(name: str) -> Any:
    """The default options of `package.module:Class`. Raises ConfigError when it cannot be had."""
    try:
        return importlib.import_module("suite.norms").options_of(name)
    except (ImportError, ValueError, TypeError) as error:
        raise ConfigError(f"norm={name}: {_first_line(str(error))}") from error


def _try_norm(name: str, options: Any) -> None:
    """Raise ConfigError where a by_site entry names no norm: only the factory looks that far."""
    try:
        importlib.import_module("suite.norms").make_norm(name, options)
    except ValueError as error:
        raise ConfigError(f"norm.{_first_line(str(error))}") from error


def _list(task: str) -> str:
    spec = registry.load_task(task)
    module_lines = {task: _first_line(sys.modules[spec.module.__module__].__doc__)}
    return cli.list_text(
        {
            "tasks": {name: module_lines.get(name, "") for name in registry.task_names()},
            "models": {name: choice.help for name, choice in spec.models.items()},
            "data": {name: choice.help for name, choice in spec.data.items()},
            "norms": {name: norm.help for name, norm in _norm_table().items()},
            "recipes": {name: sources.opening(path) for name, path in sources.recipes().items()},
        },
        task=task,
    )


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


# --- files ----------------------------------------------------------------------------------------


def _read_source(request: cli.Request) -> _Source:
    found = sources.locate(request)
    if found.path is None:
        return _Source()
    source = _read(found.path, whole=found.whole)
    if found.of_a_run:
        kept = tuple(s for s in source.settings if s.path != ("run", "resume"))
        source = dataclasses.replace(source, settings=kept)
    return source if found.recipe is None else dataclasses.replace(source, recipe=found.recipe)


def _read(path: Path, *, whole: bool) -> _Source:
    """Take a YAML file apart. whole: it must name its task (recipes and resolved configs)."""
    tree = _parse_yaml(path)
    names: dict[str, str] = {}
    settings: list[Setting] = []
    recipe = tree.pop("recipe", None)
    for key, value in tree.items():
        if key in CHOICES and isinstance(value, str):
            value = {"name": value}
        if key in SECTIONS and value is None:
            continue
        if key in SECTIONS and not isinstance(value, dict):
            raise ConfigError(f"{path}: {key}: must be a section of keys, got {value}")
        if key in CHOICES and "name" in value:
            names[key] = str(value.pop("name"))
        if key in SECTIONS:
            settings += [Setting((key, str(name)), item, str(path)) for name, item in value.items()]
        elif key == "seed":
            settings.append(Setting(("seed",), value, str(path)))
        else:
            raise cli.unknown_key(Setting((str(key),), value, str(path)))
    sources.refuse_unsafe(Setting(("recipe",), recipe, str(path)), recipe)
    if whole and "task" not in names:
        raise ConfigError(f"{path}: names no task; it needs `task: {registry.DEFAULT_TASK}` or so")
    return _Source(names, tuple(settings), str(path), None if recipe is None else str(recipe))


def _parse_yaml(path: Path) -> dict[str, Any]:
    text = sources.read_text(path)
    try:
        tree = OmegaConf.to_container(OmegaConf.load(text), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, TypeError) as error:
        raise sources.not_yaml(path, error) from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold sections such as `optim:`, got a list")
    return {str(key): value for key, value in tree.items()}


# --- values ---------------------------------------------------------------------------------------


def _fill(
    label: str, options: Any, settings: Iterable[Setting], *, table: Mapping[str, Any] | None = None
) -> Any:
    """A copy of the dataclass instance `options` with each setting laid over it, in order.

    label: "optim" or "norm=dyt". table: name -> options of what the choice could have been.
    """
    section = label.partition("=")[0]
    node: DictConfig = OmegaConf.structured(options)
    OmegaConf.set_readonly(node, False)
    hints = get_type_hints(type(options))
    last: dict[str, Setting] = {}
    for setting in settings:
        field = (
            setting.path[-1] if not section else setting.path[1] if len(setting.path) > 1 else ""
        )
        if not field:
            raise setting.error(f"={setting.value}: a section; write {section}.KEY={setting.value}")
        if field not in field_names(options):
            raise no_such_key(setting, label, options, table or {})
        _assign(node, field, hints[field], setting)
        last[field] = setting
    try:
        return OmegaConf.to_object(node)
    except OmegaConfBaseException:
        raise
    except ValueError as error:
        raise out_of_range(section, str(error), last) from error


def _assign(node: DictConfig, field: str, hint: Any, setting: Setting) -> None:
    """Put one value where it belongs. Raises ConfigError when it does not fit the field's type."""
    inner = setting.path[2:] if setting.path[0] in SECTIONS else ()
    group = is_group(hint)
    if len(inner) > group:
        raise setting.error(f": {'.'.join(setting.path[: 2 + group])} has no keys of its own")
    leaf_hint = get_args(members(hint)[0])[1] if group and inner else hint
    value = _parse(setting, leaf_hint)
    sources.refuse_unsafe(setting, value)
    if group and not inner and isinstance(value, dict):
        OmegaConf.update(node, field, {}, merge=False)
        for name, item in value.items():
            _assign(node, field, hint, Setting((*setting.path, str(name)), item, setting.origin))
        return
    try:
        # brackets: a glob such as *.bn is one key, dots and all
        OmegaConf.update(node, "".join((field, *(f"[{key}]" for key in inner))), value)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise setting.error(wrong_type(setting.value, leaf_hint)) from error


def _parse(setting: Setting, hint: Any) -> Any:
    """The value for a field of type `hint`: text as it stands for text, else a YAML scalar."""
    value, kinds = setting.value, members(hint)
    if isinstance(value, str) and not setting.origin:
        if type(None) in kinds and value in ("null", "Null", "NULL", "~", "None"):
            return None
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
        if quoted or not all(k in (str, type(None)) or is_text_literal(k) for k in kinds):
            value = _parse_scalar(setting, value)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds:
        return value if int in kinds else float(value)
    return value


def _parse_scalar(setting: Setting, text: str) -> Any:
    try:
        sources.check_anchors(text, setting.key)
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        reason = getattr(error, "problem", None) or _first_line(str(error))
        raise setting.error(f"={text}: not a value that YAML can read: {reason}") from error
    value = parsed["value"] if isinstance(parsed, dict) else None
    return text if value is None and text.startswith("#") else value


# --- out of a config ------------------------------------------------------------------------------


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict, what config.yaml holds; each choice's section has its `name` first."""
    tree: dict[str, Any] = {} if config.recipe is None else {"recipe": config.recipe}
    for key in CHOICES:
        options = dataclasses.asdict(getattr(config, key))
        tree[key] = {"name": getattr(config, f"{key}_name"), **options}
    for key in BASE:
        tree[key] = dataclasses.asdict(getattr(config, key))
    tree["seed"] = config.seed
    return tree


def to_yaml(config: Config) -> str:
    """The text of config.yaml: `load(["config=PATH"])` gives the same config again."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def comparable_hash(config: Config) -> str:
    """sha256 of what two runs must share to be compared: all but norm, seed and INCOMPARABLE."""
    left_out = tuple(f"{key}." for key in INCOMPARABLE)
    kept = {k: v for k, v in _flat(to_dict(config)) if not f"{k}.".startswith(left_out)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def diff(a: Config | Mapping[str, Any], b: Config | Mapping[str, Any]) -> list[str]:
    """The keys, such as "optim.lr", in which two configs (or their dicts) differ."""
    left, right = (dict(_flat(to_dict(c) if isinstance(c, Config) else c)) for c in (a, b))
    missing = object()
    return [k for k in {**left, **right} if left.get(k, missing) != right.get(k, missing)]
