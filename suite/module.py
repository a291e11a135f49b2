"""The step contract: a task writes `step`, this module turns its sums into exact means.

A task returns a *sum* and a *count* (examples, masked frames, tokens). The mean that is optimised
is over all ranks and all accumulation steps: counts are all-reduced and the gradients rescaled
once, together with clipping. So one process with batch B equals two with B/2, for every task, and
no task writes a collective. Nothing here knows a domain.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import MetricCollection

from suite.backends import Row
from suite.data import DataInfo, Split, SuiteDataModule, batches_done
from suite.errors import ConfigError, DataError
from suite.norms import calibrate, check_compatible, norm_modules
from suite.optim import build_optimizer, schedule, warmup_steps
from suite.randomness import derive
from suite.ranks import world_size
from suite.resumption import Resumption
from suite.sharding import Sharding, local, total_over_ranks
from suite.sums import Number, StepOutput, Sums, means

if TYPE_CHECKING:
    from suite.settings import OptimConfig

Batch = dict[str, Tensor]


class Observer:
    """A callback that looks at gradients or adds to a window of logged values."""

    def on_gradients(self, module: SuiteModule, norm: Tensor) -> None:
        """After the all-reduce, before the update. norm: 0-dim global gradient norm."""

    def on_window(self, module: SuiteModule, values: dict[str, float], units: float) -> None:
        """Before a window of steps is logged. values: what will be logged, to be added to."""


def total_norm(grads: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, 0-dim.

    torch.nn.utils.get_total_norm sorts them by device and type first, which is 0.1 ms a step.
    """
    if not grads:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))


class SuiteModule(L.LightningModule):
    """One level above a task: optimisation, exact means, logging, the checkpoint's identity.

    model: the network. options: the task's own settings. info: of the data.
    optim: the optimizer's settings. identity: plain dict that travels in every checkpoint (task,
    model, norm, resolved config). nominal: examples of one micro-batch of one process, which scales
    the loss to about 1 before the exact rescaling. steps_per_epoch: optimizer steps of an epoch.
    padded: whether training batches may hold rows that are not valid.
    folder: where a task may leave files beside the result; None where nothing is written.
    asked_to_stop: numbers for the signals that this process got. stop_flags, step_loss: their sums
    over all processes, and the loss's, of the optimizer step under way.
    backends: what the norms compute with. saving: a context for the forward pass of training, which
    decides what is kept for the backward (norm.recompute).
    sharding: how `model`, then without values, is cut over the processes; None: it is whole.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        options: Any,
        info: DataInfo,
        optim: OptimConfig,
        identity: Mapping[str, Any],
        seed: int,
        nominal: int,
        steps_per_epoch: int = 1,
        padded: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.options, self.info, self.optim = model, options, info, optim
        self.identity, self.seed, self.nominal = dict(identity), seed, nominal
        self.steps_per_epoch, self.padded = steps_per_epoch, padded
        self.split_metrics = nn.ModuleDict(
            {s: self.metrics().clone(prefix=f"{s}/") for s in ("val", "test")}
        )
        self.window, self.epoch_totals = Sums(), {"loss": 0.0, "_count": 0.0}
        self.eval_sums: dict[str, Sums] = {"val": Sums(), "test": Sums()}
        self.latest: dict[str, float] = {}
        self.train_loss: float | None = None
        self.resumption = Resumption()
        self.batch: Batch | None = None
        self.folder: Path | None = None
        self.sharding: Sharding | None = None
        self.backends: Counter[Row] = Counter()
        self.saving: AbstractContextManager[Any] = nullcontext()
        self.step_loss: Number = 0.0
        self.asked_to_stop: Callable[[], list[float]] = list
        self.stop_flags: Tensor | None = None
        self._step_count: Number = 0
        self._step_loss: Number = 0.0
        self._grad_norm: Tensor | None = None
        self._lr = 0.0
        self._logged_step = 0

    def __setattr__(self, name: str, value: Any) -> None:
        """Lightning notes the running hook 46 times a step: not through nn.Module's checks."""
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    carried: tuple[str, ...] = ()  # a task's own sums over a window: lists of tensors

    # -- what a task writes ---------------------------------------------------------------------

    @abstractmethod
    def step(self, batch: Batch, split: Split) -> StepOutput:
        """Loss and metric inputs of one batch."""

    def metrics(self) -> MetricCollection:
        """Fresh metric objects for a whole validation or test set."""
        return MetricCollection({})

    @property
    def initialises(self) -> bool:
        """Whether `initialise` would do anything, so that a batch has to be read for it."""
        return any(getattr(norm, "to_calibrate", False) for _, norm in norm_modules(self.model))

    def initialise(self, batch: Batch) -> dict[str, float]:
        """Data-dependent initialisation from one fixed batch, the same on every rank.

        Returns the calibrated alpha of each point-wise norm (empty where none asks for it).
        """
        return calibrate(self.model, lambda: self.step(batch, "val"))

    def frozen(self) -> Iterable[nn.Parameter]:
        """Parameters that this update leaves alone, though the backward pass reaches them.

        Their gradient is thrown away after the all-reduce, so that neither moments nor weight decay
        move them.
        """
        return ()

    def window_metrics(self) -> dict[str, float]:
        """What is logged of a window of training besides means; every process calls it."""
        return {}

    def after_evaluation(self, split: Split, values: dict[str, float]) -> None:
        """With the metrics of a whole split, the same on every process; may add to `values`."""

    @property
    def flops_per_unit(self) -> float | None:
        """Floating-point operations that one unit of throughput takes in training, if known."""
        return None

    @property
    def updates(self) -> int:
        """Optimizer steps that were taken; 0 outside a trainer."""
        return 0 if self._trainer is None else int(self._trainer.global_step)

    def configure_model(self) -> None:
        """Cut the model where that was asked for; Lightning calls it before every run."""
        if self.sharding is not None:
            mesh = self.device_mesh
            assert mesh is not None
            device = self.trainer.strategy.root_device
            self.sharding.apply(self.model, mesh=mesh["data_parallel"], device=device)

    # -- training -------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        callbacks: Iterable[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        self.observers = [c for c in callbacks if isinstance(c, Observer)]

    def on_train_start(self) -> None:
        self.resumption.settle(self)

    def on_train_epoch_start(self) -> None:
        self.epoch_totals = {"loss": 0.0, "_count": 0.0}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Dropout becomes a function of (seed, position, rank): nothing to save or restore."""
        seed = derive(self.seed, "step", batches_done(self.trainer), self.global_rank)
        torch.default_generator.manual_seed(
            seed
        )  # torch.manual_seed formats three stack traces a call
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.batch = batch
        with self.saving:
            out = self.step(batch, "train")
        self.window.add(out)
        count = out.count.detach() if isinstance(out.count, Tensor) else out.count
        self._step_count = self._step_count + count
        self._step_loss = self._step_loss + out.loss_sum.detach()
        return out.loss_sum / self.nominal

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | int | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Gradients of the exact global mean, their norm, and clipping, in one pass over them."""
        for parameter in self.frozen():
            parameter.grad = None
        held = [p.grad for g in optimizer.param_groups for p in g["params"]]
        grads = [local(grad) for grad in held if grad is not None]
        self._lr = optimizer.param_groups[0]["lr"]
        scale = self._exact_scale()
        norm = total_norm(grads)
        if self.sharding is not None:
            norm = total_over_ranks(norm)
        norm = norm * scale
        self._grad_norm = norm
        for observer in self.observers:
            observer.on_gradients(self, norm)
        if gradient_clip_val is not None and gradient_clip_algorithm != "value":
            scale = scale * torch.clamp(gradient_clip_val / (norm + 1e-6), max=1.0)
        if norm.device.type != "cpu" or float(scale) != 1.0:
            torch._foreach_mul_(grads, scale)
        if gradient_clip_val is not None and gradient_clip_algorithm == "value":
            torch._foreach_clamp_min_(grads, -gradient_clip_val)
            torch._foreach_clamp_max_(grads, gradient_clip_val)

    def _exact_scale(self) -> Tensor | float:
        """From the scaling that autograd, Lightning and DDP applied to that of the global mean.

        They give sum / (nominal * accumulate * world). Where reading it makes wait, a 0-dim tensor.
        """
        count, world = self._share_step(), world_size()
        applied = self.nominal * self.trainer.accumulate_grad_batches * world
        if isinstance(count, Tensor) and count.device.type != "cpu":
            return applied / count.clamp(min=1e-12)
        return applied / max(float(count), 1e-12)

    def _share_step(self) -> Number:
        """This step's count over all processes, with its loss and stop_flags in one collective."""
        count, loss = self._step_count, self._step_loss
        self._step_count, self._step_loss = 0, 0.0
        if world_size() > 1:
            own = [torch.as_tensor(v, device=self.device).float() for v in (count, loss)]
            asked = torch.tensor(self.asked_to_stop(), device=self.device)
            shared = torch.cat([torch.stack(own), asked])
            dist.all_reduce(shared)
            count, loss, self.stop_flags = shared[0], shared[1], shared[2:]
        self.step_loss = loss
        return count

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.log_if_due()

    def log_if_due(self) -> None:
        """Log the window if it ends with this step and has not been logged."""
        step, every = self.trainer.global_step, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step > self._logged_step and (step == 1 or (every and step % every == 0)):
            self._flush(step)

    def on_train_epoch_end(self) -> None:
        self._flush(self.trainer.global_step)
        if self.batch is not None and not self.epoch_totals["_count"]:
            raise DataError("no training example of this epoch could be read: see the warnings")
        if self.epoch_totals["_count"]:
            self.train_loss = self.epoch_totals["loss"] / self.epoch_totals["_count"]
        self.resumption.closed = batches_done(self.trainer)

    def _flush(self, step: int) -> None:
        """Log the steps since the last window, with one transfer from the device."""
        self._logged_step = step
        totals = self.window.totals(self.device)
        for name in self.epoch_totals:
            self.epoch_totals[name] += totals.get(name, 0.0)
        if not totals.get("_count"):
            return  # nothing since then, or every step was left out, or no row could be read
        values = {f"train/{k}": v for k, v in means(totals).items()}
        if self._grad_norm is not None:
            values["grad_norm"] = float(self._grad_norm)
            values["lr"] = self._lr
        values.update({f"train/{k}": v for k, v in self.window_metrics().items()})
        for observer in self.observers:
            observer.on_window(self, values, totals["_units"])
        self.latest = values
        self._write(values, step=step)

    def _write(self, values: Mapping[str, float], *, step: int) -> None:
        """To every logger, with the number of optimizer steps that were taken."""
        for logger in self.trainer.loggers:
            logger.log_metrics({**values, "epoch": self.current_epoch}, step=step)

    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run; None without max_epochs and max_steps.

        Not Lightning's estimate, which starts the data loader before a resumed position is
        restored.
        """
        limits = []
        if self.trainer.max_steps != -1:
            limits.append(self.trainer.max_steps)
        if self.trainer.max_epochs not in (None, -1):
            limits.append(self.trainer.max_epochs * self.steps_per_epoch)
        return min(limits) if limits else None

    def configure_optimizers(self) -> Any:
        total = self.total_steps()
        if total is None and self.optim.schedule != "constant":
            raise ConfigError(
                f"optim.schedule={self.optim.schedule} needs to know the number of steps: "
                "set trainer.max_epochs or trainer.max_steps, or optim.schedule=constant"
            )
        total = total or 1
        fused = self.optim.fused
        if fused is None:
            fused = self.device.type == "cuda" and self.trainer.precision != "16-mixed"
        optimizer = build_optimizer(self.model, self.optim, fused=fused)
        warmup = warmup_steps(self.optim, total=total, per_epoch=self.steps_per_epoch)
        factor = schedule(self.optim, total=total, warmup=warmup)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    # -- evaluation -----------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, split: Split) -> None:
        out = self.step(batch, split)
        self.eval_sums[split].add(out)
        # of a wholly padded batch no row is left, which metric objects do not take
        rows = [len(v) for v in out.metric_inputs.values() if isinstance(v, Tensor) and v.dim()]
        if out.metric_inputs and (not rows or max(rows)):
            self.split_metrics[split].update(**out.metric_inputs)  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_validation_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.resumption.validated = batches_done(self.trainer)

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _log_evaluation(self, split: Split) -> None:
        """Exact over ranks: sums are all-reduced and metric objects sync their states
        themselves."""
        totals = self.eval_sums[split].totals(self.device)
        values = {f"{split}/{k}": v for k, v in means(totals).items()}
        values[f"{split}/count"] = totals.get("_count", 0.0)
        collection: Any = self.split_metrics[split]
        if len(collection):
            values.update({k: float(v) for k, v in collection.compute().items()})
            collection.reset()
        self.after_evaluation(split, values)
        tensors = {k: torch.tensor(v, dtype=torch.float32) for k, v in values.items()}
        self.log_dict(tensors, logger=False)  # for checkpoints and callbacks
        if not self.trainer.sanity_checking:
            self._write(values, step=self.trainer.global_step)

    # -- the checkpoint's identity --------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["suite"] = self.identity
        self.resumption.save(self, checkpoint)
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, SuiteDataModule) and data.skips:
            data.gather_unreadable()
            checkpoint["suite_unreadable"] = {s: sorted(i) for s, i in data.unreadable.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("suite")
        if not isinstance(saved, Mapping):
            raise ConfigError(
                "the checkpoint was not written by this suite; use model.init_from=FILE for weights"
            )
        try:
            check_compatible(saved["norm"], self.identity["norm"])
        except ValueError as error:
            raise ConfigError(str(error)) from error
        for split, ids in checkpoint.get("suite_unreadable", {}).items():
            self.trainer.datamodule.unreadable[split].update(ids)  # type: ignore[attr-defined]
        self.resumption.load(self, checkpoint)
