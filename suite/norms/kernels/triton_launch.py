"""What the Triton kernels share: where they can run, on which device, and in how many programs.

Importable without Triton, so that `available` can be asked first; importing a module with kernels
needs it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from contextlib import AbstractContextManager
from typing import Any

import torch

INTERPRETED_SMS = 2  # a grid with more than one program, whose Python loops stay short


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 at the first import)."""
    import triton
    import triton.language as tl

    # Triton's own library is decorated by then, so this is the choice that holds for the process.
    return not isinstance(tl.sum, triton.runtime.JITFunction)


def available(device_type: str) -> str | None:
    """None if Triton runs on tensors of that device type here, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted():
        return None
    if device_type != "cuda" or not torch.cuda.is_available():
        return "needs a CUDA device"
    return None


@functools.cache
def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; a fixed number in the interpreter."""
    if device.type != "cuda":
        return INTERPRETED_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which may be another than the tensors'."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def power_of_two(n: int) -> int:
    """The least power of two >= n (n >= 1)."""
    return 1 << (n - 1).bit_length()
