"""Point-wise norms: closed forms in float64, gradients, limits, dtypes, saturation, compilation."""

from __future__ import annotations

import copy
import math
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from suite.norms import NORMS, PointwiseNorm, PointwiseOptions, make_norm
from suite.norms.functions import FUNCTIONS
from suite.norms.functions import tanh as compilable_tanh

torch.set_num_threads(1)

POINTWISE = sorted(name for name, spec in NORMS.items() if spec.options == PointwiseOptions())
DIM = 4


def sign_of(u: float) -> float:
    return math.copysign(1.0, u)


def clip(value: float) -> float:
    return max(-1.0, min(1.0, value))


# Written from the formulas of the papers, in plain Python, apart from the code that is tested.
CLOSED_FORMS: dict[str, Callable[[float], float]] = {
    "dyt": math.tanh,
    "derf": math.erf,
    "isru": lambda u: u / math.sqrt(1 + u**2),
    "arctan": lambda u: 2 / math.pi * math.atan(u),
    "satursin": lambda u: math.sin(max(-math.pi / 2, min(math.pi / 2, u))),
    "softsign": lambda u: u / (1 + abs(u)),
    "hardtanh": clip,
    "logsign_clip": lambda u: clip(sign_of(u) * math.log(1 + abs(u))),
    "arcsinh_clip": lambda u: clip(math.asinh(u)),
    "expsign": lambda u: sign_of(u) * (1 - math.exp(-abs(u))),
    "exproot": lambda u: sign_of(u) * (1 - math.exp(-math.sqrt(abs(u)))),
    "relsign": lambda u: u / (1 + math.sqrt(1 + u**2)),
    "saturlog": lambda u: sign_of(u) * math.log(1 + abs(u)) / (1 + math.log(1 + abs(u))),
    "cubsign": lambda u: u**3 / (1 + abs(u) ** 3),
    "logquad_clip": lambda u: clip(sign_of(u) * math.log(1 + u**2)),
    "power23_clip": lambda u: clip(sign_of(u) * abs(u) ** (2 / 3)),
    "dyisru": lambda u: math.sqrt(DIM) * u / math.sqrt(DIM + u**2),
    "sigmoid": lambda u: 1 / (1 + math.exp(-u)),
}
POINTS = (-40.0, -3.0, -1.6, -0.9, -0.3, -1e-3, 0.0, 1e-3, 0.2, 0.7, 1.1, 2.5, 40.0)


def norm(name: str, **options: object) -> PointwiseNorm:
    module = make_norm(name, PointwiseOptions(**options))(DIM, site="attn")
    assert isinstance(module, PointwiseNorm)
    return module


def gradients(module: PointwiseNorm, x: Tensor) -> list[Tensor]:
    module(x).sum().backward()
    assert x.grad is not None
    return [x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


def test_every_pointwise_norm_has_a_closed_form_in_these_tests() -> None:
    assert set(CLOSED_FORMS) == set(POINTWISE) == set(FUNCTIONS)
    assert len(POINTWISE) == 18


@pytest.mark.parametrize("name", POINTWISE)
def test_it_is_weight_f_of_alpha_x_plus_shift_plus_bias(name: str) -> None:
    module = norm(name, shift=True).double()
    values = {"alpha": 0.7, "shift": 0.1, "weight": 1.3, "bias": -0.4}
    for parameter, value in values.items():
        getattr(module, parameter).data.fill_(value)
    x = torch.tensor(POINTS, dtype=torch.float64)
    expected = [1.3 * CLOSED_FORMS[name](0.7 * point + 0.1) - 0.4 for point in POINTS]
    got = module(x.unsqueeze(-1).expand(-1, DIM))
    torch.testing.assert_close(got[:, 2], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("name", POINTWISE)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    module = norm(name, shift=True, alpha="channel").double()
    with torch.no_grad():
        for offset, parameter in enumerate(module.parameters()):
            parameter.add_(torch.linspace(-0.2, 0.3, DIM) + 0.01 * offset)
    x = torch.tensor([[-2.72, -0.8, 0.33, 0.9], [0.15, 4.2, -0.4, 1.37]], dtype=torch.float64)

    def apply(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(dict(module.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(module, named, (x,))

    inputs = (x, *(p.detach() for p in module.parameters()))
    assert torch.autograd.gradcheck(apply, tuple(t.clone().requires_grad_() for t in inputs))


@pytest.mark.parametrize("name", POINTWISE)
def test_the_slope_at_exactly_zero_is_the_documented_one(name: str) -> None:
    """The published expsign, logsign_clip and saturlog give 0, exproot and power23_clip NaN."""
    u = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    FUNCTIONS[name].at(DIM).forward(u).sum().backward()
    slopes = {
        "derf": 2 / math.sqrt(math.pi),
        "arctan": 2 / math.pi,
        "relsign": 0.5,
        "sigmoid": 0.25,
        "cubsign": 0.0,
        "logquad_clip": 0.0,
        "exproot": 0.0,  # infinite in truth, 0 by choice
        "power23_clip": 0.0,  # infinite in truth, 0 by choice
    }
    expected = torch.full((3,), slopes.get(name, 1.0), dtype=torch.float64)
    torch.testing.assert_close(u.grad, expected)
    assert FUNCTIONS[name].slope == pytest.approx(slopes.get(name, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", POINTWISE)
def test_values_and_gradients_are_finite_everywhere(name: str, dtype: torch.dtype) -> None:
    """Zero-padded frames hit exactly 0; a diverging stream hits anything else."""
    extremes = [0.0, -0.0, 1e-38, 1e-20, 1e-4, 1.0, 44.0, 1e4, 1e9, 1e13, 1e17, 1e20, 1e30]
    row = torch.tensor([*extremes, *(-value for value in extremes)], dtype=dtype)
    x = row.unsqueeze(-1).repeat(1, DIM).requires_grad_()
    module = norm(name, shift=True).to(dtype)
    assert module(x).isfinite().all()
    assert all(g.isfinite().all() for g in gradients(module, x))


@pytest.mark.parametrize("name", POINTWISE)
def test_large_inputs_reach_the_supremum_and_not_zero(name: str) -> None:
    """u / sqrt(1 + u^2) and u^3 / (1 + |u|^3), written naively, give 0 and NaN at 1e30."""
    module = norm(name)
    y = module(torch.full((1, DIM), 1e30))
    slow = {"saturlog"}  # a logarithm: 0.986 at 1e30
    torch.testing.assert_close(
        y, torch.full((1, DIM), module.supremum), rtol=0.02 if name in slow else 1e-5, atol=0
    )
    if name != "sigmoid":
        torch.testing.assert_close(module(torch.full((1, DIM), -1e30)), -y)


@pytest.mark.parametrize("name", POINTWISE)
def test_float32_agrees_with_float64(name: str) -> None:
    x = torch.linspace(-6, 6, 400).reshape(-1, DIM)
    torch.testing.assert_close(norm(name)(x), norm(name).double()(x.double()).float())


@pytest.mark.parametrize("name", POINTWISE)
def test_channels_first_equals_channels_last(name: str) -> None:
    last = norm(name, alpha="channel", shift=True)
    first = make_norm(name, PointwiseOptions(alpha="channel", shift=True))(
        DIM, site="stem", channels_first=True
    )
    for parameter in last.parameters():
        parameter.data.copy_(torch.linspace(0.3, 0.9, DIM))
    first.load_state_dict(last.state_dict())
    for shape in ((2, 3, DIM), (2, 3, 5, DIM), (2, DIM)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        y = first(x.movedim(-1, 1)).movedim(1, -1)
        torch.testing.assert_close(y, last(x))


def test_parameters_are_called_and_shaped_as_in_the_published_checkpoints() -> None:
    shapes = {name: tuple(p.shape) for name, p in norm("derf").named_parameters()}
    assert shapes == {"alpha": (1,), "shift": (1,), "weight": (DIM,), "bias": (DIM,)}
    assert list(dict(norm("dyt").named_parameters())) == ["alpha", "weight", "bias"]
    shapes = {n: tuple(p.shape) for n, p in norm("derf", alpha="channel").named_parameters()}
    assert shapes == dict.fromkeys(("alpha", "shift", "weight", "bias"), (DIM,))


def test_only_derf_has_a_shift_unless_asked() -> None:
    shifted = {name for name in POINTWISE if norm(name).shift is not None}
    assert shifted == {"derf"}
    assert norm("derf", shift=False).shift is None
    assert norm("isru", shift=True).shift is not None


def test_without_alpha_the_input_goes_in_as_it_is() -> None:
    module = norm("dyt", alpha="none")
    x = torch.linspace(-2, 2, 2 * DIM).reshape(2, DIM)
    assert module.alpha is None
    torch.testing.assert_close(module(x), torch.tanh(x))


def test_pointwise_norms_expose_no_eps() -> None:
    """Fused paths read norm.eps and would compute a LayerNorm with DyT's weights."""
    for name in POINTWISE:
        assert not hasattr(make_norm(name)(DIM, site="attn", eps=1e-6), "eps")


def test_dyisru_is_the_elementwise_counterpart_of_rmsnorm() -> None:
    """sqrt(C) x / sqrt(beta + x^2) with beta the sum of the squares of the other channels."""
    x = torch.tensor([0.5, -2.0, 1.5, 0.1], dtype=torch.float64)
    rms = torch.nn.functional.rms_norm(x, (DIM,), eps=0.0)
    for channel in range(DIM):
        beta = x.square().sum() - x[channel] ** 2
        module = norm("dyisru", alpha_init=float((DIM / beta).sqrt())).double()
        module.alpha.data.copy_((DIM / beta).sqrt())
        torch.testing.assert_close(module(x)[channel], rms[channel])


@pytest.mark.parametrize("name", ["dyt", "derf", "logsign_clip"])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_computed_in_float32_and_returned_in_the_inputs_dtype(
    name: str, parameters: torch.dtype
) -> None:
    """The output must be the float32 result rounded once; bf16 arithmetic rounds four times."""
    module = norm(name, shift=True)
    for parameter, value in zip(module.parameters(), (0.37, 0.11, 1.3, -0.2), strict=True):
        parameter.data.fill_(value)  # numbers that bf16 arithmetic rounds
    module.to(parameters)
    x = torch.linspace(-3, 3, 100 * DIM).reshape(-1, DIM).bfloat16()
    expected = copy.deepcopy(module).float()(x.float()).bfloat16()
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = module(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, expected)


def test_saturation_is_the_share_above_95_percent_of_the_supremum() -> None:
    module = norm("dyt", alpha_init=1.0)
    edge = math.atanh(0.95)
    x = torch.tensor([[0.0, edge - 0.01, edge + 0.01, -9.0]])
    share = module.saturation(x)
    assert share.dim() == 0
    assert share.item() == 0.5
    assert not share.requires_grad
    wide = norm("dyisru", alpha_init=1.0)  # its supremum is sqrt(C) = 2
    assert wide.saturation(torch.tensor([[0.0, 1.9, 5.0, 20.0]])).item() == 0.25
    assert wide.saturation(torch.tensor([[0.0, 1.9, 5.0, 20.0]]).bfloat16()).item() == 0.25


def test_saturation_does_not_look_at_weight_and_bias() -> None:
    module = norm("dyt", alpha_init=1.0)
    module.weight.data.fill_(0.01)
    assert module.saturation(torch.full((2, DIM), 9.0)).item() == 1.0


def test_the_compilable_tanh_and_its_gradient_are_tanhs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it runs in eager mode, where a mistake in the formula shows without a compiler."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    exact = torch.cat([torch.logspace(-30, 30, 500), torch.linspace(0.15, 0.25, 50)]).double()
    exact = torch.cat([exact, -exact, torch.zeros(1).double()]).requires_grad_()
    u = exact.detach().float().requires_grad_()
    y, expected = compilable_tanh(u), torch.tanh(exact)
    y.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(y, expected.float(), rtol=1.5e-6, atol=0)
    assert exact.grad is not None
    torch.testing.assert_close(u.grad, exact.grad.float(), rtol=2e-6, atol=4e-7)


def test_backend_eager_never_changes_its_formula() -> None:
    assert norm("dyt", backend="eager").f is torch.tanh
    assert norm("dyt", backend="auto").f is compilable_tanh
    assert norm("dyt", backend="auto").choice("cpu").name == "eager"
    assert norm("dyt", backend="compile").choice("cpu").name == "compile"


def saved_bytes(module: torch.nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """The output, and the bytes of activations (x included, parameters not) kept for backward."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    return y, sum(storages.values())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPU needs g++")
@pytest.mark.parametrize(("name", "dtype"), [("dyt", torch.bfloat16), ("derf", torch.float32)])
def test_compiled_it_saves_only_its_input(name: str, dtype: torch.dtype) -> None:
    compiled = norm(name, backend="compile")
    eager = norm(name, backend="eager")
    x = torch.linspace(-5, 5, 64 * DIM).reshape(-1, DIM).to(dtype).requires_grad_()
    y, kept = saved_bytes(compiled, x)
    assert kept == x.numel() * x.element_size()
    expected, more = saved_bytes(eager, x)
    assert more > kept
    torch.testing.assert_close(y, expected)
    for ours, theirs in zip(
        torch.autograd.grad(y.float().square().sum(), [x, *compiled.parameters()]),
        torch.autograd.grad(expected.float().square().sum(), [x, *eager.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(
            ours, theirs, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
        )
    again = pickle.loads(pickle.dumps(copy.deepcopy(compiled)))
    assert torch.equal(again(x), y)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("alpha_init", "abc", "alpha_init must be a positive number or 'calibrated', got 'abc'"),
        ("alpha_init", 0, "alpha_init must be a positive number"),
        ("alpha_init", -1.0, "alpha_init must be a positive number"),
        ("alpha_init", float("nan"), "alpha_init must be a positive number"),
        ("alpha_init", float("inf"), "alpha_init must be a positive number"),
        ("alpha_init", True, "alpha_init must be a positive number"),
        ("calibrate_target", 0.0, "calibrate_target must be a positive number"),
        ("alpha_init_by_site", {"attn": 0.0}, "alpha_init_by_site.attn must be a positive"),
        (
            "alpha_init_by_site",
            {"atn": 1.0},
            "alpha_init_by_site has no 'atn'; did you mean 'attn'",
        ),
        ("by_site", {"fnal": "dyt"}, "by_site has no 'fnal'; did you mean 'final'"),
        ("alpha", "vector", "alpha must be one of scalar, channel, none"),
        ("backend", "cuda", "backend must be one of auto, eager, compile"),
    ],
)
def test_wrong_options_are_refused_by_name(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        replace(PointwiseOptions(), **{field: value})


def test_calibrating_an_absent_alpha_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^alpha is 'none'"):
        PointwiseOptions(alpha="none", alpha_init="calibrated")


def test_alpha_differs_by_site() -> None:
    factory = make_norm("dyt", PointwiseOptions(alpha_init=0.2, alpha_init_by_site={"attn": 0.8}))
    alphas = {site: factory(DIM, site=site).alpha.item() for site in ("attn", "ffn")}
    assert alphas == pytest.approx({"attn": 0.8, "ffn": 0.2})
