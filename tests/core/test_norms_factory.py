"""The factory: names, sites, custom norms, audit, checkpoints, calibration, and no randomness."""

from __future__ import annotations

import ast
import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from suite import norms
from suite.norms import (
    NORMS,
    SITES,
    NormFactory,
    PointwiseOptions,
    StatisticsOptions,
    check_compatible,
    foreign_norms,
    is_norm,
    make_norm,
    norm_modules,
    norm_parameters,
    options_of,
    register,
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


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """An importable module `my_package.my_norm`."""
    parent, module = types.ModuleType("my_package"), types.ModuleType("my_package.my_norm")
    monkeypatch.setitem(sys.modules, "my_package", parent)
    monkeypatch.setitem(sys.modules, "my_package.my_norm", module)
    return module


def inputs() -> Tensor:
    return 0.3 * torch.randn(4, 5, DIM)


# --- names and sites ---


@pytest.mark.parametrize("name", sorted(NORMS))
def test_every_norm_knows_its_name_and_site_and_takes_a_mask(name: str) -> None:
    module = make_norm(name)(DIM, site="ffn")
    assert (module.norm_name, module.site) == (name, "ffn")
    x = inputs()
    assert module(x, torch.ones(4, 5, dtype=torch.bool)).shape == x.shape
    assert NORMS[name].help


@pytest.mark.parametrize("name", sorted(NORMS))
def test_norms_draw_no_random_numbers(name: str) -> None:
    before = torch.get_rng_state()
    for site in SITES:
        make_norm(name)(DIM, site=site)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", sorted(NORMS))
def test_the_state_dict_carries_everything(name: str) -> None:
    trained, fresh = make_norm(name)(DIM, site="attn"), make_norm(name)(DIM, site="attn")
    for parameter in trained.parameters():
        parameter.data.uniform_(0.2, 0.9)
    trained(inputs())
    fresh.load_state_dict(trained.state_dict())
    x = inputs()
    assert torch.equal(fresh.eval()(x), trained.eval()(x))


def test_an_unknown_norm_is_refused_with_the_nearest_name_and_the_list() -> None:
    with pytest.raises(ValueError, match=r"norm has no 'layernrm'; did you mean 'layernorm'") as e:
        make_norm("layernrm")
    assert "dyt" in str(e.value)
    assert "my_package.my_norm:MyNorm" in str(e.value)


def test_an_unknown_site_is_refused_with_the_nearest_name_and_the_list() -> None:
    with pytest.raises(ValueError, match=r"site has no 'fnal'; did you mean 'final'.*downsample"):
        make_norm("dyt")(DIM, site="fnal")


def test_options_of_another_norm_are_refused() -> None:
    with pytest.raises(ValueError, match="'layernorm' takes options of type RowOptions"):
        make_norm("layernorm", PointwiseOptions())
    with pytest.raises(ValueError, match="'identity' takes options of type NormOptions"):
        make_norm("identity", PointwiseOptions())


def test_by_site_puts_another_norm_there() -> None:
    options = PointwiseOptions(alpha_init=0.7, by_site={"final": "layernorm", "qk": "derf"})
    factory = make_norm("dyt", options)
    assert factory(DIM, site="final", eps=1e-6).norm_name == "layernorm"
    derf = factory(DIM, site="qk")
    assert derf.norm_name == "derf"
    assert derf.alpha.item() == pytest.approx(0.7)  # same type of options: taken over
    assert factory(DIM, site="attn").norm_name == "dyt"
    with pytest.raises(ValueError, match=r"^by_site: norm has no 'derff'; did you mean 'derf'"):
        make_norm("dyt", PointwiseOptions(by_site={"qk": "derff"}))


def test_describe_is_plain_and_complete() -> None:
    factory = make_norm("dyt", PointwiseOptions(alpha_init=0.7, by_site={"final": "layernorm"}))
    described = json.loads(json.dumps(factory.describe()))
    assert described == factory.describe()
    assert described["name"] == "dyt"
    assert described["by_site"] == {"final": "layernorm"}
    assert described["options"]["alpha_init"] == 0.7


# --- a norm of one's own ---


def test_a_class_by_its_dotted_path_gets_the_keywords_that_it_knows(
    package: types.ModuleType,
) -> None:
    class MyNorm(nn.Module):
        def __init__(self, dim: int, *, eps: float, site: str) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(dim))
            self.seen = (dim, eps, site)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    package.MyNorm = MyNorm
    before = torch.get_rng_state()
    module = make_norm("my_package.my_norm:MyNorm")(DIM, site="attn", eps=1e-6, bias=False)
    assert module.seen == (DIM, 1e-6, "attn")
    assert module.norm_name == "my_package.my_norm:MyNorm"
    assert torch.equal(torch.get_rng_state(), before)  # the rest of the model stays comparable
    x = inputs()
    assert torch.equal(module(x, mask=torch.ones(4, 5)), module(x))
    assert torch.equal(module(x, torch.ones(4, 5)), module(x))
    assert list(module.state_dict()) == ["weight"]
    overridden = make_norm("my_package.my_norm:MyNorm", StatisticsOptions(eps=1e-2))
    assert overridden(DIM, site="attn", eps=1e-6).seen[1] == 1e-2


def test_a_class_without_channels_first_is_refused_where_it_is_needed(
    package: types.ModuleType,
) -> None:
    """Called all the same it would normalize the wrong dimension."""
    package.LastNorm = type("LastNorm", (nn.LayerNorm,), {})
    factory = make_norm("my_package.my_norm:LastNorm")
    assert isinstance(factory(DIM, site="attn"), nn.LayerNorm)
    with pytest.raises(ValueError, match="site 'stem' has its channels in dimension 1"):
        factory(DIM, site="stem", channels_first=True)


def test_a_class_that_cannot_be_imported_or_built_is_a_clear_error(
    package: types.ModuleType,
) -> None:
    package.MyNorm = type("MyNorm", (nn.Module,), {})
    with pytest.raises(ValueError, match="cannot import 'no_such_package'"):
        make_norm("no_such_package:Norm")
    with pytest.raises(ValueError, match="has no 'MyNrm'; did you mean 'MyNorm'"):
        make_norm("my_package.my_norm:MyNrm")
    with pytest.raises(ValueError, match="cannot be built for 8 channels: "):
        make_norm("my_package.my_norm:MyNorm")(DIM, site="attn")
    package.make = lambda dim: "text"
    with pytest.raises(ValueError, match=r"gave a str, not a torch\.nn\.Module"):
        make_norm("my_package.my_norm:make")(DIM, site="attn")


def test_register_adds_a_norm_with_typed_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("suite.norms.factory.NORMS", dict(NORMS))

    @dataclass(frozen=True)
    class GainOptions:
        gain: float = 2.0

    class Gain(nn.Module):
        def __init__(self, dim: int, *, options: GainOptions) -> None:
            super().__init__()
            self.gain = options.gain

        def forward(self, x: Tensor) -> Tensor:
            return self.gain * x

    register("gain", Gain, GainOptions(), help="a constant")
    assert options_of("gain") == GainOptions()
    assert make_norm("gain", GainOptions(gain=3.0))(DIM, site="attn")(torch.ones(1)) == 3
    with pytest.raises(ValueError, match="already a norm called 'gain'"):
        register("gain", Gain, GainOptions())
    with pytest.raises(ValueError, match="a plain word"):
        register("my:gain", Gain, GainOptions())


# --- audit ---


def test_the_audit_is_empty_for_a_model_that_the_factory_built() -> None:
    factory = make_norm("dyt", PointwiseOptions(by_site={"final": "rmsnorm"}))
    model = Stack(factory)
    assert foreign_norms(model, factory) == []
    paths = [path for path, _ in norm_modules(model)]
    assert paths == [f"blocks.{b}.norm{n}" for b in (0, 1) for n in (1, 2)] + ["norm"]


def test_the_audit_finds_other_norms_and_heeds_the_keep_list() -> None:
    factory = make_norm("dyt")
    model = Stack(factory)
    model.norm = make_norm("layernorm")(DIM, site="final")
    assert foreign_norms(model, factory) == [("norm", "layernorm")]
    assert foreign_norms(model, factory, keep_sites=("final",)) == []
    model.extra = nn.BatchNorm1d(DIM)
    found = foreign_norms(model, factory, keep_sites=SITES)
    assert found == [("extra", "torch.nn.modules.batchnorm.BatchNorm1d")]


def test_what_counts_as_a_norm() -> None:
    class SubclassedLayer(nn.LayerNorm):
        pass

    class LlamaRMSNorm(nn.Module):
        pass

    class DynamicTanh(nn.Module):
        pass

    class PreNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fn = nn.LayerNorm(2), nn.Identity()

    class NormedLinear(nn.Module):
        pass

    norms = [nn.LayerNorm(2), nn.RMSNorm(2), nn.BatchNorm2d(2), nn.InstanceNorm1d(2)]
    norms += [nn.GroupNorm(1, 2), SubclassedLayer(2), LlamaRMSNorm(), DynamicTanh()]
    assert all(is_norm(module) for module in norms)
    weight_norm = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    others = [PreNorm(), NormedLinear(), nn.Linear(2, 2), *weight_norm.modules()]
    assert not any(is_norm(module) for module in others)


def test_timms_norms_are_recognised() -> None:
    layers = pytest.importorskip("timm.layers")
    for name in (
        "RmsNorm",
        "RmsNorm2d",
        "SimpleNorm",
        "LayerNorm2d",
        "BatchNormAct2d",
        "EvoNorm2dS0",
    ):
        assert is_norm(getattr(layers, name)(8)), name
    assert not is_norm(layers.ConvNormAct(3, 8))


def test_norm_parameters_are_those_of_every_norm_and_of_nothing_else() -> None:
    model = Stack(make_norm("derf"))
    model.extra = nn.LayerNorm(DIM)
    model.again = model.norm
    names = norm_parameters(model)
    own = ("alpha", "shift", "weight", "bias")
    expected = {f"blocks.{b}.norm{n}.{p}" for b in (0, 1) for n in (1, 2) for p in own}
    expected |= {f"norm.{p}" for p in own} | {"extra.weight", "extra.bias"}
    assert set(names) == expected
    assert len(names) == len(expected)
    assert set(names) <= {name for name, _ in model.named_parameters()}


# --- checkpoints ---


def test_a_checkpoint_of_another_norm_is_refused_though_its_tensors_would_load() -> None:
    dyt, layernorm = make_norm("dyt"), make_norm("layernorm")
    loaded = Stack(layernorm).load_state_dict(Stack(dyt).state_dict(), strict=False)
    assert loaded.missing_keys == []  # why names are compared
    check_compatible(dyt.describe(), make_norm("dyt", PointwiseOptions(alpha_init=2.0)).describe())
    with pytest.raises(ValueError, match="trained with norm=dyt, the model has norm=layernorm"):
        check_compatible(dyt.describe(), layernorm.describe())
    mixed = make_norm("dyt", PointwiseOptions(by_site={"final": "layernorm"}))
    with pytest.raises(ValueError, match="layernorm at site 'final', the model has dyt there"):
        check_compatible(mixed.describe(), dyt.describe())
    same = make_norm("dyt", PointwiseOptions(by_site={"final": "dyt"}))
    check_compatible(same.describe(), dyt.describe())
    with pytest.raises(ValueError, match="does not say which norm"):
        check_compatible({}, dyt.describe())


def test_the_package_imports_torch_and_itself_and_nothing_else_of_the_suite() -> None:
    package = Path(norms.__file__).parent
    imported = set()
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module or "")
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
    assert "suite.norms.factory" in imported
    foreign = {name for name in imported if not name.startswith("suite.norms")}
    others = {name.partition(".")[0] for name in foreign} - set(sys.stdlib_module_names)
    assert others == {"torch", "triton"}  # triton by its kernels alone, which nothing imports here
