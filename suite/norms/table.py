"""NORMS: the names that `norm=` may take, each with its builder and its options.

An explicit table: adding a norm is a class, an options dataclass and a line here, and every
contract test picks it up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from suite.norms import statistical as S
from suite.norms.options import (
    BatchNormOptions,
    GroupNormOptions,
    NormOptions,
    PointwiseOptions,
    RowOptions,
    StatisticsOptions,
)
from suite.norms.pointwise import PointwiseNorm


@dataclass(frozen=True)
class NormSpec:
    """One norm of the table.

    build: build(dim, *, options, site, channels_first, eps, bias, affine) -> nn.Module.
    options: an instance that holds the defaults. help: one line for `--list`.
    causal: whether no position sees another, so that the norm may stand in a causal model.
    """

    build: Callable[..., nn.Module]
    options: Any
    help: str = ""
    causal: bool = True


def _or(option: Any, published: Any) -> Any:
    return published if option is None else option


def _statistics(
    cls: Callable[..., nn.Module],
    extra: tuple[str, ...],
    dim: int,
    *,
    options: StatisticsOptions,
    site: str,
    channels_first: bool,
    eps: float,
    bias: bool,
    affine: bool,
) -> nn.Module:
    """A statistics norm; `extra` names the options that it has beyond StatisticsOptions."""
    published_bias = affine and bias and cls.published_bias  # type: ignore[attr-defined]
    return cls(
        dim,
        eps=_or(options.eps, eps),
        weight=_or(options.weight, affine),
        bias=_or(options.bias, published_bias),
        channels_first=channels_first,
        **{name: getattr(options, name) for name in extra},
    )


def _identity(dim: int, **_: Any) -> nn.Module:
    return S.Identity(dim)


def _pointwise(
    function: str,
    dim: int,
    *,
    options: PointwiseOptions,
    site: str,
    channels_first: bool,
    eps: float,
    bias: bool,
    affine: bool,
) -> nn.Module:
    """A point-wise norm. It has no eps: the one that the model passes is dropped on purpose."""
    return PointwiseNorm(
        dim,
        function=function,
        alpha_init=options.alpha_init_by_site.get(site, options.alpha_init),
        alpha=options.alpha,
        shift=options.shift,
        weight=_or(options.weight, affine),
        bias=_or(options.bias, affine and bias),
        channels_first=channels_first,
        backend=options.backend,
        calibrate_target=options.calibrate_target,
    )


def _stat(cls: Callable[..., nn.Module], *extra: str) -> Callable[..., nn.Module]:
    return partial(_statistics, cls, extra)


def _point(function: str) -> Callable[..., nn.Module]:
    return partial(_pointwise, function)


_STATISTICS, _ROWS, _POINTWISE = StatisticsOptions(), RowOptions(), PointwiseOptions()

NORMS: dict[str, NormSpec] = {
    "layernorm": NormSpec(
        _stat(S.LayerNorm, "backend"), _ROWS, "mean and variance of each position"
    ),
    "rmsnorm": NormSpec(_stat(S.RMSNorm, "backend"), _ROWS, "root mean square of each position"),
    "batchnorm": NormSpec(
        _stat(S.BatchNorm, "sync", "momentum"),
        BatchNormOptions(),
        "mean and variance of each channel over the batch",
        causal=False,
    ),
    "groupnorm": NormSpec(
        _stat(S.GroupNorm, "groups"), GroupNormOptions(), "mean and variance of groups of channels"
    ),
    "scalenorm": NormSpec(_stat(S.ScaleNorm), _STATISTICS, "x / |x| with one learned scale"),
    "identity": NormSpec(_identity, NormOptions(), "no normalization"),
    "dyt": NormSpec(_point("dyt"), _POINTWISE, "Dynamic Tanh: tanh(alpha x)"),
    "derf": NormSpec(_point("derf"), _POINTWISE, "Derf: erf(alpha x + shift)"),
    "isru": NormSpec(_point("isru"), _POINTWISE, "u / sqrt(1 + u^2)"),
    "arctan": NormSpec(_point("arctan"), _POINTWISE, "(2 / pi) atan(u)"),
    "satursin": NormSpec(_point("satursin"), _POINTWISE, "sin(clip(u, -pi/2, pi/2))"),
    "softsign": NormSpec(_point("softsign"), _POINTWISE, "u / (1 + |u|), the papers' smoothsign"),
    "hardtanh": NormSpec(_point("hardtanh"), _POINTWISE, "clip(u, -1, 1), the papers' linearclip"),
    "logsign_clip": NormSpec(
        _point("logsign_clip"), _POINTWISE, "clip(sign(u) ln(1 + |u|), -1, 1)"
    ),
    "arcsinh_clip": NormSpec(_point("arcsinh_clip"), _POINTWISE, "clip(asinh(u), -1, 1)"),
    "expsign": NormSpec(_point("expsign"), _POINTWISE, "sign(u) (1 - exp(-|u|))"),
    "exproot": NormSpec(_point("exproot"), _POINTWISE, "sign(u) (1 - exp(-sqrt|u|))"),
    "relsign": NormSpec(_point("relsign"), _POINTWISE, "u / (1 + sqrt(1 + u^2))"),
    "saturlog": NormSpec(_point("saturlog"), _POINTWISE, "sign(u) L / (1 + L), L = ln(1 + |u|)"),
    "cubsign": NormSpec(_point("cubsign"), _POINTWISE, "u^3 / (1 + |u|^3)"),
    "logquad_clip": NormSpec(
        _point("logquad_clip"), _POINTWISE, "clip(sign(u) ln(1 + u^2), -1, 1)"
    ),
    "power23_clip": NormSpec(_point("power23_clip"), _POINTWISE, "clip(sign(u) |u|^(2/3), -1, 1)"),
    "dyisru": NormSpec(
        _point("dyisru"), _POINTWISE, "sqrt(C) x / sqrt(beta + x^2), beta = C / alpha^2"
    ),
    "sigmoid": NormSpec(_point("sigmoid"), _POINTWISE, "sigmoid(u), an ablation of DyT"),
}
