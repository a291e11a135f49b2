"""What leaves no trace in names and shapes of weights, so that a wrong file would load and mean
nothing: options such as the number of heads, and what an id of the data stands for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from suite.errors import ConfigError
from suite.safety import printable, read_json

NOTHING = "the weights would load and mean nothing"


def check_traceless(
    fields: Iterable[str], identity: Mapping[str, Any], options: Any, *, where: str
) -> None:
    """Raise ConfigError where an option is not what the weights were trained with."""
    saved = (identity.get("config") or {}).get("model") or {}
    for field in fields:
        was, now = (plain(v) for v in (saved.get(field), getattr(options, field)))
        if field in saved and was != now:
            raise ConfigError(
                f"{where}: was trained with model.{field}={was}, here it is {now}: {NOTHING}; set "
                f"model.{field}={was}"
            )


def check_meaning(identity: Mapping[str, Any], meaning: Any, *, where: str) -> None:
    """Raise ConfigError where an id of the data stands for something else than in training.

    meaning: DataInfo.extra["meaning"] of the data that is here, plain values, or None.
    """
    was = identity.get("meaning")
    if was is None or meaning is None or was == meaning:
        return
    raise ConfigError(
        f"{where}: was trained on other ids ({brief(was)}) than the data's ({brief(meaning)}): "
        f"{NOTHING}; take the data's encoding that it was trained with"
    )


def brief(meaning: Mapping[str, Any]) -> str:
    """A description in a few words."""
    texts = (f"{key} {str(value)[:24]!r}" for key, value in meaning.items() if key != "name")
    return " ".join([str(meaning.get("name", "unnamed")), *texts])


def check_config_json(model: nn.Module, file: Path, options: Any, *, where: str) -> None:
    """Raise ConfigError where Hugging Face's config.json beside `file` says otherwise.

    A model may have said_by(config) -> option names and values, which raises ValueError for what it
    has no option for.
    """
    said_by: Any = getattr(model, "said_by", None)
    beside = file.parent / "config.json"
    if said_by is None or not beside.is_file():
        return
    try:
        content = read_json(beside)
    except (OSError, ValueError):
        return  # somebody else's file
    try:
        wanted = said_by(content) if isinstance(content, dict) else {}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        said = printable(str(error))
        raise ConfigError(f"{where}: config.json beside it says {said}") from error
    other = {k: v for k, v in wanted.items() if plain(getattr(options, k)) != plain(v)}
    if other:
        listed = " ".join(f"model.{key}={plain(value)}" for key, value in other.items())
        raise ConfigError(f"{where}: by config.json beside it the model is another; set {listed}")


def plain(value: Any) -> Any:
    """A list or tuple as sorted text, a truth value as YAML has it: to compare and to show."""
    if isinstance(value, list | tuple):
        return f"[{','.join(sorted(map(str, value)))}]"
    return str(value).lower() if isinstance(value, bool) else value
