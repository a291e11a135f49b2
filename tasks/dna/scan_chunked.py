"""The selective scan in plain PyTorch, made for the caches of a CPU, with a backward of its own.

A scan in PyTorch is bound by memory: what it computes per (b, l, d) is N states that nobody wants
to keep. So the positions are taken in chunks of a few steps, whose N states a channel fit a core's
cache; what costs the most, exp(delta A), is one call a chunk, and the recurrence one in-place
addcmul a step. States are step-major with the channels innermost, [T, R, N, D]: every step is
contiguous, every broadcast runs along D, and the sums over N or D are batched products.

Kept for the backward are the inputs and the state that enters each chunk: it computes the chunk
once more and runs the adjoint recurrence g_t = C_t dy_t + a_{t+1} g_{t+1} through it from its end.
Softplus, bias, mask, D and gate are done for a span of chunks at a time and never kept, and
`reverse` is an order of the steps, not a copy. Time is linear in L, and so is memory, at about the
size of one or two inputs beside them.

Shapes: R of the B sequences, S positions of a span, T of a chunk, D channels, N states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.dna.scan import Scan, check_first_order
from tasks.dna.scan_threads import spread

STEP = 2**14  # numbers of a step's states: enough to make a call per step cheap
CHUNK = 2**17  # of a chunk's: two or three such buffers fit the cache of a core
SPAN = 2**16  # of [S, R, D]
MIN_STEPS, MAX_STEPS = 8, 64  # of a chunk: fewer would keep more boundary states than inputs

Range = tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """How a scan is cut. rows: sequences at a time; steps: of a chunk; span: positions, a multiple
    of steps."""

    rows: int
    steps: int
    span: int

    @classmethod
    def of(cls, scan: Scan) -> Plan:
        (b, length, d), n = scan.u.shape, scan.A.shape[1]
        share = -(-b // torch.get_num_threads()) if scan.u.device.type == "cpu" else b
        rows = min(share, max(1, STEP // max(1, n * d)))
        steps = max(MIN_STEPS, min(MAX_STEPS, CHUNK // max(1, rows * n * d)))
        chunks = max(1, SPAN // max(1, rows * d * steps))
        return cls(rows, min(steps, length), min(chunks * steps, -(-length // steps) * steps))

    def spans(self, length: int, *, backwards: bool) -> list[Range]:
        """First and last (exclusive) position of each."""
        return cut(0, length, size=self.span, backwards=backwards)

    def chunks(self, span: Range, *, backwards: bool) -> list[Range]:
        """The same of the chunks of a span."""
        return cut(*span, size=self.steps, backwards=backwards)


def cut(start: int, stop: int, *, size: int, backwards: bool) -> list[Range]:
    """The range in pieces of `size`, the last one shorter if it has to be."""
    pieces = [(s, min(s + size, stop)) for s in range(start, stop, size)]
    return pieces[::-1] if backwards else pieces


class Buffers:
    """Room for one chunk: decays a, states h (one more: the state that enters), adjoints g."""

    def __init__(self, scan: Scan, plan: Plan, *, adjoint: bool) -> None:
        shape = (scan.u.shape[0], scan.A.shape[1], scan.u.shape[2])
        make = scan.A.new_empty
        self.A_ND = scan.A.to(scan.state_dtype).t().contiguous()
        self.reverse = scan.reverse
        self.a = make(plan.steps, *shape, dtype=scan.state_dtype)
        self.h = make(plan.steps + 1, *shape, dtype=scan.state_dtype)
        self.g = make(plan.steps if adjoint else 0, *shape, dtype=scan.state_dtype)
        self.a_steps, self.h_steps = self.a.unbind(0), self.h.unbind(0)
        self.g_steps = self.g.unbind(0) if adjoint else ()
        self.state = torch.zeros_like(self.h_steps[0])  # that enters the next chunk

    def in_order(self, steps: Sequence[Tensor]) -> Sequence[Tensor]:
        """Steps by position -> as the recurrence takes them."""
        return steps[::-1] if self.reverse else steps


@dataclass(frozen=True)
class Span:
    """Inputs of some positions as the recurrence takes them, contiguous and step-major.

    raw: delta before the softplus; x: delta u. All [S, R, D]; B, C: [S, R, N]. start: the first
    position.
    """

    start: int
    raw: Tensor
    delta: Tensor
    u: Tensor
    x: Tensor
    B: Tensor
    C: Tensor
    hidden: Tensor | None  # [S, R, 1], True where the mask is False

    @classmethod
    def of(cls, scan: Scan, span: Range) -> Span:
        dtype, where = scan.state_dtype, slice(*span)
        u, raw, B, C = (
            x[:, where].transpose(0, 1).to(dtype).contiguous()
            for x in (scan.u, scan.delta, scan.B, scan.C)
        )
        if scan.delta_bias is not None:
            raw = raw + scan.delta_bias
        delta = F.softplus(raw) if scan.softplus else raw
        hidden = None
        if scan.mask is not None:
            hidden = ~scan.mask[:, where].t()[:, :, None]
            delta, u = delta.masked_fill(hidden, 0), u.masked_fill(hidden, 0)
        return cls(span[0], raw, delta, u, delta * u, B, C, hidden)

    def chunk(self, chunk: Range) -> slice:
        """A chunk's positions within the span."""
        return slice(chunk[0] - self.start, chunk[1] - self.start)


def run_chunk(buffers: Buffers, span: Span, where: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Decays, states and the states before them of a chunk, [T, R, N, D], by position."""
    count = where.stop - where.start
    a, slots, reverse = buffers.a[:count], buffers.h[: count + 1], buffers.reverse
    first = count if reverse else 0
    h, before = (slots[:-1], slots[1:]) if reverse else (slots[1:], slots[:-1])
    torch.mul(span.delta[where, :, None], buffers.A_ND, out=a)
    torch.exp(a, out=a)
    torch.mul(span.B[where, :, :, None], span.x[where, :, None], out=h)
    state = buffers.h_steps[first].copy_(buffers.state)
    h_steps = buffers.h_steps[:count] if reverse else buffers.h_steps[1 : count + 1]
    ordered = buffers.in_order(buffers.a_steps[:count]), buffers.in_order(h_steps)
    for a_RND, h_RND in zip(*ordered, strict=True):
        state = h_RND.addcmul_(a_RND, state)  # h holds B_t x_t
    return a, h, before


def adjoint_chunk(buffers: Buffers, count: int) -> None:
    """g_t += a_{t+1} g_{t+1} through a chunk, from its end. g holds C_t dy_t and, at its end, what
    comes from the chunk after."""
    a_steps = buffers.in_order(buffers.a_steps[:count])[::-1]
    g_steps = buffers.in_order(buffers.g_steps[:count])[::-1]
    g_next = g_steps[0]
    for a_RND, g_RND in zip(a_steps[:-1], g_steps[1:], strict=True):
        g_next = g_RND.addcmul_(a_RND, g_next)


def weighted(weights_TRN: Tensor, x_TRND: Tensor, *, out: Tensor) -> None:
    """Sum over the states, into [T, R, D]."""
    t, r, n, d = x_TRND.shape
    flat = weights_TRN.reshape(t * r, 1, n), x_TRND.view(t * r, n, d)
    torch.bmm(*flat, out=out.view(t * r, 1, d))


def projected(weights_TRD: Tensor, x_TRND: Tensor, *, out: Tensor) -> None:
    """Sum over the channels, into [T, R, N]."""
    t, r, n, d = x_TRND.shape
    flat = weights_TRD.reshape(t * r, 1, d), x_TRND.view(t * r, n, d).transpose(1, 2)
    torch.bmm(*flat, out=out.view(t * r, 1, n))


def forward_rows(scan: Scan, plan: Plan, *, out: Tensor, states: Tensor | None) -> None:
    """The scan of some sequences. states: [chunks, R, N, D], takes the one that enters each."""
    buffers = Buffers(scan, plan, adjoint=False)
    for positions in plan.spans(scan.u.shape[1], backwards=scan.reverse):
        span = Span.of(scan, positions)
        y = torch.empty_like(span.u)
        for chunk in plan.chunks(positions, backwards=scan.reverse):
            where = span.chunk(chunk)
            if states is not None:
                states[chunk[0] // plan.steps].copy_(buffers.state)
            _, h, _ = run_chunk(buffers, span, where)
            weighted(span.C[where], h, out=y[where])
            buffers.state.copy_(h[0] if scan.reverse else h[-1])
        if scan.D is not None:
            y.addcmul_(span.u, scan.D.to(y.dtype))
        if scan.z is not None:
            y.mul_(F.silu(scan.z[:, slice(*positions)].transpose(0, 1).to(y.dtype)))
        out[:, slice(*positions)].copy_(y.transpose(0, 1))


@dataclass
class Gradients:
    """Of some sequences' inputs (views of the whole), and sums over them. None: no such input."""

    u: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor
    z: Tensor | None
    A_ND: Tensor
    D: Tensor | None
    delta_bias: Tensor | None


@dataclass(frozen=True)
class SpanGradients:
    """Of a span: y, its gradient, and those of x, B, C and of the exponents delta A by delta."""

    y: Tensor
    dy: Tensor
    dx: Tensor
    ddelta: Tensor
    dB: Tensor
    dC: Tensor

    @classmethod
    def of(cls, span: Span, dy: Tensor) -> SpanGradients:
        d, n = span.u, span.B
        empty = torch.empty_like
        return cls(empty(d), dy, empty(d), empty(d), empty(n), empty(n))


def backward_rows(
    scan: Scan, plan: Plan, *, dout: Tensor, states: Tensor, grads: Gradients
) -> None:
    """Gradients of some sequences, into `grads`."""
    buffers = Buffers(scan, plan, adjoint=True)
    carried = torch.zeros_like(buffers.state)  # a_{t+1} g_{t+1} of the chunk after
    for positions in plan.spans(scan.u.shape[1], backwards=not scan.reverse):
        span = Span.of(scan, positions)
        dout_SRD = dout[:, slice(*positions)].transpose(0, 1).to(span.u.dtype)
        z = None
        if scan.z is not None:
            z = scan.z[:, slice(*positions)].transpose(0, 1).to(span.u.dtype)
        dy = dout_SRD.contiguous() if z is None else (dout_SRD * F.silu(z)).contiguous()
        found = SpanGradients.of(span, dy)
        for chunk in plan.chunks(positions, backwards=not scan.reverse):
            buffers.state.copy_(states[chunk[0] // plan.steps])
            where = span.chunk(chunk)
            a, h, before = run_chunk(buffers, span, where)
            if z is not None:
                weighted(span.C[where], h, out=found.y[where])
            backward_chunk(buffers, span, where, found, carried, a, h, before, grads.A_ND)
        write(scan, span, found, dout_SRD, z, grads, slice(*positions))


def backward_chunk(
    buffers: Buffers,
    span: Span,
    where: slice,
    found: SpanGradients,
    carried: Tensor,
    a: Tensor,
    h: Tensor,
    before: Tensor,
    dA_ND: Tensor,
) -> None:
    """Gradients of a chunk, into `found`, `dA_ND` and `carried`. Uses up a and g."""
    count = where.stop - where.start
    first, last = (count - 1, 0) if buffers.reverse else (0, count - 1)
    g = buffers.g[:count]
    torch.mul(span.C[where, :, :, None], found.dy[where, :, None], out=g)
    buffers.g_steps[last].add_(carried)
    adjoint_chunk(buffers, count)
    projected(found.dy[where], h, out=found.dC[where])
    projected(span.x[where], g, out=found.dB[where])
    weighted(span.B[where], g, out=found.dx[where])
    a.mul_(g)
    carried.copy_(a[first])
    a.mul_(before)  # the gradient of the exponent delta_t A
    dA_ND.add_(torch.mul(a, span.delta[where, :, None], out=g).sum((0, 1)))
    torch.sum(a.mul_(buffers.A_ND), 2, out=found.ddelta[where])


def write(
    scan: Scan,
    span: Span,
    found: SpanGradients,
    dout: Tensor,
    z: Tensor | None,
    grads: Gradients,
    where: slice,
) -> None:
    """From the gradients of the recurrence to those of the inputs, for one span."""
    du, ddelta = found.dx * span.delta, found.ddelta.addcmul_(found.dx, span.u)
    if scan.D is not None and grads.D is not None:
        D = scan.D.to(du.dtype)
        du.addcmul_(found.dy, D)
        grads.D.add_((found.dy * span.u).sum((0, 1)))
        found.y.addcmul_(span.u, D)
    if z is not None and grads.z is not None:
        sigmoid = torch.sigmoid(z)
        slope = sigmoid * (1 + z * (1 - sigmoid))
        grads.z[:, where].copy_((dout * found.y * slope).transpose(0, 1))
    if span.hidden is not None:
        du, ddelta = du.masked_fill_(span.hidden, 0), ddelta.masked_fill_(span.hidden, 0)
    if scan.softplus:
        ddelta.mul_(torch.sigmoid(span.raw))
    if grads.delta_bias is not None:
        grads.delta_bias.add_(ddelta.sum((0, 1)))
    for target, value in (
        (grads.u, du),
        (grads.delta, ddelta),
        (grads.B, found.dB),
        (grads.C, found.dC),
    ):
        target[:, where].copy_(value.transpose(0, 1))


def tiles(scan: Scan, plan: Plan) -> list[tuple[slice, Scan]]:
    """The sequences, a few at a time."""
    found = []
    for start in range(0, scan.u.shape[0], plan.rows):
        rows = slice(start, start + plan.rows)
        parts = {
            name: value[rows]
            for name in ("u", "delta", "B", "C", "z", "mask")
            if (value := getattr(scan, name)) is not None
        }
        found.append((rows, replace(scan, **parts)))
    return found


class ChunkedScan(torch.autograd.Function):
    """selective_scan in the layout of Scan. It can be differentiated once."""

    @staticmethod
    def forward(
        ctx: Any, keep: bool, softplus: bool, reverse: bool, *tensors: Tensor | None
    ) -> Tensor:
        """keep: whether a backward may follow. tensors: those of Scan, in order."""
        scan = Scan.of(tensors, softplus=softplus, reverse=reverse)
        plan = Plan.of(scan)
        out = torch.empty_like(scan.u)
        (b, length, d), n = scan.u.shape, scan.A.shape[1]
        states = None
        if keep:
            chunks = -(-length // plan.steps)
            states = scan.A.new_empty(chunks, b, n, d, dtype=scan.state_dtype)

        def forward(rows: slice, part: Scan) -> None:
            kept = None if states is None else states[:, rows]
            forward_rows(part, plan, out=out[rows], states=kept)

        spread(forward, tiles(scan, plan))
        ctx.softplus, ctx.reverse, ctx.plan = softplus, reverse, plan
        ctx.save_for_backward(states, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """In the order of forward's arguments."""
        check_first_order("chunked")
        states, *tensors = ctx.saved_tensors
        scan = Scan.of(tensors, softplus=ctx.softplus, reverse=ctx.reverse)
        u, delta, B, C = (torch.empty_like(x) for x in (scan.u, scan.delta, scan.B, scan.C))
        z = None if scan.z is None else torch.empty_like(scan.z)

        def backward(rows: slice, part: Scan) -> Gradients:
            grads = Gradients(
                u[rows],
                delta[rows],
                B[rows],
                C[rows],
                None if z is None else z[rows],
                A_ND=scan.A.new_zeros(scan.A.shape[::-1], dtype=scan.state_dtype),
                D=zeros_for(scan.D, scan),
                delta_bias=zeros_for(scan.delta_bias, scan),
            )
            kept = states[:, rows]
            backward_rows(part, ctx.plan, dout=dout[rows], states=kept, grads=grads)
            return grads

        with torch.autocast(scan.u.device.type, enabled=False):
            parts = spread(backward, tiles(scan, ctx.plan))
        dA = summed([x.A_ND for x in parts], scan.A.t())
        dD, dbias = (
            summed([getattr(x, name) for x in parts], getattr(scan, name))
            for name in ("D", "delta_bias")
        )
        ours = (u, delta, None if dA is None else dA.t(), B, C, dD, z, dbias, None)
        return None, None, None, *ours


def summed(parts: Sequence[Tensor], parameter: Tensor | None) -> Tensor | None:
    """The gradient of a parameter, in its dtype; always added in the same order."""
    return None if parameter is None else torch.stack(list(parts)).sum(0).to(parameter.dtype)


def zeros_for(parameter: Tensor | None, scan: Scan) -> Tensor | None:
    """Where the gradient of a parameter is summed, in the dtype of the state."""
    return None if parameter is None else torch.zeros_like(parameter, dtype=scan.state_dtype)


def chunked_scan(scan: Scan) -> Tensor:
    """The scan, [B, L, D]."""
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in scan.tensors)
    out: Tensor = ChunkedScan.apply(keep, scan.softplus, scan.reverse, *scan.tensors)
    return out
