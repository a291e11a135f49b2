"""Sums and rows over all processes of a training that a task needs.

A task whose loss is a mean writes no collective: `suite.module` makes the mean exact. A loss that
is not a mean of examples, such as the entropy of codes over a batch, needs the sums themselves, and
the gradient of what it computes from them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from suite.errors import RankError, one_line

T = TypeVar("T")


def world_size() -> int:
    """Processes that take part in this training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sums_over_ranks(*values: Tensor) -> list[Tensor]:
    """Each tensor summed over all processes, in one collective, in the value's own dtype.

    The gradient of a sum reaches this process's share of it alone: if every process differentiates
    the same function of the sums, and the gradients of all are added, the result is the function's
    gradient, with no collective in the backward pass. Every process has to call this.
    """
    if world_size() == 1:
        return list(values)
    with torch.no_grad():
        packed = torch.cat([v.detach().double().flatten() for v in values])
        dist.all_reduce(packed)
    totals = packed.split([v.numel() for v in values])
    return [
        v + (total.view_as(v) - v.detach()).to(v.dtype)
        for v, total in zip(values, totals, strict=True)
    ]


def of_first(value: int, *, device: torch.device) -> int:
    """The first process's number. Every process has to call it. device: of the collective."""
    if world_size() == 1:
        return value
    held = torch.tensor([value], device=device)
    dist.broadcast(held, src=0)
    return int(held)


def lost_rank(error: BaseException, *, timeout: int, known: Callable[[], str]) -> RankError | None:
    """The error of a collective in which another process did not take part; None for any other.

    timeout: run.dist_timeout. known: says which ones have ended, or nothing. torch has a class for
    NCCL's and the store's; gloo's are RuntimeErrors that name its file.
    """
    text = str(error)
    of_gloo = isinstance(error, RuntimeError) and ("gloo/" in text or "[gloo]" in text.lower())
    if not (isinstance(error, dist.DistError) or of_gloo):
        return None
    reason = text.partition("] ")[2] or text
    who = known() or (
        f"another process of this run is gone or did not answer within run.dist_timeout={timeout} "
        "seconds"
    )
    return RankError(f"{who}; its own lines say why ({one_line(reason, limit=300)})")


def from_first(find: Callable[[], T]) -> T:
    """What the first process finds, on every one of them; each has to call it."""
    if world_size() == 1:
        return find()
    box: list[Any] = [find() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return cast(T, box[0])


def gather_rows(rows: Tensor, *, total: int) -> Tensor:
    """The `total` rows of all processes in order; this one holds rows rank, rank + world, ...

    Every process has to call it, and every process gets all rows. No gradient.
    """
    world = world_size()
    if world == 1:
        return rows
    longest = -(-total // world)
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    padded[: len(rows)] = rows
    everyone = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(everyone, padded)
    return torch.stack(everyone, dim=1).flatten(0, 1)[:total]
