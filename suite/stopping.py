"""All processes of a run stop after the same step, and save before they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from suite.errors import Stopped
from suite.module import SuiteModule
from suite.ranks import world_size
from suite.signals import ENDING, Signals


class StopTogether(Callback):
    """Ends the run where a process was sent a signal, with a checkpoint at `path`.

    What a signal handler noted goes along with the all-reduce of every optimizer step; in a
    validation, which may be long and whose batches are of equal number everywhere, it has a small
    one of its own. A GPU's copy of the sum is read a step later, so that nobody waits for it.
    path: None saves nothing.
    """

    def __init__(self, signals: Signals, path: Path | None = None) -> None:
        self.signals, self.path = signals, path
        self._step = 0
        self._late: tuple[Any, Tensor] | None = None

    def asked(self) -> list[float]:
        """One number a signal of ENDING: 1 for the one that came."""
        return [float(self.signals.number == number) for number in ENDING]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, SuiteModule)
        module.asked_to_stop = self.asked
        self._step = trainer.global_step
        self.signals.held = True
        if world_size() == 1:
            self.signals.check()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        if trainer.global_step == self._step:
            return  # in the middle of an accumulation
        self._step = trainer.global_step
        self._act(trainer, self._noted(module.stop_flags))

    def on_validation_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        if not self.signals.held or trainer.sanity_checking:
            return
        flags = torch.tensor(self.asked(), device=module.device)
        if world_size() > 1:
            dist.all_reduce(flags)
        self._act(trainer, flags.tolist())

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """What follows needs no agreement: the last checkpoint is written."""
        if self.signals.number is not None:
            raise Stopped(self.signals.number, self.path)
        self.signals.held = False
        self.signals.check()

    def on_exception(self, trainer: L.Trainer, module: Any, exception: BaseException) -> None:
        """A second signal, of a launcher or at the end of a warning, must not cut the end short."""
        self.signals.held = isinstance(exception, Stopped)

    def _noted(self, flags: Tensor | None) -> list[float]:
        """The signals of all processes, of the step before on a GPU."""
        if world_size() == 1 or flags is None:
            return self.asked()
        if flags.device.type == "cpu":
            return flags.tolist()
        before, held = self._late, torch.empty(flags.shape, pin_memory=True)
        held.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._late = (event, held)
        if before is None:
            return []
        before[0].synchronize()
        return before[1].tolist()

    def _act(self, trainer: L.Trainer, flags: list[float]) -> None:
        number = next((n for n, count in zip(ENDING, flags, strict=False) if count), None)
        if number is None:
            return
        if self.path is not None:
            trainer.save_checkpoint(self.path)
        raise Stopped(number, self.path)
