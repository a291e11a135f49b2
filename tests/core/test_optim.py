"""Parameter groups by role; schedules as pure functions of the step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from suite.errors import ConfigError
from suite.norms import NORMS, make_norm
from suite.optim import build_optimizer, layer_scales, parameter_groups, schedule, warmup_steps
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
    groups = parameter_groups(model, weight_decay=0.1, lr=0.1, **options)
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


class Layered(Tiny):
    """embed is layer 0, linear 1, the norms 2."""

    def layer_of(self, name: str) -> int:
        return {"embed": 0, "linear": 1}.get(name.partition(".")[0], 2)


def rates(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Name -> (learning rate, weight decay)."""
    of = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    return {name: of[id(p)] for name, p in model.named_parameters()}


def test_a_layer_learns_at_a_share_of_the_next_ones_rate_and_decays_by_role() -> None:
    model = Layered("derf")
    config = OptimConfig(lr=0.4, weight_decay=0.1, layer_decay=0.5)
    found = rates(model, build_optimizer(model, config, fused=False).param_groups)
    assert found["embed"] == (0.1, 0.0)
    assert (found["linear.weight"], found["linear.bias"]) == ((0.2, 0.1), (0.2, 0.0))
    for name in ("norm.alpha", "norm.shift", "norm.weight", "norm.bias", "plain.weight"):
        assert found[name] == (0.4, 0.0)


@pytest.mark.parametrize("layer_decay", [None, 0.5, 1.0])
def test_the_first_group_has_the_highest_rate_which_is_what_is_logged(
    layer_decay: float | None,
) -> None:
    config = OptimConfig(lr=0.4, layer_decay=layer_decay)
    groups = build_optimizer(Layered("dyt"), config, fused=False).param_groups
    assert [g["lr"] for g in groups] == sorted((g["lr"] for g in groups), reverse=True)
    assert groups[0]["lr"] == 0.4


def test_the_schedule_keeps_the_ratio_of_the_layers_down_to_min_lr() -> None:
    config = OptimConfig(lr=0.4, min_lr=0.04, layer_decay=0.5, warmup_steps=2)
    optimizer = build_optimizer(Layered("dyt"), config, fused=False)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(config, total=10, warmup=2))
    for _ in range(10):
        top, low = optimizer.param_groups[0]["lr"], optimizer.param_groups[-1]["lr"]
        assert low == pytest.approx(top / 4)
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.04)


def test_layer_decay_needs_a_model_that_knows_its_layers() -> None:
    with pytest.raises(ConfigError, match=r"^optim.layer_decay=0.5: Tiny does not say which layer"):
        layer_scales(Tiny("dyt"), 0.5)


@pytest.mark.parametrize("value", [0.0, -0.5, 1.5, math.nan])
def test_layer_decay_is_above_0_and_at_most_1(value: float) -> None:
    with pytest.raises(ValueError, match=r"^layer_decay must be above 0 and at most 1, got"):
        OptimConfig(layer_decay=value)


def test_vit_has_the_scales_and_decays_of_timm() -> None:
    """With the final norm behind the pooling, as published; timm's `norm` is of the last block."""
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    from tasks.vision.vit import ViT

    sizes = {"img_size": 32, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
    theirs = timm.create_model("vit_tiny_patch16_224", global_pool="avg", **sizes)
    exempt = theirs.no_weight_decay()
    groups = param_groups_layer_decay(theirs, 0.1, exempt, layer_decay=0.65)
    expected = rates(theirs, [{**g, "lr": 0.4 * g["lr_scale"]} for g in groups])
    sizes = {"image_size": 32, "dim": 16, "depth": 3, "heads": 2, "classes": 5}
    ours = ViT(norm=make_norm("layernorm"), **sizes)  # type: ignore[arg-type]
    config = OptimConfig(lr=0.4, weight_decay=0.1, layer_decay=0.65)
    found = rates(ours, build_optimizer(ours, config, fused=False).param_groups)
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        assert found[name] == pytest.approx(pair)
