"""What the Triton kernels share: where they can run, on which device, and how they are started.

Importable without Triton, so that `available` can be asked first; importing a module with kernels
needs it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

ALIGNED = 16  # bytes; Triton builds for addresses that are divisible by it, or for any
INTERPRETED_SMS = 2  # a grid with more than one program, whose Python loops stay short
_built: dict[Any, Any] = {}  # what `start` has built before


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


def start(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
    constants: Mapping[str, Any],
    *,
    device: torch.device,
    options: Mapping[str, Any],
) -> None:
    """kernel[grid](*tensors, *numbers, **constants, **options), on a device of the tensors.

    Triton looks at every argument of every start before it finds what it has built, which on a fast
    machine takes longer than a small kernel (30 of 40 us on an H100's host). What that depends on
    is the key here: dtypes, addresses divisible by 16, constants. Numbers must be kept out of it by
    do_not_specialize; those past 32 bits go Triton's own way, as do AMD's kernels, which are also
    built by the sizes of tensors.
    """
    with on(device):
        if device.type != "cuda" or torch.version.hip or max(numbers) >= 2**31:
            kernel[grid](*tensors, *numbers, **constants, **options)
            return
        given = tuple(constants.values())
        looks = [None if x is None else (x.dtype, x.data_ptr() % ALIGNED == 0) for x in tensors]
        key = (id(kernel), device.index, given, *options.values(), *looks)
        built = _built.get(key)
        if built is None:
            assert kernel.arg_names[-len(given) :] == [*constants], "in the order of the kernel"
            _built[key] = kernel[grid](*tensors, *numbers, **constants, **options)
        else:
            built[grid](*tensors, *numbers, *given)


def power_of_two(n: int) -> int:
    """The least power of two >= n (n >= 1)."""
    return 1 << (n - 1).bit_length()
