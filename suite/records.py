"""What a run's folder says of itself: result.json, metrics.jsonl, and where two configurations
differ.

Kept apart from the sweep and the report because both judge runs by it, and neither needs torch for
it. A folder may be somebody else's: texts come out of it printable, every part that is looked at is
of its kind, and what it calls its command or its folder is shown and never used.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite.config import INCOMPARABLE
from suite.errors import ConfigError, shown
from suite.safety import parse_json, printable, printable_values, read_json

SCHEMA = 1
RESULT = "result.json"
METRICS = "metrics.jsonl"
# Two runs may differ in these and be the same thing twice: where it went, how it was watched.
NOT_COMPARED = tuple(key for key in INCOMPARABLE if key not in ("norm", "seed"))
FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "status": str,
    "task": str,
    "model": str,
    "norm": str,
    "norm_options": Mapping,
    "data": Mapping,
    "seed": int,
    "primary": Mapping,
    "config": Mapping,
}
PARTS: Mapping[str, type] = {
    **dict.fromkeys(("metrics", "throughput", "hardware", "versions", "git"), Mapping),
    **dict.fromkeys(("data.sizes", "config.norm", "config.data", "config.model"), Mapping),
    "hardware.gpus": list,
}  # that may be missing or null
NAMES = ("task", "model", "norm", "data.name", "primary.name")
STATUSES = ("done", "failed", "diverged", "interrupted")


def read_result(folder: Path) -> dict[str, Any]:
    """The result.json of a run's folder.

    Raises ValueError, in one line without the path, when there is none, or it is not JSON, or it is
    not of this schema.
    """
    try:
        result = printable_values(read_json(folder / RESULT))
    except FileNotFoundError:
        raise ValueError(f"no {RESULT} (still running, or killed)") from None
    except OSError as error:
        raise ValueError(f"{RESULT} cannot be read: {printable(str(error))}") from None
    except ValueError as error:
        raise ValueError(f"{RESULT} is not JSON: {printable(str(error))}") from None
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        found = result.get("schema") if isinstance(result, dict) else None
        raise ValueError(f"{RESULT} has schema {found}, this version reads {SCHEMA}")
    for key, kind in FIELDS.items():
        if not isinstance(result.get(key), kind):
            raise ValueError(f"{RESULT}: {key} is missing or of the wrong type")
    if result["status"] not in STATUSES:
        raise ValueError(f"{RESULT}: status is {result['status']}, not one of {STATUSES}")
    for key, kind in PARTS.items():
        if not isinstance(part(result, key), (kind, type(None))):
            raise ValueError(f"{RESULT}: {key} is of the wrong type")
    for key in NAMES:  # a spreadsheet would compute what begins so
        if str(part(result, key)).startswith(("=", "+", "-", "@")):
            raise ValueError(f"{RESULT}: {key} is {part(result, key)}, which is no name")
    return result


def part(result: Mapping[str, Any], key: str) -> Any:
    """A value by its dotted key; None where there is none."""
    value: Any = result
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def read_curve(folder: Path, *, key: str) -> dict[int, float]:
    """Step -> value of `key` in metrics.jsonl; empty without the file.

    A last line cut short by a crash is left out, and of two lines of one step (a resumed run) the
    later counts.
    """
    curve: dict[int, float] = {}
    path = folder / METRICS
    if not path.is_file():
        return curve
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = parse_json(line)
                if isinstance(row, dict) and isinstance(row.get(key), (int, float)):
                    curve[int(row["step"])] = float(row[key])
            except (ValueError, KeyError, TypeError, OverflowError):
                continue
    return dict(sorted(curve.items()))


def flatten(config: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """`{"optim": {"lr": 1}}` -> `{"optim.lr": 1}`; lists stay values, an empty dict is a value."""
    return dict(_leaves(config, prefix))


def _leaves(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def comparable(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A flat configuration without the keys that do not decide what is trained."""
    return {
        key: value
        for key, value in flat.items()
        if not any(in_section(key, section) for section in NOT_COMPARED)
    }


def in_section(key: str, section: str) -> bool:
    """Whether a flat key is `section` or lies in it: "optim.lr" in "optim"."""
    return key == section or key.startswith(f"{section}.")


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> (was, now) where two flat configurations differ; None stands for a missing key.

    Values are compared as JSON, so a tuple equals a list, and nan equals nan.
    """
    keys = sorted(was.keys() | now.keys())
    pairs = {key: (was.get(key), now.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if plain(pair[0]) != plain(pair[1])}


def plain(value: Any) -> str:
    """A value as JSON text, for comparing and for showing; 1.0 is 1, as YAML and JSON have both."""
    return json.dumps(_canonical(value), sort_keys=True, default=str)


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _canonical(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(inner) for inner in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return int(value)
    return value


@dataclass(frozen=True)
class Run:
    """One run's folder, as it was found.

    flat: the configuration that was trained, plus the data's checksum.
    written: when result.json was, in seconds since the epoch.
    """

    folder: Path
    result: Mapping[str, Any]
    flat: Mapping[str, Any]
    written: float

    @property
    def done(self) -> bool:
        """Whether its figures count."""
        return bool(self.result["status"] == "done")

    @property
    def seed(self) -> int:
        return int(self.result["seed"])

    def figure(self, split: str, *, metric: str | None = None) -> float | None:
        """The primary metric (best on val, the one value on test), or any metric by name."""
        primary = self.result["primary"]
        if metric is None or metric == primary.get("name"):
            value = primary.get("best" if split == "val" else "test")
        else:
            value = self.result.get("metrics", {}).get(f"{split}/{metric}")
        number = isinstance(value, (int, float)) and math.isfinite(value)
        return float(value) if number else None


def find_runs(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Every run in or below `paths`, and a line for each that cannot be read.

    Raises ConfigError for a path that does not exist, and when there is no run at all.
    """
    folders: dict[Path, Path] = {}
    given = list(paths)
    for path in given:
        if not path.exists():
            raise ConfigError(
                f"{path}: does not exist; give run folders, or folders that hold them"
            )
        marks = itertools.chain(path.rglob(RESULT), path.rglob("config.yaml"))
        found = [path.parent] if path.name == RESULT else sorted({mark.parent for mark in marks})
        folders.update((folder.resolve(), folder) for folder in found)
    runs, skipped = [], []
    for folder in folders.values():
        if not str(folder).isprintable():
            skipped.append(f"{shown(folder)}: skipped: its name cannot be shown; rename it")
            continue
        try:
            runs.append(_read_run(folder))
        except ValueError as error:
            skipped.append(f"{folder}: skipped: {error}")
    if not runs:
        where = ", ".join(str(path) for path in given)
        raise ConfigError("\n".join([*skipped, f"{where}: no readable {RESULT} in or below it"]))
    return runs, skipped


def _read_run(folder: Path) -> Run:
    result = read_result(folder)
    config = {"norm": {"name": result["norm"], **result["norm_options"]}, **result["config"]}
    flat = flatten(config)
    flat["seed"] = result["seed"]
    flat["data sha256"] = result["data"].get("sha256")
    return Run(folder, result, flat, written=(folder / RESULT).stat().st_mtime)
