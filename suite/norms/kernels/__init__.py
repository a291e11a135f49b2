"""Which implementation a norm runs with: what `norm.backend` means on a device.

    eager     plain torch, on every device and in every dtype
    compile   torch.compile of the layer alone (inside a compiled model every norm is fused anyway)
    triton    this package's kernels for CUDA
    cpp       this package's C++ for the CPU, built once by the user's compiler
    auto      triton for point-wise norms on CUDA, where it agrees with the formula; else eager

On a CPU `auto` stays with plain torch, so that a run's bits do not depend on whether a compiler is
installed. LayerNorm and RMSNorm have kernels in torch itself, and `auto` takes those. What was
chosen is said (`Choice.why`), and what has run is counted (`launches`): a fused path that silently
leaves a norm out cannot hide.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from shutil import which
from types import ModuleType
from typing import Literal

Family = Literal["pointwise", "rows"]
BACKENDS = ("auto", "eager", "compile", "triton", "cpp")
KERNELS = ("triton", "cpp")
_MODULES = {
    ("cpp", "pointwise"): "cpp",
    ("cpp", "rows"): "cpp",
    ("triton", "pointwise"): "triton_pointwise",
    ("triton", "rows"): "triton_rows",
}
_launched: Counter[str] = Counter()


@dataclass(frozen=True)
class Choice:
    """What runs and, in a few words, why."""

    name: Literal["eager", "compile", "triton", "cpp"]
    why: str


@cache
def choose_backend(requested: str, device_type: str, *, family: Family = "pointwise") -> Choice:
    """What `requested` means on `device_type` ("cpu", "cuda", ...).

    "cpp" without a compiler is "compile", and "eager" where that cannot work either: `why` says so.
    Raises ValueError for an unknown name, and for a kernel that is asked for by name on a device
    that it does not run on.
    """
    if requested not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {requested!r}")
    if device_type == "meta" or requested == "eager":
        return Choice("eager", "nothing is computed" if device_type == "meta" else "as asked")
    if requested == "compile":
        return _compiled(device_type, "as asked")
    if requested == "auto":
        return _automatic(device_type, family)
    reason = _cannot(requested, device_type, family)
    if reason is None:
        return Choice("triton" if requested == "triton" else "cpp", "as asked")
    if requested == "cpp" and device_type == "cpu":
        return _compiled(device_type, reason)
    raise ValueError(
        f"backend={requested} cannot run on {device_type}: {reason}; take auto, eager or compile"
    )


@cache
def module_of(backend: str, family: Family) -> ModuleType:
    """The module of a backend's kernels, imported when it is first asked for."""
    return importlib.import_module(f"suite.norms.kernels.{_MODULES[backend, family]}")


def launches() -> Counter[str]:
    """How often each kernel was started in this process: "triton.pointwise_forward" -> count."""
    return Counter(_launched)


def count(backend: str, kernel: str) -> None:
    """Note that a kernel starts."""
    _launched[f"{backend}.{kernel}"] += 1


@contextmanager
def uncounted() -> Iterator[None]:
    """While it lasts, kernels that start are not counted."""
    before = launches()
    try:
        yield
    finally:
        _launched.clear()
        _launched.update(before)


def _automatic(device_type: str, family: Family) -> Choice:
    if family == "rows":
        return Choice("eager", "torch has its own kernels")
    if device_type != "cuda":
        return Choice("eager", f"no kernel is taken unasked on {device_type}")
    reason = _cannot("triton", device_type, family)
    return (
        Choice("triton", "agrees with the formula here")
        if reason is None
        else Choice("eager", f"triton cannot run: {reason}")
    )


def _compiled(device_type: str, why: str) -> Choice:
    """torch.compile, if what it needs is there: the compiler that Inductor would look for."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if device_type == "cpu" and which((os.environ.get("CXX", "").split() or [usual])[0]) is None:
        asked = why == "as asked"
        lacks = "no C++ compiler for torch.compile" if asked else f"{why}, nor for torch.compile"
        return Choice("eager", lacks)
    return Choice("compile", why)


def _cannot(backend: str, device_type: str, family: Family) -> str | None:
    """Why the kernels of a backend do not run on a device; None if they do, and agree."""
    try:
        reason: str | None = module_of(backend, family).available(device_type)
    except Exception as error:  # a Triton that is too old lacks names; another lacks its libraries
        return f"it cannot be imported: {error}"
    if reason is not None:
        return reason
    from suite.norms.kernels.agreement import disagreement

    return disagreement(backend, device_type, family=family)
