"""Calibration: alpha = target / RMS(input), site by site, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from suite.norms import (
    NormFactory,
    PointwiseNorm,
    PointwiseOptions,
    calibrate,
    make_norm,
    norm_modules,
)

torch.set_num_threads(1)
DIM = 8


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, norm: NormFactory) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(DIM, site="attn"), norm(DIM, site="ffn")
        self.mix, self.mlp = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 3 * self.mix(self.norm1(x))
        return x + self.mlp(self.norm2(x)).relu()


class Stack(nn.Module):
    """Two blocks and a final norm."""

    def __init__(self, norm: NormFactory) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(norm) for _ in range(2))
        self.norm = norm(DIM, site="final")

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def calibrated(**options: object) -> NormFactory:
    return make_norm("dyt", PointwiseOptions(alpha_init="calibrated", **options))


def inputs() -> Tensor:
    return 0.3 * torch.randn(4, 5, DIM)


@pytest.mark.parametrize("alpha", ["scalar", "channel"])
def test_after_calibration_alpha_times_rms_is_the_target_at_every_site(alpha: str) -> None:
    model = Stack(calibrated(alpha=alpha))
    model.train()
    model.blocks[1].eval()
    x = inputs()
    alphas = calibrate(model, lambda: model(x), target=1.5)
    assert list(alphas) == [path for path, _ in norm_modules(model)]
    products = {}
    for path, module in norm_modules(model):
        module.register_forward_pre_hook(
            lambda m, args, path=path: products.update(
                {path: m.alpha * args[0].square().mean().sqrt()}
            )
        )
    model(x)
    for path, product in products.items():
        torch.testing.assert_close(product, torch.full_like(product, 1.5), msg=path)
    assert len(products) == 5
    assert model.training
    assert not model.blocks[1].training
    assert all(p.grad is None for p in model.parameters())


def test_calibrated_alphas_are_in_the_state_dict() -> None:
    model = Stack(calibrated())
    x = inputs()
    alphas = calibrate(model, lambda: model(x))
    other = Stack(calibrated())
    other.load_state_dict(model.state_dict())
    assert other.norm.alpha.item() == pytest.approx(alphas["norm"])
    torch.testing.assert_close(other(x), model(x))


def test_calibration_takes_each_norms_own_target_and_leaves_the_random_state() -> None:
    model = Stack(calibrated(calibrate_target=0.5))
    x = inputs()
    before = torch.get_rng_state()
    alphas = calibrate(model, lambda: model(x + 0 * torch.randn_like(x)))
    assert torch.equal(torch.get_rng_state(), before)
    assert alphas["blocks.0.norm1"] == pytest.approx(0.5 / x.square().mean().sqrt().item())


def test_only_calibrated_sites_are_touched() -> None:
    model = Stack(calibrated(alpha_init_by_site={"final": 0.25}))
    x = inputs()
    alphas = calibrate(model, lambda: model(x))
    assert "norm" not in alphas
    assert model.norm.alpha.item() == 0.25

    def never() -> None:
        raise AssertionError("nothing to calibrate, so nothing to run")

    for name in ("dyt", "layernorm"):
        assert calibrate(Stack(make_norm(name)), never) == {}


def test_a_norm_that_is_reached_twice_is_calibrated_the_first_time() -> None:
    norm = calibrated()(DIM, site="qk")
    model = nn.Sequential(norm, nn.Linear(DIM, DIM), norm)
    x = inputs()
    alphas = calibrate(model, lambda: model(x))
    assert alphas == {"0": pytest.approx(1 / x.square().mean().sqrt().item())}


@pytest.mark.parametrize("channels_first", [False, True])
def test_calibration_looks_at_valid_positions_only(channels_first: bool) -> None:
    module = calibrated()(DIM, site="stem", channels_first=channels_first)
    assert isinstance(module, PointwiseNorm)
    model = nn.ModuleDict({"norm": module})
    x, mask = inputs(), torch.arange(5).expand(4, 5) < 3
    expected = 1 / x[mask].square().mean().sqrt().item()
    x[~mask] = 100.0
    x = x.movedim(-1, 1) if channels_first else x
    for call in (lambda: module(x, mask), lambda: module(x, mask=mask)):
        assert calibrate(model, call)["norm"] == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_calibrating_on_a_dead_or_broken_input_names_the_site(value: float) -> None:
    model = Stack(calibrated())
    hooks = len(model.norm._forward_pre_hooks)
    with pytest.raises(ValueError, match=r"calibrate: the input of blocks\.0\.norm1 has RMS"):
        calibrate(model, lambda: model(torch.full((2, 3, DIM), value)))
    assert model.training
    assert len(model.norm._forward_pre_hooks) == hooks


def test_a_norm_that_the_pass_never_reaches_is_an_error() -> None:
    model = Stack(calibrated())
    x = inputs()
    with pytest.raises(
        ValueError, match=r"never reached blocks\.1\.norm1, blocks\.1\.norm2, norm$"
    ):
        calibrate(model, lambda: model.blocks[0](x))


def test_calibration_does_not_depend_on_the_norms_around_it_being_copied() -> None:
    """deepcopy keeps name, site and the wish to be calibrated (EMA and tests copy models)."""
    model = copy.deepcopy(Stack(calibrated()))
    x = inputs()
    assert len(calibrate(model, lambda: model(x))) == 5
