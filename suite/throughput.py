"""How fast a run trains: steps and units a second, and the share of the device that is used."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import PassThroughProfiler

from suite.flops import peak_flops
from suite.module import Observer, SuiteModule


class Throughput(Callback, Observer):
    """Steps and units a second between logged windows, without validation and without the first
    window.

    The first window holds compilation and cache warm-up, so it is logged but kept out of the
    summary. Where the task says what a unit takes (SuiteModule.flops_per_unit) and the device is
    known (suite.flops), also the share of its arithmetic that is used, `throughput/mfu`.
    """

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.windows = 0
        self.units, self.steps, self.seconds = 0.0, 0, 0.0
        self.peak: float | None = None
        self.flops: float | None = None
        self._busy, self._steps, self._since = 0.0, 0, 0.0

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        of_unit: Any = getattr(module, "flops_per_unit", None)
        peak = peak_flops(module.device, str(trainer.precision))
        self.flops = None if of_unit is None else of_unit / trainer.world_size
        self.peak = peak

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._since:
            self._since = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        now = time.perf_counter()
        self._busy += now - self._since
        self._since = now
        self._steps += int((batch_idx + 1) % trainer.accumulate_grad_batches == 0)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._since = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._since = 0.0

    def on_window(self, module: SuiteModule, values: dict[str, float], units: float) -> None:
        if self._steps and self._busy > 0:
            values[f"throughput/{self.unit}_per_s"] = units / self._busy
            values["throughput/step_ms"] = 1e3 * self._busy / self._steps
            if self.flops is not None and self.peak is not None:
                values["throughput/mfu"] = units * self.flops / self._busy / self.peak
            if self.windows:
                self.units, self.steps = self.units + units, self.steps + self._steps
                self.seconds += self._busy
            self.windows += 1
        self._busy, self._steps = 0.0, 0

    def summary(self) -> dict[str, Any]:
        """For result.json."""
        known = self.seconds > 0
        per_s = self.units / self.seconds if known else None
        of_peak = per_s is not None and self.flops is not None and self.peak is not None
        return {
            "unit": self.unit,
            "per_s": per_s,
            "step_ms": 1e3 * self.seconds / self.steps if known else None,
            "mfu": per_s * self.flops / self.peak if of_peak else None,  # type: ignore[operator]
        }


class NoProfiler(PassThroughProfiler):
    """No profiler, without the 67 generator contexts a step that Lightning's would open."""

    _shared = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        return self._shared
