"""Random command lines, from the options dataclasses themselves: valid, nearly valid and broken."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import hypothesis.strategies as st

from suite import fields as types_of
from suite import registry
from suite.cli import BASE
from suite.norms import NORMS

NASTY = (
    *("", " ", "null", "None", "~", "true", "True", "yes", "off", "-1", "0", "1", "2", "3", "1.0"),
    *("1e3", "1e400", "-1e400", "-0.0", "nan", ".nan", ".NaN", "inf", ".inf", "-.inf", "0x10"),
    *("0o17", "1_000", "+1", "1.", ".5", "1e", "\u0661\u0662", "12:30:00", "2026-01-01"),
    *(
        "9" * 400,
        "0x" + "f" * 5000,
        "9" * 5000,
        "-" + "9" * 5000,
        "0." + "0" * 5000,
        "2147483648",
        str(2**63),
    ),
    *(str(2**64), "4294967296", "1e-320", "1e308", "5e-324"),
    *("'", '"', "''", '""', "'a", "[", "]", "{", "}", "[1,2", "[]", "{}", "{a: 1}", "{a: {b: 1}}"),
    *("[1,2]", "[[1]]", "[null]", "{1: 2}", "{null: x}", "{[1]: x}", "a,b", "1,2,3", ",", "1,"),
    *("a\nb", "a\tb", "\x00", "a\x00b", "\x1b[31mred", "\u202eab", "\u2028", "\ufeff1", "\x85"),
    *("\udcff", "\udc80x", "\u00e9", "\U0001f600", "x" * 300, "x" * 5000, "\U0001f600" * 2000),
    *("${oc.env:HOME}", "${norm}", "${", "$", "???", "!!python/object/apply:os.system [x]"),
    *("!!python/name:os.system", "!!int x", "!!binary x", "!!set {a}", "!x y", "&a 1", "*a", "- 1"),
    *("--help", "-h", "@file", "~/x", "~nobody/x", "../../..", "/", ".", "..", "/dev/null"),
    *("/proc/self/mem", "http://localhost/x", "s3://x/y", "%s", "{0}", "\\", "#", "a#b", " #c"),
    *("a: b", ": ", ":", "|", ">", "=", "<<", "? a", "a=b", "=1", "os:path", "os:nothing", ":x"),
    *("x:", "a.b:C", "nothing:X", ".a:b", "a..b:C", "a b:C", "\u00e9:\u00e9", "os.path:join"),
    *("auto", "none", "never", "default", "all", "[" * 60, "{a: " * 60, "[" * 3000, "a." * 50),
)
KEYS = (
    *("optim", "optim.lr.x", "optim.lr.x.y", "Optim.lr", "optim.LR", "optim .lr", "optim. lr"),
    *("lr", "seed.x", "seeds", "norm.by_site", "norm.by_site.final", "norm.by_site.final.x"),
    *(
        "norm.by_site.*",
        "norm.by_site.[a]",
        "norm.by_site.a[0",
        "norm.by_site.a]b",
        "norm.by_site.",
    ),
    *("norm.by_site.\u00e9", "norm.by_site.0", "norm.by_site.'a'", "norm.alpha_init_by_site.attn"),
    *("__class__", "__class__.x", "norm.__class__", "norm.__init__.x", "norm.name", "model.name"),
    *(
        "task.name",
        "data.name",
        "trainer.callbacks",
        "trainer.logger",
        "run",
        "run.dir.x",
        "a" * 3000,
    ),
    *(
        "\x00",
        "a\nb",
        "model.\x1b[0m",
        "model.\udcff",
        "\u00e9.\u00e9",
        "[",
        "model.[",
        "a.b.c.d.e.f",
    ),
    *("model.depht", "optim.weight_deacy", "trainer.max_epoch", "data.batchsize", "recipe.x"),
    *(
        "config.x",
        "evaluate.x",
        "on_error",
        "hydra.run.dir",
        "+optim.lr",
        "~optim.lr",
        "model.sites",
    ),
    *("model.sites.*.bn", "model.sites.x", "model.keep", "data.mean", "_target_", "model._target_"),
)
FLAGS = (
    *("--print-config", "--help", "-h", "--version", "--list", "--dry-run", "--print_config", "--"),
    *(
        "-",
        "---",
        "--config",
        "--config=x",
        "-x",
        "+x",
        "~x",
        "--printconfig=1",
        "",
        " ",
        "=",
        "==",
    ),
    *(
        "a",
        "a b",
        "\x00",
        "--\x00",
        "-\n",
        "--" + "x" * 3000,
        "\udcff",
        "--help=1",
        "help",
        "\u2028",
    ),
)


@dataclass(frozen=True)
class Chosen:
    """A task with one of its models, data sets and norms."""

    names: Mapping[str, str]

    @property
    def tokens(self) -> list[str]:
        """The choices as the command line has them."""
        return [f"{key}={name}" for key, name in self.names.items()]

    def sections(self) -> dict[str, Any]:
        """Section -> an options instance with its defaults."""
        spec = registry.load_task(self.names["task"])
        found = {key: kind() for key, kind in BASE.items()}
        found["task"] = spec.options
        found["model"] = spec.models[self.names["model"]].options
        found["data"] = spec.data[self.names["data"]].options
        found["norm"] = NORMS[self.names["norm"]].options
        return found

    def every_key(self) -> list[tuple[str, Any, Any]]:
        """(key, type, default) of every key there is."""
        return [("seed", int, 0), *_keys(self)]


@functools.lru_cache(maxsize=4096)
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _keys(chosen: Chosen) -> Iterator[tuple[str, Any, Any]]:
    for section, options in chosen.sections().items():
        hints = _hints(type(options))
        for field in fields(options):
            yield f"{section}.{field.name}", hints[field.name], getattr(options, field.name)


@st.composite
def choices(draw: st.DrawFn, tasks: tuple[str, ...] | None = None) -> Chosen:
    """A task and what goes with it."""
    task = draw(st.sampled_from(tasks or registry.task_names()))
    spec = registry.load_task(task)
    return Chosen(
        {
            "task": task,
            "model": draw(st.sampled_from(sorted(spec.models))),
            "data": draw(st.sampled_from(sorted(spec.data))),
            "norm": draw(st.sampled_from(sorted(NORMS))),
        }
    )


def typed(hint: Any, default: Any) -> st.SearchStrategy[str]:
    """Texts of the right type for a field, in range or not."""
    kinds: list[st.SearchStrategy[str]] = []
    for member in types_of.members(hint):
        origin = get_origin(member) or member
        if origin is Literal:
            kinds.append(st.sampled_from([str(word) for word in get_args(member)]))
        elif origin is bool:
            kinds.append(st.sampled_from(["true", "false"]))
        elif origin is int:
            kinds.append(st.sampled_from(_near(default)).map(str))
            kinds.append(st.integers(-(2**65), 2**65).map(str))
        elif origin is float:
            kinds.append(st.floats().map(_number))
            kinds.append(st.sampled_from([0.0, 1.0, 0.5, 1e-8, 0.999999, 1.0000001]).map(_number))
        elif origin is str:
            kinds.append(st.text(max_size=12))
        elif origin is type(None):
            kinds.append(st.just("null"))
        elif origin in (list, tuple):
            kinds.append(
                st.lists(st.sampled_from(NASTY), max_size=3).map(lambda x: f"[{','.join(x)}]")
            )
        elif origin is dict:
            kinds.append(st.just("{}"))
            kinds.append(st.sampled_from(NASTY).map(lambda x: f"{{final: {x}}}"))
    return st.one_of(kinds)


def _near(default: Any) -> list[int]:
    around = default if isinstance(default, int) else 1
    return [around, around + 1, around - 1, 0, 1, 2, -1, 7, 2**31, 2**63]


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(value)
    return ".nan" if math.isnan(value) else f"{'-' * (value < 0)}.inf"


@st.composite
def valid_tokens(draw: st.DrawFn, chosen: Chosen, *, most: int = 6) -> list[str]:
    """Keys of the schema with values of their type; some may be out of range."""
    keys = draw(
        st.lists(st.sampled_from(chosen.every_key()), max_size=most, unique_by=lambda k: k[0])
    )
    return [f"{key}={draw(typed(hint, default))}" for key, hint, default in keys]


@st.composite
def broken_tokens(draw: st.DrawFn, chosen: Chosen) -> list[str]:
    """Anything at all where a key, a value or a flag should be."""
    keys = [key for key, _, _ in chosen.every_key()]
    known = st.sampled_from(
        [*keys, "task", "model", "data", "norm", "config", "recipe", "evaluate"]
    )
    key = known | known.flatmap(_misspelt) | st.sampled_from(KEYS) | st.text(max_size=8)
    value = st.sampled_from(NASTY) | st.text(max_size=20)
    pair = st.tuples(key, value).map("=".join)
    token = st.one_of(pair, pair, pair, st.sampled_from(FLAGS), st.text(max_size=10))
    return draw(st.lists(token, min_size=1, max_size=3))


def _misspelt(key: str) -> st.SearchStrategy[str]:
    return st.integers(0, len(key) - 1).flatmap(
        lambda at: st.sampled_from(
            [key[:at] + key[at + 1 :], key[:at] + "x" + key[at:], key[:at] + key[at:].swapcase()]
        )
    )
