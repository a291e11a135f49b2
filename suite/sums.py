"""What a step gives, and its sums over a window of steps or a split, exact over all processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from suite.ranks import world_size

Number = Tensor | float | int


@dataclass
class StepOutput:
    """What one batch gives.

    loss_sum: 0-dim, the loss summed over `count` items, with gradient. count: items of this batch.
    logs: further sums over the same items, logged as means. metric_inputs: keyword arguments of the
    task's metrics, of valid rows only. units: how many of the task's unit the batch holds (None:
    count).
    """

    loss_sum: Tensor
    count: Number
    logs: Mapping[str, Tensor] = field(default_factory=dict)
    metric_inputs: Mapping[str, Any] = field(default_factory=dict)
    units: Number | None = None


class Sums:
    """Named sums that stay on the device until they are read, once for all of them."""

    def __init__(self) -> None:
        self.values: dict[str, Number] = {}

    def add(self, out: StepOutput) -> None:
        """Add a batch's loss, count, units and logs."""
        units = out.count if out.units is None else out.units
        for name, value in (("loss", out.loss_sum), ("_count", out.count), ("_units", units)):
            self._add(name, value)
        for name, value in out.logs.items():
            self._add(name, value)

    def _add(self, name: str, value: Number) -> None:
        value = value.detach() if isinstance(value, Tensor) else value
        held = self.values.get(name)
        self.values[name] = value if held is None else held + value

    def totals(self, device: torch.device, *, keep: bool = False) -> dict[str, float]:
        """Sums over all ranks, read in one transfer. Clears unless they are to be kept."""
        names, values = list(self.values), list(self.values.values())
        self.values = self.values if keep else {}
        if not names:
            return {}
        wide = torch.float32 if device.type == "mps" else torch.float64
        packed = torch.stack([torch.as_tensor(v, device=device, dtype=wide) for v in values])
        if world_size() > 1:
            dist.all_reduce(packed)
        return dict(zip(names, packed.tolist(), strict=True))


def means(totals: Mapping[str, float]) -> dict[str, float]:
    """Sums to means over `_count`."""
    count = max(totals.get("_count", 0.0), 1e-12)
    return {k: v / count for k, v in totals.items() if not k.startswith("_")}
