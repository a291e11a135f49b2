"""dyt_suite::*: the kernels as operators that torch.compile keeps in its graphs.

torch.library.custom_op and not triton_op, which fails in Triton's interpreter. An operator cannot
give None, so a gradient that is not needed is an empty tensor here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from suite.norms.kernels.launch import (
    pointwise_backward,
    pointwise_forward,
    rows_backward,
    rows_forward,
)
from suite.norms.kernels.layout import layout_of

OPS = torch.ops.dyt_suite
PARAMETERS = (
    "Tensor? alpha, Tensor? shift, Tensor? weight, Tensor? bias, "
    "str function, bool channels_first, str backend"
)


def _given(found: Any, like: Tensor) -> Any:
    """Absent gradients as empty tensors."""
    return tuple(like.new_empty(0) if g is None else g for g in found)


def _like(x: Tensor, *, channels_first: bool) -> Tensor:
    layout = layout_of(x, channels_first=channels_first)
    return layout.restore(torch.empty_like(layout.match(x), memory_format=torch.contiguous_format))


def _blank(wanted: bool, p: Tensor | None, x: Tensor) -> Tensor:
    return torch.empty_like(p) if wanted and p is not None else x.new_empty(0)


@torch.library.custom_op(
    "dyt_suite::pointwise", mutates_args=(), schema=f"(Tensor x, {PARAMETERS}) -> Tensor"
)
def _pointwise(x: Tensor, *rest: Any) -> Tensor:
    return pointwise_forward(x, None, rest[:4], settings=rest[4:])[0]  # type: ignore[arg-type]


@_pointwise.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return _like(x, channels_first=rest[5])


@torch.library.custom_op(
    "dyt_suite::pointwise_add",
    mutates_args=(),
    schema=f"(Tensor x, Tensor residual, {PARAMETERS}) -> (Tensor, Tensor)",
)
def _pointwise_add(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y, h = pointwise_forward(x, residual, rest[:4], settings=rest[4:])  # type: ignore[arg-type]
    assert h is not None
    return y, h


@_pointwise_add.register_fake
def _(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _like(x, channels_first=rest[5]), _like(x, channels_first=rest[5])


@torch.library.custom_op(
    "dyt_suite::pointwise_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor? dh, Tensor h, {PARAMETERS}, bool[] needs) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _pointwise_backward(dy: Tensor, dh: Tensor | None, h: Tensor, *rest: Any) -> Any:
    settings, needs = rest[4:7], rest[7]
    found = pointwise_backward(dy, dh, h, rest[:4], settings=settings, needs=needs)  # type: ignore[arg-type]
    return _given(found, h)


@_pointwise_backward.register_fake
def _(dy: Tensor, dh: Tensor | None, h: Tensor, *rest: Any) -> Any:
    needs = rest[7]
    dx = _like(h, channels_first=rest[5]) if needs[0] else h.new_empty(0)
    return (dx, *(_blank(n, p, h) for n, p in zip(needs[1:], rest[:4], strict=True)))


def _keep_pointwise(ctx: Any, inputs: Any, output: Any) -> None:
    added = isinstance(output, tuple)
    parameters, ctx.settings = inputs[-7:-3], inputs[-3:]
    ctx.save_for_backward(output[1] if added else inputs[0], *parameters)
    ctx.set_materialize_grads(False)


def _differentiate_pointwise(ctx: Any, dy: Tensor | None, dh: Tensor | None = None) -> Any:
    h, *parameters = ctx.saved_tensors
    added = len(ctx.needs_input_grad) > 8
    sources = ctx.needs_input_grad[: 2 if added else 1]
    if dy is None:
        return (*[dh] * len(sources), *[None] * 7)
    needs = [any(sources), *ctx.needs_input_grad[len(sources) : len(sources) + 4]]
    found = OPS.pointwise_backward(dy, dh, h, *parameters, *ctx.settings, needs)
    dx, *rest = _taken_where(found, needs, parameters)
    return (*[dx] * len(sources), *rest, None, None, None)


def _taken_where(found: Any, needs: Any, parameters: Any) -> list[Tensor | None]:
    there = [True, *(p is not None for p in parameters)]
    return [g if n and t else None for g, n, t in zip(found, needs, there, strict=True)]


_pointwise.register_autograd(_differentiate_pointwise, setup_context=_keep_pointwise)
_pointwise_add.register_autograd(_differentiate_pointwise, setup_context=_keep_pointwise)


ROWS = "Tensor? weight, Tensor? bias, str kind, float eps, str backend"


def _stats_like(x: Tensor, kind: str) -> Tensor:
    count = math.prod(x.shape[:-1])  # .numel() of a shape would be a constant of the graph
    return x.new_empty(2 if kind == "layer" else 1, count, dtype=torch.float32)


def _row_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "dyt_suite::rows", mutates_args=(), schema=f"(Tensor x, {ROWS}) -> (Tensor, Tensor)"
)
def _rows(x: Tensor, weight: Any, bias: Any, *settings: Any) -> tuple[Tensor, Tensor]:
    y, _, stats = rows_forward(x, None, weight, bias, settings=settings)  # type: ignore[arg-type]
    return y, stats


@_rows.register_fake
def _(x: Tensor, weight: Any, bias: Any, *settings: Any) -> tuple[Tensor, Tensor]:
    return _row_like(x), _stats_like(x, settings[0])


@torch.library.custom_op(
    "dyt_suite::rows_add",
    mutates_args=(),
    schema=f"(Tensor x, Tensor residual, {ROWS}) -> (Tensor, Tensor, Tensor)",
)
def _rows_add(x: Tensor, residual: Tensor, weight: Any, bias: Any, *settings: Any) -> Any:
    return rows_forward(x, residual, weight, bias, settings=settings)  # type: ignore[arg-type]


@_rows_add.register_fake
def _(x: Tensor, residual: Tensor, weight: Any, bias: Any, *settings: Any) -> Any:
    return _row_like(x), _row_like(x), _stats_like(x, settings[0])


@torch.library.custom_op(
    "dyt_suite::rows_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor? dh, Tensor h, Tensor stats, Tensor? weight, Tensor? bias, "
    "str kind, str backend, bool[] needs) -> (Tensor, Tensor, Tensor)",
)
def _rows_backward(dy: Tensor, dh: Tensor | None, h: Tensor, stats: Tensor, *rest: Any) -> Any:
    weight, bias, kind, backend, needs = rest
    settings = (kind, backend)
    return _given(rows_backward(dy, dh, h, stats, weight, bias, settings=settings, needs=needs), h)


@_rows_backward.register_fake
def _(dy: Tensor, dh: Tensor | None, h: Tensor, stats: Tensor, *rest: Any) -> Any:
    weight, bias, _, _, needs = rest
    dx = _row_like(h) if needs[0] else h.new_empty(0)
    return dx, _blank(needs[1], weight, h), _blank(needs[2], bias, h)


def _keep_rows(ctx: Any, inputs: Any, output: Any) -> None:
    weight, bias, kind, _, backend = inputs[-5:]
    h = output[1] if len(output) == 3 else inputs[0]
    ctx.save_for_backward(h, output[-1], weight, bias)
    ctx.settings = (kind, backend)
    ctx.set_materialize_grads(False)


def _differentiate_rows(ctx: Any, dy: Tensor | None, *others: Tensor | None) -> Any:
    h, stats, *parameters = ctx.saved_tensors
    added = len(ctx.needs_input_grad) > 6
    dh = others[0] if added else None
    sources = ctx.needs_input_grad[: 2 if added else 1]
    if dy is None:
        return (*[dh] * len(sources), *[None] * 5)
    needs = [any(sources), *ctx.needs_input_grad[len(sources) : len(sources) + 2]]
    found = OPS.rows_backward(dy, dh, h, stats, *parameters, *ctx.settings, needs)
    dx, *rest = _taken_where(found, needs, parameters)
    return (*[dx] * len(sources), *rest, None, None, None)


_rows.register_autograd(_differentiate_rows, setup_context=_keep_rows)
_rows_add.register_autograd(_differentiate_rows, setup_context=_keep_rows)
