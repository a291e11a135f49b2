"""Fully sharded training: weights, gradients and moments cut over all processes (FSDP2).

torch's `fully_shard` gathers a block's weights around its passes and leaves each process the rows
of every tensor that are its own. The model is built on the meta device, so that no process ever
holds all of it: each parameter is drawn whole by its address (`suite.initial`), or read from a
file's memory map, and its rows are kept, one parameter after the other and without a message
between processes. So the weights are those of a single process, bit by bit.

Lightning's ModelParallelStrategy brings the processes up. Its checkpoints are not used: they number
the optimizer's states by the model's parameters, where every other run numbers them by parameter
group, so that moments would go to other parameters when a run goes on with another strategy; and
they fail for an optimizer without states. Here a checkpoint is the one file that a single process
writes, put together on the first one, and any number of processes goes on from it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from suite.errors import ConfigError
from suite.initial import drawn, reset_norms
from suite.norms import norm_modules
from suite.ranks import world_size

NAME = "fully_shard"
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


@dataclass
class Sharding:
    """How a model that was built on the meta device becomes this process's share of it.

    seed: of the first weights. compile: a mode of torch.compile for each block, or false.
    weights: whole tensors of a file by their names in the model, which go before drawn ones; on the
    disk until they are cut.
    """

    seed: int
    compile: str | bool = False
    weights: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def apply(self, model: Any, *, mesh: DeviceMesh, device: torch.device) -> None:
        """Cut `model` and give it its values; a second time nothing happens."""
        if isinstance(model, FSDPModule):
            return
        known = {**norm_values(model), **self.weights}
        for unit in model.shard_units():
            if self.compile:  # before it is cut: what gathers the weights stays outside the graph
                unit.compile(mode=None if self.compile == "default" else self.compile)
            fully_shard(unit, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.to_empty(device=device)
        for name, parameter in model.named_parameters():
            whole = known.get(name)
            if whole is None:
                # on the CPU, as one process draws it: a GPU has other numbers
                like = torch.empty((), dtype=parameter.dtype).expand(parameter.shape)
                whole = drawn(model, name, like, seed=self.seed)
            put(parameter, whole)
        for name, buffer in model.named_buffers():
            put(buffer, known[name])
        self.weights = {}


def norm_values(model: nn.Module) -> dict[str, Tensor]:
    """First values of all that norms hold, whole and on the CPU."""
    values = {}
    for path, norm in norm_modules(model):
        made = copy.deepcopy(norm).to_empty(device="cpu")
        reset_norms(made)
        named = (*made.named_parameters(), *made.named_buffers())
        values.update({f"{path}.{name}": tensor.detach() for name, tensor in named})
    return values


def check_shardable(model: nn.Module, *, name: str) -> None:
    """Raise ConfigError for a model that cannot be cut. name: what it is called in errors."""
    strategy = f"trainer.strategy={NAME}"
    missing = [m for m in ("shard_units", "init_parameter") if not hasattr(model, m)]
    if missing:
        raise ConfigError(
            f"{strategy}: model={name} does not say how it is cut ({type(model).__name__} has no "
            f"{' and no '.join(missing)}); take trainer.strategy=ddp"
        )
    norms = dict(norm_modules(model))
    for path, norm in norms.items():
        held = any(True for _ in (*norm.parameters(), *norm.buffers()))
        if held and not hasattr(norm, "reset_parameters"):
            raise ConfigError(
                f"{strategy}: norm {path} of model={name} has no reset_parameters, which gives it "
                "its first values after it was cut; add it, or take trainer.strategy=ddp"
            )
    of_norms = {id(b) for norm in norms.values() for b in norm.buffers()}
    others = [n for n, b in model.named_buffers() if id(b) not in of_norms]
    if others:
        raise ConfigError(
            f"{strategy}: model={name} has buffers ({', '.join(others[:3])}), whose values are "
            "lost when it is cut; compute them in forward, or take trainer.strategy=ddp"
        )
    scalars = [n for n, p in model.named_parameters() if p.dim() == 0]
    if scalars:
        raise ConfigError(
            f"{strategy}: model={name} has parameters without a dimension "
            f"({', '.join(scalars[:3])}), which cannot be cut; make them of one element"
        )


def check_precision(precision: str) -> None:
    """Raise ConfigError for one that Lightning or the loss scale has no sharded form of."""
    if precision not in PRECISIONS:
        raise ConfigError(
            f"trainer.precision={precision}: with trainer.strategy={NAME} it must be one of "
            f"{', '.join(PRECISIONS)}"
        )


class ShardedStrategy(ModelParallelStrategy):
    """All processes share the data and the weights; a checkpoint is one file of whole tensors."""

    def __init__(self, *, processes: int, timeout: timedelta) -> None:
        super().__init__(
            data_parallel_size=processes,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            timeout=timeout,
        )

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return whole_tensors(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        state = optimizer.state_dict()
        return {**state, "state": {i: whole_tensors(s) for i, s in state["state"].items()}}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = True) -> Any:
        """What the file holds; its tensors stay on the disk until their rows are read."""
        path = Path(self.broadcast(checkpoint_path))
        return self.checkpoint_io.load_checkpoint(path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        load_whole(self.lightning_module, checkpoint["state_dict"])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(cut_states(optimizer, saved))


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a tensor that is cut, without gradient; any other as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def whole(tensor: Tensor) -> Tensor:
    """All rows of a tensor that is cut, without gradient; every process has to call it."""
    with torch.no_grad():
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def whole_tensors(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with whole tensors on the first process's CPU, one at a time; elsewhere nothing.

    Every process has to call it.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    found = {}
    for name, value in values.items():
        value = whole(value).cpu() if isinstance(value, DTensor) else value
        if first:
            found[name] = value
    return found


@torch.no_grad()
def put(held: Tensor, full: Tensor) -> None:
    """Copy the whole tensor `full` into `held`, of which this process may have some rows only.

    Only those are read. Raises ValueError for another shape.
    """
    if held.shape != full.shape:
        raise ValueError(f"shape {tuple(full.shape)} where {tuple(held.shape)} is expected")
    if not isinstance(held, DTensor):
        held.copy_(full)
        return
    assert held.placements == (Shard(0),), held.placements  # what fully_shard does by itself
    rows, mesh = held.to_local(), held.device_mesh
    share = -(-len(full) // mesh.size())  # as torch.chunk: the last processes may have less
    start = min(mesh.get_local_rank() * share, len(full))
    rows.copy_(full[start : start + len(rows)])


def load_whole(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Whole tensors into a module that may be cut, strictly; without a message."""
    held = module.state_dict(keep_vars=True)
    if held.keys() != state.keys():
        differing = sorted(held.keys() ^ state.keys())
        raise ConfigError(f"the checkpoint holds other weights than the model: {differing[:3]}")
    for name, tensor in held.items():
        put(tensor, state[name])


@torch.no_grad()
def share_weights(module: nn.Module, state: Mapping[str, Tensor], device: torch.device) -> None:
    """Give every process the weights and buffers that the first one has in `state`, whole.

    One tensor at a time; what the others pass as `state` is not looked at.
    """
    first = world_size() == 1 or dist.get_rank() == 0
    for name, held in module.state_dict(keep_vars=True).items():
        if world_size() == 1:
            put(held, state[name])
            continue
        sent = torch.empty(held.shape, dtype=held.dtype, device=device)
        if first:
            sent.copy_(state[name])
        dist.broadcast(sent, src=0)
        put(held, sent)


def cut_states(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
    """A whole optimizer's state dict with this process's rows of what is as large as a parameter.

    Raises ValueError where it is of other parameters.
    """
    held = _parameters(optimizer.param_groups)
    numbers = _parameters(saved["param_groups"])
    if len(held) != len(numbers):
        raise ValueError(f"the optimizer has {len(held)} parameters, the checkpoint {len(numbers)}")
    by_number = dict(zip(numbers, held, strict=True))

    def cut(value: Any, like: Tensor) -> Any:
        if not (isinstance(value, Tensor) and value.shape == like.shape):
            return value
        rows = torch.zeros_like(like.detach(), dtype=value.dtype)
        put(rows, value)
        return rows

    state = {
        number: {key: cut(value, by_number[number]) for key, value in values.items()}
        for number, values in saved["state"].items()
    }
    return {**saved, "state": state}


def _parameters(groups: Iterable[Mapping[str, Any]]) -> list[Any]:
    return [parameter for group in groups for parameter in group["params"]]


def total_over_ranks(norm: Tensor) -> Tensor:
    """The 2-norm of all rows from that of this process's."""
    squared = norm.double().square()
    if world_size() > 1:
        dist.all_reduce(squared)
    return squared.sqrt().to(norm.dtype)
