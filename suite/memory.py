"""What a training will take of a device's memory, told from the meta device: nothing is allocated.

Counted are weights, gradients, the optimizer's moments and an average of the weights, in float32 or
what trainer.precision stores them in (of these a process holds its share where they are sharded),
copies that a step works on, and the activations that the backward pass needs, which are those that
autograd saves when the model runs on tensors without numbers. Left out are cuDNN's and NCCL's own
buffers, fragmentation, and what the data loader holds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from suite.checks import world_size
from suite.config import Config
from suite.data import DataInfo
from suite.errors import ConfigError
from suite.norms import NormFactory, norm_modules
from suite.registry import TaskSpec

GIB = 2**30
TRIED = 2  # examples of the step on the meta device


@dataclass(frozen=True)
class Need:
    """Bytes of one process.

    parameters, of_norms: of the whole model, in numbers. largest, outside: parameters of the
    largest unit that is sharded, and of none. states: bytes a parameter of weights, gradient,
    moments and average. stored, compute: bytes of a weight, and of a number that is computed with.
    again: whether blocks are computed again in the backward pass. rows: examples of a micro-batch.
    activations: of one example; None where the model could not be tried out without data.
    processes: how many there are. sharded: whether they share the states.
    """

    parameters: int
    of_norms: int
    largest: int
    outside: int
    states: int
    stored: int
    compute: int
    again: bool
    rows: int
    activations: int | None
    processes: int
    sharded: bool

    @property
    def held(self) -> int:
        """Weights, gradients and moments."""
        return self.states * self.parameters // (self.processes if self.sharded else 1)

    @property
    def working(self) -> int:
        """Whole units that a sharded step works on: this one's and the next one's weights, one
        gradient, and what is in no unit, as they are stored. And the 16-bit copies that autocast
        makes of weights, which the backward pass needs: of all that are not computed again.
        """
        copied = self.largest + self.outside if self.again else self.parameters
        copies = self.compute * copied if self.compute < self.stored else 0
        if self.sharded and self.processes > 1:
            return copies + self.stored * (3 * self.largest + 2 * self.outside)
        return copies

    @property
    def total(self) -> int:
        return self.held + self.working + self.rows * (self.activations or 0)

    def over(self, processes: int) -> Need:
        """The same with another number of processes that share, an example at a time."""
        return replace(self, processes=processes, sharded=True, rows=1)

    def text(self) -> str:
        """One line."""
        saved = "not tried out"
        if self.activations is not None:
            saved = f"{self.rows} x {gib(self.activations)}"
        shared = f" / {self.processes}" if self.sharded and self.processes > 1 else ""
        return (
            f"weights, gradients and moments {gib(self.held)} ({self.states} bytes a parameter"
            f"{shared}) + working copies {gib(self.working)} + saved activations {saved} = "
            f"{gib(self.total)} a process"
        )


def gib(count: int) -> str:
    """Bytes as text."""
    return f"{count / GIB:.1f} GiB"


def data_outline(
    config: Config, spec: TaskSpec, build: Callable[[], Any]
) -> tuple[DataInfo, str | None]:
    """What is known of the data, and why that is all.

    build: makes the splits. Where data.root is not given and the set can say from its options what
    a model must know, that is taken. Raises ConfigError as `build` does otherwise.
    """
    try:
        return build().info, None
    except ConfigError as error:
        outline = spec.data[config.data_name].outline
        if outline is None or getattr(config.data, "root", None) is not None:
            raise
        return outline(config.data), str(error)


def meta_model(config: Config, spec: TaskSpec, factory: NormFactory, info: DataInfo) -> nn.Module:
    """The model without numbers. Raises ConfigError as the real one would."""
    try:
        with torch.device("meta"):
            model: nn.Module = spec.models[config.model_name].build(
                config.model, norm=factory, data=info
            )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(
            f"model={config.model_name} with norm={config.norm_name}: {error}"
        ) from error
    return model


def need(
    config: Config,
    spec: TaskSpec,
    factory: NormFactory,
    info: DataInfo,
    *,
    activations: bool,
    processes: int | None = None,
) -> Need:
    """What a process needs. activations: run a step on the meta device too, where the task says
    what a batch looks like; every shape of the model is checked by that. processes: how many there
    are; None: as many as the config says.
    """
    model = meta_model(config, spec, factory, info)
    cut: Any = getattr(model, "shard_units", list)
    units: list[nn.Module] = cut()
    sizes = [sum(p.numel() for p in unit.parameters()) for unit in units]
    count = sum(p.numel() for p in model.parameters())
    processes = processes or world_size(config) or 1
    stored, compute = widths(config.trainer.precision)
    found = Need(
        parameters=count,
        of_norms=sum(p.numel() for _, m in norm_modules(model) for p in m.parameters()),
        largest=max(sizes, default=0),
        outside=count - sum(sizes),
        states=stored * (2 + extra_copies(config)),
        stored=stored,
        compute=compute,
        again=bool(getattr(config.model, "checkpoint", False)),
        rows=local_rows(config, processes),
        activations=None,
        processes=processes,
        sharded=config.trainer.strategy == "fully_shard",
    )
    if not activations or spec.outline_batch is None:
        return found
    batch = spec.outline_batch(info, TRIED)
    saved = saved_bytes(config, spec, model, info, batch, compute=compute)
    return replace(found, activations=saved // TRIED)


def widths(precision: str) -> tuple[int, int]:
    """Bytes of a weight that is stored, and of a number that is computed with."""
    compute = 2 if precision.startswith(("bf16", "16")) else 8 if precision == "64-true" else 4
    return (compute if precision.endswith("-true") else 4), compute


def extra_copies(config: Config) -> int:
    """Numbers a parameter beside itself and its gradient: the optimizer's, and an average."""
    adaptive, momentum = config.optim.name != "sgd", bool(config.optim.momentum)
    return (2 if adaptive else int(momentum)) + int(config.optim.ema_decay is not None)


def local_rows(config: Config, processes: int) -> int:
    """Examples of one process's micro-batch."""
    return max(config.data.batch_size // (processes * config.trainer.accumulate_grad_batches), 1)


def check_memory(
    config: Config, spec: TaskSpec, factory: NormFactory, info: DataInfo, *, processes: int
) -> None:
    """Raise ConfigError, before anything is allocated, where the states alone are too large."""
    try:
        found = need(config, spec, factory, info, activations=False, processes=processes)
    except (NotImplementedError, RuntimeError):
        return  # it reads numbers while it is built, so that only building it shows what it takes
    local = 1 if on_gpu(config) else found.processes // config.trainer.num_nodes
    available = available_memory(config) // max(local, 1)
    if found.total <= available:
        return
    shard = "more processes with trainer.strategy=fully_shard" if found.largest else "a smaller one"
    raise ConfigError(
        f"model={config.model_name}: training its {found.parameters:,} parameters needs at least "
        f"{gib(found.total)} a process, {gib(available)} are available; take {shard}, and see "
        "--dry-run"
    )


def saved_bytes(
    config: Config,
    spec: TaskSpec,
    model: nn.Module,
    info: DataInfo,
    batch: Mapping[str, Tensor],
    *,
    compute: int,
) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of one batch; each
    storage once, and parameters not at all.
    """
    if compute == 2:
        model = model.to(torch.bfloat16)
    module = spec.module(
        model,
        options=config.task,
        info=info,
        optim=config.optim,
        identity={},
        seed=0,
        nominal=1,
    ).to("meta")
    owned = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, tuple[Tensor, int]] = {}  # the tensor too, lest its address be used again

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = (tensor, storage.nbytes())
        return tensor

    held = {name: value.to("meta") for name, value in batch.items()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = module.train().step(held, "train").loss_sum
        total = sum(size for _, size in kept.values())
    loss.backward()
    return total


def on_gpu(config: Config) -> bool:
    """Whether the run is on an NVIDIA or AMD GPU."""
    return config.trainer.accelerator != "cpu" and torch.cuda.is_available()


def own_gpu(devices: int | str) -> int:
    """Number of the GPU that this process trains on.

    Another one is not to be asked: that takes some hundred MB of it for as long as this process is.
    """
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    if isinstance(devices, str) and devices != "auto":
        chosen = [int(number) for number in devices.strip(",").split(",")]
        return chosen[local % len(chosen)]
    return local % torch.cuda.device_count()


def available_memory(config: Config) -> int:
    """Bytes that could still be taken: of this process's GPU if it has one, else of the machine."""
    if on_gpu(config):
        return int(torch.cuda.mem_get_info(own_gpu(config.trainer.devices))[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return sys.maxsize
