"""The command line as text: tokens in, help and lists out.

A token is `key=value` or one of five flags. `task`, `model`, `data` and `norm` pick entries, and
are told from `norm.alpha_init=0.7` here, before any library sees them: OmegaConf's own parser keeps
only the last of the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches

from suite.errors import ConfigError
from suite.settings import Action, OptimConfig, RunConfig, TrainerConfig

CHOICES = ("task", "model", "data", "norm")
SOURCES = ("recipe", "config", "evaluate")
BASE = {"optim": OptimConfig, "trainer": TrainerConfig, "run": RunConfig}
SECTIONS = (*CHOICES, *BASE)
FLAGS: dict[str, Action] = {
    "--help": "help",
    "-h": "help",
    "--list": "list",
    "--version": "version",
    "--print-config": "print_config",
    "--dry-run": "dry_run",
}


@dataclass(frozen=True)
class Setting:
    """One value for one key.

    path: ("norm", "alpha_init") or ("norm", "by_site", "final") or ("seed",).
    value: text from the command line, parsed YAML from a file.
    origin: "" for the command line, else the file that it came from.
    """

    path: tuple[str, ...]
    value: object
    origin: str = ""

    @property
    def key(self) -> str:
        """The key as it is written on the command line."""
        return ".".join(self.path)

    def error(self, text: str) -> ConfigError:
        """`key: text`, with the file in front where there is one."""
        return ConfigError(f"{self.origin + ': ' if self.origin else ''}{self.key}{text}")


@dataclass(frozen=True)
class Request:
    """The command line, taken apart but not yet checked against any table.

    choices: task, model, data, norm that were named; sources: recipe, config, evaluate.
    """

    action: Action = "train"
    choices: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    settings: tuple[Setting, ...] = ()


def parse(argv: Sequence[str]) -> Request:
    """Take the tokens apart. Raises ConfigError for one that is not `key=value` or a flag."""
    actions: dict[Action, str] = {}
    values: dict[str, str] = {}
    for token in argv:
        if token in FLAGS:
            actions[FLAGS[token]] = token
        else:
            key, value = _split(token)
            if key in values:
                raise ConfigError(f"{key} is given twice: {key}={values[key]} and {token}")
            values[key] = value
    for first in ("help", "version", "list"):
        if first in actions:
            actions = {first: actions[first]}  # type: ignore[index, dict-item]
    if len(actions) > 1:
        raise ConfigError(f"{' and '.join(actions.values())} cannot be given together")
    _check_parts(values)
    sources = {key: values[key] for key in SOURCES if key in values}
    if len(sources) > 1:
        raise ConfigError(f"{' and '.join(f'{key}=' for key in sources)} cannot be given together")
    picked = {key: values[key] for key in CHOICES if key in values}
    rest = (key for key in values if key not in sources and key not in picked)
    settings = tuple(Setting(tuple(key.split(".")), values[key]) for key in rest)
    action = next(iter(actions), "evaluate" if "evaluate" in sources else "train")
    return Request(action, picked, sources, settings)


def _split(token: str) -> tuple[str, str]:
    key, equals, value = token.partition("=")
    if token.startswith(("-", "+", "~")):
        bare = token.lstrip("-+~")
        right = bare if equals else f"{bare}=VALUE"
        near = get_close_matches(token, FLAGS, n=1, cutoff=0.7)
        if token.startswith("--") and not equals and near:
            raise ConfigError(f"{token}: no such flag. Did you mean {near[0]}?")
        raise ConfigError(f"{token}: write {right} (flags: {', '.join(FLAGS)})")
    if not equals or not key.strip():
        raise ConfigError(f"{token!r}: write key=value without spaces, such as norm=dyt or seed=1")
    if not value.strip():
        raise ConfigError(f"{token}: a value is missing; write {key}=VALUE or leave it out")
    if not all(key.split(".")):
        raise ConfigError(f"{token}: a part of the key is missing; write section.key=value")
    if key in CHOICES and "," in value:
        raise ConfigError(f"{token}: one {key} a run; `python -m suite.sweep {token}` runs a list")
    return key, value


def _check_parts(values: Mapping[str, str]) -> None:
    """Refuse `norm.by_site={...}` next to `norm.by_site.final=...`."""
    for key in values:
        whole = key.rpartition(".")[0]
        if "." in whole and whole in values:
            raise ConfigError(
                f"{whole} is given twice: {whole}={values[whole]} and {key}={values[key]}"
            )


def nearest(word: str, names: Iterable[str], *, cutoff: float = 0.5) -> str | None:
    """The one of `names` that looks most like `word`."""
    near = get_close_matches(word, list(names), n=1, cutoff=cutoff)
    return near[0] if near else None


def unknown_key(setting: Setting) -> ConfigError:
    """The error for a key whose first part is no section."""
    head, tail = setting.path[0], setting.path[1:]
    if not tail:
        owners = {name: section for section, kind in BASE.items() for name in _names(kind)}
        name = nearest(head, [*owners, *SECTIONS, *SOURCES, "seed"], cutoff=0.6)
        hint = f"{owners[name]}.{name}" if name in owners else name
        return setting.error(
            f": no such key.{f' Did you mean {hint}?' if hint else ''} "
            f"Keys: seed, {', '.join((*CHOICES, *SOURCES))} and those of {', '.join(BASE)}"
        )
    near = nearest(head, SECTIONS)
    hint = f" Did you mean {'.'.join((near, *tail))}?" if near else ""
    return setting.error(f": no such section.{hint} Sections: {', '.join(SECTIONS)}")


def _names(kind: type) -> list[str]:
    return [f.name for f in fields(kind)]


def help_text() -> str:
    """What `--help` prints. Imports no task."""
    shown = {
        "trainer": ("max_epochs", "max_steps", "devices", "accelerator", "precision", "strategy"),
        "optim": ("lr", "weight_decay", "schedule", "warmup_steps", "ema_decay"),
        "run": ("dir", "resume", "compile", "eval_split"),
    }
    keys = []
    for section, names in shown.items():
        defaults = BASE[section]()
        pairs = (f"{section}.{name}={_text(getattr(defaults, name))}" for name in names)
        keys += _wrap(list(pairs))
    return _HELP.format(keys="\n".join(keys))


def _text(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _wrap(words: list[str], *, width: int = 96, indent: str = "  ") -> list[str]:
    lines = [indent]
    for word in words:
        if len(lines[-1]) + len(word) > width:
            lines.append(indent)
        lines[-1] += word + "  "
    return [line.rstrip() for line in lines]


_HELP = """\
Train any task of the suite with any norm.

usage: python -m suite.train [key=value ...] [flag]

what to run
  task=NAME            what it trains and measures; see --list
  model=NAME           model.KEY=VALUE sets one of its options
  data=NAME            data.KEY=VALUE, such as data.root=/data/imagenet data.batch_size=256
  norm=NAME            or package.module:Class; norm.alpha_init=0.7, norm.by_site.final=layernorm
  seed=0
  recipe=NAME          start from a recipe (or a .yaml file); keys on the command line win
  config=PATH          start from a config.yaml that a run has written
  evaluate=RUN         a run's folder or checkpoint: its metrics, nothing trained
Values stand for themselves: ${{...}} and addresses (https://...) are refused; a $ alone is text.
A file sets no path outside this folder to write to, and imports no code: say that here.

most used keys, with the suite's defaults (a task's own file or a recipe may set others)
{keys}

flags
  --list               tasks, and the models, data, norms and recipes of task=NAME
  --print-config       every key with the value it would have; can be passed back as config=PATH
  --dry-run            build all, one training and one validation batch, write nothing
  --version, --help

examples
  python -m suite.train
  python -m suite.train norm=derf norm.alpha_init=0.7 trainer.max_epochs=3
  python -m suite.train recipe=NAME data.root=/data trainer.devices=8
  torchrun --nproc_per_node=2 -m suite.train trainer.accelerator=cpu
  python -m suite.sweep norm=layernorm,dyt seed=0,1,2

exit codes: 0 done, 1 error while running, 2 config, 3 diverged, 130 interrupted, 143 preempted"""


def list_text(tables: Mapping[str, Mapping[str, str]], *, task: str) -> str:
    """What `--list` prints: each table's names with one line each.

    tables: heading -> name -> help; the first name of models and data is the default.
    """
    blocks = []
    for heading, rows in tables.items():
        width = max((len(name) for name in rows), default=0) + 2
        lines = [f"  {name:<{width}}{text}".rstrip() for name, text in rows.items()] or ["  (none)"]
        title = heading if heading in ("tasks", "norms") else f"{heading} of {task}"
        blocks.append("\n".join((title, *lines)))
    return "\n\n".join(blocks)
