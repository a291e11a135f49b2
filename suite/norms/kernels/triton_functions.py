"""f and f' of every point-wise norm for Triton, as one table: (u, dim) -> (f(u), f'(u)).

Kernels that use only f pay nothing for f': the compiler drops what is not read.

What bounds a point-wise norm on a GPU, beside memory, is the number of instructions per element, so
everything here is branch-free and made of what is one instruction on NVIDIA: fused multiply-add,
exp2, rsqrt and a symmetric clamp. A quotient is a product with rsqrt(d)^2: `/` is nine times as
long (it scales its operands first), and the denominators here stay far from overflow. libdevice is
left out for the same reason, and because Triton's interpreter cannot run it: its tanh takes 22
instructions, this one 12, its erf 28, this one 16. sin, asinh, atan, erf and log2 are minimax
polynomials or quotients of polynomials with relative error below 5e-8, fitted for this file.

float32 in and out. Errors in exact float32 operations: at most 2e-7 + 2e-6 |f|. NaN stays NaN, and
infinity gives the supremum. Slopes are those that autograd gives in suite.norms.functions, small
ones of a saturated f with their full relative precision. Subnormal numbers are taken for 0 where
f' is infinite at 0 (exproot, power23_clip), as the hardware's exp2 and rsqrt take them.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

# A constexpr stands right of the tensor: left of it the interpreter makes a constexpr of both.
_NAN = tl.constexpr(tl.PropagateNan.ALL)  # min and max drop a NaN unless told
_LOG2E = tl.constexpr(1 / math.log(2))
_LN2 = tl.constexpr(math.log(2))
_TWO_OVER_PI = tl.constexpr(2 / math.pi)
_HALF_PI = tl.constexpr(math.pi / 2)
_LOG2_ERF_SLOPE = tl.constexpr(math.log2(2 / math.sqrt(math.pi)))
_TINY = tl.constexpr(1.1754944e-38)  # the least normal float32
_HUGE = tl.constexpr(3e38)
_BIG = tl.constexpr(1e18)  # u^2 is finite and 1 + u^2 == u^2 long before
_E_MINUS_1 = tl.constexpr(math.e - 1)
_ROOT_E_MINUS_1 = tl.constexpr(math.sqrt(math.e - 1))
_SINH_1 = tl.constexpr(math.sinh(1))


@triton.jit
def _clip(u, limit):  # type: ignore[no-untyped-def]
    """u between -limit and limit; one instruction."""
    return tl.clamp(u, -limit, limit, propagate_nan=_NAN)


@triton.jit
def _reciprocal(d):  # type: ignore[no-untyped-def]
    """1 / d for d > 0 that is not near the ends of float32; on the GPU to 3e-7."""
    root = tl.rsqrt(d)
    return root * root


@triton.jit
def _signed(u, a):  # type: ignore[no-untyped-def]
    """a >= 0 with the sign of u; one instruction."""
    sign = u.to(tl.int32, bitcast=True) & -0x80000000
    return (a.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _within(u, limit, slope):  # type: ignore[no-untyped-def]
    """The slope of f(clip(u)): 0 outside, as torch.clamp has it."""
    return tl.where(tl.abs(u) <= limit, slope, 0.0)


@triton.jit
def _log2(x):  # type: ignore[no-untyped-def]
    """log2 of a normal positive number: 2^k m, 0.7 < m < 1.42, log m by a series in (m-1)/(m+1)."""
    bits = x.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23
    m = (bits - (k << 23)).to(tl.float32, bitcast=True)
    s = (m - 1.0) * _reciprocal(m + 1.0)
    z = s * s
    series = 2.88539008 + z * (0.961798861 + z * (0.576712901 + z * 0.431776193))
    return k.to(tl.float32) + s * series


@triton.jit
def _log1p(a):  # type: ignore[no-untyped-def]
    """(ln(1 + a), 1 / (1 + a)) for 0 <= a <= 3e38. What 1 + a rounds away is added back."""
    w = 1.0 + a
    inverse = _reciprocal(w)
    return _log2(w) * _LN2 + (a - (w - 1.0)) * inverse, inverse


@triton.jit
def _one_minus_exp(a):  # type: ignore[no-untyped-def]
    """(1 - e^-a, e^-a) for a >= 0; a series where the difference cancels."""
    e = tl.exp2(a * -_LOG2E)
    tail = 1 / 6 - a * (1 / 24 - a * (1 / 120 - a * (1 / 720)))
    return tl.where(a < 0.25, a * (1.0 - a * (0.5 - a * tail)), 1.0 - e), e


@triton.jit
def _sine(v):  # type: ignore[no-untyped-def]
    """sin for |v| <= pi / 2."""
    z = v * v
    tail = -0.166666567 + z * (0.00833302515 + z * (-0.000198074191 + z * 2.60190368e-6))
    return v + v * z * tail


@triton.jit
def _tanh(u, dim):  # type: ignore[no-untyped-def]
    """t = 1 - q and q (1 + t), q = 2 / (e^2|u| + 1); a series near 0, where 1 - q cancels.

    By |u| the slope of a saturated element is right to its last digits on both sides.
    """
    q = _reciprocal(0.5 * tl.exp2(tl.abs(u) * (2 * _LOG2E)) + 0.5)
    t = 1.0 - q
    z = u * u
    series = u * (1.0 - z * (1 / 3 - z * (2 / 15)))
    return tl.where(tl.abs(u) < 0.15, series, _signed(u, t)), q + q * t


@triton.jit
def _erf(u, dim):  # type: ignore[no-untyped-def]
    """u P(u^2) / Q(u^2) up to 3.9, where float32 cannot tell it from 1; exp2 for the slope."""
    v = _clip(u, 3.9)
    z = v * v
    p = 0.0037384073 + z * (0.000285063613 + z * 2.0664625e-6)
    p = 1.12837915 + z * (0.189668249 + z * (0.0526682694 + z * p))
    q = 0.0149143987 + z * (0.00115739114 + z * 3.82699839e-5)
    q = 1.0 + z * (0.501421891 + z * (0.113819546 + z * q))
    return v * p * _reciprocal(q), tl.exp2(u * u * -_LOG2E + _LOG2_ERF_SLOPE)


@triton.jit
def _arctan(u, dim):  # type: ignore[no-untyped-def]
    """(2 / pi) atan(u); above 1 by atan(a) = pi / 2 - atan(1 / a)."""
    a = tl.abs(u)
    above = a > 1.0
    v = tl.where(above, _reciprocal(a), a)
    z = v * v
    p = 0.636619759 + z * (0.571936992 + z * 0.087607089)
    q = 1.0 + z * (1.23172781 + z * (0.348222148 + z * 0.0123777751))
    found = v * p * _reciprocal(q)
    w = _clip(u, _BIG)
    return _signed(u, tl.where(above, 1.0 - found, found)), _reciprocal(1.0 + w * w) * _TWO_OVER_PI


@triton.jit
def _isru(u, dim):  # type: ignore[no-untyped-def]
    v = _clip(u, _BIG)
    r = tl.rsqrt(1.0 + v * v)
    return v * r, r * r * r


@triton.jit
def _dyisru(u, dim):  # type: ignore[no-untyped-def]
    v = _clip(u, _BIG)
    r = tl.rsqrt(1.0 + v * v * (1.0 / dim))
    return v * r, r * r * r


@triton.jit
def _satursin(u, dim):  # type: ignore[no-untyped-def]
    """The slope, cos v = sin(pi / 2 - |v|), is 0 from the clip on by itself."""
    v = _clip(u, _HALF_PI)
    return _sine(v), _sine(-tl.abs(v) + _HALF_PI)


@triton.jit
def _softsign(u, dim):  # type: ignore[no-untyped-def]
    v = _clip(u, _BIG)
    r = _reciprocal(1.0 + tl.abs(v))
    return v * r, r * r


@triton.jit
def _hardtanh(u, dim):  # type: ignore[no-untyped-def]
    return _clip(u, 1.0), _within(u, 1.0, 1.0)


@triton.jit
def _logsign_clip(u, dim):  # type: ignore[no-untyped-def]
    log, inverse = _log1p(tl.abs(_clip(u, _E_MINUS_1)))
    return _signed(u, log), _within(u, _E_MINUS_1, inverse)


@triton.jit
def _arcsinh_clip(u, dim):  # type: ignore[no-untyped-def]
    v = _clip(u, _SINH_1)
    z = v * v
    p = 0.999999959 + z * (0.856171633 + z * 0.124541351)
    q = 1.0 + z * (1.02283512 + z * (0.220053662 + z * 0.00441365717))
    return v * p * _reciprocal(q), _within(u, _SINH_1, tl.rsqrt(1.0 + z))


@triton.jit
def _expsign(u, dim):  # type: ignore[no-untyped-def]
    found, e = _one_minus_exp(tl.abs(u))
    return _signed(u, found), e


@triton.jit
def _exproot(u, dim):  # type: ignore[no-untyped-def]
    a = tl.abs(_clip(u, _BIG))
    zero = a < _TINY
    r = tl.where(zero, 0.0, tl.rsqrt(a))
    found, e = _one_minus_exp(a * r)
    return _signed(u, found), 0.5 * e * r


@triton.jit
def _relsign(u, dim):  # type: ignore[no-untyped-def]
    """u / (1 + s) with s = sqrt(1 + u^2), and 1 / (s (1 + s))."""
    v = _clip(u, _BIG)
    square = 1.0 + v * v
    r = tl.rsqrt(square)
    inverse = _reciprocal(1.0 + square * r)
    return v * inverse, r * inverse


@triton.jit
def _saturlog(u, dim):  # type: ignore[no-untyped-def]
    """L / (1 + L): a logarithm, so only infinity itself reaches the supremum."""
    a = tl.abs(u)
    log, inverse = _log1p(tl.minimum(a, _HUGE, propagate_nan=_NAN))
    r = _reciprocal(1.0 + log)
    return _signed(u, tl.where(a == float("inf"), 1.0, log * r)), inverse * r * r


@triton.jit
def _cubsign(u, dim):  # type: ignore[no-untyped-def]
    v = _clip(u, 1e10)
    z = v * v
    cube = v * z
    r = _reciprocal(1.0 + tl.abs(cube))
    return cube * r, 3.0 * z * r * r


@triton.jit
def _logquad_clip(u, dim):  # type: ignore[no-untyped-def]
    v = _clip(u, _ROOT_E_MINUS_1)
    log, inverse = _log1p(v * v)
    return _signed(u, log), _within(u, _ROOT_E_MINUS_1, 2.0 * tl.abs(v) * inverse)


@triton.jit
def _power23_clip(u, dim):  # type: ignore[no-untyped-def]
    """v |v|^(-1/3), which has v's sign, and its slope 2/3 |v|^(-1/3)."""
    v = _clip(u, 1.0)
    a = tl.abs(v)
    near = tl.exp2(_log2(a) * (-1 / 3))
    near = near * (4 / 3 - a * near * near * near * (1 / 3))  # Newton: log2's rounding grows
    r = tl.where(a < _TINY, 0.0, near)
    return v * r, _within(u, 1.0, (2 / 3) * r)


@triton.jit
def _sigmoid(u, dim):  # type: ignore[no-untyped-def]
    e = tl.exp2(_clip(u, 80.0) * -_LOG2E)
    r = _reciprocal(1.0 + e)
    return r, e * r * r


TRITON_FUNCTIONS: dict[str, Any] = {
    "dyt": _tanh,
    "derf": _erf,
    "isru": _isru,
    "arctan": _arctan,
    "satursin": _satursin,
    "softsign": _softsign,
    "hardtanh": _hardtanh,
    "logsign_clip": _logsign_clip,
    "arcsinh_clip": _arcsinh_clip,
    "expsign": _expsign,
    "exproot": _exproot,
    "relsign": _relsign,
    "saturlog": _saturlog,
    "cubsign": _cubsign,
    "logquad_clip": _logquad_clip,
    "power23_clip": _power23_clip,
    "dyisru": _dyisru,
    "sigmoid": _sigmoid,
}
