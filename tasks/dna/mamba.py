"""The mixer of Mamba (Gu and Dao, arXiv 2312.00752), in one direction or, as Caduceus has it, both.

    x, z = in_proj(h);  u = silu(conv(x));  dt, B, C = x_proj(u);  y = scan(u, dt, A, B, C) + D u
    out = out_proj(y silu(z))

Caduceus (arXiv 2403.03234) adds a Mamba that reads the sequence from its end. Both share in_proj
and out_proj, which hold most of the parameters; the rest is each direction's own. What is shared
is linear or the same for both, so that here it is computed once: in_proj, the gate and out_proj on
the sum of what the two directions found. The second direction runs by index, its convolution looks
ahead and its scan starts at the end: nothing is flipped and nothing copied.

Positions stay in front of channels throughout: every product is one matrix product over all
positions, and the convolution's taps are shifted views.

Shapes: B sequences, L positions, C channels of the model, D channels of the mixer, N states of a
channel, R rank of the step size, K taps of the convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.dna.scan import Backend, selective_scan

STEP_MIN, STEP_MAX, STEP_FLOOR = 1e-3, 0.1, 1e-4  # of the first step sizes


class DepthwiseConv(torch.autograd.Function):
    """y_t = bias + sum over k of weight_k x_{t-K+1+k}, or with reverse of weight_k x_{t+K-1-k}.

    Beyond the ends x is 0. Each tap adds to the part of the result that it reaches: nothing is
    padded, and the gradient of x is as many sums, where autograd would make each tap's a full-size
    tensor. Weights and sums are float32 at least; the result has x's dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BLD: Tensor, weight_KD: Tensor, bias_D: Tensor, reverse: bool
    ) -> Tensor:
        ctx.save_for_backward(x_BLD, weight_KD)
        ctx.reverse = reverse
        y_BLD = torch.addcmul(bias_D, x_BLD, weight_KD[-1])  # each position's own tap
        for weight_D, ahead, behind in taps(weight_KD[:-1], x_BLD.shape[1], reverse=reverse):
            y_BLD[:, ahead].addcmul_(x_BLD[:, behind], weight_D)
        return y_BLD.to(x_BLD.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_BLD, weight_KD = ctx.saved_tensors
        dy_BLD = gradients[0].to(weight_KD.dtype)
        dx_BLD, dweight_KD = dy_BLD * weight_KD[-1], torch.empty_like(weight_KD)
        dweight_KD[-1] = (dy_BLD * x_BLD).sum((0, 1))
        others = taps(weight_KD[:-1], x_BLD.shape[1], reverse=ctx.reverse)
        for dweight_D, (weight_D, ahead, behind) in zip(dweight_KD[:-1], others, strict=True):
            dx_BLD[:, behind].addcmul_(dy_BLD[:, ahead], weight_D)
            dweight_D.copy_((dy_BLD[:, ahead] * x_BLD[:, behind]).sum((0, 1)))
        return dx_BLD.to(x_BLD.dtype), dweight_KD, dy_BLD.sum((0, 1)), None


def taps(weight_KD: Tensor, length: int, *, reverse: bool) -> Iterator[tuple[Tensor, slice, slice]]:
    """Of each tap but the last its weights, the positions it adds to, and those it reads there."""
    for k, weight_D in enumerate(weight_KD):
        lag = min(len(weight_KD) - k, length)
        late, early = slice(lag, length), slice(0, length - lag)
        yield (weight_D, early, late) if reverse else (weight_D, late, early)


class Direction(nn.Module):
    """One direction: depthwise convolution, SiLU, selective scan. x [B, L, D] -> y [B, L, D].

    A_log, D and dt_bias stay float32 when the module is cast to 16 bits: a step of the scan
    multiplies their rounding by the length of the sequence.
    reverse: reads from the last position to the first.
    """

    def __init__(
        self, inner: int, *, state: int, rank: int, kernel: int, reverse: bool, scan: Backend
    ) -> None:
        super().__init__()
        self.state, self.rank, self.kernel = state, rank, kernel
        self.reverse, self.scan = reverse, scan
        self.conv1d = nn.Conv1d(inner, inner, kernel, groups=inner)  # holds weight and bias
        self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, inner, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        self.dt_bias = nn.Parameter(inverse_softplus(first_steps(inner)))
        self.A_log = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """x is 0 where mask is False. What comes out there is of no use."""
        u_BLD = F.silu(self.convolve(x_BLD))
        sizes = (self.rank, self.state, self.state)
        dt_BLR, B_BLN, C_BLN = self.x_proj(u_BLD).split(sizes, dim=-1)
        return selective_scan(
            u_BLD,
            self.dt_proj(dt_BLR),
            -torch.exp(self.A_log),
            B_BLN,
            C_BLN,
            D_D=self.D,
            delta_bias_D=self.dt_bias,
            reverse=self.reverse,
            backend=self.scan,
            mask_BL=mask_BL,
            layout="BLD",
        )

    def convolve(self, x_BLD: Tensor) -> Tensor:
        """The convolution that sees the K - 1 positions before each, in reading direction.

        In x's dtype, sums in float32.
        """
        wide = torch.promote_types(x_BLD.dtype, torch.float32)
        weight_KD = self.conv1d.weight.squeeze(1).t().to(wide)
        bias_D = self.conv1d.bias.to(wide)  # type: ignore[union-attr]
        return DepthwiseConv.apply(x_BLD, weight_KD, bias_D, self.reverse)  # type: ignore[no-any-return]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Direction:
        """As nn.Module's, which is behind .to(), .half(), .bfloat16() and .cuda()."""

        def wide(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            if found.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(device=found.device, dtype=torch.float32)
            return found

        if recurse:
            for child in self.children():
                child._apply(fn)
        super()._apply(wide, recurse=False)
        return self


def first_steps(inner: int) -> Tensor:
    """Step sizes [D] that are spread evenly on a logarithmic scale, at random, in float32."""
    low, high = math.log(STEP_MIN), math.log(STEP_MAX)
    return torch.exp(torch.rand(inner) * (high - low) + low).clamp(min=STEP_FLOOR)


def inverse_softplus(y: Tensor) -> Tensor:
    """x with softplus(x) = y, for small y too."""
    return y + torch.log(-torch.expm1(-y))


class Mamba(nn.Module):
    """h [B, L, C] -> [B, L, C], along the sequence or, if bidirectional, both ways.

    expand: channels of the mixer for each of the model. depth: of the model; out_proj's first
    weights are smaller by its root, as published.
    """

    def __init__(
        self,
        dim: int,
        *,
        state: int,
        kernel: int,
        expand: int,
        bidirectional: bool,
        depth: int,
        scan: Backend,
    ) -> None:
        super().__init__()
        inner, rank = expand * dim, math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.directions = nn.ModuleList(
            Direction(inner, state=state, rank=rank, kernel=kernel, reverse=reverse, scan=scan)
            for reverse in ((False, True) if bidirectional else (False,))
        )
        self.out_proj = nn.Linear(inner, dim, bias=False)
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(depth)

    def forward(self, h_BLC: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """mask: True where a position is real; None: everywhere. Others touch no real one."""
        x_BLD, z_BLD = self.in_proj(h_BLC).chunk(2, dim=-1)
        if mask_BL is not None:
            x_BLD = x_BLD.where(mask_BL.unsqueeze(-1), 0)
        first_BLD, *second = (direction(x_BLD, mask_BL) for direction in self.directions)
        y_BLD = sum(second, first_BLD)
        return self.out_proj(y_BLD * F.silu(z_BLD))
