"""Depthwise convolution with a filter as long as the sequence, by FFT or directly.

    y_t = D u_t + sum_{s <= t} k_{t-s} u_s  (+ sum_{s > t} k_reverse_{s-t} u_s)

The sequence is padded with zeros to `fft_size(L)` >= 2 L - 1 points: a shorter transform is
circular and lets the end of a sequence into its beginning. It is computed in float32 under any
autocast, since half precision transforms exist for few lengths on a GPU and not at all on a CPU;
float64 stays. torch.compile sees one operator, as inductor has no code for complex numbers.

Two things make it leaner than the formula of HyenaDNA's fftconv (hyena-dna d553021). The
backward keeps the inputs only and transforms them again, where autograd keeps the spectra, twice
the size. And it goes through the channels in slices whose spectra fit a cache (on a GPU: a bounded
part of its memory), so that what is needed at a time does not grow with batch and width.

By FFT a position leaks into earlier ones at the level of rounding (1e-7 of the largest value in
float32); `direct_conv` is the same function with exact causality, at a cost that grows as L * L.

Shapes: B sequences, D channels, L positions, F frequencies.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

SLICE_BYTES = {"cpu": 2**22, "cuda": 2**28}  # of the spectra that are held at a time


def fft_conv(
    u_BDL: Tensor,
    k_DL: Tensor,
    *,
    D_D: Tensor | None = None,
    k_reverse_DL: Tensor | None = None,
) -> Tensor:
    """The convolution by FFT: [B, D, L], in the dtype of `u_BDL`.

    D_D: weight of the input itself, 0 if None. k_reverse_DL: the filter of the later positions by
    distance, none if None; its first tap, distance 0, is not used: `k_DL` has it already.
    Once differentiable. Raises ValueError for shapes that do not fit.
    """
    check_shapes(u_BDL, k_DL, D_D, k_reverse_DL)
    y: Tensor = torch.ops.suite_dna.fft_conv(u_BDL, k_DL, D_D, k_reverse_DL)
    return y


def direct_conv(
    u_BDL: Tensor,
    k_DL: Tensor,
    *,
    D_D: Tensor | None = None,
    k_reverse_DL: Tensor | None = None,
) -> Tensor:
    """What `fft_conv` computes, tap by tap: no later input reaches an output, not by rounding."""
    check_shapes(u_BDL, k_DL, D_D, k_reverse_DL)
    dtype, length = working_dtype(u_BDL, k_DL), u_BDL.shape[-1]
    later = 0 if k_reverse_DL is None else length - 1
    # cuDNN may choose an FFT or Winograd itself, and round across positions
    exact = torch.backends.cudnn.flags(enabled=False) if u_BDL.is_cuda else nullcontext()
    with torch.autocast(u_BDL.device.type, enabled=False), exact:
        taps_DK = k_DL.to(dtype).flip(-1)  # conv1d correlates
        if k_reverse_DL is not None:
            taps_DK = torch.cat((taps_DK, k_reverse_DL[:, 1:].to(dtype)), dim=-1)
        padded = F.pad(u_BDL.to(dtype), (length - 1, later))
        y_BDL = F.conv1d(padded, taps_DK.unsqueeze(1), groups=k_DL.shape[0])
        if D_D is not None:
            y_BDL = y_BDL + u_BDL * D_D.to(dtype)[:, None]
    return y_BDL.to(u_BDL.dtype)


def check_shapes(
    u_BDL: Tensor, k_DL: Tensor, D_D: Tensor | None, k_reverse_DL: Tensor | None
) -> None:
    """Raise a ValueError that names the first argument whose shape is not that of the input's."""
    if u_BDL.dim() != 3 or 0 in u_BDL.shape:
        raise ValueError(f"u_BDL must be [B, D, L] and not empty, got {list(u_BDL.shape)}")
    D, L = u_BDL.shape[1:]
    wanted = {"k_DL": (k_DL, [D, L]), "D_D": (D_D, [D]), "k_reverse_DL": (k_reverse_DL, [D, L])}
    for name, (value, shape) in wanted.items():
        if value is not None and list(value.shape) != shape:
            raise ValueError(
                f"{name} must be {shape} for an input of {list(u_BDL.shape)}, "
                f"got {list(value.shape)}"
            )


def working_dtype(u: Tensor, k: Tensor) -> torch.dtype:
    """float32, or float64 if one of them is."""
    return torch.promote_types(torch.promote_types(u.dtype, k.dtype), torch.float32)


@lru_cache(maxsize=1024)
def fft_size(length: int) -> int:
    """Points of the transform for `length` positions: 2 * length - 1 or a little more.

    The least multiple of 16 with no prime factor above 5; transforms of other sizes take up to
    three times as long (2,052 points against 2,048, MKL).
    """
    size = -(-(2 * length - 1) // 16) * 16
    while not is_smooth(size):
        size += 16
    return size


def is_smooth(number: int) -> bool:
    """Whether it has no prime factor above 5."""
    for prime in (2, 3, 5):
        while number % prime == 0:
            number //= prime
    return number == 1


def slices_of(u_BDL: Tensor, *, spectra: int) -> Iterator[slice]:
    """Channels in turns that need about SLICE_BYTES. spectra: held at a time."""
    B, D, L = u_BDL.shape
    width = 16 if u_BDL.dtype == torch.float64 else 8  # bytes of a complex number
    budget = SLICE_BYTES.get(u_BDL.device.type, SLICE_BYTES["cuda"])
    step = max(1, budget // (spectra * B * (fft_size(L) // 2 + 1) * width))
    for start in range(0, D, step):
        yield slice(start, min(D, start + step))


def spectrum_of_filter(k_DL: Tensor, k_reverse_DL: Tensor | None, *, size: int) -> Tensor:
    """[D, F] of both directions: on a circle of `size` points later positions are negative ones."""
    if k_reverse_DL is None:
        return torch.fft.rfft(k_DL, n=size)
    L = k_DL.shape[-1]
    between = k_DL.new_zeros(k_DL.shape[0], size - 2 * L + 1)
    return torch.fft.rfft(torch.cat((k_DL, between, k_reverse_DL[:, 1:].flip(-1)), dim=-1))


def _forward(u: Tensor, k: Tensor, D: Tensor | None, k_reverse: Tensor | None) -> Tensor:
    """u [B, D, L], k and k_reverse [D, L], D [D] -> y [B, D, L]."""
    dtype, L = working_dtype(u, k), u.shape[-1]
    size = fft_size(L)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    with torch.autocast(u.device.type, enabled=False):
        for part in slices_of(u, spectra=2):
            u_part = u[:, part].to(dtype)
            back = None if k_reverse is None else k_reverse[part].to(dtype)
            f_BDF = torch.fft.rfft(u_part, n=size)
            f_BDF *= spectrum_of_filter(k[part].to(dtype), back, size=size)
            made = torch.fft.irfft(f_BDF, n=size)[..., :L]
            if D is not None:
                made = torch.addcmul(made, u_part, D[part].to(dtype)[:, None])
            y[:, part] = made
    return y


def _backward(
    grad: Tensor, u: Tensor, k: Tensor, D: Tensor | None, k_reverse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, k, D and k_reverse; of what is None an empty tensor."""
    dtype, L = working_dtype(u, k), u.shape[-1]
    size = fft_size(L)
    du, dk = torch.empty_like(u, memory_format=torch.contiguous_format), torch.empty_like(k)
    dD = k.new_empty(0) if D is None else torch.empty_like(D)
    d_reverse = k.new_empty(0) if k_reverse is None else torch.zeros_like(k_reverse)
    with torch.autocast(u.device.type, enabled=False):
        for part in slices_of(u, spectra=3):
            u_part, g_part = u[:, part].to(dtype), grad[:, part].to(dtype)
            back = None if k_reverse is None else k_reverse[part].to(dtype)
            g_BDF = torch.fft.rfft(g_part, n=size)
            both_DF = (torch.fft.rfft(u_part, n=size).conj() * g_BDF).sum(dim=0)
            taps_DN = torch.fft.irfft(both_DF, n=size)
            dk[part] = taps_DN[:, :L]
            if k_reverse is not None:
                d_reverse[part, 1:] = taps_DN[:, size - L + 1 :].flip(-1)
            g_BDF *= spectrum_of_filter(k[part].to(dtype), back, size=size).conj()
            made = torch.fft.irfft(g_BDF, n=size)[..., :L]
            if D is not None:
                dD[part] = (g_part * u_part).sum(dim=(0, 2))
                made = torch.addcmul(made, g_part, D[part].to(dtype)[:, None])
            du[:, part] = made
    return du, dk, dD, d_reverse


_ARGUMENTS = "Tensor u, Tensor k, Tensor? D, Tensor? k_reverse"
_OP, _BACKWARD = "suite_dna::fft_conv", "suite_dna::fft_conv_backward"
_FOUR = "(Tensor, Tensor, Tensor, Tensor)"
# not by custom_op, whose first call imports the whole compiler
torch.library.define(_OP, f"({_ARGUMENTS}) -> Tensor")
torch.library.define(_BACKWARD, f"(Tensor grad, {_ARGUMENTS}) -> {_FOUR}")
torch.library.impl(_OP, "CompositeExplicitAutograd", _forward)
torch.library.impl(_BACKWARD, "CompositeExplicitAutograd", _backward)


@torch.library.register_fake(_OP)
def _(u: Tensor, k: Tensor, D: Tensor | None, k_reverse: Tensor | None) -> Tensor:
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@torch.library.register_fake(_BACKWARD)
def _(
    grad: Tensor, u: Tensor, k: Tensor, D: Tensor | None, k_reverse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(u, memory_format=torch.contiguous_format),
        torch.empty_like(k),
        k.new_empty(0) if D is None else torch.empty_like(D),
        k.new_empty(0) if k_reverse is None else torch.empty_like(k_reverse),
    )


def _keep_inputs(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    u, k, D, k_reverse = ctx.saved_tensors  # type: ignore[attr-defined]
    du, dk, dD, d_reverse = torch.ops.suite_dna.fft_conv_backward(grad, u, k, D, k_reverse)
    return du, dk, None if D is None else dD, None if k_reverse is None else d_reverse


torch.library.register_autograd(_OP, _gradients, setup_context=_keep_inputs)
