"""The part of a norm layer that asks which backend its input is computed with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from suite.norms.kernels import KERNELS, Choice, Family, choose_backend

_missing: set[tuple[str, str, Family]] = set()  # kernels asked for by name that cannot run here


class Chosen:
    """requested: the option `backend`. family: which kernels the layer has."""

    family: Family
    requested: str

    def choice(self, device_type: str) -> Choice:
        """What runs on a device, and why. Raises ValueError as `choose_backend` does."""
        found = choose_backend(self.requested, device_type, family=self.family)
        if self.requested in KERNELS and found.name != self.requested:
            _missing.add((self.requested, device_type, self.family))
        return found

    def backend_for(self, x: Tensor) -> str:
        """What runs for x. Kernels compute in float32, so float64 is plain torch, as is everything
        inside a transform of torch.func, which has to look into the formula.

        While torch.compile traces, "auto" and "compile" are plain torch too: it fuses them with
        their neighbours, which it cannot do with a kernel of ours. A kernel that was asked for by
        name is taken there without another look at the machine, unless `choice` found it missing.
        """
        requested = self.requested
        if requested == "eager" or x.dtype == torch.float64:
            return "eager"
        if torch.compiler.is_compiling():
            there = (requested, x.device.type, self.family) not in _missing
            return requested if requested in KERNELS and there else "eager"
        if torch._C._are_functorch_transforms_active():  # a kernel has no rule for vmap or jvp
            return "eager"
        if requested == "auto" and type(x) not in (Tensor, nn.Parameter):
            return "eager"  # such as DTensor, which knows how to shard torch's operators alone
        return self.choice(x.device.type).name
