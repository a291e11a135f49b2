"""The kernels as differentiable functions: what the layers call.

Each keeps its input and nothing of its size besides: f and f' are computed again in the backward
(perf: 4 bytes an element in float32 and 2 in bf16, where the written-out formula keeps 8 to 12).
In eager mode they are autograd functions; while torch.compile traces, and for tensors that are no
plain ones (fake, functional), the operators `dyt_suite::*`, which have fakes and autograd of their
own. They can be differentiated once.

x: float32, bfloat16 or float16, computed in float32. Parameters: alpha, shift (1,) or (C,); weight,
bias (C,); each may be None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from suite.norms.kernels.launch import (
    pointwise_backward,
    pointwise_forward,
    rows_backward,
    rows_forward,
)
from suite.norms.kernels.operators import OPS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pointwise(
    x: Tensor,
    alpha: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    function: str,
    channels_first: bool,
    backend: str,
) -> Tensor:
    """weight * f(alpha * x + shift) + bias for x [..., C], or [B, C, ...] with channels_first.

    Raises ValueError for a dtype that no kernel takes and for parameters that do not fit.
    """
    _check(x, (alpha, shift, weight, bias), channels=1 if channels_first and x.dim() > 2 else -1)
    rest = (alpha, shift, weight, bias, function, channels_first, backend)
    if _plain(x):
        found: Tensor = _Pointwise.apply(x, None, *rest)
        return found
    return OPS.pointwise(x, *rest)


def pointwise_add(
    x: Tensor,
    residual: Tensor,
    alpha: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    function: str,
    channels_first: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """h = x + residual, which have one shape and dtype, and its norm in one pass: (y, h)."""
    _check(x, (alpha, shift, weight, bias), channels=1 if channels_first and x.dim() > 2 else -1)
    _check_same(x, residual)
    rest = (alpha, shift, weight, bias, function, channels_first, backend)
    if _plain(x):
        y, h = _Pointwise.apply(x, residual, *rest)
    else:
        y, h = OPS.pointwise_add(x, residual, *rest)
    return y, h


def rows(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, kind: str, eps: float, backend: str
) -> Tensor:
    """LayerNorm (kind "layer") or RMSNorm ("rms") of x [..., C] over its last dimension."""
    _check(x, (weight, bias), channels=-1)
    if _plain(x):
        found: Tensor = _Rows.apply(x, None, weight, bias, kind, eps, backend)
        return found
    return OPS.rows(x, weight, bias, kind, eps, backend)[0]


def rows_add(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    kind: str,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """h = x + residual and its norm in one pass: (y, h)."""
    _check(x, (weight, bias), channels=-1)
    _check_same(x, residual)
    if _plain(x):
        y, h = _Rows.apply(x, residual, weight, bias, kind, eps, backend)
    else:
        y, h, _ = OPS.rows_add(x, residual, weight, bias, kind, eps, backend)
    return y, h


def _plain(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()


def _check(x: Tensor, parameters: tuple[Tensor | None, ...], *, channels: int) -> None:
    """A kernel reads C values of each parameter: one that is shorter must not come so far."""
    if x.dtype not in DTYPES:
        raise ValueError(f"the kernels take float32, bfloat16 or float16, got {x.dtype}")
    if not x.dim():
        raise ValueError("x must have a dimension of channels, got a scalar")
    dim = x.shape[channels]
    last = len(parameters) - 2  # weight and bias
    for place, p in enumerate(parameters):
        if p is None:
            continue
        if p.dim() != 1 or (p.shape[0] != dim and (place >= last or p.shape[0] != 1)):
            raise ValueError(f"x has {dim} channels, a parameter has shape {tuple(p.shape)}")
        if p.device != x.device:
            raise ValueError(f"x is on {x.device}, a parameter on {p.device}")


def _check_same(x: Tensor, residual: Tensor) -> None:
    if x.shape != residual.shape or x.dtype != residual.dtype or x.device != residual.device:
        raise ValueError(
            f"x and residual must have one shape, dtype and device, got {tuple(x.shape)} "
            f"{x.dtype} on {x.device} and {tuple(residual.shape)} {residual.dtype} on "
            f"{residual.device}"
        )


def _own(z: Tensor) -> Tensor:
    """z as no view: torch refuses nn.ReLU(inplace=True) on a view that a function has made."""
    return z.detach() if z._is_view() else z


def _first_order(backend: str) -> None:
    """Raise RuntimeError for a graph of the backward, which the kernels do not have."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"backend={backend} can be differentiated once; "
            "take norm.backend=eager for create_graph=True"
        )


class _Pointwise(torch.autograd.Function):
    """(x, residual, parameters, function, channels_first, backend) -> y or (y, h)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, *rest: Any) -> Any:
        parameters, ctx.settings = rest[:4], rest[4:]
        y, h = pointwise_forward(x, residual, parameters, settings=ctx.settings)
        y, h = _own(y), None if h is None else _own(h)
        ctx.save_for_backward(x if h is None else h, *parameters)
        ctx.added = h is not None
        ctx.set_materialize_grads(False)
        return y if h is None else (y, h)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        _first_order(ctx.settings[2])
        h, *parameters = ctx.saved_tensors
        dy, dh = grads if ctx.added else (grads[0], None)
        needs = ctx.needs_input_grad
        if dy is None:
            return (dh, dh, *[None] * 7)
        dx, *rest = pointwise_backward(
            dy,
            dh,
            h,
            parameters,
            settings=ctx.settings,
            needs=(needs[0] or needs[1], *needs[2:6]),
        )
        return (dx, dx if ctx.added else None, *rest, None, None, None)


class _Rows(torch.autograd.Function):
    """(x, residual, weight, bias, kind, eps, backend) -> y or (y, h)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, *rest: Any) -> Any:
        weight, bias, kind, eps, backend = rest
        y, h, stats = rows_forward(x, residual, weight, bias, settings=(kind, eps, backend))
        y, h = _own(y), None if h is None else _own(h)
        ctx.save_for_backward(x if h is None else h, stats, weight, bias)
        ctx.settings, ctx.added = (kind, backend), h is not None
        ctx.set_materialize_grads(False)
        return y if h is None else (y, h)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        _first_order(ctx.settings[1])
        dy, dh = grads if ctx.added else (grads[0], None)
        if dy is None:
            return (dh, dh, *[None] * 5)
        needs = ctx.needs_input_grad
        wanted = (needs[0] or needs[1], needs[2], needs[3])
        dx, dweight, dbias = rows_backward(
            dy, dh, *ctx.saved_tensors, settings=ctx.settings, needs=wanted
        )
        return dx, dx if ctx.added else None, dweight, dbias, None, None, None
