"""What the norms of a run compute with: resolved before it starts, proved by its first step.

A fused path that leaves a norm out, or a kernel that silently falls back, is what makes people
distrust a comparison. So the choice is said for every norm with its reason, and the kernels that
the first training step has started are counted (suite.norms.kernels.launches) and written into
result.json.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from suite.config import Config
from suite.errors import ConfigError
from suite.norms import norm_modules
from suite.norms.kernels import KERNELS, launches
from suite.norms.kernels.chosen import Chosen
from suite.norms.recompute import Recompute, recompute_norms
from suite.sharding import NAME as SHARDED

Row = tuple[str, str, str]  # norm, backend, why


def backends(model: nn.Module, device: torch.device, *, compiled: bool) -> Counter[Row]:
    """How many norms of `model` run with which backend on `device`, and why.

    compiled: whether the model is under torch.compile. Kernels are built, loaded and tried out
    here, where that is needed. Raises ConfigError for one that was asked for and cannot run.
    """
    found: Counter[Row] = Counter()
    # a kernel is tried out on the process's own GPU, not on the first
    here = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    for _, norm in norm_modules(model):
        name = str(norm.norm_name)
        if not isinstance(norm, Chosen):
            found[name, "eager", "it has no other"] += 1
        elif compiled and norm.requested not in KERNELS:
            found[name, "compile", "fused by torch.compile of the model"] += 1
        else:
            try:
                with here:
                    choice = norm.choice(device.type)
            except ValueError as error:
                raise ConfigError(f"norm.{error}") from error
            found[name, choice.name, choice.why] += 1
    return found


def backend_lines(found: Counter[Row]) -> list[str]:
    """One line for each kind: `9 dyt: triton (agrees with the formula here)`."""
    return [f"{n} {norm}: {backend} ({why})" for (norm, backend, why), n in found.items()]


def recomputing(config: Config, model: nn.Module) -> Recompute:
    """The context of norm.recompute. Raises ConfigError where it could do nothing, or harm."""
    if config.trainer.strategy == SHARDED:
        raise ConfigError(
            f"norm.recompute with trainer.strategy={SHARDED}: a norm's weights are only gathered "
            "while its block runs; take model.checkpoint=true, which gathers them again"
        )
    if config.run.compile:
        raise ConfigError(
            "norm.recompute with run.compile: torch.compile chooses by itself what it computes "
            "again, point-wise norms first of all; leave one of the two out"
        )
    return recompute_norms(model)


class BackendProof(Callback):
    """Counts the kernels that the first training step starts; warns if none of a chosen one did."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self.warn = warn
        self.chosen: Counter[Row] = Counter()
        self.started: dict[str, int] | None = None
        self._before: Counter[str] = Counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.started is None:
            self._before = launches()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self.started is not None:
            return
        self.started = dict(launches() - self._before)
        for norm, backend, _ in self.chosen:
            ran = any(kernel.startswith(f"{backend}.") for kernel in self.started)
            if backend in KERNELS and not ran:
                self.warn(
                    f"{norm}: no kernel of {backend} was started in the first step, so it was "
                    "computed by other means (float64 is plain torch)"
                )

    def summary(self) -> dict[str, Any]:
        """For result.json. started: kernels of the first step; null without one."""
        layers: Counter[str] = Counter()
        for (_, backend, _), count in self.chosen.items():
            layers[backend] += count
        return {"layers": dict(layers), "started": self.started}
