"""What a field of an options dataclass may hold, and the line that says so when a value does not.

Types are read from the dataclasses' annotations and said in words: "a whole number or null".
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from suite import cli
from suite.cli import Setting
from suite.errors import ConfigError

LONGEST = 100  # characters of a value that an error repeats


def refuse_interpolation(setting: Setting, value: Any) -> None:
    """Raise ConfigError for `${...}` and `???`: a config file says values, it runs nothing."""
    try:
        text = json.dumps(value, default=str)
    except ValueError:  # 0x and thousands of digits: Python says no such number in decimals
        raise setting.error(": a number of too many digits") from None
    if "${" in text or value == "???":
        raise setting.error(f"={_shown(value)}: not evaluated here; write the value itself")


def out_of_range(section: str, text: str, last: Mapping[str, Setting]) -> ConfigError:
    """The error of a `__post_init__`, whose text starts with the field, with its key in front."""
    head, _, rest = text.partition(" ")
    setting = last.get(re.split(r"\W", text)[0])
    if setting is not None and setting.key in (head, f"{section}.{head}"):
        return setting.error(f"={_shown(setting.value)}: {re.sub(r', got [^,]*$', '', rest)}")
    origin = f"{setting.origin}: " if setting is not None and setting.origin else ""
    return ConfigError(f"{origin}{section + '.' if section else ''}{text}")


def no_such_key(
    setting: Setting, label: str, options: Any, table: Mapping[str, Any]
) -> ConfigError:
    """The error for a key that the entry `label` does not have, with whoever in `table` has it."""
    section = label.partition("=")[0]
    field, fields = setting.path[1], field_names(options)
    if field == "name" and table:
        return setting.error(f"={_shown(setting.value)}: write {section}={_shown(setting.value)}")
    keys = f"Keys of {label}: {', '.join(fields) or 'none'}"
    owners = [name for name, other in table.items() if field in field_names(other)]
    if owners:
        more = f" and {len(owners) - 6} more" if len(owners) > 6 else ""
        text = f"={_shown(setting.value)}: {label} has no {field}, only"
        return setting.error(f"{text} {section}={', '.join(owners[:6])}{more}. {keys}")
    near = cli.nearest(field, fields)
    hint = f" Did you mean {'.'.join((section, near, *setting.path[2:]))}?" if near else ""
    return setting.error(f": no such key.{hint} {keys}")


def wrong_type(value: object, hint: Any) -> str:
    """`=value: must be ...` for a field of type `hint`."""
    words = [_WORDS.get(get_origin(member) or member, "") for member in members(hint)]
    for member in members(hint):
        if get_origin(member) is Literal:
            words += [f"one of {', '.join(map(str, get_args(member)))}"]
    allowed = " or ".join(dict.fromkeys(word for word in words if word))
    lists = "," in str(value) and not str(value).startswith(("[", "{"))
    hint_text = "; `python -m suite.sweep` takes lists" if lists else ""
    return f"={_shown(value)}: must be {allowed}{hint_text}"


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 20]}...{text[-17:]}"


_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    list: "a list such as [a,b]",
    tuple: "a list such as [a,b]",
    dict: "a group of keys",
}


def members(hint: Any) -> tuple[Any, ...]:
    """The types that a field may have: `int | None` -> (int, NoneType)."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def is_group(hint: Any) -> bool:
    """Whether a field holds key=value pairs, as dict[str, float] does."""
    return any(get_origin(member) is dict for member in members(hint))


def is_text_literal(hint: Any) -> bool:
    """Whether a type is a Literal of words."""
    return get_origin(hint) is Literal and all(isinstance(word, str) for word in get_args(hint))


def field_names(options: Any) -> list[str]:
    """The fields of a dataclass or of one of its instances."""
    return [field.name for field in dataclasses.fields(options)]


def under(section: str, settings: Iterable[Setting]) -> list[Setting]:
    """Those of `settings` that belong to `section`."""
    return [setting for setting in settings if setting.path[0] == section]


def shared(
    settings: Iterable[Setting], options: Any, table: Mapping[str, Any]
) -> Iterator[Setting]:
    """Of a nameless section, what the chosen entry has; what none has stays in, to be refused."""
    elsewhere = {field for other in table.values() for field in field_names(other)}
    for setting in settings:
        if setting.path[1] in field_names(options) or setting.path[1] not in elsewhere:
            yield setting


def changed(settings: Sequence[Setting], options: Any) -> list[str]:
    """The keys whose value is not what `options`, if known, has anyway."""
    missing = object()
    return [
        setting.key
        for setting in settings
        if len(setting.path) > 2 or getattr(options, setting.path[1], missing) != setting.value
    ]
