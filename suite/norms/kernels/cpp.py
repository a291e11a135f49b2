"""Point-wise norms, LayerNorm and RMSNorm on the CPU by this package's C++ (compiler.py).

One pass over memory forward and one backward, which recomputes f and its slope from the input that
is saved; arithmetic in float32, in the input's dtype only at the ends. torch's own DyT on a CPU is
five to seven passes with a slow tanh. Which threads do what, and so the bits, depend on the shape
alone (pointwise.cpp, rows.cpp). The interface is the one of triton_pointwise.py and triton_rows.py.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from suite.norms.kernels import compiler

# pointwise.cpp counts in this order
FUNCTIONS = (
    *("dyt", "derf", "isru", "arctan", "satursin", "softsign", "hardtanh", "logsign_clip"),
    *("arcsinh_clip", "expsign", "exproot", "relsign", "saturlog", "cubsign", "logquad_clip"),
    *("power23_clip", "dyisru", "sigmoid"),
)
_NUMBERS = {name: number for number, name in enumerate(FUNCTIONS)}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FOUR_POINTERS, _FOUR_COUNTS = c_void_p * 4, c_int64 * 4


def available(device_type: str) -> str | None:
    """None if the kernels can run on tensors of that device type here, else why not."""
    return compiler.missing() if device_type == "cpu" else "it needs tensors on the CPU"


def pointwise_forward(
    x: Tensor,
    residual: Tensor | None,
    alpha: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    function: str,
    dim: int,
    inner: int,
) -> tuple[Tensor, Tensor | None]:
    """(y, h): y = weight * f(alpha * h + shift) + bias with h = x + residual, None without one.

    x is read as contiguous [outer, dim, inner] in float32, bfloat16 or float16; y and h are new and
    like it. Parameters are of any floating dtype; alpha and shift have 1 or dim numbers.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    h = None if residual is None else torch.empty_like(x)
    if x.numel() == 0:
        return y, h
    parameters = _Parameters(alpha, shift, weight, bias, dim=dim)
    other = None if residual is None else residual.contiguous()
    _library().pointwise_forward(
        *(_NUMBERS[function], _dtype(x), x.numel() // (dim * inner), dim, inner),
        *map(_address, (x, other, h, y)),
        *(parameters.addresses, parameters.counts, torch.get_num_threads()),
    )
    return y, h


def pointwise_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    alpha: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    function: str,
    dim: int,
    inner: int,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, alpha, shift, weight, bias), None where not needed or absent.

    dy: of y; dh: the one that arrives at h itself, or None; needs: of (x, alpha, shift, weight,
    bias). The parameters' gradients are float32.
    """
    given = (alpha, shift, weight, bias)
    gradients = [
        torch.zeros(p.shape, dtype=torch.float32) if p is not None and needed else None
        for p, needed in zip(given, needs[1:], strict=True)
    ]
    h, dy = h.contiguous(), dy.contiguous()
    dx = torch.empty_like(h)
    if h.numel() == 0:
        return (dx if needs[0] else None, *gradients)
    parameters = _Parameters(*given, dim=dim)
    extra = None if dh is None else dh.contiguous()
    shape = (h.numel() // (dim * inner), dim, inner)
    library = _library()
    room = torch.empty(library.pointwise_room(*shape), dtype=torch.float64)
    library.pointwise_backward(
        *(_NUMBERS[function], _dtype(h), *shape),
        *map(_address, (dy, extra, h, dx, room)),
        *(parameters.addresses, parameters.counts),
        *(_FOUR_POINTERS(*map(_address, gradients)), torch.get_num_threads()),
    )
    return (dx if needs[0] else None, *gradients)


def rows_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    kind: str,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(y, h, statistics) of LayerNorm ("layer") or RMSNorm ("rms") over the last dimension.

    h = x + residual, None without one; statistics: float32 [2, rows] (mean, 1 / std) for "layer",
    [1, rows] for "rms".
    """
    x = x.contiguous()
    dim = x.shape[-1]
    rows = x.numel() // dim if dim else 0
    y = torch.empty_like(x)
    h = None if residual is None else torch.empty_like(x)
    stats = torch.empty((2 if kind == "layer" else 1, rows), dtype=torch.float32)
    if x.numel() == 0:
        return y, h, stats
    other = None if residual is None else residual.contiguous()
    weight, bias = _float32(weight, dim), _float32(bias, dim)
    _library().rows_forward(
        *(_dtype(x), rows, dim),
        *map(_address, (x, other, h, y, *_mean_and_rstd(stats), weight, bias)),
        *(eps, torch.get_num_threads()),
    )
    return y, h, stats


def rows_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    kind: str,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (x, weight, bias), None where not needed or absent; see pointwise_backward."""
    h, dy = h.contiguous(), dy.contiguous()
    dx = torch.empty_like(h)
    dweight, dbias = (
        torch.zeros(p.shape, dtype=torch.float32) if p is not None and needed else None
        for p, needed in zip((weight, bias), needs[1:], strict=True)
    )
    if h.numel():
        dim, rows = h.shape[-1], h.numel() // h.shape[-1]
        extra = None if dh is None else dh.contiguous()
        weight = _float32(weight, dim)
        library = _library()
        room = torch.empty(library.rows_room(rows, dim), dtype=torch.float64)
        used = (dy, extra, h, dx, *_mean_and_rstd(stats), weight, room, dweight, dbias)
        library.rows_backward(
            *(_dtype(h), rows, dim, *map(_address, used)), torch.get_num_threads()
        )
    return dx if needs[0] else None, dweight, dbias


class _Parameters:
    """The four parameters as C arrays. It holds the tensors that they point to."""

    def __init__(self, *given: Tensor | None, dim: int) -> None:
        alpha, shift, weight, bias = given
        self.kept = (
            *(_float32(alpha, 1, dim), _float32(shift, 1, dim)),
            *(_float32(weight, dim), _float32(bias, dim)),
        )
        self.addresses = _FOUR_POINTERS(*map(_address, self.kept))
        self.counts = _FOUR_COUNTS(*(0 if p is None else p.numel() for p in self.kept))


def _float32(parameter: Tensor | None, *sizes: int) -> Tensor | None:
    if parameter is None:
        return None
    if parameter.numel() not in sizes:
        raise ValueError(f"a parameter of {parameter.numel()} numbers where {sizes[-1]} are due")
    if parameter.dtype == torch.float32 and parameter.is_contiguous():
        return parameter
    return parameter.detach().to(torch.float32).contiguous()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _mean_and_rstd(stats: Tensor) -> tuple[Tensor | None, Tensor]:
    return (stats[0], stats[1]) if len(stats) == 2 else (None, stats[0])


def _dtype(x: Tensor) -> int:
    if x.dtype not in _DTYPES or x.device.type != "cpu":
        raise ValueError(f"the C++ kernels take 16- and 32-bit CPU tensors, got {x.dtype}")
    return _DTYPES[x.dtype]


def _library() -> ctypes.CDLL:
    """The library, found once in this process. Raises ValueError, always the same."""
    found = _found()
    if isinstance(found, str):
        raise ValueError(found)
    return found


@cache
def _found() -> ctypes.CDLL | str:
    """The library, or why it cannot be used: a build that failed is not tried twice."""
    try:
        library = compiler.library()
    except ValueError as error:
        return str(error)
    _declare(library)
    return library


def _declare(library: ctypes.CDLL) -> None:
    """Argument types, as in the sources."""
    pointers: list[Any] = [c_void_p]
    sizes: list[Any] = [c_int64]
    number: list[Any] = [c_int]
    library.pointwise_room.argtypes = sizes * 3
    library.pointwise_room.restype = c_int64
    library.pointwise_forward.argtypes = (
        number * 2 + sizes * 3 + pointers * 4 + [_FOUR_POINTERS, _FOUR_COUNTS, c_int]
    )
    library.pointwise_forward.restype = None
    library.pointwise_backward.argtypes = (
        number * 2 + sizes * 3 + pointers * 5 + [_FOUR_POINTERS, _FOUR_COUNTS]
    ) + [_FOUR_POINTERS, c_int]
    library.pointwise_backward.restype = None
    library.rows_room.argtypes = sizes * 2
    library.rows_room.restype = c_int64
    library.rows_forward.argtypes = number + sizes * 2 + pointers * 8 + [c_float, c_int]
    library.rows_forward.restype = None
    library.rows_backward.argtypes = number + sizes * 2 + pointers * 10 + [c_int]
    library.rows_backward.restype = None
