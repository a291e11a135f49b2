"""What makes a checkpoint resume exactly, whichever hook it was written in.

Lightning restarts its loops where they stood, and there are corners in which that is not what an
uninterrupted run does: a checkpoint from the last batch of an epoch skips the validation and the
epoch's end, one from the middle of a validation goes on with a part of it, and an epoch that was
cut short counts as a whole one. Here the counters are rebuilt from one number, the micro-batches
that were trained on; beside it stand the last whole validation and the last closed epoch, and what
an uninterrupted run would have done since is done before the next batch. A validation that was
broken off is repeated as a whole. Randomness is addressed, so there is none to restore.

It follows lightning/pytorch/loops/{fit_loop,training_epoch_loop,evaluation_loop}.py, the same from
2.6.4 to 2.6.6.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from suite.data import batches_done
from suite.errors import ConfigError
from suite.metrics import JsonlLogger, is_main_process
from suite.ranks import world_size

if TYPE_CHECKING:
    from suite.module import SuiteModule

KEY = "suite_progress"


class Resumption:
    """Where a run stands beside its position, and how it comes back there.

    validated, closed: micro-batches of the run after which the last whole validation ended, and the
    last epoch, whole or cut short.
    """

    def __init__(self) -> None:
        self.validated = 0
        self.closed = 0
        self._loaded: Mapping[str, Any] | None = None
        self._limits: tuple[int | None, int] | None = None

    def save(self, module: SuiteModule, checkpoint: dict[str, Any]) -> None:
        """Add what a resumed run needs; every process has to call it."""
        module.log_if_due()  # a callback's hook comes before the module's, which would do it
        norm = module._grad_norm
        checkpoint[KEY] = {
            "position": batches_done(module.trainer),
            "epoch_batches": epoch_batches(module),
            "validated": self.validated,
            "closed": self.closed,
            "windows": from_all_ranks(
                {"sums": on_cpu(module.window.values)}
                | {name: on_cpu(getattr(module, name)) for name in module.carried}
            ),
            "epoch_totals": dict(module.epoch_totals),
            "train_loss": module.train_loss,
            "logged_step": module._logged_step,
            "grad_norm": None if norm is None else float(norm),
            "lr": module._lr,
            "metrics_bytes": {
                log.path.name: log.path.stat().st_size
                for log in json_logs(module)
                if log.path.is_file()
            },
        }

    def load(self, module: SuiteModule, checkpoint: dict[str, Any]) -> None:
        """Put the loops' counters where the position is. Raises ConfigError for another epoch."""
        loops = checkpoint["loops"]["fit_loop"]
        done = int(loops["epoch_loop.batch_progress"]["total"]["processed"])
        older = {"position": done, "validated": done, "closed": done}  # of before there was a key
        found = {**older, **checkpoint.get(KEY, {})}
        batches = epoch_batches(module)
        if found.get("epoch_batches", batches) != batches:
            raise ConfigError(
                f"run.resume: an epoch of this run had {found['epoch_batches']} batches and has "
                f"{batches} here, so that its position means other examples; resume with the data "
                "that it began with, or start a new run with model.init_from"
            )
        # in the middle of an accumulation the weights are those of the step before it
        position = found["position"]
        position -= position % module.trainer.accumulate_grad_batches
        self.validated, self.closed, self._loaded = found["validated"], found["closed"], found
        place(loops, position, batches=batches, closed=self.closed == position)
        module.epoch_totals.update(found.get("epoch_totals", {}))
        module.train_loss = found.get("train_loss")

    def lift_limits(self, trainer: Any) -> None:
        """Let the loop of a resumed run begin, even at max_epochs or max_steps.

        It would return at once, with the hooks of training's end not called and what is pending not
        done. `settle` puts the limits back.
        """
        if self._loaded is not None and self._limits is None:
            loop = trainer.fit_loop
            self._limits = (loop.max_epochs, loop.epoch_loop.max_steps)
            loop.max_epochs, loop.epoch_loop.max_steps = -1, -1

    def settle(self, module: SuiteModule) -> None:
        """Before the first batch: do what an uninterrupted run would have done by now."""
        trainer: Any = module.trainer
        loop = trainer.fit_loop
        align_validations(trainer)
        if self._limits is not None:
            loop.max_epochs, loop.epoch_loop.max_steps = self._limits
            self._limits = None
        module._logged_step = trainer.global_step
        found, self._loaded = self._loaded, None
        if found is None:
            return
        restore_window(module, found)
        rewind_logs(module, found)
        loop.epoch_loop.val_loop.restarting = False
        if loop.epoch_loop.batch_progress.current.ready:
            self._validate_if_due(trainer)
            if not epoch_is_over(trainer):
                return  # Lightning's own restart goes on in the middle of it
            self._close(trainer)
        begin_afresh(loop)

    def _validate_if_due(self, trainer: Any) -> None:
        loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
        due = loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
        if due and self.validated != batches_done(trainer):
            first = connector._first_loop_iter
            trainer.validating = True
            loop.val_loop.run()
            trainer.training = True
            connector._first_loop_iter = first

    def _close(self, trainer: Any) -> None:
        """End the epoch; of one that had been cut short there, and goes on no further, the hooks
        have run already.
        """
        loop = trainer.fit_loop
        if self.closed != batches_done(trainer):
            loop.on_advance_end()
        else:
            loop.epoch_progress.increment_processed()
            loop.epoch_progress.increment_completed()


def epoch_batches(module: SuiteModule) -> int:
    """Micro-batches of an epoch."""
    return module.steps_per_epoch * int(module.trainer.accumulate_grad_batches)


def epoch_is_over(trainer: Any) -> bool:
    """Whether the loop that stands after a batch would take no other one in this epoch."""
    loop = trainer.fit_loop
    return bool(loop.epoch_loop._is_training_done or (trainer.should_stop and loop._can_stop_early))


def place(loops: dict[str, Any], position: int, *, batches: int, closed: bool) -> None:
    """Rewrite Lightning's counters: `position` batches are done, `batches` make an epoch.

    In the middle of an epoch it has begun and is not processed. On its last batch either, unless it
    is closed: then the next one has not begun. No validation is under way.
    """
    epochs, inside = divmod(position, batches)
    if epochs and not inside and not closed:
        epochs, inside = epochs - 1, batches
    begun = epochs + bool(inside)
    epoch = {"ready": begun, "started": begun, "processed": epochs, "completed": epochs}
    loops["epoch_progress"] = {"total": dict(epoch), "current": dict(epoch)}
    loops["epoch_loop.batch_progress"] = {
        "total": counted(position),
        "current": counted(inside),
        "is_last_batch": inside == batches,
    }
    none = {"total": counted(0), "current": counted(0), "is_last_batch": False}
    loops["epoch_loop.val_loop.batch_progress"] = none


def counted(number: int) -> dict[str, int]:
    """So many, all through every stage."""
    return dict.fromkeys(("ready", "started", "processed", "completed"), number)


def begin_afresh(loop: Any) -> None:
    """Make the next epoch one that was not restarted.

    The position of the loader's iterator is right already, so `is_resuming` stays.
    """
    for part in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
        part._restarting = False
        part.reset_restart_stage()


def align_validations(trainer: Any) -> None:
    """Validate after whole optimizer steps only: half an accumulation is in no checkpoint."""
    every, parts = trainer.val_check_batch, trainer.accumulate_grad_batches
    if isinstance(every, int) and every % parts:
        trainer.val_check_batch = max(parts, every - every % parts)


def from_all_ranks(own: Any) -> list[Any]:
    """What each process gives, by rank."""
    if world_size() == 1:
        return [own]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, own)
    return found


def on_cpu(value: Any) -> Any:
    """The same tensors and numbers on the CPU, as copies."""
    return moved(value, torch.device("cpu"))


def moved(value: Any, device: torch.device) -> Any:
    """Copies of tensors, alone or in lists and dicts, on a device."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, Mapping):
        return {name: moved(one, device) for name, one in value.items()}
    if isinstance(value, list):
        return [moved(one, device) for one in value]
    return value


def restore_window(module: SuiteModule, found: Mapping[str, Any]) -> None:
    """The sums since values were last logged: each process's own or, with another number of
    processes, all of them in the first.
    """
    windows: list[dict[str, Any]] = found.get("windows", [])
    if len(windows) == world_size():
        own = windows[module.global_rank]
    else:  # the same names everywhere: they are summed by collectives
        own = added(windows) if windows else {}
        own = own if module.global_rank == 0 else zeros(own)
    for name, value in moved(own, module.device).items():
        if name == "sums":
            module.window.values = value
        elif name in module.carried:
            setattr(module, name, value)
    module._logged_step = found.get("logged_step", module._logged_step)
    if found.get("grad_norm") is not None:
        module._grad_norm = torch.tensor(found["grad_norm"], dtype=torch.float64)
        module._lr = found["lr"]


def added(values: list[Any]) -> Any:
    """The sums of tensors and numbers at the same places of lists and dicts."""
    values = [v for v in values if not (isinstance(v, list | dict) and not v)] or values[:1]
    if isinstance(values[0], Mapping):
        names = dict.fromkeys(name for value in values for name in value)
        return {name: added([v[name] for v in values if name in v]) for name in names}
    if isinstance(values[0], list):
        return [added(list(column)) for column in zip(*values, strict=True)]
    return sum(values[1:], start=values[0])


def zeros(value: Any) -> Any:
    """0 in the place of every tensor and number of lists and dicts."""
    if isinstance(value, Mapping):
        return {name: zeros(one) for name, one in value.items()}
    if isinstance(value, list):
        return [zeros(one) for one in value]
    return torch.zeros_like(value) if isinstance(value, Tensor) else 0


def json_logs(module: SuiteModule) -> list[JsonlLogger]:
    """The run's files of rows, in the process that writes them."""
    loggers = module.trainer.loggers if is_main_process() else []
    return [logger for logger in loggers if isinstance(logger, JsonlLogger)]


def rewind_logs(module: SuiteModule, found: Mapping[str, Any]) -> None:
    """Take back what was logged after the checkpoint was written: it will be logged again."""
    sizes = found.get("metrics_bytes", {})
    for log in json_logs(module):
        if log.path.name in sizes and log.path.is_file():
            cut_lines(log.path, sizes[log.path.name])
    for logger in module.trainer.loggers:
        writer: Any = getattr(logger, "experiment", None)
        if type(writer).__module__.startswith("torch.utils.tensorboard"):
            writer.close()  # opened again with the next value, which it precedes with this mark
            writer.purge_step = module.trainer.global_step + 1


def cut_lines(path: Path, size: int) -> None:
    """Leave the first `size` bytes of a file of lines, and of these the whole lines."""
    with path.open("rb") as file:
        kept = file.read(size)
    whole = kept.rfind(b"\n") + 1
    if whole < path.stat().st_size:
        os.truncate(path, whole)
