"""timm's norms with an activation inside: what came after the norm comes after the new one."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from suite.norms import (
    NORMS,
    foreign_norms,
    is_norm,
    make_norm,
    norm_modules,
    register,
    replace_norms,
)

torch.set_num_threads(1)
DIM = 8
ACTIVATED = (
    *("BatchNormAct2d", "GroupNormAct", "GroupNorm1Act", "LayerNormAct2d", "LayerNormAct2dFp32"),
    *("LayerNormAct", "LayerNormActFp32", "RmsNormAct", "RmsNormActFp32"),
    *("RmsNormAct2d", "RmsNormAct2dFp32"),
)


def snapshot(model: nn.Module) -> list[tuple[str, int]]:
    return [(path, id(m)) for path, m in model.named_modules(remove_duplicate=False)]


def activated_norm(name: str, **options: Any) -> nn.Module:
    """One of timm's norms with an activation inside, with weights that are not all 1."""
    norm_act = pytest.importorskip("timm.layers.norm_act")
    groups = {"num_groups": 2} if name == "GroupNormAct" else {}
    norm = getattr(norm_act, name)(DIM, **groups, **options)
    torch.manual_seed(0)
    for parameter in norm.parameters(recurse=False):
        nn.init.uniform_(parameter, 0.5, 1.5)
    return norm


@pytest.mark.parametrize("name", ACTIVATED)
def test_the_activation_inside_timms_norms_stays_behind_the_new_norm(name: str) -> None:
    first = "2d" in name or "Group" in name
    model = nn.Sequential(activated_norm(name, act_layer=nn.SiLU, drop_layer=nn.Hardtanh, eps=1e-3))
    old, x = model[0], torch.randn(3, DIM, 2, 2) if first else torch.randn(3, 2, 2, DIM)
    before = list(old.state_dict())
    assert [r.was for r in replace_norms(model, "dyt")] == [f"timm.layers.norm_act.{name}"]
    plain = make_norm("dyt")(DIM, site="mixer", channels_first=first, bias="bias" in before)
    plain.load_state_dict(model[0].state_dict())
    assert not torch.equal(plain.weight, torch.ones(DIM))
    assert torch.equal(model(x), nn.functional.silu(nn.functional.hardtanh(plain(x))))
    assert (model[0].act, model[0].drop) == (old.act, old.drop)
    assert foreign_norms(model, make_norm("dyt")) == []
    assert set(before) - {"running_mean", "running_var", "num_batches_tracked"} < {
        *model[0].state_dict()
    }


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("BatchNormAct2d", "batchnorm"),
        ("LayerNormAct", "layernorm"),
        ("LayerNormAct2d", "layernorm"),
        ("RmsNormAct2d", "rmsnorm"),
    ],
)
def test_the_same_norm_in_place_of_one_with_an_activation_gives_the_same(
    name: str, norm: str
) -> None:
    """In training, with dropout's place taken by something that can be compared."""
    model = nn.Sequential(activated_norm(name, act_layer=nn.GELU, eps=1e-2))
    same, x = copy.deepcopy(model), torch.randn(4, DIM, DIM, DIM)
    replace_norms(same, norm)
    torch.testing.assert_close(same(x), model(x))
    if name == "BatchNormAct2d":
        assert list(same.state_dict()) == list(model.state_dict())
        torch.testing.assert_close(same[0].running_var, model[0].running_var)
        torch.testing.assert_close(same.eval()(x), model.eval()(x))


def test_an_activation_with_parameters_keeps_them_and_their_names() -> None:
    model = nn.Sequential(activated_norm("RmsNormAct", act_layer=nn.PReLU))
    old = model[0].act.weight.requires_grad_(False)
    assert is_norm(model[0])
    replace_norms(model, "dyt")
    assert [name for name, _ in model.named_parameters()] == ["0.alpha", "0.weight", "0.act.weight"]
    assert model[0].act.weight is old
    assert [p.requires_grad for p in model.parameters()] == [True, True, False]


def test_a_norm_whose_activation_is_switched_off_becomes_a_plain_one() -> None:
    model = nn.Sequential(activated_norm("BatchNormAct2d", apply_act=False))
    replace_norms(model, "dyt")
    assert type(model[0]) is type(make_norm("dyt")(DIM, site="stem"))


def test_a_norm_with_its_activation_can_be_copied_and_pickled() -> None:
    model = nn.Sequential(activated_norm("LayerNormAct"))
    replace_norms(model, "derf")
    x = torch.randn(5, DIM)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert type(other[0]) is type(model[0])
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
        assert [m.norm_name for _, m in norm_modules(other)] == ["derf"]


@pytest.mark.parametrize("norm", ["identity", "dyt"])
def test_an_activation_no_longer_overwrites_what_the_new_norm_was_given(norm: str) -> None:
    """A pre-activation block adds the norm's input again; ReLU(inplace=True) would change it."""
    model = nn.ModuleDict({"norm": activated_norm("BatchNormAct2d", affine=False)})
    replace_norms(model, norm)
    x = torch.randn(2, DIM, 2, 2, requires_grad=True)
    shortcut = x * 1.0
    before = shortcut.detach().clone()
    (model["norm"](shortcut) + shortcut).sum().backward()
    assert torch.equal(shortcut, before)
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_timms_norms_that_are_something_else_are_refused() -> None:
    layers = pytest.importorskip("timm.layers")

    class Mine(layers.BatchNormAct2d):
        """A subclass, whose forward could be anything."""

    others = [layers.EvoNorm2dS0(DIM), layers.EvoNorm2dB0(DIM), layers.FilterResponseNormAct2d(DIM)]
    others += [layers.FrozenBatchNormAct2d(DIM), layers.SyncBatchNormAct(DIM), Mine(DIM)]
    for other in others:
        model = nn.Sequential(other, nn.BatchNorm2d(DIM))
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"cannot replace 0 \(.*, not a type that is known"):
            replace_norms(model, "dyt")
        assert snapshot(model) == before


def test_a_norm_that_has_an_act_of_its_own_does_not_take_another() -> None:
    class WithAct(nn.Module):
        def __init__(self, dim: int, channels_first: bool = False) -> None:
            super().__init__()
            self.act = nn.Tanh()

    register("with-act", WithAct)
    model = nn.Sequential(nn.BatchNorm2d(DIM), activated_norm("BatchNormAct2d"))
    before = snapshot(model)
    try:
        with pytest.raises(ValueError, match="WithAct has an attribute called act of its own"):
            replace_norms(model, "with-act")
    finally:
        del NORMS["with-act"]
    assert snapshot(model) == before
