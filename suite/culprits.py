"""Which rank, samples and sites a non-finite step comes from, by repeating its batches.

A batch and its dropout are functions of the position in training, so any micro-batch of the step
can be had again without being kept. Every process repeats as many forward passes as the others,
since a task or a cut model may have collectives in them, and tells the others what it found: all of
them then raise the same line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from suite.data import AddressedDataset, SuiteDataModule
from suite.errors import one_line
from suite.module import Batch, SuiteModule
from suite.norms import norm_modules
from suite.randomness import derive
from suite.ranks import from_first, world_size
from suite.saving import newest

T = TypeVar("T")
OF_ALL = "the loss"
ADVICE = "Lower optim.lr, set trainer.gradient_clip_val=1, or look at these samples"


@dataclass(frozen=True)
class Suspect:
    """A step that went wrong.

    positions: of its micro-batches. last: the last of them, where that costs no device memory.
    """

    step: int
    epoch: int
    positions: range = range(0)
    last: Batch | None = None


@dataclass
class Finding:
    """What one process saw. sites: in the order of the forward pass, empty if all is finite."""

    rank: int
    samples: list[int] = field(default_factory=list)
    sites: list[str] = field(default_factory=list)
    gradients: list[str] = field(default_factory=list)
    trouble: str | None = None


def blame(module: SuiteModule, suspect: Suspect, *, advice: bool = True) -> str:
    """One line, the same on every process, all of which have to call it.

    advice: add the last good checkpoint and what to do.
    """
    findings = gathered(investigate(module, suspect, gradients=False))
    whole = module.sharding is None  # the backward pass of a cut model cannot be had in parts
    if whole and suspect.positions and not any(f.sites or f.trouble for f in findings):
        findings = gathered(investigate(module, suspect, gradients=True))
    guilty = [f for f in findings if f.sites or f.gradients]
    if any(f.sites[0] != OF_ALL for f in guilty if f.sites):
        # a loss may hold sums of all processes, so that it is non-finite in the others as well
        guilty = [f for f in guilty if f.sites[:1] != [OF_ALL]]
    where = f"step {suspect.step}, epoch {suspect.epoch}"
    if guilty:
        ranks = " and ".join(str(f.rank) for f in guilty[:4]) + " and others" * (len(guilty) > 4)
        said = [told(f, named=len(guilty) > 1) for f in guilty[:2]]
        text = f"non-finite loss or gradient at {where}, rank {ranks}: {'; '.join(said)}"
    else:
        trouble = next((f.trouble for f in findings if f.trouble), None)
        reason = "all values are finite when its batches are repeated"
        if trouble:
            reason = f"its batches cannot be repeated ({trouble})"
        elif not suspect.positions:
            reason = "its batches are not known"
        ids = "; ".join(f"rank {f.rank} had {samples(f)}" for f in findings[:2] if f.samples)
        text = f"non-finite loss or gradient at {where}: {reason}{'; ' if ids else ''}{ids}"
    if not advice:
        return text
    kept = from_first(lambda: last_good(module))  # reads all of it, which may take a minute
    return f"{text}. {kept or 'There is no checkpoint yet'}. {ADVICE}"


def told(finding: Finding, *, named: bool) -> str:
    """One process's part of the line. named: whether it has to say which one."""
    if finding.sites:
        first, *later = finding.sites
        cause = f"first non-finite output in {first}"
        cause += f", then {', '.join(later[:3])}" * bool(later)
    else:
        cause = (
            "the forward pass is finite; non-finite gradients in "
            f"{', '.join(finding.gradients[:3])}"
        )
    return f"rank {finding.rank}: " * named + f"{cause}; {samples(finding)}"


def samples(finding: Finding) -> str:
    """`samples 3, 5, ...`."""
    ids = finding.samples
    return f"samples {', '.join(map(str, ids[:8]))}" + ", ..." * (len(ids) > 8)


def trouble(error: Exception) -> str:
    """An error as one line."""
    return one_line(f"{type(error).__name__}: {error}", limit=300)


def gathered(mine: T) -> list[T]:
    """Those of all processes, in order of rank."""
    if world_size() == 1:
        return [mine]
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def investigate(module: SuiteModule, suspect: Suspect, *, gradients: bool) -> Finding:
    """Repeat this process's micro-batches of the step, all of them, as every process does.

    gradients: the backward passes too.
    """
    finding = Finding(module.global_rank)
    if not suspect.positions:
        return finding
    seen: list[int] = []
    with undisturbed(module):
        for position in suspect.positions:
            batch = suspect.last if position == suspect.positions[-1] else None
            try:
                batch = rebuilt(module, position) if batch is None else batch
            except Exception as error:
                finding.trouble = trouble(error)
            if any(gathered(finding.trouble)):
                break  # in all: a step may have collectives, in which the others would wait
            assert batch is not None
            seen += batch["sample_id"].tolist()
            try:
                if finding.sites or finding.gradients:
                    with torch.no_grad():
                        module.step(batch, "train")  # the other processes may wait for it
                    continue
                seed_as_in_training(module, position)
                found = bad_gradients(module, batch) if gradients else locate(module, batch)
            except Exception as error:  # what follows is about the first problem, not this one
                finding.trouble = trouble(error)
                break
            if found:
                finding.samples = suspicious(batch)
                if gradients:
                    finding.gradients = found
                else:
                    finding.sites = found
    finding.samples = finding.samples or seen
    return finding


def suspicious(batch: Batch) -> list[int]:
    """The sample ids of rows that are non-finite themselves; without any, all of them."""
    ids = batch["sample_id"]
    bad = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for value in batch.values():
        if value.is_floating_point() and value.dim() and len(value) == len(ids):
            bad |= ~value.isfinite().flatten(1).all(dim=1) if value.dim() > 1 else ~value.isfinite()
    found: list[int] = (ids[bad] if bad.any() else ids).tolist()
    return found


def rebuilt(module: SuiteModule, position: int) -> Batch:
    """This process's micro-batch at a position of training, read again."""
    trainer: Any = module.trainer
    data = trainer.datamodule
    if not isinstance(data, SuiteDataModule):
        raise TypeError("the data has no addresses")
    sampler = data.train_sampler(rank=trainer.global_rank, world_size=trainer.world_size)
    sampler.position = lambda: position
    batch = AddressedDataset(data.splits.train, train=True)[next(iter(sampler))]
    batch.pop("unreadable", None)
    moved: Batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
    return moved


def seed_as_in_training(module: SuiteModule, position: int) -> None:
    """What SuiteModule.on_train_batch_start does at that position."""
    torch.manual_seed(derive(module.seed, "step", position, module.global_rank))


@contextmanager
def undisturbed(module: SuiteModule) -> Iterator[None]:
    """Repeat steps inside as they were trained; afterwards the module is what it was.

    Not compiled, since a graph would not stop at each output.
    """
    trainer: Any = module.trainer
    held, training = dict(vars(module)), module.model.training
    buffers = [(b, b.detach().clone()) for b in module.model.buffers()]
    module.model.train()
    try:
        eager = torch.compiler.set_stance("force_eager")
        with eager, trainer.precision_plugin.train_step_context():
            yield
    finally:
        module.model.train(training)
        vars(module).update(held)
        with torch.no_grad():
            for buffer, copy in buffers:
                buffer.copy_(copy)


@torch.no_grad()
def locate(module: SuiteModule, batch: Batch) -> list[str]:
    """Names of what is not finite, in forward order: inputs, outputs, norms with their site."""
    found: list[str] = []
    for name, value in batch.items():
        if value.is_floating_point() and not value.isfinite().all():
            found.append(f"batch[{name!r}]")
    with watch_outputs(module.model, found):
        out = module.step(batch, "train")
    if not out.loss_sum.isfinite():
        found.append(OF_ALL)
    return found


def bad_gradients(module: SuiteModule, batch: Batch) -> list[str]:
    """Names of the parameters whose gradient of this process's batch alone is not finite.

    torch.autograd.grad: a backward pass would run DDP's hooks and add to what is being summed.
    """
    named = [(n, p) for n, p in module.model.named_parameters() if p.requires_grad]
    with torch.enable_grad():
        loss = module.step(batch, "train").loss_sum / module.nominal
        grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    pairs = zip(named, grads, strict=True)
    return [n for (n, _), g in pairs if g is not None and not g.isfinite().all()]


@contextmanager
def watch_outputs(model: nn.Module, found: list[str]) -> Iterator[None]:
    """While open, append the name of every leaf or norm whose output is not finite."""
    norms = {id(m): m for _, m in norm_modules(model)}
    handles = []

    def hook(label: str) -> Callable[..., None]:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(label)

        return look

    for name, child in model.named_modules():
        if id(child) in norms:
            norm: Any = norms[id(child)]
            handles.append(
                child.register_forward_hook(hook(f"{name} ({norm.site}, {norm.norm_name})"))
            )
        elif not list(child.children()):
            handles.append(child.register_forward_hook(hook(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def last_good(module: SuiteModule) -> str | None:
    """Which checkpoint is left to go on from, as a sentence without its full stop."""
    if module.folder is None:
        return None
    path, _ = newest(module.folder)
    return None if path is None else f"The last good checkpoint is {path}"
