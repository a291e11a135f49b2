"""Optimizers, parameter groups by role, and schedules as pure functions of the step.

Weight decay goes by role, not by the type of one norm: published scripts exempt nn.LayerNorm by
type and then decay DyT's alpha and weight, so that the comparison compares decay. Here what a norm
owns, every bias and what the model names in `no_weight_decay()` is not decayed, for every norm
alike.

With layer-wise decay of the learning rate (arXiv 2106.08254, as timm and MAE fine-tune with it) a
parameter of layer i learns at lr * layer_decay ** (last - i), and so does its min_lr: the schedule
is a factor on every group's own rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from suite.errors import ConfigError
from suite.norms import norm_parameters

if TYPE_CHECKING:
    from suite.settings import OptimConfig


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Name of every parameter -> its share of the learning rate: decay ** (last layer - its own).

    The model says in `layer_of(name)` which layer a parameter is of: 0 the stem, the largest the
    head. Raises ConfigError if it does not.
    """
    layer_of = getattr(model, "layer_of", None)
    if layer_of is None:
        raise ConfigError(
            f"optim.layer_decay={decay}: {type(model).__name__} does not say which layer a "
            "parameter is of; leave optim.layer_decay out, or give the model a method layer_of"
        )
    layers = {name: int(layer_of(name)) for name, _ in model.named_parameters()}
    last = max(layers.values())
    return {name: decay ** (last - layer) for name, layer in layers.items()}


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    decay_norm: bool,
    decay_bias: bool = False,
    lr: float,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Two groups, decayed and not, of each learning rate; the first has the highest rate.

    decay_norm: decay alpha, shift, weight and bias of norms too. decay_bias: and what else is not
    decayed. lr: that of the last layer.
    """
    norms = set(norm_parameters(model))
    exempt = set(getattr(model, "no_weight_decay", set)())
    scales = {} if layer_decay is None else layer_scales(model, layer_decay)
    held: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in norms:
            role_decays = decay_norm
        else:
            role_decays = decay_bias or (parameter.ndim > 1 and name not in exempt)
        held.setdefault((scales.get(name, 1.0), role_decays), []).append(parameter)
    return [
        {"params": held[key], "weight_decay": weight_decay if key[1] else 0.0, "lr": lr * key[0]}
        for key in sorted(held, reverse=True)
    ]


def build_optimizer(model: nn.Module, config: OptimConfig, *, fused: bool) -> torch.optim.Optimizer:
    """The optimizer that `optim.name` names, over `parameter_groups(model)`."""
    groups = parameter_groups(
        model,
        weight_decay=config.weight_decay,
        decay_norm=config.decay_norm,
        decay_bias=config.decay_bias,
        lr=config.lr,
        layer_decay=config.layer_decay,
    )
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused or None)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    betas = (config.beta1, config.beta2)
    return kind(groups, lr=config.lr, betas=betas, eps=config.eps, fused=fused or None)


def warmup_steps(config: OptimConfig, *, total: int, per_epoch: int) -> int:
    """Warm-up in optimizer steps from whichever of the three options was given."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    if config.warmup_epochs is not None:
        return round(config.warmup_epochs * per_epoch)
    return round((config.warmup_fraction or 0.0) * total)


def schedule(config: OptimConfig, *, total: int, warmup: int) -> Callable[[int], float]:
    """step -> factor of the learning rate, for steps 0 to total - 1.

    The warm-up is linear from warmup_scale: step k of it is (k + 1) / warmup of the way, so that no
    step stands still.
    """
    shapes: dict[str, Callable[[OptimConfig, int, int, int], float]] = {
        "cosine": cosine,
        "constant": lambda config, step, total, warmup: 1.0,
        "polynomial": polynomial,
        "tri_stage": tri_stage,
    }
    shape = shapes[config.schedule]

    def factor(step: int) -> float:
        if step >= warmup:
            return shape(config, step, total, warmup)
        return config.warmup_scale + (1 - config.warmup_scale) * (step + 1) / warmup

    return factor


def progress(step: int, *, start: int, stop: int) -> float:
    """How far `step` is from `start` to `stop`, from 0 to 1."""
    return min(1.0, max(0.0, (step - start) / max(1, stop - start)))


def cosine(config: OptimConfig, step: int, total: int, warmup: int) -> float:
    """Half a cosine from 1 to min_lr / lr (arXiv 1608.03983)."""
    floor = config.min_lr / config.lr
    share = progress(step, start=warmup, stop=total)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * share))


def polynomial(config: OptimConfig, step: int, total: int, warmup: int) -> float:
    """(1 - progress) ** power from 1 to min_lr / lr."""
    floor = config.min_lr / config.lr
    share = progress(step, start=warmup, stop=total)
    return floor + (1.0 - floor) * (1.0 - share) ** config.power


def tri_stage(config: OptimConfig, step: int, total: int, warmup: int) -> float:
    """Warm-up, hold, exponential decay to final_scale, as shares of all steps (arXiv
    2006.11477)."""
    hold_until = warmup + round(config.hold_fraction * total)
    if config.decay_fraction is None:
        stop = total
    else:
        stop = hold_until + round(config.decay_fraction * total)
    if step < hold_until:
        return 1.0
    share = progress(step, start=hold_until, stop=stop)
    return math.exp(math.log(max(config.final_scale, 1e-12)) * share)
