"""Weights in and out: finding a run's checkpoint, reading it safely, and the guard on its norm.

A DyT checkpoint loads into a LayerNorm model under strict=False with nothing missing; the published
fine-tuning scripts do so silently. Here every load is strict, and the norm that a checkpoint
records must be the model's. Only tensors and plain values are read: safetensors, or torch files
under `weights_only=True`, which runs no code from the file, and no more of them than the file has
bytes for (see suite.safety).
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from suite.errors import ConfigError
from suite.norms import check_compatible, norm_parameters
from suite.safety import SLACK, check_archive, check_values, printable, read_json, unique_values
from suite.traces import check_config_json, check_meaning, check_traceless

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".safetensors.index.json")
PUBLISHED = ("model.safetensors", "model.safetensors.index.json")  # in Hugging Face's folders
WRAPPERS = ("state_dict", "model_ema", "model")  # where published files keep their weights
IDENTITY_VALUES = 100_000  # a configuration has some 100


def find_checkpoint(path: str | Path, *, key: str, prefer: str) -> Path:
    """The checkpoint that a run's folder or a file's path means. key: what to call it in errors;
    prefer: "best" or "last".

    Raises ConfigError if there is none.
    """
    try:
        path = Path(path).expanduser()
        path.stat()
    except (OSError, ValueError, RuntimeError):  # also a name that is too long, ~nobody
        raise ConfigError(f"{key}={path}: no such run or file") from None
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise ConfigError(f"{key}={path}: not a weights file; allowed: {', '.join(SUFFIXES)}")
        return path
    if not path.is_dir():
        raise ConfigError(f"{key}={path}: no such run or file")
    other = {"best": "last", "last": "best"}[prefer]
    for name in (prefer, other):
        found = path / "checkpoints" / f"{name}.ckpt"
        if found.is_file():
            return found
    for name in PUBLISHED:
        if (path / name).is_file():
            return path / name
    raise ConfigError(
        f"{key}={path}: has no checkpoints/best.ckpt or last.ckpt to start from, and no "
        "model.safetensors"
    )


def read_checkpoint(path: Path, *, lazy: bool = False) -> dict[str, Any]:
    """What a file holds, on the CPU. lazy: tensors stay on the disk until they are looked at.

    Raises ConfigError for one that is broken or not plain data.
    """
    if path.suffix == ".json":
        return read_parts(path)
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except (SafetensorError, OSError, ValueError) as error:
            reason = printable(str(error))
            raise ConfigError(f"{path}: not a readable safetensors file ({reason})") from error
    try:
        packed = is_packed(path)
        if packed:
            check_archive(path)
        lazy = lazy and packed  # older files have to be read whole
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=lazy or None)
        check_content(content, size=path.stat().st_size)
    except Exception as error:  # of a damaged file, whatever its bytes make the reader do
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = re.sub(r"\x1b\[[0-9;]*m", "", reason)  # torch colours its advice
        reason = printable(reason.partition(" In PyTorch 2.6")[0])  # to load without weights_only
        raise ConfigError(
            f"{path}: not a readable checkpoint of tensors and plain values ({reason})"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a {type(content).__name__}, expected a state dict")
    return content


def is_packed(path: Path) -> bool:
    """Whether a file is a zip by its end, as Python judges, or by its start, as torch does."""
    with path.open("rb") as opened:
        return opened.read(2) == b"PK" or zipfile.is_zipfile(opened)


def check_content(content: Any, *, size: int) -> None:
    """Raise ValueError for values without end, and tensors that are not plain ones of the file.

    One on the meta device loads nothing without a word; an expanded or sparse one of a few bytes
    may stand for terabytes. size: bytes of the file.
    """
    check_values(content)
    for value in unique_values(content):
        if not isinstance(value, Tensor):
            continue
        plain = type(value) in (Tensor, nn.Parameter) and not value.is_quantized
        if not plain or value.layout != torch.strided or value.device.type != "cpu":
            raise ValueError("it holds a tensor that is sparse, quantized, or without values")
        if value.nbytes > size + SLACK:
            raise ValueError(
                f"it holds a tensor of {value.nbytes >> 30:,} GiB, and the file has {size:,} bytes"
            )


def read_parts(index: Path) -> dict[str, Any]:
    """The tensors of all the files that Hugging Face's index of a large model names.

    Raises ConfigError for an index that is not one, and for files that are missing or elsewhere.
    """
    try:
        listed = read_json(index)["weight_map"]
        files = sorted(set(listed.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = printable(" ".join(str(error).split()))
        raise ConfigError(f"{index}: not an index of safetensors files ({reason})") from None
    state: dict[str, Any] = {}
    for name in files:
        beside = isinstance(name, str) and Path(name).name == name and name.isprintable()
        if not beside or not name.endswith(".safetensors"):
            raise ConfigError(f"{index}: names {name!r}, expected .safetensors files beside it")
        state.update(read_checkpoint(index.parent / name))
    if missing := sorted(set(listed) - set(state)):
        raise ConfigError(f"{index}: its files do not hold {few(missing)}")
    return state


def read_resumable(path: Path) -> Mapping[str, Any]:
    """The identity that a checkpoint records. Raises ConfigError for one to start from only."""
    content = read_checkpoint(path, lazy=True)  # of no tensor: it may have hundreds of GB
    saved = content.get("suite")
    if not isinstance(saved, Mapping) or not is_identity(saved) or saved.get("config") is None:
        raise ConfigError(f"run.resume={path}: was not written by this suite")
    needed = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step")
    if missing := [key for key in needed if key not in content]:
        raise ConfigError(
            f"run.resume={path}: holds no {', '.join(missing)} to go on with; start a new run with "
            f"model.init_from={path}"
        )
    identity: Mapping[str, Any] = content["suite"]
    return identity


def split_weights(content: Mapping[str, Any]) -> tuple[dict[str, Tensor], Mapping[str, Any] | None]:
    """A file's content as (the network's state dict, the suite's identity or None)."""
    identity = content.get("suite")
    if identity is not None and not is_identity(identity):
        raise ConfigError("it does not say which norm it was trained with; the file is damaged")
    state: Mapping[str, Any] = content
    for key in WRAPPERS:
        if isinstance(state.get(key), Mapping):
            state = state[key]
            break
    if isinstance(identity, Mapping):
        state = {k[6:]: v for k, v in state.items() if str(k).startswith("model.")}
    return {str(k): v for k, v in state.items() if isinstance(v, Tensor)}, identity


def is_identity(found: Any) -> bool:
    """Whether a checkpoint's identity has the parts that are looked at, of their kinds."""
    if not isinstance(found, Mapping) or not isinstance(found.get("norm"), Mapping):
        return False
    config, meaning = found.get("config"), found.get("meaning")
    inner = config.get("model") if isinstance(config, Mapping) else None
    if not all(part is None or isinstance(part, Mapping) for part in (config, meaning, inner)):
        return False
    try:
        check_values(found, most=IDENTITY_VALUES)
    except ValueError:
        return False
    return True


def init_from(
    model: nn.Module,
    path: str,
    *,
    norm: Mapping[str, Any],
    across_norms: bool,
    options: Any = None,
    meaning: Any = None,
    later: dict[str, Tensor] | None = None,
) -> list[str]:
    """Load a file's or a run's weights into `model` before training; returns notes on what was
    done.

    norm: the chosen factory's description. across_norms: load what both norms have. For the others
    see `read_weights`.
    Raises ConfigError if names or shapes differ, or the norm does and across_norms is off.
    """
    file = find_checkpoint(path, key="model.init_from", prefer="best")
    return read_weights(
        model,
        file,
        norm=norm,
        key="model.init_from",
        across_norms=across_norms,
        options=options,
        meaning=meaning,
        later=later,
    )


def read_weights(
    model: nn.Module,
    file: Path,
    *,
    norm: Mapping[str, Any],
    key: str,
    across_norms: bool = False,
    options: Any = None,
    meaning: Any = None,
    later: dict[str, Tensor] | None = None,
) -> list[str]:
    """Load `file` into `model`, strictly but for norms if across_norms. key: its name in errors.

    A model may have adapt(state, *, whole) -> (state, notes): the tensors of other people's files,
    or of another of its tasks, under its own names. whole: nothing may be left at its initial
    value. And fixed_by_weights, the names of options that leave no trace in names or shapes: where
    the file says what they were, they must be as in `options`.
    meaning: of the data's ids, see suite.traces. later: takes the tensors, still on the disk, in
    place of a model that has no values yet.
    """
    where = f"{key}={file}"
    try:
        content = read_checkpoint(file, lazy=later is not None)
    except ConfigError as error:
        raise ConfigError(f"{key}={error}") from error  # which begins with the file
    try:
        state, identity = split_weights(content)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if identity is not None and not across_norms:
        try:
            check_compatible(identity["norm"], norm)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{where}: {printable(str(error))}") from error
    if identity is not None:
        check_meaning(identity, meaning, where=where)
    if identity is not None and options is not None:
        check_traceless(getattr(model, "fixed_by_weights", ()), identity, options, where=where)
    if identity is None and options is not None:
        check_config_json(model, file, options, where=where)
    notes = []
    if adapt := getattr(model, "adapt", None):
        try:
            state, notes = adapt(state, whole=key == "evaluate")
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error
    own = model.state_dict()
    of_norms = set(norm_parameters(model))
    norm_paths = {name.rpartition(".")[0] for name in of_norms}
    foreign = [k for k in state if k not in own and k.rpartition(".")[0] in norm_paths]
    absent = [k for k in own if k not in state and k in of_norms]
    problems = {
        "missing": [k for k in own if k not in state and not (across_norms and k in absent)],
        "unknown": [k for k in state if k not in own and not (across_norms and k in foreign)],
        "other shape": [k for k in own if k in state and own[k].shape != state[k].shape],
    }
    if any(problems.values()):
        listed = "; ".join(f"{what} {few(names)}" for what, names in problems.items() if names)
        hint = getattr(model, "weights_hint", lambda names: "")(set(state))
        of_a_norm = set(problems["missing"]) <= set(absent) and set(problems["unknown"]) <= set(
            foreign
        )
        if not hint and of_a_norm and not problems["other shape"]:
            hint = "It looks trained with another norm: choose that norm"
        hint = f". {hint}" if hint else ""
        raise ConfigError(f"{where}: these are not weights of this model: {listed}{hint}")
    known = {k: v for k, v in state.items() if k in own}
    if later is None:
        model.load_state_dict(known, strict=not across_norms)
    else:
        later.update(known)
    notes = [f"loaded {len(state) - len(foreign)} tensors from {file}", *notes]
    if identity is None:
        notes.append(f"the file does not say its norm; it is taken as norm={norm['name']}")
    if across_norms:
        notes.append(
            f"across norms: {few(absent) or 'no parameter'} kept the initial value, "
            f"{few(foreign) or 'nothing'} of the file was left out"
        )
    return notes


def few(names: list[str]) -> str:
    """The first names of a list and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
