"""The Triton kernels of LayerNorm and RMSNorm, over rows that fit registers and over longer ones.

A row that fits is read once; LayerNorm takes the mean first and then the variance of the
deviations. A longer one is walked over in blocks by Welford's method and read again, from the L2,
for the output. Each program walks over a fixed set of rows and loads the next while it works on
one. The backward adds up the columns of dweight and dbias in registers and writes them once for
each program; where a row is too long for that its sums stay in the program's own part of memory,
which the L2 holds. `reduce` adds those of all programs in a fixed order.

DIM is compiled in: it decides the width of the accesses (16 bytes where it is divisible by 8 at two
bytes an element), and a model has few. An argument that is None is compiled out.

Names: R rows and N columns of a tile, P programs.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mean_square(x, inside, DIM: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mean of x^2 over each row of a tile [R, N]; columns outside do not count."""
    square = x * x
    if N != DIM:
        square = tl.where(inside, square, 0.0)
    return tl.sum(square, axis=1) / DIM


@triton.jit
def _inverse_root(mean_square, eps):  # type: ignore[no-untyped-def]
    return tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))


@triton.jit
def _load(x, row, rows, col, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows [R] and columns [N] of x [rows, DIM] as they lie in memory, 0 outside of it."""
    inside = (row < rows)[:, None] & (col < DIM)[None, :]
    return tl.load(x + row[:, None] * DIM + col[None, :], mask=inside, other=0.0)


@triton.jit
def _per_column(x, col, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """A parameter's columns, [1, N]: a tile of its own, which needs no exchange of lanes after."""
    return tl.load(x + col[None, :], mask=(col < DIM)[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "steps"])
def forward(  # type: ignore[no-untyped-def]
    x,
    residual,
    weight,
    bias,
    y,
    h,
    stats,
    rows,
    steps,
    eps,
    LAYER: tl.constexpr,
    DIM: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
):
    """Tiles of whole rows, `steps` for each program, of which the last may be beyond the end."""
    col = tl.arange(0, N)
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    x_next = _load(x, row, rows, col, DIM)
    added_next = x_next
    if residual is not None:
        added_next = _load(residual, row, rows, col, DIM)
    for _ in range(steps):
        z, added = x_next.to(tl.float32), added_next
        at = row[:, None] * DIM + col[None, :]
        row_in = row < rows
        inside = row_in[:, None] & (col < DIM)[None, :]
        stats_at = stats + row
        row += tl.num_programs(0).to(tl.int64) * R
        x_next = _load(x, row, rows, col, DIM)
        if residual is not None:
            added_next = _load(residual, row, rows, col, DIM)
            added = (z + added.to(tl.float32)).to(h.dtype.element_ty)
            tl.store(h + at, added, mask=inside)
            z = added.to(tl.float32)
        if LAYER:
            mean = tl.sum(z, axis=1) / DIM
            z -= mean[:, None]
            tl.store(stats_at, mean, mask=row_in)
            stats_at += rows
        rstd = _inverse_root(_mean_square(z, inside, DIM, N), eps)
        tl.store(stats_at, rstd, mask=row_in)
        z *= rstd[:, None]
        if weight is not None:
            z *= _per_column(weight, col, DIM)
        if bias is not None:
            z += _per_column(bias, col, DIM)
        tl.store(y + at, z.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "steps"])
def forward_long(  # type: ignore[no-untyped-def]
    x,
    residual,
    weight,
    bias,
    y,
    h,
    stats,
    rows,
    steps,
    eps,
    LAYER: tl.constexpr,
    DIM: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
):
    """Rows (R = 1) in blocks: Welford's moments in every lane, then those of all lanes together."""
    row = tl.program_id(0).to(tl.int64)
    for _ in range(steps):
        row_in = row < rows
        mean_N, square_N = tl.zeros([N], tl.float32), tl.zeros([N], tl.float32)
        count_N = tl.zeros([N], tl.float32)
        for block in range(0, DIM, N):
            col = block + tl.arange(0, N)
            inside = (col < DIM) & row_in
            z = tl.load(x + row * DIM + col, mask=inside, other=0.0).to(tl.float32)
            if residual is not None:
                z += tl.load(residual + row * DIM + col, mask=inside, other=0.0).to(tl.float32)
                added = z.to(h.dtype.element_ty)
                tl.store(h + row * DIM + col, added, mask=inside)
                z = added.to(tl.float32)
            if LAYER:
                count_N += tl.where(inside, 1.0, 0.0)
                away = z - mean_N
                mean_N += tl.where(inside, away / tl.maximum(count_N, 1.0), 0.0)
                square_N += tl.where(inside, away * (z - mean_N), 0.0)
            else:
                square_N += z * z
        mean = tl.sum(mean_N * count_N, axis=0) / DIM
        stats_at = stats + row
        if LAYER:
            away = mean_N - mean
            square_N += count_N * away * away
            tl.store(stats_at, mean, mask=row_in)
            stats_at += rows
        rstd = _inverse_root(tl.sum(square_N, axis=0) / DIM, eps)
        tl.store(stats_at, rstd, mask=row_in)
        if residual is not None:
            tl.debug_barrier()  # another thread may have stored what this one loads
        for block in range(0, DIM, N):
            col = block + tl.arange(0, N)
            inside = (col < DIM) & row_in
            again = x if residual is None else h
            z = tl.load(again + row * DIM + col, mask=inside, other=0.0).to(tl.float32)
            if LAYER:
                z -= mean
            z *= rstd
            if weight is not None:
                z *= tl.load(weight + col, mask=inside, other=0.0).to(tl.float32)
            if bias is not None:
                z += tl.load(bias + col, mask=inside, other=0.0).to(tl.float32)
            tl.store(y + row * DIM + col, z.to(y.dtype.element_ty), mask=inside)
        row += tl.num_programs(0)


@triton.jit
def _row_stats(stats, row, rows, LAYER: tl.constexpr):  # type: ignore[no-untyped-def]
    """(mean, rstd) of rows [R]; 0 outside, so that such a row adds nothing."""
    inside = row < rows
    if LAYER:
        mean = tl.load(stats + row, mask=inside, other=0.0)
        return mean, tl.load(stats + rows + row, mask=inside, other=0.0)
    rstd = tl.load(stats + row, mask=inside, other=0.0)
    return tl.zeros_like(rstd), rstd


@triton.jit(do_not_specialize=["rows", "steps"])
def backward(  # type: ignore[no-untyped-def]
    dy,
    dh,
    h,
    stats,
    weight,
    dx,
    dweight,
    dbias,
    rows,
    steps,
    LAYER: tl.constexpr,
    DIM: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
):
    """Tiles of whole rows, `steps` for each program, of which the last may be beyond the end."""
    col = tl.arange(0, N)
    col_in = col < DIM
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    stride = tl.num_programs(0).to(tl.int64) * R
    dweight_RN, dbias_RN = tl.zeros([R, N], tl.float32), tl.zeros([R, N], tl.float32)
    if weight is not None and R > 1:
        weight_N = _per_column(weight, col, DIM)
    h_next, dy_next = _load(h, row, rows, col, DIM), _load(dy, row, rows, col, DIM)
    for _ in range(steps):
        mean, rstd = _row_stats(stats, row, rows, LAYER)
        z, g = h_next.to(tl.float32), dy_next.to(tl.float32)
        if dh is not None:
            past = _load(dh, row, rows, col, DIM)
        at = row[:, None] * DIM + col[None, :]
        inside = (row < rows)[:, None] & col_in[None, :]
        row += stride
        h_next, dy_next = _load(h, row, rows, col, DIM), _load(dy, row, rows, col, DIM)
        z = (z - mean[:, None]) * rstd[:, None]
        if dweight is not None:
            dweight_RN += g * z
        if dbias is not None:
            dbias_RN += g
        if dx is not None:
            if weight is not None:
                if R == 1:  # from the L1 each time, which spares registers
                    weight_N = _per_column(weight, col, DIM)
                g *= weight_N
            # g is 0 outside, so what z is there does not count
            away = g - z * (tl.sum(g * z, axis=1) / DIM)[:, None]
            if LAYER:
                away -= (tl.sum(g, axis=1) / DIM)[:, None]
            away *= rstd[:, None]
            if dh is not None:
                away += past.to(tl.float32)
            tl.store(dx + at, away.to(dx.dtype.element_ty), mask=inside)
    part = tl.program_id(0).to(tl.int64) * DIM + col
    if dweight is not None:
        tl.store(dweight + part, tl.sum(dweight_RN, axis=0), mask=col_in)
    if dbias is not None:
        tl.store(dbias + part, tl.sum(dbias_RN, axis=0), mask=col_in)


@triton.jit
def _add_columns(sums, part, x_RN, col_in, first):  # type: ignore[no-untyped-def]
    """A tile's column sums on top of the program's own, which begin with its first tile."""
    x_N = tl.sum(x_RN, axis=0)
    before = tl.load(sums + part, mask=col_in & (first == 0), other=0.0)
    tl.store(sums + part, before + x_N, mask=col_in)


@triton.jit(do_not_specialize=["rows", "steps"])
def backward_long(  # type: ignore[no-untyped-def]
    dy,
    dh,
    h,
    stats,
    weight,
    dx,
    dweight,
    dbias,
    rows,
    steps,
    LAYER: tl.constexpr,
    DIM: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
):
    """The same in blocks of N columns: R rows are read for their two means, then again for dx."""
    own = tl.program_id(0).to(tl.int64)
    row = own * R + tl.arange(0, R)
    for step in range(steps):
        mean, rstd = _row_stats(stats, row, rows, LAYER)
        along, plain = tl.zeros([R, N], tl.float32), tl.zeros([R, N], tl.float32)
        if dx is not None:
            for block in range(0, DIM, N):
                col = block + tl.arange(0, N)
                g = _load(dy, row, rows, col, DIM).to(tl.float32)
                if weight is not None:
                    g *= _per_column(weight, col, DIM)
                along += g * (_load(h, row, rows, col, DIM).to(tl.float32) - mean[:, None])
                plain += g
        along_R = tl.sum(along, axis=1) * rstd / DIM
        plain_R = tl.sum(plain, axis=1) / DIM
        for block in range(0, DIM, N):
            col = block + tl.arange(0, N)
            col_in = col < DIM
            g = _load(dy, row, rows, col, DIM).to(tl.float32)
            z = (_load(h, row, rows, col, DIM).to(tl.float32) - mean[:, None]) * rstd[:, None]
            if dweight is not None:
                _add_columns(dweight, own * DIM + col, g * z, col_in, step == 0)
            if dbias is not None:
                _add_columns(dbias, own * DIM + col, g, col_in, step == 0)
            if dx is not None:
                if weight is not None:
                    g *= _per_column(weight, col, DIM)
                away = g - z * along_R[:, None]
                if LAYER:
                    away -= plain_R[:, None]
                away *= rstd[:, None]
                if dh is not None:
                    away += _load(dh, row, rows, col, DIM).to(tl.float32)
                inside = (row < rows)[:, None] & col_in[None, :]
                at = row[:, None] * DIM + col[None, :]
                tl.store(dx + at, away.to(dx.dtype.element_ty), mask=inside)
        row += tl.num_programs(0).to(tl.int64) * R
        tl.debug_barrier()  # another thread may have stored the sums that this one loads next


@triton.jit(do_not_specialize=["programs"])
def reduce(  # type: ignore[no-untyped-def]
    parts, first, second, programs, DIM: tl.constexpr, P: tl.constexpr, N: tl.constexpr
):
    """parts [1 or 2, programs, DIM] -> their sums over programs, in `first` and `second`."""
    which = tl.program_id(1)
    col = tl.program_id(0) * N + tl.arange(0, N)
    parts += which.to(tl.int64) * programs * DIM
    total = tl.zeros([P, N], tl.float32)
    for block in range(0, programs, P):
        part = block + tl.arange(0, P)
        inside = (part < programs)[:, None] & (col < DIM)[None, :]
        at = part.to(tl.int64)[:, None] * DIM + col[None, :]
        total += tl.load(parts + at, mask=inside, other=0.0)
    total_N = tl.sum(total, axis=0)
    if which == 0:
        tl.store(first + col, total_N.to(first.dtype.element_ty), mask=col < DIM)
    elif second is not None:
        tl.store(second + col, total_N.to(second.dtype.element_ty), mask=col < DIM)
