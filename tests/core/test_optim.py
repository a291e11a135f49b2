"""Parameter groups by role; schedules as pure functions of the step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from suite.norms import NORMS, make_norm
from suite.optim import build_optimizer, parameter_groups, schedule, warmup_steps
from suite.settings import OptimConfig


class Tiny(nn.Module):
    def __init__(self, norm: str) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.zeros(1, 3, 8))
        self.norm = make_norm(norm)(8, site="ffn")
        self.linear = nn.Linear(8, 8)
        self.plain = nn.LayerNorm(8)

    def no_weight_decay(self) -> set[str]:
        return {"embed"}


def decayed(model: nn.Module, **options: Any) -> set[str]:
    groups = parameter_groups(model, weight_decay=0.1, **options)
    ids = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    return {n for n, p in model.named_parameters() if id(p) in ids}


@pytest.mark.parametrize("norm", list(NORMS))
def test_no_norm_is_decayed_unless_all_are(norm: str) -> None:
    model = Tiny(norm)
    assert decayed(model, decay_norm=False) == {"linear.weight"}
    owned = {n for n, _ in model.named_parameters() if n.startswith(("norm.", "plain."))}
    assert decayed(model, decay_norm=True) == {"linear.weight"} | owned


def test_every_parameter_is_in_one_group() -> None:
    model = Tiny("derf")
    grouped = [
        p
        for g in build_optimizer(model, OptimConfig(), fused=False).param_groups
        for p in g["params"]
    ]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))


def curve(config: OptimConfig, total: int = 100) -> list[float]:
    factor = schedule(config, total=total, warmup=warmup_steps(config, total=total, per_epoch=10))
    return [factor(step) for step in range(total)]


def test_warmup_is_linear_to_the_peak_in_steps_epochs_or_a_share() -> None:
    for given in ({"warmup_steps": 20}, {"warmup_epochs": 2.0}, {"warmup_fraction": 0.2}):
        values = curve(OptimConfig(**given))
        assert values[:20] == pytest.approx([(k + 1) / 20 for k in range(20)])
        assert max(values) == 1.0


def test_cosine_is_the_closed_form_and_ends_at_min_lr() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=10)
    values = curve(config, total=110)
    for step in (10, 35, 60, 109):
        expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 100))
        assert values[step] == pytest.approx(expected)
    assert schedule(config, total=110, warmup=10)(500) == pytest.approx(0.1)


def test_constant_and_polynomial() -> None:
    assert set(curve(OptimConfig(schedule="constant"))) == {1.0}
    values = curve(OptimConfig(schedule="polynomial", lr=1.0, power=2.0))
    assert values[50] == pytest.approx(0.25)


def test_tri_stage_warms_up_holds_and_decays_exponentially() -> None:
    config = OptimConfig(
        schedule="tri_stage",
        warmup_fraction=0.1,
        hold_fraction=0.4,
        decay_fraction=0.5,
        final_scale=0.05,
    )
    values = curve(config)
    assert values[10:50] == [1.0] * 40
    assert values[75] == pytest.approx(0.05**0.5)
    assert schedule(config, total=100, warmup=10)(100) == pytest.approx(0.05)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_optimizers_take_a_step(name: Any) -> None:
    model = Tiny("layernorm")
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.1), fused=False)
    before = model.linear.weight.clone()
    model.linear(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.linear.weight)
