"""Whether a kernel agrees with the formula on this machine: looked at before `auto` takes it.

A compiler, a driver or a GPU that nobody has tried this on must not change what a norm computes. A
kernel that fails or differs is left out, with its reason in the run's log.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from suite.norms.functions import FUNCTIONS
from suite.norms.kernels import Family, uncounted
from suite.norms.kernels.launch import (
    pointwise_backward,
    pointwise_forward,
    rows_backward,
    rows_forward,
)

SHAPE = (37, 200)
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def disagreement(backend: str, device_type: str, *, family: Family) -> str | None:
    """Why a kernel is not to be used on this device: what failed or differs. None: it agrees."""
    look = _pointwise if family == "pointwise" else _rows
    try:
        with (
            uncounted(),
            torch.inference_mode(mode=False),  # the first call of a layer may be an evaluation
            torch.enable_grad(),
            torch.autocast(device_type, enabled=False),
        ):
            for dtype in BOUNDS:
                for what, error in look(backend, device_type, dtype=dtype).items():
                    if not error <= BOUNDS[dtype]:
                        return f"its {what} differs by {error:.2g} in {_short(dtype)}"
    except Exception as error:  # a compiler's, a driver's or a kernel's own
        return f"{type(error).__name__}: {_line(error)}"
    return None


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _drawn(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """x, dy and four parameters: two scalars and two vectors, which begin near 1.

    By a generator of its own: torch.manual_seed would also reseed the GPUs of the run.
    """
    draw = torch.Generator().manual_seed(0)
    x, dy, *rest = (
        torch.randn(n, generator=draw, device="cpu", dtype=torch.float32)
        for n in (SHAPE, SHAPE, 1, 1, SHAPE[1], SHAPE[1])
    )
    return x.to(device, dtype), dy.to(device, dtype), [(1 + 0.1 * p).to(device) for p in rest]


def _pointwise(backend: str, device: str, *, dtype: torch.dtype) -> dict[str, float]:
    errors: dict[str, float] = {}
    x, dy, parameters = _drawn(device, dtype)
    for function in ("dyt", "derf"):
        settings = (function, False, backend)
        y, _ = pointwise_forward(x, None, parameters, settings=settings)
        grads = pointwise_backward(dy, None, x, parameters, settings=settings, needs=(True,) * 5)
        leaves = [t.double().cpu().requires_grad_() for t in (x, *parameters)]
        u = leaves[1] * leaves[0] + leaves[2]
        wanted = leaves[3] * FUNCTIONS[function].forward(u) + leaves[4]
        errors |= _compared(function, [y, *grads], wanted, dy=dy, leaves=leaves)
    return errors


def _rows(backend: str, device: str, *, dtype: torch.dtype) -> dict[str, float]:
    errors: dict[str, float] = {}
    x, dy, (_, _, weight, bias) = _drawn(device, dtype)
    for kind in ("layer", "rms"):
        y, _, stats = rows_forward(x, None, weight, bias, settings=(kind, 1e-5, backend))
        grads = rows_backward(
            dy, None, x, stats, weight, bias, settings=(kind, backend), needs=(True,) * 3
        )
        leaves = [t.double().cpu().requires_grad_() for t in (x, weight, bias)]
        shape = (SHAPE[1],)
        wanted = (
            F.layer_norm(leaves[0], shape, leaves[1], leaves[2], 1e-5)
            if kind == "layer"
            else F.rms_norm(leaves[0], shape, leaves[1], 1e-5) + leaves[2]
        )
        errors |= _compared(kind, [y, *grads], wanted, dy=dy, leaves=leaves)
    return errors


def _compared(
    name: str, found: list[Tensor | None], wanted: Tensor, *, dy: Tensor, leaves: list[Tensor]
) -> dict[str, float]:
    """Largest error of the output and of each gradient, relative to the largest value."""
    right = [wanted, *torch.autograd.grad(wanted, leaves, dy.double().cpu())]
    errors = {}
    for place, (value, true) in enumerate(zip(found, right, strict=True)):
        assert value is not None
        error = (value.double().cpu() - true).abs().max() / true.abs().max()
        errors[f"{name} output" if place == 0 else f"{name} gradient {place}"] = float(
            error.detach()
        )
    return errors
