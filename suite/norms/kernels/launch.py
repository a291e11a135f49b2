"""A kernel's start: the tensor is brought into its layout, counted, and given to the backend.

Both ways to a kernel come through here, the autograd functions of `ops` and the operators of
`operators`, so that `suite.norms.kernels.launches` misses none.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from suite.norms.kernels import count, module_of
from suite.norms.kernels.layout import layout_of

PointwiseSettings = tuple[str, bool, str]  # function, channels_first, backend


def pointwise_forward(
    x: Tensor,
    residual: Tensor | None,
    parameters: Sequence[Tensor | None],
    *,
    settings: PointwiseSettings,
) -> tuple[Tensor, Tensor | None]:
    """y and, with a residual, h = x + residual, both laid out as x. parameters: alpha, shift,
    weight, bias."""
    function, channels_first, backend = settings
    layout = layout_of(x, channels_first=channels_first)
    count(backend, "pointwise_forward")
    y, h = module_of(backend, "pointwise").pointwise_forward(
        layout.match(x),
        None if residual is None else layout.match(residual),
        *map(_dense, parameters),
        function=function,
        dim=layout.dim,
        inner=layout.inner,
    )
    return layout.restore(y), None if h is None else layout.restore(h)


def pointwise_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    parameters: Sequence[Tensor | None],
    *,
    settings: PointwiseSettings,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, alpha, shift, weight and bias; None where not needed or absent."""
    function, channels_first, backend = settings
    layout = layout_of(h, channels_first=channels_first)
    count(backend, "pointwise_backward")
    dx, *rest = module_of(backend, "pointwise").pointwise_backward(
        layout.match(dy),
        None if dh is None else layout.match(dh),
        layout.match(h),
        *map(_dense, parameters),
        function=function,
        dim=layout.dim,
        inner=layout.inner,
        needs=tuple(needs),
    )
    grads = map(_as_parameter, rest, parameters)
    return (None if dx is None else layout.restore(dx), *grads)


def rows_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    settings: tuple[str, float, str],
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, h and the statistics of each row. settings: kind, eps, backend."""
    kind, eps, backend = settings
    count(backend, "rows_forward")
    y, h, stats = module_of(backend, "rows").rows_forward(
        _flat(x),
        None if residual is None else _flat(residual),
        _dense(weight),
        _dense(bias),
        kind=kind,
        eps=eps,
    )
    return y.view(x.shape), None if h is None else h.view(x.shape), stats


def rows_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    settings: tuple[str, str],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight and bias. settings: kind, backend."""
    kind, backend = settings
    count(backend, "rows_backward")
    dx, dweight, dbias = module_of(backend, "rows").rows_backward(
        _flat(dy),
        None if dh is None else _flat(dh),
        _flat(h),
        stats,
        _dense(weight),
        _dense(bias),
        kind=kind,
        needs=tuple(needs),
    )
    return (
        None if dx is None else dx.view(h.shape),
        _as_parameter(dweight, weight),
        _as_parameter(dbias, bias),
    )


def _dense(p: Tensor | None) -> Tensor | None:
    """A parameter whose numbers lie side by side, as a kernel reads them; a slice may not."""
    return None if p is None else p.contiguous()


def _flat(x: Tensor) -> Tensor:
    """[..., C] -> [rows, C], contiguous."""
    return x.contiguous().view(x.shape[:-1].numel(), x.shape[-1])


def _as_parameter(gradient: Tensor | None, p: Tensor | None) -> Tensor | None:
    """A gradient, float32 from a kernel, in its parameter's dtype."""
    return None if gradient is None or p is None else gradient.to(p.dtype)
