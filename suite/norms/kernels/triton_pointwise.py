"""y = weight * f(alpha * x + shift) + bias in Triton for NVIDIA GPUs: tiles, launches, gradients.

Such a norm is bound by memory: 4 bytes an element forward and 6 backward in bfloat16, as for a
LayerNorm. So x is read once, 16 bytes at a time, and it is all that the backward needs: f is
computed again. The kernels are in triton_tiles.py, f and f' in triton_functions.py.

Sizes come from the shape and the number of multiprocessors alone: nothing is tuned at run time. A
block of columns divides the width where it can (768 = 3 x 256), so that few lanes idle.

At small shapes the host decides how fast it is, so what depends on the shape is remembered and
nothing is computed on the way but that. On an H100 the forward takes a copy's time and the backward
1.1 times what its bytes take at a copy's rate (docs/performance.md).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from suite.norms.kernels.triton_functions import TRITON_FUNCTIONS
from suite.norms.kernels.triton_launch import available, power_of_two, sm_count, start
from suite.norms.kernels.triton_tiles import backward_kernel, forward_kernel, reduce_kernel

__all__ = ["available", "pointwise_backward", "pointwise_forward"]

WARPS = 4
FORWARD_ELEMENTS = 32  # of a thread where that still gives every multiprocessor its programs
ELEMENTS = 8  # of a thread else: 16 bytes of bfloat16
BACKWARD_ELEMENTS = 16  # 8 have too little on the way: 5 to 15 % slower on an H100
PROGRAMS = 4  # of the forward on a multiprocessor, at least, for large tiles
WALKS = {2: 3, 4: 2}  # programs of the backward on a multiprocessor, by bytes of an element
REGISTERS = 65536  # of a multiprocessor
MOST_REGISTERS = 255  # of a thread
SUM_TILE = {"SR": 64, "SC": 32}  # of the kernel that adds the parts
GRID_LIMIT = 65535  # of the second and third axis


class Tiles(NamedTuple):
    """How [planes, rows, width] is cut into tiles [BR, BC]; everything a launch needs of a shape.

    units: width / UNIT. blocks: of rows and of columns, in a plane. flags: what is compiled in.
    """

    planes: int
    rows: int
    width: int
    units: int
    blocks: tuple[int, int]
    grid: tuple[int, int, int]
    flags: dict[str, Any]


class Walk(NamedTuple):
    """How the backward goes over the tiles: `blocks` of channels, `groups` of programs for each.

    along: tiles of a walk in a plane. steps: tiles of all walks over the same channels. programs:
    on a multiprocessor.
    """

    cut: Tiles
    blocks: int
    along: int
    steps: int
    groups: int
    programs: int


def _columns(width: int) -> int:
    """Columns of a tile: as many as 256, but at most an eighth more idle lanes than need be."""
    if width < 32:
        return power_of_two(width)
    padded = {columns: -(-width // columns) * columns for columns in (256, 128, 64, 32)}
    least = min(padded.values())
    return next(columns for columns, room in padded.items() if 8 * room <= 9 * least)


def tiles(numel: int, dim: int, inner: int, *, elements: int) -> Tiles:
    """The tiles of a contiguous tensor [numel / (dim inner), dim, inner], `elements` a thread."""
    first = inner > 1
    planes, rows, width = (numel // (dim * inner), dim, inner) if first else (1, numel // dim, dim)
    tile = 32 * WARPS * elements
    columns = _columns(width)
    tall = min(tile // columns, power_of_two(rows))
    while 2 * tall * columns <= tile and columns < width:
        columns *= 2
    blocks = -(-rows // tall), -(-width // columns)
    unit = min(width & -width, 16)  # a power of two that the compiler may count on
    flags = {
        "FIRST": first,
        "UNIT": unit,
        "EVEN": width % columns == 0,
        "WIDE": tall * width >= 2**31,
        "BR": tall,
        "BC": columns,
    }
    down = planes * blocks[0]
    low = min(down, GRID_LIMIT)
    grid = (blocks[1], low, -(-down // low))
    return Tiles(planes, rows, width, width // unit, blocks, grid, flags)


@lru_cache(maxsize=1024)
def forward_plan(numel: int, dim: int, inner: int, multiprocessors: int) -> Tiles:
    """Large tiles where they still make enough programs for the device."""
    large = numel >= 32 * WARPS * FORWARD_ELEMENTS * PROGRAMS * multiprocessors
    return tiles(numel, dim, inner, elements=FORWARD_ELEMENTS if large else ELEMENTS)


@lru_cache(maxsize=1024)
def walk_plan(numel: int, dim: int, inner: int, itemsize: int, multiprocessors: int) -> Walk:
    """As many programs as are resident at once, or fewer if the tiles are fewer."""
    cut, programs = tiles(numel, dim, inner, elements=BACKWARD_ELEMENTS), WALKS[itemsize]
    down, across = cut.blocks
    blocks, along = (down, across) if inner > 1 else (across, down)
    steps = cut.planes * along
    groups = max(1, min(steps, programs * multiprocessors // blocks))
    return Walk(cut, blocks, along, steps, groups, programs)


def _registers(programs: int) -> dict[str, int]:
    """The limit of a thread's registers with which `programs` are resident on a multiprocessor; an
    option of NVIDIA's compiler alone."""
    most = REGISTERS // (32 * WARPS * programs) // 8 * 8
    return {"maxnreg": most} if most <= MOST_REGISTERS and not torch.version.hip else {}


def _per_channel(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.numel() > 1


def pointwise_forward(
    x: Tensor,
    residual: Tensor | None,
    alpha: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    function: str,
    dim: int,
    inner: int,
) -> tuple[Tensor, Tensor | None]:
    """(y, h) for contiguous x [outer, dim, inner]: h = x + residual in x's dtype, or None.

    y = weight * f(alpha * h + shift) + bias in float32, rounded once.
    """
    y = torch.empty_like(x)
    h = None if residual is None else torch.empty_like(x)
    if x.numel() == 0:
        return y, h
    cut = forward_plan(x.numel(), dim, inner, sm_count(x.device))
    start(
        forward_kernel,
        cut.grid,
        (x, residual, alpha, shift, weight, bias, y, h),
        (cut.planes, cut.rows, cut.units, cut.blocks[0]),
        {
            "F": TRITON_FUNCTIONS[function],
            "ALPHAS": _per_channel(alpha),
            "SHIFTS": _per_channel(shift),
            **cut.flags,
        },
        device=x.device,
        options={"num_warps": WARPS},
    )
    return y, h


def pointwise_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    alpha: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    function: str,
    dim: int,
    inner: int,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of (h, alpha, shift, weight, bias); None where not needed or absent.

    dh is what arrives at h from elsewhere and is added to dx. The others are summed in float32, in
    one fixed order, and rounded to their parameter's dtype.
    """
    dx = torch.empty_like(h) if needs[0] else None
    parameters = (alpha, shift, weight, bias)
    room = torch.zeros_like if h.numel() == 0 else torch.empty_like
    sums = [
        room(p) if need and p is not None else None
        for p, need in zip(parameters, needs[1:], strict=True)
    ]
    summed = any(found is not None for found in sums)
    if h.numel() == 0 or (dx is None and not summed):
        return dx, *sums
    walk = walk_plan(h.numel(), dim, inner, h.element_size(), sm_count(h.device))
    cut, alphas, shifts = walk.cut, _per_channel(alpha), _per_channel(shift)
    size = sum(walk.blocks if p.numel() == 1 else dim for p in sums if p is not None)
    parts = h.new_empty(walk.groups * size, dtype=torch.float32) if summed else None
    start(
        backward_kernel,
        (walk.blocks, walk.groups, 1),
        (dy, dh, h, alpha, shift, weight, dx, parts),
        (cut.planes, cut.rows, cut.units, walk.blocks, walk.along, walk.steps, walk.groups),
        {
            "F": TRITON_FUNCTIONS[function],
            "ALPHAS": alphas,
            "SHIFTS": shifts,
            "DALPHA": sums[0] is not None,
            "DSHIFT": sums[1] is not None,
            "DWEIGHT": sums[2] is not None,
            "DBIAS": sums[3] is not None,
            **cut.flags,
        },
        device=h.device,
        options={"num_warps": WARPS, **_registers(walk.programs)},
    )
    if summed:
        start(
            reduce_kernel,
            (-(-dim // SUM_TILE["SC"]), 4, 1),
            (parts, *sums),
            (walk.groups, dim, walk.blocks),
            {"ALPHAS": alphas, "SHIFTS": shifts, **SUM_TILE},
            device=h.device,
            options={"num_warps": WARPS},
        )
    return dx, *sums
