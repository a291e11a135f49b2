"""One class for every point-wise norm: y = weight * f(alpha * x + shift) + bias.

Normalization without statistics: f squashes, alpha plays the part of 1 / std (DyT, arXiv
2503.10622; Derf, arXiv 2512.10938). No reduction, so no position sees another and padding needs no
care. There is no eps, and none is exposed: fused paths such as nn.TransformerEncoderLayer's read
`norm.eps` and would compute LayerNorm.

Parameters are called and shaped as in the published checkpoints: alpha (1,), shift (1,), weight
(C,), bias (C,). Computed in float32 (float64 stays float64), returned in the input's dtype, with or
without autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from suite.norms.functions import FUNCTIONS, Function
from suite.norms.kernels import KERNELS, Family
from suite.norms.kernels.chosen import Chosen
from suite.norms.kernels.ops import pointwise
from suite.norms.options import CALIBRATED

SATURATED = 0.95  # of sup |f|


def _formula(
    x: Tensor,
    alpha: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    f: Function,
) -> Tensor:
    """The norm, on parameters that broadcast against x; the result has x's dtype."""
    u = x.to(torch.promote_types(x.dtype, torch.float32))
    if alpha is not None:
        u = alpha * u
    if shift is not None:
        u = u + shift
    y = f(u)
    if weight is not None:
        y = weight * y
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


@lru_cache(maxsize=1)
def _compiled_formula() -> Callable[..., Tensor]:
    """One compiled function for all layers: equal ones share it, and modules stay picklable."""
    return torch.compile(_formula)


class PointwiseNorm(Chosen, nn.Module):
    """y = weight * f(alpha * x + shift) + bias for x [..., C], or [B, C, ...] with channels_first.

    function: a key of FUNCTIONS. alpha: "scalar", "channel" or "none". alpha_init: a positive
    number, or "calibrated", which leaves 1 there until `suite.norms.calibrate` has seen a batch.
    backend: what runs, see suite.norms.kernels.
    """

    family: Family = "pointwise"
    alpha: Tensor | None
    shift: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        dim: int,
        *,
        function: str = "dyt",
        alpha_init: float | str = 0.5,
        alpha: str = "scalar",
        shift: bool | None = None,
        weight: bool = True,
        bias: bool = True,
        channels_first: bool = False,
        backend: str = "auto",
        calibrate_target: float = 1.0,
    ) -> None:
        super().__init__()
        row = FUNCTIONS[function].at(dim)
        self.dim, self.function, self.channels_first = dim, function, channels_first
        self.f = row.plain if row.plain is not None and backend == "eager" else row.forward
        self.supremum = row.supremum
        self.requested = backend
        self.to_calibrate = alpha_init == CALIBRATED
        self.calibrate_target = calibrate_target
        self.alpha_init = 1.0 if self.to_calibrate else float(alpha_init)
        inner = dim if alpha == "channel" else 1
        with_shift = row.shift if shift is None else shift
        self.register_parameter("alpha", None if alpha == "none" else _empty(inner))
        self.register_parameter("shift", _empty(inner) if with_shift else None)
        self.register_parameter("weight", _empty(dim) if weight else None)
        self.register_parameter("bias", _empty(dim) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """alpha at alpha_init, weight at 1, shift and bias at 0. Draws no random numbers."""
        starts = {"alpha": self.alpha_init, "shift": 0.0, "weight": 1.0, "bias": 0.0}
        for name, value in starts.items():
            parameter = getattr(self, name)
            if parameter is not None:
                nn.init.constant_(parameter, value)

    def _along_channels(self, parameter: Tensor | None, x: Tensor) -> Tensor | None:
        if parameter is None or not self.channels_first or x.dim() <= 2:
            return parameter
        return parameter.view(-1, *(1 for _ in range(x.dim() - 2)))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [..., C] or [B, C, ...] -> the same shape and dtype. `mask` makes no difference."""
        parameters = (self.alpha, self.shift, self.weight, self.bias)
        backend = self.backend_for(x)
        if backend in KERNELS:
            layout = {"function": self.function, "channels_first": self.channels_first}
            return pointwise(x, *parameters, **layout, backend=backend)  # type: ignore[arg-type]
        alpha, shift, weight, bias = (self._along_channels(p, x) for p in parameters)
        formula = _compiled_formula() if backend == "compile" else _formula
        return formula(x, alpha, shift, weight, bias, self.f)

    @torch.no_grad()
    def saturation(self, x: Tensor) -> Tensor:
        """Share (0..1, float32 scalar) of x's elements with |f(alpha x + shift)| > 0.95 sup|f|."""
        alpha, shift = (self._along_channels(p, x) for p in (self.alpha, self.shift))
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        y = _formula(x, alpha, shift, None, None, self.f)
        return (y.abs() > SATURATED * self.supremum).float().mean()

    def extra_repr(self) -> str:
        return f"{self.dim}, function={self.function}, channels_first={self.channels_first}"


def _empty(size: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(size))
