"""The selective scan as a Triton kernel for NVIDIA GPUs, with a backward that recomputes.

One program has a sequence and BLOCK_D channels and takes the positions in chunks of BLOCK_L. In a
chunk it does the N states one after the other, each by an associative scan over the positions,
while the states that go on to the next chunk stay in registers. What would be N times the size of
the input is never in memory: softplus, bias, mask, D and gate are done on the way, and only the
state that enters each chunk is kept. The backward starts from those, last chunk first, and runs the
adjoint g_t = C_t dy_t + a_{t+1} g_{t+1} as a scan from the end. What bounds such a kernel are the
exponentials, one per position, channel and state, so they are exp2 with the factor in A; the
backward computes a second one for a_{t+1}, which spares it a shift across threads.

It is deterministic: no atomics. Gradients of A, D and the bias are summed per sequence and those
of B and C per block of channels, then added in one fixed order. `reverse` is index arithmetic.
Sums are float32; float64 is refused. Right in Triton's interpreter and on an H100; not
yet timed there.

Shapes: B sequences, L positions, D channels, N states, K chunks.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tasks.dna.scan import Scan, check_first_order

BLOCK_L = 32
BLOCK_D = 32
WARPS = 4
LOG2E = tl.constexpr(1.4426950408889634)


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter (TRITON_INTERPRET=1 at the first import)."""
    return not isinstance(_forward, triton.runtime.JITFunction)


@triton.jit
def _after(a1, b1, a2, b2):  # type: ignore[no-untyped-def]
    """h -> a1 h + b1, then h -> a2 h + b2, as one map."""
    return a2 * a1, a2 * b1 + b2


@triton.jit
def _softplus(x):  # type: ignore[no-untyped-def]
    """log(1 + e), e = exp(x); by Kahan's quotient, as 1 + e loses the last digits of a small e."""
    e = tl.exp(tl.minimum(x, 20.0))
    w = 1.0 + e
    small = w == 1.0
    found = tl.where(small, e, tl.log(w) * (e / tl.where(small, 1.0, w - 1.0)))
    return tl.where(x > 20.0, x, found)


@triton.jit
def _positions(i, L, REVERSE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Place in the order of the recurrence -> position."""
    return L - 1 - i if REVERSE else i


@triton.jit
def _delta(delta, mask, row, at, inside, bias, SOFTPLUS: tl.constexpr, HAS_MASK: tl.constexpr):  # type: ignore[no-untyped-def]
    """delta before the softplus and as the recurrence takes it, 0 outside of the sequence."""
    raw = tl.load(delta + at, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
    found = _softplus(raw) if SOFTPLUS else raw
    keep = inside
    if HAS_MASK:
        seen = tl.load(mask + row)
        keep = inside & (seen[:, None] != 0)
    return raw, tl.where(keep, found, 0.0), keep


@triton.jit
def _row(x_ND, n, index_N):  # type: ignore[no-untyped-def]
    """Row n of a tensor in registers."""
    return tl.sum(tl.where(index_N[:, None] == n, x_ND, 0.0), axis=0)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    bias,
    mask,
    out,
    states,
    L,
    dim,
    N,
    K,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    KEEP: tl.constexpr,
    BL: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
):
    blocks = tl.cdiv(dim, BD)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    d_in = d < dim
    n_all = tl.arange(0, BN)
    nd_in = (n_all[:, None] < N) & d_in[None, :]
    A_ND = tl.load(A + d[None, :] * N + n_all[:, None], mask=nd_in, other=0.0) * LOG2E
    bias_D = tl.load(bias + d, mask=d_in, other=0.0) if HAS_BIAS else tl.zeros([BD], tl.float32)
    state = tl.zeros([BN, BD], tl.float32)
    t = tl.arange(0, BL)
    for k in range(K):
        i = k * BL + t
        t_in = i < L
        row = b * L + _positions(tl.where(t_in, i, 0), L, REVERSE)
        inside = t_in[:, None] & d_in[None, :]
        at = row[:, None] * dim + d[None, :]
        _, dt, keep = _delta(delta, mask, row, at, inside, bias_D, SOFTPLUS, HAS_MASK)
        u_LD = tl.load(u + at, mask=keep, other=0.0).to(tl.float32)
        x = dt * u_LD
        y = tl.zeros([BL, BD], tl.float32)
        if KEEP:
            place = ((b * K + k) * N + n_all[:, None]) * dim + d[None, :]
            tl.store(states + place, state, mask=nd_in)
        for n in range(N):
            B_L = tl.load(B + row * N + n, mask=t_in, other=0.0).to(tl.float32)
            C_L = tl.load(C + row * N + n, mask=t_in, other=0.0).to(tl.float32)
            a = tl.exp2(dt * _row(A_ND, n, n_all)[None, :])
            decay, h = tl.associative_scan((a, x * B_L[:, None]), 0, _after)
            h += decay * _row(state, n, n_all)[None, :]
            y += h * C_L[:, None]
            end = tl.sum(tl.where(t[:, None] == BL - 1, h, 0.0), axis=0)
            state = tl.where(n_all[:, None] == n, end[None, :], state)
        if HAS_D:
            y += u_LD * tl.load(D + d, mask=d_in, other=0.0)[None, :]
        if HAS_Z:
            z_LD = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
            y *= z_LD * tl.sigmoid(z_LD)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    bias,
    mask,
    dout,
    states,
    du,
    ddelta,
    dA,
    dB,
    dC,
    dD,
    dz,
    dbias,
    L,
    dim,
    N,
    K,
    batch,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BL: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
):
    blocks = tl.cdiv(dim, BD)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    d = block * BD + tl.arange(0, BD)
    d_in = d < dim
    n_all = tl.arange(0, BN)
    nd_in = (n_all[:, None] < N) & d_in[None, :]
    A_ND = tl.load(A + d[None, :] * N + n_all[:, None], mask=nd_in, other=0.0)
    bias_D = tl.load(bias + d, mask=d_in, other=0.0) if HAS_BIAS else tl.zeros([BD], tl.float32)
    D_D = tl.load(D + d, mask=d_in, other=0.0) if HAS_D else tl.zeros([BD], tl.float32)
    adjoint = tl.zeros([BN, BD], tl.float32)  # of the first state of the chunk after
    dA_ND = tl.zeros([BN, BD], tl.float32)
    dD_D = tl.zeros([BD], tl.float32)
    dbias_D = tl.zeros([BD], tl.float32)
    t = tl.arange(0, BL)
    for back in range(K):
        k = K - 1 - back
        i = k * BL + t
        t_in = i < L
        row = b * L + _positions(tl.where(t_in, i, 0), L, REVERSE)
        next_in = i + 1 < L
        next_row = b * L + _positions(tl.where(next_in, i + 1, 0), L, REVERSE)
        inside = t_in[:, None] & d_in[None, :]
        at = row[:, None] * dim + d[None, :]
        raw, dt, keep = _delta(delta, mask, row, at, inside, bias_D, SOFTPLUS, HAS_MASK)
        next_at = next_row[:, None] * dim + d[None, :]
        next_inside = next_in[:, None] & d_in[None, :]
        _, dt_next, _ = _delta(
            delta, mask, next_row, next_at, next_inside, bias_D, SOFTPLUS, HAS_MASK
        )
        u_LD = tl.load(u + at, mask=keep, other=0.0).to(tl.float32)
        x = dt * u_LD
        dout_LD = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
        dy = dout_LD
        z_LD = dout_LD
        gate = dout_LD
        if HAS_Z:
            z_LD = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
            gate = tl.sigmoid(z_LD)
            dy = dout_LD * z_LD * gate
        y = u_LD * D_D[None, :]
        dx = tl.zeros([BL, BD], tl.float32)
        ddt = tl.zeros([BL, BD], tl.float32)
        for n in range(N):
            B_L = tl.load(B + row * N + n, mask=t_in, other=0.0).to(tl.float32)
            C_L = tl.load(C + row * N + n, mask=t_in, other=0.0).to(tl.float32)
            A_D = _row(A_ND, n, n_all)
            a = tl.exp2(dt * (A_D * LOG2E)[None, :])
            a_next = tl.exp2(dt_next * (A_D * LOG2E)[None, :])
            entering = tl.load(states + ((b * K + k) * N + n) * dim + d, mask=d_in, other=0.0)
            new = x * B_L[:, None]
            decay, h = tl.associative_scan((a, new), 0, _after)
            h += decay * entering[None, :]
            decay, g = tl.associative_scan((a_next, dy * C_L[:, None]), 0, _after, reverse=True)
            g += decay * _row(adjoint, n, n_all)[None, :]
            start = tl.sum(tl.where(t[:, None] == 0, g, 0.0), axis=0)
            adjoint = tl.where(n_all[:, None] == n, start[None, :], adjoint)
            if HAS_Z:
                y += h * C_L[:, None]
            part = ((block.to(tl.int64) * batch + b) * L + row - b * L) * N + n
            tl.store(dC + part, tl.sum(h * dy, axis=1), mask=t_in)
            tl.store(dB + part, tl.sum(g * x, axis=1), mask=t_in)
            dx += g * B_L[:, None]
            q = g * (h - new)  # of the exponent delta_t A: a_t h_{t-1} = h_t - delta_t B_t u_t
            ddt += q * A_D[None, :]
            dA_D = tl.sum(q * dt, axis=0)
            dA_ND = tl.where(n_all[:, None] == n, dA_ND + dA_D[None, :], dA_ND)
        dD_D += tl.sum(dy * u_LD, axis=0)
        if HAS_Z:
            slope = gate * (1.0 + z_LD * (1.0 - gate))
            tl.store(dz + at, (dout_LD * y * slope).to(dz.dtype.element_ty), mask=inside)
        du_LD = tl.where(keep, dx * dt + dy * D_D[None, :], 0.0)
        ddt = tl.where(keep, ddt + dx * u_LD, 0.0)
        if SOFTPLUS:
            ddt *= tl.sigmoid(raw)
        dbias_D += tl.sum(ddt, axis=0)
        tl.store(du + at, du_LD.to(du.dtype.element_ty), mask=inside)
        tl.store(ddelta + at, ddt.to(ddelta.dtype.element_ty), mask=inside)
    tl.store(dA + (b * N + n_all[:, None]) * dim + d[None, :], dA_ND, mask=nd_in)
    tl.store(dD + b * dim + d, dD_D, mask=d_in)
    tl.store(dbias + b * dim + d, dbias_D, mask=d_in)


def sizes(scan: Scan) -> dict[str, int]:
    """The block sizes for a scan."""
    return {
        "BL": BLOCK_L,
        "BD": min(BLOCK_D, triton.next_power_of_2(scan.u.shape[2])),
        "BN": triton.next_power_of_2(scan.A.shape[1]),
    }


def flags(scan: Scan) -> dict[str, bool]:
    """What is compiled into the kernels."""
    return {
        "SOFTPLUS": scan.softplus,
        "REVERSE": scan.reverse,
        "HAS_D": scan.D is not None,
        "HAS_Z": scan.z is not None,
        "HAS_BIAS": scan.delta_bias is not None,
        "HAS_MASK": scan.mask is not None,
    }


def inputs(scan: Scan) -> tuple[Tensor, ...]:
    """What both kernels begin with. What a scan has not is never read, so u stands in for it."""
    full = [
        scan.u,
        scan.delta,
        scan.A.float(),
        scan.B,
        scan.C,
        scan.u if scan.D is None else scan.D.float(),
        scan.u if scan.z is None else scan.z,
        scan.u if scan.delta_bias is None else scan.delta_bias.float(),
        scan.u if scan.mask is None else scan.mask.view(torch.uint8),
    ]
    return tuple(x.contiguous() for x in full)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which may be another than the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class TritonScan(torch.autograd.Function):
    """selective_scan in the layout of Scan. It can be differentiated once."""

    @staticmethod
    def forward(
        ctx: Any, keep: bool, softplus: bool, reverse: bool, *tensors: Tensor | None
    ) -> Tensor:
        """keep: whether a backward may follow. tensors: those of Scan, in order."""
        scan = Scan.of(tensors, softplus=softplus, reverse=reverse)
        (b, length, d), n, block = scan.u.shape, scan.A.shape[1], sizes(scan)
        chunks = triton.cdiv(length, block["BL"])
        out = torch.empty((b, length, d), dtype=scan.u.dtype, device=scan.u.device)
        states = scan.A.new_empty((b, chunks, n, d) if keep else (1,), dtype=torch.float32)
        grid = (b * triton.cdiv(d, block["BD"]),)
        with on(scan.u.device):
            _forward[grid](
                *inputs(scan),
                *(out, states, length, d, n, chunks),
                **flags(scan),
                **block,
                KEEP=keep,
                num_warps=WARPS,
            )
        ctx.softplus, ctx.reverse = softplus, reverse
        ctx.save_for_backward(states, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """In the order of forward's arguments."""
        check_first_order("triton")
        states, *tensors = ctx.saved_tensors
        scan = Scan.of(tensors, softplus=ctx.softplus, reverse=ctx.reverse)
        (b, length, d), n, block = scan.u.shape, scan.A.shape[1], sizes(scan)
        chunks, blocks = triton.cdiv(length, block["BL"]), triton.cdiv(d, block["BD"])

        def room(*shape: int, like: Tensor | None = None) -> Tensor:
            dtype = torch.float32 if like is None else like.dtype
            return torch.empty(shape, dtype=dtype, device=scan.u.device)

        full = (b, length, d)
        du, ddelta = room(*full, like=scan.u), room(*full, like=scan.delta)
        dz = du if scan.z is None else room(*full, like=scan.z)
        dA, dD, dbias = room(b, n, d), room(b, d), room(b, d)
        dB, dC = room(blocks, b, length, n), room(blocks, b, length, n)
        with on(scan.u.device):
            _backward[(b * blocks,)](
                *inputs(scan),
                *(dout.contiguous(), states),
                *(du, ddelta, dA, dB, dC, dD, dz, dbias),
                *(length, d, n, chunks, b),
                **flags(scan),
                **block,
                num_warps=WARPS,
            )
        ours = (
            *(du, ddelta, dA.sum(0).t().to(scan.A.dtype)),
            *(dB.sum(0).to(scan.B.dtype), dC.sum(0).to(scan.C.dtype)),
            None if scan.D is None else dD.sum(0).to(scan.D.dtype),
            None if scan.z is None else dz,
            None if scan.delta_bias is None else dbias.sum(0).to(scan.delta_bias.dtype),
            None,
        )
        return None, None, None, *ours


def triton_scan(scan: Scan) -> Tensor:
    """The scan, [B, L, D]. Raises ValueError for float64."""
    tensors = scan.tensors
    if any(x is not None and x.dtype == torch.float64 for x in tensors):
        raise ValueError("scan=triton computes in float32; take scan=chunked for float64")
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    out: Tensor = TritonScan.apply(keep, scan.softplus, scan.reverse, *tensors)
    return out
