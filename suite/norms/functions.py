"""The functions f of the point-wise norms y = weight * f(alpha * x + shift) + bias, as one table.

tanh is DyT (arXiv 2503.10622), erf is Derf and the others are the ones that the Derf paper compares
(arXiv 2512.10938, table 7), plus DyISRU (arXiv 2503.21708) and the sigmoid ablation of DyT.

The published code of several of these is not usable as it stands, and zero-padded frames meet all
of it:

- exproot and power23_clip have an infinite slope at 0, and as published a NaN gradient there.
  Here it is 0, by choice: a padded frame gives no gradient. Off zero it is the true one,
  which grows like |u|^-1/2 and |u|^-1/3.
- functions written with sign(u) have gradient 0 at exactly 0. Here it is the true one.
- isru, relsign and cubsign overflow to 0 or NaN for large inputs. Here u is clamped where f is
  constant in floating point.

The clipped functions clip the input where f reaches 1: the same function, and it cannot overflow.

All take and return float32 or float64; `PointwiseNorm` does the casting.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]

_BIG = 1e18  # u^2 is finite in float32 and 1 + u^2 == u^2 long before


def _clamp(u: Tensor, limit: float) -> Tensor:
    return u.clamp(-limit, limit)


def _sign(u: Tensor) -> Tensor:
    """-1 or 1, and 1 at 0: s * g(s * u) has the slope g'(0) at 0, where sign(u) * g(|u|) has 0."""
    return torch.where(u < 0, -1.0, 1.0).to(u.dtype)


def _safe_power(a: Tensor, exponent: float) -> Tensor:
    """a^exponent for a >= 0, with value and gradient 0 at 0."""
    positive = a > 0
    return torch.where(positive, torch.where(positive, a, 1.0) ** exponent, 0.0)


def tanh(u: Tensor) -> Tensor:
    """tanh; while compiling as 1 - 2 / (e^2u + 1), with a series near 0 where that cancels.

    Inductor's own tanh is a slow library call; this form is 2.6 times faster, but slower in eager
    mode, so it is used only while compiling. Its slope is 1 - tanh^2: what autograd makes of the
    clamps, of both branches and of the choice between them takes longer than all the rest.
    Absolute error 2e-7, relative error 1e-6.
    """
    if not torch.compiler.is_compiling() or u.dtype == torch.float64:
        return torch.tanh(u)
    found: Tensor = _CompiledTanh.apply(u)
    return found


class _CompiledTanh(torch.autograd.Function):
    """See `tanh`."""

    @staticmethod
    def forward(u: Tensor) -> Tensor:
        exponential = 1 - 2 / (torch.exp(2 * _clamp(u, 15.0)) + 1)
        v = _clamp(u, 0.2)
        square = v * v
        series = v * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
        return torch.where(u.abs() < 0.2, series, exponential)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (t,) = ctx.saved_tensors
        return grad * (1 - t * t)


def arctan(u: Tensor) -> Tensor:
    """(2 / pi) atan(u)."""
    return torch.atan(u) * (2 / math.pi)


def isru(u: Tensor) -> Tensor:
    """u / sqrt(1 + u^2), the inverse square root unit."""
    v = _clamp(u, _BIG)
    return v / torch.sqrt(1 + v * v)


def dyisru(u: Tensor, *, dim: int) -> Tensor:
    """u / sqrt(1 + u^2 / C): for u = alpha x, sqrt(C) x / sqrt(beta + x^2), beta = C / alpha^2."""
    v = _clamp(u, _BIG)
    return v / torch.sqrt(1 + v * v / dim)


def satursin(u: Tensor) -> Tensor:
    """sin(clip(u, -pi/2, pi/2))."""
    return torch.sin(_clamp(u, math.pi / 2))


def softsign(u: Tensor) -> Tensor:
    """u / (1 + |u|); "smoothsign" in the Derf paper."""
    s = _sign(u)
    return u / (1 + s * u)


def hardtanh(u: Tensor) -> Tensor:
    """clip(u, -1, 1); "linear_clip" in the Derf paper."""
    return _clamp(u, 1.0)


def logsign_clip(u: Tensor) -> Tensor:
    """clip(sign(u) ln(1 + |u|), -1, 1)."""
    v = _clamp(u, math.e - 1)
    s = _sign(u)
    return s * torch.log1p(s * v)


def arcsinh_clip(u: Tensor) -> Tensor:
    """clip(asinh(u), -1, 1)."""
    return torch.asinh(_clamp(u, math.sinh(1)))


def expsign(u: Tensor) -> Tensor:
    """sign(u) (1 - e^-|u|)."""
    s = _sign(u)
    return -s * torch.expm1(-s * u)


def exproot(u: Tensor) -> Tensor:
    """sign(u) (1 - e^-sqrt|u|); the gradient at 0, infinite in truth, is 0."""
    s = _sign(u)
    return -s * torch.expm1(-_safe_power(s * u, 0.5))


def relsign(u: Tensor) -> Tensor:
    """u / (1 + sqrt(1 + u^2))."""
    v = _clamp(u, _BIG)
    return v / (1 + torch.sqrt(1 + v * v))


def saturlog(u: Tensor) -> Tensor:
    """sign(u) L / (1 + L) with L = ln(1 + |u|)."""
    s = _sign(u)
    log = torch.log1p(s * u)
    return s * log / (1 + log)


def cubsign(u: Tensor) -> Tensor:
    """u^3 / (1 + |u|^3); flat at 0."""
    v = _clamp(u, 1e10)
    cube = v * v * v
    return cube / (1 + _sign(u) * cube)


def logquad_clip(u: Tensor) -> Tensor:
    """clip(sign(u) ln(1 + u^2), -1, 1); flat at 0."""
    v = _clamp(u, math.sqrt(math.e - 1))
    return _sign(u) * torch.log1p(v * v)


def power23_clip(u: Tensor) -> Tensor:
    """clip(sign(u) |u|^(2/3), -1, 1); the gradient at 0, infinite in truth, is 0."""
    v = _clamp(u, 1.0)
    s = _sign(u)
    return s * _safe_power(s * v, 2 / 3)


@dataclass(frozen=True)
class PointwiseFunction:
    """One row of the table.

    forward: f, as it runs by default. plain: the same, never changed by compilation
    (`backend="eager"`), where that differs. shift: whether its paper gives it one.
    slope: f'(0) as autograd gives it here. supremum: of |f| over the reals.
    by_dim: f(u, dim=) where it depends on the channels; its supremum is sqrt(dim) (only DyISRU).
    """

    forward: Function
    slope: float
    supremum: float = 1.0
    shift: bool = False
    plain: Function | None = None
    by_dim: Callable[..., Tensor] | None = None

    def at(self, dim: int) -> PointwiseFunction:
        """The row for `dim` channels; itself for all but DyISRU."""
        if self.by_dim is None:
            return self
        return replace(self, forward=partial(self.by_dim, dim=dim), supremum=math.sqrt(dim))


FUNCTIONS: dict[str, PointwiseFunction] = {
    "dyt": PointwiseFunction(tanh, 1.0, plain=torch.tanh),
    "derf": PointwiseFunction(torch.erf, 2 / math.sqrt(math.pi), shift=True),
    "isru": PointwiseFunction(isru, 1.0),
    "arctan": PointwiseFunction(arctan, 2 / math.pi),
    "satursin": PointwiseFunction(satursin, 1.0),
    "softsign": PointwiseFunction(softsign, 1.0),
    "hardtanh": PointwiseFunction(hardtanh, 1.0),
    "logsign_clip": PointwiseFunction(logsign_clip, 1.0),
    "arcsinh_clip": PointwiseFunction(arcsinh_clip, 1.0),
    "expsign": PointwiseFunction(expsign, 1.0),
    "exproot": PointwiseFunction(exproot, 0.0),
    "relsign": PointwiseFunction(relsign, 0.5),
    "saturlog": PointwiseFunction(saturlog, 1.0),
    "cubsign": PointwiseFunction(cubsign, 0.0),
    "logquad_clip": PointwiseFunction(logquad_clip, 0.0),
    "power23_clip": PointwiseFunction(power23_clip, 0.0),
    "dyisru": PointwiseFunction(isru, 1.0, by_dim=dyisru),
    "sigmoid": PointwiseFunction(torch.sigmoid, 0.25),
}
