"""The part of a norm layer that asks which backend its input is computed with."""

from __future__ import annotations

import torch
from torch import Tensor

from suite.norms.kernels import KERNELS, Choice, Family, choose_backend


class Chosen:
    """requested: the option `backend`. family: which kernels the layer has."""

    family: Family
    requested: str

    def choice(self, device_type: str) -> Choice:
        """What runs on a device, and why. Raises ValueError as `choose_backend` does."""
        return choose_backend(self.requested, device_type, family=self.family)

    def backend_for(self, x: Tensor) -> str:
        """What runs for x. Kernels compute in float32, so float64 is plain torch.

        While torch.compile traces, "auto" and "compile" are plain torch too: it fuses them with
        their neighbours, which it cannot do with a kernel of ours. A kernel that was asked for by
        name is taken there without another look at the machine.
        """
        requested = self.requested
        if requested == "eager" or x.dtype == torch.float64:
            return "eager"
        if torch.compiler.is_compiling():
            return requested if requested in KERNELS else "eager"
        return self.choice(x.device.type).name
