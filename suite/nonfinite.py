"""Non-finite values: one rule for all processes, whether a step counts, and who is to blame.

By default Lightning trains on over a NaN and ends with exit code 0 and weights that are all NaN
(measured). Here the loss and the gradient norm are looked at after the all-reduce, so that every
process decides alike without asking the others. On a GPU nobody waits for the answer: the device
itself leaves the update out (`found_inf`, which torch's fused optimizers take from GradScaler) and
the host reads the flag a step later. suite.culprits says who it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from suite.culprits import Suspect, blame
from suite.data import batches_done
from suite.ema import WeightEMA
from suite.errors import DivergedError
from suite.module import Observer, SuiteModule
from suite.ranks import world_size
from suite.sharding import local
from suite.train import say

POLICIES = ("stop", "skip")
DESCRIBED = 10  # skipped steps that are repeated to find the culprit, and that are remembered


class NonFiniteGuard(Callback, Observer):
    """Ends a run on a non-finite loss or gradient, or leaves that update out; saves no such weight.

    policy: "stop" raises DivergedError with the same text on every process; "skip" leaves weights,
    moments, step counters and running statistics as they were, while schedule and position go on,
    until more than `limit` steps of the whole run were left out. The GradScaler of 16-mixed skips
    such steps by design; two windows of them in a row are too many, under either policy.
    """

    def __init__(self, policy: str = "stop", *, limit: int = 10) -> None:
        assert policy in POLICIES, policy
        self.policy, self.limit = policy, limit
        self.skipped, self.steps = 0, list[int]()
        self._first: int | None = None  # the position of the step's first micro-batch
        self._pending: tuple[SuiteModule, Flag, Suspect] | None = None
        self._latest: Suspect | None = None
        self._before = Before()
        self._constants: set[str] = set()
        self._scaled, self._bad_windows = False, 0

    def summary(self) -> dict[str, Any]:
        """What a run's record says of it."""
        return {"policy": self.policy, "skipped": self.skipped, "steps": list(self.steps)}

    # -- the step -------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._scaled = trainer.precision == "16-mixed"

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, SuiteModule)
        self._first, self._pending, self._before = None, None, Before()
        buffers = dict(module.named_buffers())
        self._constants = set(nonfinite(buffers))  # a mask of -inf is meant to be so

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._first is None:
            assert isinstance(module, SuiteModule)
            self._first = batches_done(trainer)
            if self.policy == "skip" and not self._scaled:
                self._before.take(module)

    def on_gradients(self, module: SuiteModule, norm: Tensor) -> None:
        suspect = self._suspect(module, seen=not self._waits(norm))
        self._latest, self._first = suspect, None
        if self._scaled:
            return
        self._settle()
        loss = torch.as_tensor(module.step_loss, device=norm.device)
        bad = ~(norm.isfinite() & loss.isfinite())
        optimizers = module.trainer.optimizers
        if self._waits(norm) and gate(optimizers, bad):
            if self.policy == "skip":
                self._before.put_back(module, where=bad)
            self._pending = (module, Flag(bad), suspect)
        elif bool(bad):
            for parameter in parameters_of(optimizers):
                parameter.grad = None  # which every optimizer leaves alone
            self._found(module, suspect)
            self._before.put_back(module)

    @staticmethod
    def _waits(norm: Tensor) -> bool:
        """Whether reading `norm` would make the host wait for the device."""
        return norm.device.type == "cuda"

    def _suspect(self, module: SuiteModule, *, seen: bool) -> Suspect:
        last = batches_done(module.trainer)
        first = last if self._first is None else self._first
        return Suspect(
            step=module.trainer.global_step + 1,
            epoch=module.current_epoch,
            positions=range(first, last + 1),
            last=module.batch if seen else None,  # of a device it would hold memory
        )

    def _settle(self) -> None:
        """Read the flag of the last step, if it has not been."""
        pending, self._pending = self._pending, None
        if pending is not None:
            module, flag, suspect = pending
            if flag.read():
                self._found(module, suspect)

    def _found(self, module: SuiteModule, suspect: Suspect) -> None:
        if self.policy == "stop":
            raise DivergedError(blame(module, suspect))
        self.skipped += 1
        self.steps = [*self.steps, suspect.step][:DESCRIBED]
        if self.skipped > self.limit:
            raise DivergedError(
                f"{blame(module, suspect)}; it is the {self.skipped}th update of this run to be "
                f"left out, run.nonfinite_limit={self.limit} allows {self.limit}"
            )
        if self.skipped > DESCRIBED:
            text = f"non-finite loss or gradient at step {suspect.step}"
        else:
            text = blame(module, suspect, advice=False)
        say(f"warning: {text}; this update is left out ({self.skipped}, at most {self.limit})")

    # -- where the last step's flag has to be known ----------------------------------------------

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._settle()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._settle()
        forget(trainer.optimizers)

    def on_window(self, module: SuiteModule, values: dict[str, float], units: float) -> None:
        finite = math.isfinite(values["train/loss"])
        self._bad_windows = 0 if finite else self._bad_windows + 1
        if self._scaled and self._bad_windows == 2:
            step = module.trainer.global_step
            raise DivergedError(blame(module, self._latest or Suspect(step, module.current_epoch)))

    # -- what is saved ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        self._settle()  # Lightning asks for this before it calls on_save_checkpoint
        return {"skipped": self.skipped, "steps": list(self.steps)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.steps = state_dict["skipped"], list(state_dict["steps"])

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse weights, averages and moments that are not finite, before anything is written.

        Looked at where they are, not in `checkpoint`: that holds copies by now if they are cut over
        processes, and the average is put into it by a later callback.
        """
        self._settle()
        bad = nonfinite(self._to_be_saved(trainer, module))
        if world_size() > 1:
            everyone: list[Any] = [None] * world_size()
            dist.all_gather_object(everyone, bad)
            bad = [name for theirs in everyone for name in theirs]
        if bad:
            listed = ", ".join(list(dict.fromkeys(bad))[:4])
            raise DivergedError(
                f"non-finite values at step {trainer.global_step} in {listed}: nothing was saved, "
                "the checkpoint before this one stays. Go on from it with run.resume and a lower "
                "optim.lr or trainer.gradient_clip_val=1"
            )

    def _to_be_saved(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Tensor]:
        weights = module.state_dict(keep_vars=True)
        held = {n: t for n, t in weights.items() if n not in self._constants}
        callbacks: Iterable[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, WeightEMA):
                average = {n: t for n, t in callback.held.items() if n not in self._constants}
                held.update({f"the average of {n}": t for n, t in average.items()})
        names = {id(p): n for n, p in module.named_parameters()}
        for optimizer in trainer.optimizers:
            for parameter, moments in optimizer.state.items():
                name = names.get(id(parameter), "a parameter")
                tensors = {k: v for k, v in moments.items() if isinstance(v, Tensor)}
                held.update({f"{key} of {name}": value for key, value in tensors.items()})
        return held


class Flag:
    """A truth value that a device is still working out, to be read later without waiting."""

    def __init__(self, value: Tensor) -> None:
        self._event: Any = None
        if value.device.type == "cuda":
            self._value = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._value = value.clone()

    def read(self) -> bool:
        """The value."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._value)


def gate(optimizers: Iterable[Any], bad: Tensor) -> bool:
    """Let the device leave the next update out where `bad`; False if an optimizer cannot."""
    chosen = list(optimizers)
    forget(chosen)
    if not all(getattr(o, "_step_supports_amp_scaling", False) for o in chosen):
        return False
    if any(lacks_momentum(o) for o in chosen):
        return False
    for optimizer in chosen:
        optimizer.found_inf = bad.float()
    return True


def forget(optimizers: Iterable[Any]) -> None:
    """Take back what `gate` has told them: it was of one update."""
    for optimizer in optimizers:
        vars(optimizer).pop("found_inf", None)


def lacks_momentum(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this would be SGD's first step of a parameter.

    torch's fused SGD makes the momentum without values and leaves it so if that step is left out:
    the next step takes whatever was in memory (seen with 2.14's CPU kernel).
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return False
    moved = [p for g in optimizer.param_groups if g["momentum"] for p in g["params"]]
    started = (optimizer.state.get(p, {}).get("momentum_buffer") is not None for p in moved)
    return not all(ok or p.grad is None for p, ok in zip(moved, started, strict=True))


def parameters_of(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[Any]:
    """All that they move."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from group["params"]


class Before:
    """What a forward pass of training changes besides gradients, as it was before the step.

    The buffers (running statistics), all of them, since a version counter does not tell which were
    written to: torch's batch norm leaves its own alone. And the sums that will be logged, the
    module's and those of its `carried`, which a NaN would spoil; none of them is changed in place.
    """

    def __init__(self) -> None:
        self.alike: list[Alike] | None = None
        self.sums: dict[str, Any] = {}
        self.carried: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def take(self, module: SuiteModule) -> None:
        """Remember it."""
        self.sums = dict(module.window.values)
        self.carried = {name: list(getattr(module, name)) for name in module.carried}
        if self.alike is None:
            found = [b for b in module.model.buffers() if writable(b)]
            kinds = {(b.dtype, b.device) for b in found}
            self.alike = [Alike([b for b in found if (b.dtype, b.device) == k]) for k in kinds]
        for buffers in self.alike:
            torch._foreach_copy_(buffers.then_parts, buffers.held)

    @torch.no_grad()
    def put_back(self, module: SuiteModule, *, where: Tensor | None = None) -> None:
        """All as it was. where: 0-dim, whether to, on the device, so that nobody waits for it."""
        if where is None:
            module.window.values = dict(self.sums)
        else:
            for name, value in module.window.values.items():
                module.window.values[name] = torch.where(where, self.sums.get(name, 0), value)
        for name, then in self.carried.items():
            now = then if where is None else chosen(where, then, getattr(module, name))
            setattr(module, name, list(now))
        for buffers in self.alike or []:
            if where is None:
                torch._foreach_copy_(buffers.held, buffers.then_parts)
                continue
            torch._foreach_copy_(buffers.now_parts, buffers.held)
            torch.where(where, buffers.then, buffers.now, out=buffers.now)
            torch._foreach_copy_(buffers.held, buffers.now_parts)


def chosen(where: Tensor, then: list[Tensor], now: list[Tensor]) -> list[Tensor]:
    """`then` where that is true, else `now`. An empty list stands for zeros."""
    before = then or [torch.zeros_like(value) for value in now]
    return [torch.where(where, a.to(b.device), b) for a, b in zip(before, now, strict=True)]


def writable(buffer: Tensor) -> bool:
    """Whether each of its values has a place of its own: others are never written to."""
    sizes = zip(buffer.shape, buffer.stride(), strict=True)
    return all(stride or size < 2 for size, stride in sizes)


class Alike:
    """Buffers of one type, and room for their values before a step and after, in one piece each:
    a choice between the two is then one operation for all of them.
    """

    def __init__(self, held: list[Tensor]) -> None:
        self.held = held
        self.then, self.then_parts = self._room()
        self.now, self.now_parts = self._room()

    def _room(self) -> tuple[Tensor, list[Tensor]]:
        sizes = [b.numel() for b in self.held]
        flat = self.held[0].new_empty(sum(sizes))
        parts = zip(flat.split(sizes), self.held, strict=True)
        return flat, [part.view(buffer.shape) for part, buffer in parts]


@torch.no_grad()
def nonfinite(tensors: dict[str, Tensor]) -> list[str]:
    """The names of those that hold a NaN or an infinity, with one reading a device and no copies.

    A sum is never finite over such a value; one that overflowed is looked at again.
    """
    floats = {n: local(t) for n, t in tensors.items() if t.is_floating_point() or t.is_complex()}
    floats = {n: t for n, t in floats.items() if t.numel() and not t.is_meta}
    if not floats:
        return []
    suspects = set[str]()
    for device in {t.device for t in floats.values()}:  # AdamW's counters may be on the CPU
        here = {n: t for n, t in floats.items() if t.device == device}
        sums = torch.stack([~t.sum().isfinite() for t in here.values()])
        suspects |= {n for n, bad in zip(here, sums.tolist(), strict=True) if bad}
    return [n for n in floats if n in suspects and not floats[n].isfinite().all()]
