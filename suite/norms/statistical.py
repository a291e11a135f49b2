"""The norms that compute statistics: Layer-, RMS-, Batch-, Group- and ScaleNorm; and Identity.

Thin wraps of torch's functions that add what comparing norms across domains needs: one constructor,
any layout ([B, T, C], [B, H, W, C], and with channels_first [B, C, T], [B, C, H, W]), padding, and
one stated autocast policy: statistics in float32 (float64 stays float64), output in the input's
dtype. Where parameters and input have the same 16-bit dtype torch's kernels for CUDA are given them
as they are, because those accumulate in float32 themselves.

`mask` is True at valid positions and broadcasts over batch and positions from the left: [B] marks
whole examples, [B, T] tokens, [B, H, W] pixels. Norms whose statistics stay within a position
ignore it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from suite.norms.kernels import KERNELS, Family
from suite.norms.kernels.chosen import Chosen
from suite.norms.kernels.ops import rows


def _compute_dtype(x: Tensor, *parameters: Tensor | None) -> torch.dtype:
    """float32 or wider; on a GPU x's own where all parameters share it.

    torch's kernels accumulate in float32 there. On a CPU they sum the gradients of parameters in 16
    bits, which over a few thousand rows is off by a tenth and more.
    """
    present = [p.dtype for p in parameters if p is not None]
    if x.device.type == "cuda" and present and all(dtype == x.dtype for dtype in present):
        return x.dtype
    return torch.promote_types(x.dtype, torch.float32)


def _cast(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if parameter is None else parameter.to(dtype)


def _valid(mask: Tensor, z: Tensor) -> Tensor:
    """mask [B, ...] -> bool, broadcast to z's batch and positions, with a last dimension of 1."""
    missing = z.dim() - 1 - mask.dim()
    mask = mask.bool().reshape(*mask.shape, *(1 for _ in range(missing)))
    return mask.expand(z.shape[:-1]).unsqueeze(-1)


class _StatisticsNorm(nn.Module):
    """Learned scale and offset per channel, and the layout.

    published_bias: whether the norm has a bias by its paper.
    """

    published_bias = True
    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        weight: bool = True,
        bias: bool = True,
        channels_first: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.eps, self.channels_first = dim, eps, channels_first
        self.register_parameter(
            "weight", nn.Parameter(torch.empty(self._scales())) if weight else None
        )
        self.register_parameter("bias", nn.Parameter(torch.empty(dim)) if bias else None)
        self.reset_parameters()

    def _scales(self) -> int:
        return self.dim

    def reset_parameters(self) -> None:
        """weight at 1, bias at 0. Draws no random numbers."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _last(self, x: Tensor) -> Tensor:
        """x with its channels last."""
        return x.movedim(1, -1) if self.channels_first else x

    def _restore(self, z: Tensor) -> Tensor:
        return z.movedim(-1, 1) if self.channels_first else z

    def _affine(self, z: Tensor) -> Tensor:
        """weight * z + bias for z with its channels last."""
        if self.weight is not None:
            z = z * self.weight
        return z if self.bias is None else z + self.bias

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, channels_first={self.channels_first}"


class _RowNorm(Chosen, _StatisticsNorm):
    """A norm over the channels of each position, which has kernels of ours besides torch's.

    backend: what runs, see suite.norms.kernels. kind: its kernel's name.
    """

    family: Family = "rows"
    kind: str

    def __init__(self, dim: int, *, backend: str = "auto", **layout: Any) -> None:
        super().__init__(dim, **layout)
        self.requested = backend

    def formula(self, x: Tensor) -> Tensor:
        """x with its channels last -> the same shape, in the dtype of the statistics."""
        raise NotImplementedError

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        z, backend = self._last(x), self.backend_for(x)
        if backend in KERNELS:
            y = rows(z, self.weight, self.bias, kind=self.kind, eps=self.eps, backend=backend)
        else:
            cls: Any = type(self)
            y = _compiled(cls)(self, z) if backend == "compile" else self.formula(z)
        return self._restore(y).to(x.dtype)


@cache
def _compiled(cls: Any) -> Callable[[_RowNorm, Tensor], Tensor]:
    """One compiled function for all layers of a class, so that modules stay picklable."""
    return torch.compile(cls.formula)


class LayerNorm(_RowNorm):
    """(x - mean) / sqrt(var + eps) over the channels of each position (arXiv 1607.06450)."""

    kind = "layer"

    def formula(self, x: Tensor) -> Tensor:
        """See _RowNorm."""
        dtype = _compute_dtype(x, self.weight, self.bias)
        weight, bias = _cast(self.weight, dtype), _cast(self.bias, dtype)
        return F.layer_norm(x.to(dtype), (self.dim,), weight, bias, self.eps)


class RMSNorm(_RowNorm):
    """x / sqrt(mean x^2 + eps) over the channels of each position (arXiv 1910.07467).

    No bias unless it is asked for.
    """

    published_bias = False
    kind = "rms"

    def formula(self, x: Tensor) -> Tensor:
        """See _RowNorm."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        y = F.rms_norm(x.to(dtype), (self.dim,), _cast(self.weight, dtype), self.eps)
        return y if self.bias is None else y + self.bias


class ScaleNorm(_StatisticsNorm):
    """weight * sqrt(C) x / |x| with one learned scalar (arXiv 1910.05895), eps as in RMSNorm.

    No bias unless it is asked for.
    """

    published_bias = False

    def _scales(self) -> int:
        return 1

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        z = self._last(x).to(torch.promote_types(x.dtype, torch.float32))
        z = F.rms_norm(z, (self.dim,), None, self.eps)
        return self._restore(self._affine(z)).to(x.dtype)


def default_groups(dim: int) -> int:
    """The most groups, up to 32, that divide `dim` and leave at least 8 channels in each."""
    return max(g for g in range(1, 33) if dim % g == 0 and (g == 1 or dim // g >= 8))


class GroupNorm(_StatisticsNorm):
    """Mean and variance per group of channels (arXiv 1803.08494).

    Tokens ([B, T, C] or [B, C], channels last): within each token, so that no token sees another.
    Everything else ([B, C, T], [B, C, H, W], [B, H, W, C]): over the valid positions of each
    example too, as torch.nn.GroupNorm.
    """

    def __init__(self, dim: int, *, groups: int | None = None, **layout: Any) -> None:
        super().__init__(dim, **layout)
        self.groups = default_groups(dim) if groups is None else groups
        if dim % self.groups:
            raise ValueError(f"groups must divide the {dim} channels, got {self.groups}")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        per_token = not self.channels_first and x.dim() <= 3
        if mask is not None and not per_token:
            return self._masked(x, mask)
        dtype = _compute_dtype(x, self.weight, self.bias)
        z = x.reshape(-1, self.dim) if per_token else self._last(x).movedim(-1, 1)
        weight, bias = _cast(self.weight, dtype), _cast(self.bias, dtype)
        z = F.group_norm(z.to(dtype), self.groups, weight, bias, self.eps).to(x.dtype)
        return z.view(x.shape) if per_token else self._restore(z.movedim(1, -1))

    def _masked(self, x: Tensor, mask: Tensor) -> Tensor:
        """With channels in front, where the published uses have them: moments, one multiply-add."""
        z = x if self.channels_first else x.movedim(-1, 1)
        z = z.to(torch.promote_types(x.dtype, torch.float32))
        around = mask.bool().reshape(*mask.shape, *[1] * (z.dim() - 1 - mask.dim()))
        valid = around.expand(len(z), *z.shape[2:]).reshape(len(z), 1, 1, -1)
        grouped = z.reshape(len(z), self.groups, self.dim // self.groups, -1)
        count = (valid.sum((2, 3), keepdim=True) * (self.dim // self.groups)).clamp(min=1)
        mean = torch.where(valid, grouped, 0).sum((2, 3), keepdim=True) / count
        var = torch.where(valid, grouped - mean, 0).square().sum((2, 3), keepdim=True) / count
        scale = torch.rsqrt(var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight.view(1, self.groups, -1, 1)
        offset = -mean * scale
        if self.bias is not None:
            offset = offset + self.bias.view(1, self.groups, -1, 1)
        y = torch.addcmul(offset, grouped, scale).reshape(z.shape).to(x.dtype)
        return y if self.channels_first else y.movedim(1, -1)


class _SumOverRanks(torch.autograd.Function):
    """All-reduce (sum) whose gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


def _moments(z: Tensor, valid: Tensor | None, *, over_ranks: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], biased variance [C] and count [] over the valid positions of z [..., C]."""

    def kept(values: Tensor) -> Tensor:
        return values if valid is None else torch.where(valid, values, 0)

    def total(values: Tensor) -> Tensor:
        summed = values.reshape(-1, z.shape[-1]).sum(0)
        return _SumOverRanks.apply(summed) if over_ranks else summed

    count = z.new_tensor(z[..., 0].numel()) if valid is None else valid.sum().to(z.dtype)
    if over_ranks:
        dist.all_reduce(count)
    some = count.clamp(min=1)
    mean = total(kept(z)) / some
    return mean, total(kept(z - mean).square()) / some, count


class BatchNorm(_StatisticsNorm):
    """Mean and variance per channel over the batch and its valid positions (arXiv 1502.03167).

    Evaluation uses running statistics, updated as in torch (unbiased variance, weight `momentum` on
    the new batch).
    sync: in a process group, statistics over all ranks; on CPU ranks that is refused with a
    ValueError.
    Positions see each other: not for causal models.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, dim: int, *, sync: bool = True, momentum: float = 0.1, **layout: Any
    ) -> None:
        super().__init__(dim, **layout)
        self.sync, self.momentum = sync, momentum
        self.register_buffer("running_mean", torch.empty(dim))
        self.register_buffer("running_var", torch.empty(dim))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """weight at 1, bias at 0, running mean 0 and variance 1, nothing tracked."""
        super().reset_parameters()
        if "running_mean" in self._buffers:  # not yet while the base class is being built
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        z = self._last(x).to(torch.promote_types(x.dtype, torch.float32))
        if not self.training:
            z = self._normalize(z, self.running_mean.to(z.dtype), self.running_var.to(z.dtype))
            return self._restore(z).to(x.dtype)
        over_ranks = self._over_ranks(x)
        several = z[..., 0].numel() > 1  # of one value torch refuses to take the variance
        if mask is None and several and not over_ranks and self.running_mean.dtype == z.dtype:
            z = self._torch(z)
        else:
            valid = None if mask is None else _valid(mask, z)
            mean, var, count = _moments(z, valid, over_ranks=over_ranks)
            self._track(mean, var, count)
            z = self._normalize(z, mean, var)
        return self._restore(z).to(x.dtype)

    def _torch(self, z: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        z_NC = z.movedim(-1, 1)
        weight, bias = _cast(self.weight, z.dtype), _cast(self.bias, z.dtype)
        running = (self.running_mean, self.running_var)
        return F.batch_norm(z_NC, *running, weight, bias, True, self.momentum, self.eps).movedim(
            1, -1
        )

    def _normalize(self, z: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return self._affine((z - mean) * torch.rsqrt(var + self.eps))

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Move the running statistics towards the batch's, unless it has no valid position."""
        unbiased = var * (count / (count - 1).clamp(min=1))
        # one value has a mean but says nothing of the variance
        parts = ((self.running_mean, mean, count > 0), (self.running_var, unbiased, count > 1))
        for running, new, known in parts:
            old = running.to(new.dtype)
            running.copy_(old + self.momentum * known.to(new.dtype) * (new - old))
        self.num_batches_tracked.add_((count > 0).to(self.num_batches_tracked.dtype))

    def _over_ranks(self, x: Tensor) -> bool:
        if not (self.sync and dist.is_available() and dist.is_initialized()):
            return False
        if dist.get_world_size() == 1:
            return False
        if x.device.type == "cpu":
            raise ValueError(
                "sync: batchnorm's statistics over several ranks need GPUs; on CPU ranks set"
                " norm.sync=false (each rank then uses its own statistics) or choose another norm"
            )
        return True


class Identity(nn.Module):
    """No normalization: the input, unchanged. Takes and ignores what other norms take."""

    published_bias = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x
