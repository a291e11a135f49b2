"""A tensor as the kernels see it: contiguous memory of shape [outer, channels, inner].

Point-wise norms need no order among the positions, so any dense tensor is taken as it lies in
memory: channels last, channels first, torch's channels_last format, transposed. Only a tensor with
gaps or with shared elements (a slice, an expanded one) is copied first.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Layout(NamedTuple):
    """order: dimensions from the slowest in memory to the fastest, None for the usual order.

    dim: channels; inner: elements between two neighbouring channels.
    """

    order: tuple[int, ...] | None
    dim: int
    inner: int

    def view(self, x: Tensor) -> Tensor:
        """x, which has this layout, as a contiguous tensor."""
        return x if self.order is None else x.permute(self.order)

    def restore(self, z: Tensor) -> Tensor:
        """The opposite of `view`."""
        if self.order is None:
            return z
        back = [0] * len(self.order)
        for place, d in enumerate(self.order):
            back[d] = place
        return z.permute(back)

    def match(self, x: Tensor) -> Tensor:
        """x of the same shape, brought into this layout (a copy where it has another), viewed."""
        return self.view(x).contiguous()


def layout_of(x: Tensor, *, channels_first: bool) -> Layout:
    """The layout of x, or for one that is not dense that of its contiguous copy."""
    at = 1 if channels_first and x.dim() > 2 else x.dim() - 1
    dim = x.shape[at]
    if not x.is_contiguous():
        strides = x.stride()
        order = tuple(sorted(range(x.dim()), key=lambda d: (-strides[d], d)))
        if x.permute(order).is_contiguous():
            inner = 1
            for d in order[order.index(at) + 1 :]:
                inner *= x.shape[d]
            return Layout(order, dim, inner)
    # not .numel() of a shape, which makes torch.compile compile anew for every length
    return Layout(None, dim, math.prod(x.shape[at + 1 :]))
