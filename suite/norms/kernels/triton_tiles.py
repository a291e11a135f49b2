"""The Triton kernels of the point-wise norms: forward, backward, and the sum of its parts.

A program has a tile of rows x columns of [planes, rows, width]. Channels last, that is one plane of
positions x channels, and the parameters lie along the columns; channels first, outer planes of
channels x positions, and they lie along the rows.

The backward is made for its sums over positions. A program keeps to its channels and walks over
every `groups`-th tile with one sum per element of a tile in registers, so the walk has neither
barrier nor shuffle; weight and alpha are constants of a channel and multiplied outside of it. The
next tile is read before the present one is written, as the compiler cannot know that they differ.
Then each program writes its part of each sum once, and a second kernel adds the parts in one fixed
order: no atomics, so two runs agree to the bit.

Offsets: where a tile starts is counted in 64 bits, inside of a tile in 32 bits unless it reaches
2^31 elements from its start (WIDE). So any size is safe, and nothing is paid for it.

What is absent is passed as None, which is compiled out. Kernels have as many parameters as they
have; a structure of them would be taken apart at every launch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(  # type: ignore[no-untyped-def]
    plane,
    row,
    column,
    planes,
    rows,
    width,
    FIRST: tl.constexpr,
    EVEN: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Where a tile begins, in elements and 64 bits, and which of its elements exist.

    EVEN: the column blocks divide the width.
    """
    row = row.to(tl.int64)
    at = (plane.to(tl.int64) * rows + row) * width + column
    left = tl.minimum(rows - row, BR).to(tl.int32)
    if FIRST:
        left = tl.where(plane < planes, left, 0)
    inside = tl.broadcast_to(tl.arange(0, BR)[:, None] < left, [BR, BC])
    if not EVEN:
        inside = inside & (tl.arange(0, BC)[None, :] < width - column)
    return at, inside


@triton.jit
def _offsets(width, WIDE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the elements of a tile [BR, BC] from its first."""
    r = tl.arange(0, BR)[:, None]
    if WIDE:
        r = r.to(tl.int64)
    return r * width + tl.arange(0, BC)[None, :]


@triton.jit
def _channels(block, dim, FIRST: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):  # type: ignore[no-untyped-def]
    """The channels of a tile, as a column where they come first, and whether they exist."""
    if FIRST:
        channel = (block * BR + tl.arange(0, BR))[:, None]
    else:
        channel = (block * BC + tl.arange(0, BC))[None, :]
    return channel, channel < dim


@triton.jit
def _parameter(p, channel, exists, PER_CHANNEL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Its values in float32; 1 for an absent one, which the compiler folds away."""
    if p is None:
        found = 1.0
    elif PER_CHANNEL:
        found = tl.load(p + channel, mask=exists, other=0.0).to(tl.float32)
    else:
        found = tl.load(p).to(tl.float32)
    return found


@triton.jit(do_not_specialize=["planes", "rows", "units", "blocks"])
def forward_kernel(  # type: ignore[no-untyped-def]
    x,
    residual,
    alpha,
    shift,
    weight,
    bias,
    y,
    h,
    planes,
    rows,
    units,
    blocks,
    F: tl.constexpr,
    ALPHAS: tl.constexpr,
    SHIFTS: tl.constexpr,
    FIRST: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """blocks: of rows, in a plane. width = units * UNIT, so that the compiler knows a divisor."""
    width = units * UNIT
    dim = rows if FIRST else width
    column_block = tl.program_id(0)
    row_block = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    plane = row_block * 0
    if FIRST:
        plane = row_block // blocks
        row_block -= plane * blocks
    column = column_block * BC
    at, inside = _place(
        plane, row_block.to(tl.int64) * BR, column, planes, rows, width, FIRST, EVEN, BR, BC
    )
    tile = _offsets(width, WIDE, BR, BC)
    x_RC = tl.load(x + at + tile, mask=inside, other=0.0)
    if residual is not None:
        other_RC = tl.load(residual + at + tile, mask=inside, other=0.0)
        x_RC = (x_RC.to(tl.float32) + other_RC.to(tl.float32)).to(x_RC.dtype)
        tl.store(h + at + tile, x_RC, mask=inside)
    channel, exists = _channels(row_block if FIRST else column_block, dim, FIRST, BR, BC)
    u = x_RC.to(tl.float32)
    if alpha is not None:
        u = u * _parameter(alpha, channel, exists, ALPHAS)
    if shift is not None:
        u = u + _parameter(shift, channel, exists, SHIFTS)
    found, _ = F(u, dim)
    if weight is not None:
        found = found * _parameter(weight, channel, exists, True)
    if bias is not None:
        found = found + _parameter(bias, channel, exists, True)
    tl.store(y + at + tile, found.to(x_RC.dtype), mask=inside)


@triton.jit
def _walk(  # type: ignore[no-untyped-def]
    t,
    block,
    planes,
    rows,
    width,
    along,
    FIRST: tl.constexpr,
    EVEN: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Tile t of those with the channels of `block`. along: how many of them a plane has."""
    plane = t * 0
    row = t.to(tl.int64) * BR
    column = block * BC
    if FIRST:
        plane = t // along
        row = (block * BR).to(tl.int64)
        column = (t - plane * along) * BC
    return _place(plane, row, column, planes, rows, width, FIRST, EVEN, BR, BC)


@triton.jit
def _of_thread(x_RC, BR: tl.constexpr, BC: tl.constexpr, LANE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums over LANE neighbouring columns, which a thread holds: one register instead of LANE."""
    return tl.sum(tl.reshape(x_RC, [BR, BC // LANE, LANE]), axis=2)


@triton.jit
def _keep_sum(  # type: ignore[no-untyped-def]
    part,
    sum_RC,
    group,
    groups,
    block,
    blocks,
    channel,
    exists,
    dim,
    PER_CHANNEL: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Write a program's part of a sum; returns where the parts of the next sum begin."""
    if PER_CHANNEL:
        found = tl.sum(sum_RC, axis=1 if FIRST else 0, keep_dims=True)
        tl.store(part + group * dim + channel, found, mask=exists)
        after = part + groups * dim
    else:
        tl.store(part + group * blocks + block, tl.sum(tl.sum(sum_RC, axis=1), axis=0))
        after = part + groups * blocks
    return after


@triton.jit(do_not_specialize=["planes", "rows", "units", "blocks", "along", "steps", "groups"])
def backward_kernel(  # type: ignore[no-untyped-def]
    dy,
    dh,
    h,
    alpha,
    shift,
    weight,
    dx,
    parts,
    planes,
    rows,
    units,
    blocks,
    along,
    steps,
    groups,
    F: tl.constexpr,
    ALPHAS: tl.constexpr,
    SHIFTS: tl.constexpr,
    DALPHA: tl.constexpr,
    DSHIFT: tl.constexpr,
    DWEIGHT: tl.constexpr,
    DBIAS: tl.constexpr,
    FIRST: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """blocks: of channels. Group g of `groups` does tiles g, g + groups, ... of `steps`."""
    width = units * UNIT
    dim = rows if FIRST else width
    block, group = tl.program_id(0), tl.program_id(1)
    channel, exists = _channels(block, dim, FIRST, BR, BC)
    a = _parameter(alpha, channel, exists, ALPHAS)
    s = _parameter(shift, channel, exists, SHIFTS)
    w = _parameter(weight, channel, exists, True)
    # at most what a thread reads at once
    LANE: tl.constexpr = min(min(BC, UNIT), 128 // h.dtype.element_ty.primitive_bitwidth)
    dalpha = tl.zeros([BR, BC if ALPHAS else BC // LANE], tl.float32)
    dshift = tl.zeros([BR, BC if SHIFTS else BC // LANE], tl.float32)
    dweight_RC = tl.zeros([BR, BC], tl.float32)
    dbias_RC = tl.zeros([BR, BC], tl.float32)
    tile = _offsets(width, WIDE, BR, BC)
    at, inside = _walk(group, block, planes, rows, width, along, FIRST, EVEN, BR, BC)
    h_RC = tl.load(h + at + tile, mask=inside, other=0.0)
    dy_RC = tl.load(dy + at + tile, mask=inside, other=0.0)
    dh_RC = dy_RC
    if dh is not None:
        dh_RC = tl.load(dh + at + tile, mask=inside, other=0.0)
    for t in range(group, steps, groups):
        after = t + groups
        at2, inside2 = _walk(after, block, planes, rows, width, along, FIRST, EVEN, BR, BC)
        h2_RC = tl.load(h + at2 + tile, mask=inside2, other=0.0)
        dy2_RC = tl.load(dy + at2 + tile, mask=inside2, other=0.0)
        dh2_RC = dy2_RC
        if dh is not None:
            dh2_RC = tl.load(dh + at2 + tile, mask=inside2, other=0.0)
        x = h_RC.to(tl.float32)
        g = dy_RC.to(tl.float32)
        u = x
        if alpha is not None:
            u = u * a
        if shift is not None:
            u = u + s
        f, slope = F(u, dim)
        du = g * slope
        if weight is not None:
            du = du * w
        if dx is not None:
            found = du * a
            if dh is not None:
                found += dh_RC.to(tl.float32)
            tl.store(dx + at + tile, found.to(h_RC.dtype), mask=inside)
        if DALPHA:
            dalpha += du * x if ALPHAS else _of_thread(du * x, BR, BC, LANE)
        if DSHIFT:
            dshift += du if SHIFTS else _of_thread(du, BR, BC, LANE)
        if DWEIGHT:
            dweight_RC += g * f
        if DBIAS:
            dbias_RC += g
        at, inside, h_RC, dy_RC, dh_RC = at2, inside2, h2_RC, dy2_RC, dh2_RC
    part = parts
    if DWEIGHT:
        part = _keep_sum(
            part, dweight_RC, group, groups, block, blocks, channel, exists, dim, True, FIRST
        )
    if DBIAS:
        part = _keep_sum(
            part, dbias_RC, group, groups, block, blocks, channel, exists, dim, True, FIRST
        )
    if DALPHA:
        part = _keep_sum(
            part, dalpha, group, groups, block, blocks, channel, exists, dim, ALPHAS, FIRST
        )
    if DSHIFT:
        _keep_sum(part, dshift, group, groups, block, blocks, channel, exists, dim, SHIFTS, FIRST)


@triton.jit
def _add(  # type: ignore[no-untyped-def]
    part,
    out,
    groups,
    dim,
    blocks,
    PER_CHANNEL: tl.constexpr,
    SR: tl.constexpr,
    SC: tl.constexpr,
):
    """Add the parts of one sum, of the columns of this program, or of all by its first program."""
    width = dim if PER_CHANNEL else blocks * groups
    if PER_CHANNEL:
        column = tl.program_id(0) * SC + tl.arange(0, SC)[None, :]
        sum_RC = tl.zeros([SR, SC], tl.float32)
        for first in range(0, groups, SR):
            r = first + tl.arange(0, SR)[:, None]
            sum_RC += tl.load(
                part + r * dim + column, mask=(r < groups) & (column < dim), other=0.0
            )
        found = tl.sum(sum_RC, axis=0, keep_dims=True)
        tl.store(out + column, found.to(out.dtype.element_ty), mask=column < dim)
    elif tl.program_id(0) == 0:
        sum_R = tl.zeros([SR * SC], tl.float32)
        for first in range(0, width, SR * SC):
            r = first + tl.arange(0, SR * SC)
            sum_R += tl.load(part + r, mask=r < width, other=0.0)
        tl.store(out, tl.sum(sum_R, axis=0).to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["groups", "dim", "blocks"])
def reduce_kernel(  # type: ignore[no-untyped-def]
    parts,
    dalpha,
    dshift,
    dweight,
    dbias,
    groups,
    dim,
    blocks,
    ALPHAS: tl.constexpr,
    SHIFTS: tl.constexpr,
    SR: tl.constexpr,
    SC: tl.constexpr,
):
    """The four sums, one a row of programs, in the order in which backward_kernel wrote them."""
    which = tl.program_id(1)
    part = parts
    if dweight is not None:
        if which == 0:
            _add(part, dweight, groups, dim, blocks, True, SR, SC)
        part += groups * dim
    if dbias is not None:
        if which == 1:
            _add(part, dbias, groups, dim, blocks, True, SR, SC)
        part += groups * dim
    if dalpha is not None:
        if which == 2:
            _add(part, dalpha, groups, dim, blocks, ALPHAS, SR, SC)
        part += groups * (dim if ALPHAS else blocks)
    if dshift is not None:  # noqa: SIM102
        if which == 3:
            _add(part, dshift, groups, dim, blocks, SHIFTS, SR, SC)
