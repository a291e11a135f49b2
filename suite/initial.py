"""First weights by address: every parameter's numbers follow from (seed, its name).

A model that draws its parameters one after the other from one generator has other weights as soon
as a layer is added before them, and cannot be drawn in parts. Here a parameter is drawn whole and
alone, so that a model that was built on the meta device and cut over many processes starts from the
numbers of the one that fits into a single one; and a norm that has more parameters than another
cannot move anything.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from suite.norms import norm_modules
from suite.randomness import derive


class Initialised(Protocol):
    """A model whose parameters can be drawn one by one."""

    def init_parameter(self, name: str, full: Tensor, generator: torch.Generator) -> None:
        """Fill `full`, the whole parameter called `name`, which no norm owns."""


def drawn(model: nn.Module, name: str, like: Tensor, *, seed: int) -> Tensor:
    """The whole first value of the parameter `name`, on the device of `like`.

    Two devices of one kind draw the same numbers; a CPU and a GPU do not.
    """
    full = torch.empty(like.shape, device=like.device, dtype=like.dtype)
    generator = torch.Generator(device=like.device)
    generator.manual_seed(derive(seed, "init", zlib.crc32(name.encode())))
    cast(Initialised, model).init_parameter(name, full, generator)
    return full


def own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that no norm owns, by name."""
    of_norms = {id(p) for _, norm in norm_modules(model) for p in norm.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in of_norms:
            yield name, parameter


@torch.no_grad()
def init_weights(model: nn.Module, *, seed: int | None = None) -> None:
    """Give every parameter its first value; on the meta device nothing happens.

    model: an Initialised. seed: None is the one that torch.manual_seed was last given.
    """
    seed = torch.initial_seed() if seed is None else seed
    for name, parameter in own_parameters(model):
        if not parameter.is_meta:
            parameter.copy_(drawn(model, name, parameter, seed=seed))


def reset_norms(model: nn.Module) -> None:
    """Norms as they were made. Raises ValueError for one that cannot be made again in place."""
    for name, norm in norm_modules(model):
        made: Any = norm
        reset = getattr(made, "reset_parameters", None)
        if reset is None and any(True for _ in norm.parameters()):
            raise ValueError(f"norm {name} has no reset_parameters, which a sharded model needs")
        if reset is not None:
            reset()
