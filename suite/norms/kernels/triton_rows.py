"""LayerNorm and RMSNorm in Triton, with or without residual add, that save only their input.

They are here so that point-wise norms are compared with statistics norms made with the same care
(arXiv 1607.06450, 1910.07467): x is read once, statistics and sums are float32, and rows of few
channels share a warp, so that no lane idles. The backward is two kernels: one over the rows, whose
programs each write a row of sums for dweight and dbias, and one that adds these in a fixed order.
There are no atomics, so the bits are the same every time on the same device.

The sizes below come from the machine code for compute capability 9.0 (registers, spills,
instructions for each element); how fast they are on an H100 stands in docs/performance.md.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from suite.norms.kernels.triton_launch import (
    available,
    interpreted,
    power_of_two,
    sm_count,
    start,
)
from suite.norms.kernels.triton_rows_kernels import (
    backward,
    backward_long,
    forward,
    forward_long,
    reduce,
)

__all__ = ["available", "interpreted", "rows_backward", "rows_forward"]

WHOLE_FORWARD = 16384  # the longest row kept in registers
WHOLE_BACKWARD = {4: 4096, 2: 8192}  # by bytes per element: two inputs, two sums, the row after
LONG_TILE = 4096
REDUCE_TILE = 8192
MOST_WARPS = 16 if torch.version.hip else 32  # 1024 threads: AMD's warps are twice as wide
WARPS_PER_SM = 16  # each with a row at work and the next on its way: past what the memory needs


class Plan(NamedTuple):
    """The tile of a kernel, and whether a row is walked over in blocks."""

    R: int
    N: int
    warps: int
    long: bool


@functools.cache
def forward_plan(dim: int, itemsize: int) -> Plan:
    """64 bytes for each thread, in as many rows as that takes up to one warp."""
    N = max(16, power_of_two(dim))
    if N > WHOLE_FORWARD:
        return Plan(1, LONG_TILE, 8, True)
    R = max(1, 64 // itemsize * 32 // N)
    return Plan(R, N, min(MOST_WARPS, max(1, R * N * itemsize // 2048)), False)


@functools.cache
def backward_plan(dim: int, itemsize: int) -> Plan:
    """One warp a row up to 1024 channels, so that no warp waits for another; 16 elements for each
    thread beyond. A long row is read twice, so as many at once as the L1 holds."""
    N = max(16, power_of_two(dim))
    if WHOLE_BACKWARD[itemsize] >= N:
        return Plan(max(1, 512 // N), N, 1 if N <= 1024 else N // 512, False)
    R = 4 if N <= 16384 else 2
    return Plan(R, LONG_TILE // R, 8, True)


@functools.cache
def grid(rows: int, plan: Plan, sms: int, *, per_sm: int, least: int) -> tuple[int, int]:
    """(programs, tiles for each): as many as run at once, of `least` rows or more where that keeps
    all SMs at work."""
    tiles = triton.cdiv(rows, plan.R)
    programs = min(tiles, sms * max(1, per_sm // plan.warps), max(sms, rows // least))
    steps = triton.cdiv(tiles, programs)
    return triton.cdiv(tiles, steps), steps


def _registers(itemsize: int, warps: int) -> dict[str, int]:
    """The limit of a thread's registers in the backward; an option of NVIDIA's compiler alone."""
    return {"maxnreg": 128} if itemsize == 2 and warps > 1 and not torch.version.hip else {}


def rows_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    kind: str,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(y, h, stats) for x [rows, C]: h = x + residual, or None without residual; stats float32,
    (mean, rstd) [2, rows] for kind "layer", (rstd) [1, rows] for "rms"."""
    rows, dim = x.shape
    layer = kind == "layer"
    y = torch.empty_like(x)
    h = None if residual is None else torch.empty_like(x)
    stats = torch.empty((1 + layer, rows), dtype=torch.float32, device=x.device)
    if not x.numel():
        return y, h, stats.fill_(float("nan"))
    plan = forward_plan(dim, x.element_size())
    programs, steps = grid(rows, plan, sm_count(x.device), per_sm=WARPS_PER_SM, least=1)
    kernel: Any = forward_long if plan.long else forward
    start(
        kernel,
        (programs, 1, 1),
        (x, residual, weight, bias, y, h, stats),
        (rows, steps, eps),
        {"LAYER": layer, "DIM": dim, "R": plan.R, "N": plan.N},
        device=x.device,
        options={"num_warps": plan.warps},
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
    """(dx, dweight, dbias), the last two summed in float32 and in the dtype of their parameter;
    None where not needed or absent."""
    rows, dim = h.shape
    dx = torch.empty_like(h) if needs[0] else None
    pairs = ((weight, needs[1]), (bias, needs[2]))
    out = [torch.empty_like(p) if p is not None and need else None for p, need in pairs]
    sums = [x is not None for x in out]
    if not h.numel() or not (needs[0] or any(sums)):
        dweight, dbias = (x if x is None else x.zero_() for x in out)
        return dx, dweight, dbias
    plan = backward_plan(dim, h.element_size())
    programs, steps = grid(rows, plan, sm_count(h.device), per_sm=WARPS_PER_SM, least=16)
    parts = h.new_empty((sum(sums), programs, dim), dtype=torch.float32)
    own = iter(parts)
    kernel: Any = backward_long if plan.long else backward
    start(
        kernel,
        (programs, 1, 1),
        (dy, dh, h, stats, weight, dx, *(next(own) if need else None for need in sums)),
        (rows, steps),
        {"LAYER": kind == "layer", "DIM": dim, "R": plan.R, "N": plan.N},
        device=h.device,
        options={"num_warps": plan.warps, **_registers(h.element_size(), plan.warps)},
    )
    if any(sums):
        wanted = [x for x in out if x is not None]
        P = min(512, power_of_two(programs))
        N = min(REDUCE_TILE // P, max(16, power_of_two(dim)))
        start(
            reduce,
            (triton.cdiv(dim, N), len(wanted), 1),
            (parts, wanted[0], wanted[1] if len(wanted) == 2 else None),
            (programs,),
            {"DIM": dim, "P": P, "N": N},
            device=h.device,
            options={"num_warps": 8},
        )
    return dx, out[0], out[1]
