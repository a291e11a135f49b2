"""Which backend a norm runs with, and the operators around the kernels: layouts, autograd."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from suite.norms import PointwiseOptions, RowOptions, make_norm
from suite.norms.functions import FUNCTIONS
from suite.norms.kernels import Choice, choose_backend, cpp, launches
from suite.norms.kernels.agreement import disagreement
from suite.norms.kernels.layout import layout_of
from suite.norms.kernels.ops import pointwise, pointwise_add, rows, rows_add

LACKS = cpp.available("cpu")
needs_cpp = pytest.mark.skipif(LACKS is not None, reason=f"the C++ kernels need it: {LACKS}")
DIM = 24


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(dim: int = DIM, *, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """alpha, shift, weight, bias, near 1."""
    made = [1 + 0.2 * drawn(n, seed=n + i) for i, n in enumerate((1, 1, dim, dim))]
    return [p.to(dtype).requires_grad_() for p in made]


def formula(x: Tensor, p: list[Tensor], *, function: str = "dyt", along: int = -1) -> Tensor:
    """In float64."""
    shape = [1] * x.dim()
    shape[along] = -1
    alpha, shift, weight, bias = (q.double().view(shape) for q in p)
    return (
        weight * FUNCTIONS[function].at(x.shape[along]).forward(alpha * x.double() + shift) + bias
    )


# -- which ------------------------------------------------------------------------------------


def test_auto_on_a_cpu_is_plain_torch_whatever_compiler_is_installed() -> None:
    assert choose_backend("auto", "cpu").name == "eager"
    assert choose_backend("auto", "cpu", family="rows").name == "eager"
    assert make_norm("dyt")(DIM, site="attn").choice("cpu").name == "eager"


def test_statistics_norms_take_torchs_kernels_unasked_on_every_device() -> None:
    assert choose_backend("auto", "cuda", family="rows").name == "eager"


def test_nothing_is_built_for_the_meta_device() -> None:
    layer = make_norm("dyt", PointwiseOptions(backend="triton"))(DIM, site="attn").to("meta")
    assert layer(torch.empty(2, DIM, device="meta")).shape == (2, DIM)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_kernel_that_is_asked_for_where_it_cannot_run_is_one_clear_line() -> None:
    layer = make_norm("dyt", PointwiseOptions(backend="triton"))(DIM, site="attn")
    with pytest.raises(ValueError, match=r"backend=triton cannot run on cpu: .*; take auto, eager"):
        layer(drawn(2, DIM))
    assert choose_backend("auto", "cuda").name == "eager"  # no device to run on: said, not raised
    assert "triton cannot run" in choose_backend("auto", "cuda").why


def test_an_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of auto, eager, .* got 'fast'"):
        choose_backend("fast", "cpu")
    with pytest.raises(ValueError, match=r"^backend must be one of"):
        RowOptions(backend="fast")  # type: ignore[arg-type]


def test_without_a_compiler_cpp_is_plain_torch_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "available", lambda device_type: "no C++ compiler")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("suite.norms.kernels.which", lambda name: None)
    found = choose_backend.__wrapped__("cpp", "cpu")
    assert (found.name, found.why) == ("eager", "no C++ compiler, nor for torch.compile")
    monkeypatch.setattr("suite.norms.kernels.which", lambda name: "/usr/bin/" + name)
    assert choose_backend.__wrapped__("cpp", "cpu").name == "compile"


def test_a_cxx_that_torch_compile_could_not_start_leaves_plain_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent -O2")
    found = choose_backend.__wrapped__("cpp", "cpu")
    assert (found.name, found.why[:16]) == ("eager", "CXX=/nonexistent")
    assert choose_backend.__wrapped__("compile", "cpu").name == "eager"


def test_a_kernel_found_missing_is_not_taken_inside_torch_compile_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, before = make_norm("dyt", PointwiseOptions(backend="cpp"))(8, site="attn"), launches()
    monkeypatch.setattr("suite.norms.kernels.chosen._missing", set())
    monkeypatch.setattr(
        "suite.norms.kernels.chosen.choose_backend", lambda *a, **k: Choice("eager", "broken")
    )
    layer.choice("cpu")
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(torch.ones(2, 8)), torch.tanh(torch.full((2, 8), 0.5)))
    assert launches() == before


@needs_cpp
@pytest.mark.parametrize("norm", ["dyt", "layernorm"])
@pytest.mark.parametrize("how", ["last", "first", "channels_last"])
def test_the_output_may_be_changed_in_place(norm: str, how: str) -> None:
    options = (PointwiseOptions if norm == "dyt" else RowOptions)(backend="cpp")
    layer = make_norm(norm, options)(6, site="attn", channels_first=how != "last")
    data = torch.randn(2, 3, 6) if how == "last" else torch.randn(2, 6, 4, 4)
    if how == "channels_last":
        data = data.to(memory_format=torch.channels_last)
    grads = []
    for relu in (torch.relu, torch.relu_):
        x = data.clone().requires_grad_()
        relu(layer(x)).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)  # type: ignore[arg-type]


@needs_cpp
@pytest.mark.parametrize("norm", ["dyt", "layernorm"])
def test_transforms_of_torch_func_see_the_formula(norm: str) -> None:
    options = (PointwiseOptions if norm == "dyt" else RowOptions)(backend="cpp")
    layer, x = make_norm(norm, options)(6, site="attn"), torch.randn(4, 6)
    torch.testing.assert_close(torch.vmap(layer)(x), layer(x))
    leaf = x.clone().requires_grad_()
    layer(leaf).square().sum().backward()
    found = torch.func.grad(lambda z: layer(z).square().sum())(x)
    torch.testing.assert_close(found, leaf.grad)


@needs_cpp
@pytest.mark.parametrize("shape", [(0, 6), (0, 6, 4, 4), (2, 6, 0), (0, 6, 0, 3)])
def test_nothing_is_normed_to_nothing(shape: tuple[int, ...]) -> None:
    options = PointwiseOptions(backend="cpp")
    layer = make_norm("dyt", options)(6, site="attn", channels_first=True)
    x = torch.empty(shape, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    assert torch.equal(layer.weight.grad, torch.zeros(6))


@needs_cpp
def test_a_kernel_that_computes_something_else_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = cpp.pointwise_forward

    def wrong(*args: Any, **rest: Any) -> Any:
        y, h = right(*args, **rest)
        return y * 1.01, h

    assert disagreement("cpp", "cpu", family="pointwise") is None
    assert disagreement("cpp", "cpu", family="rows") is None
    monkeypatch.setattr(cpp, "pointwise_forward", wrong)
    found = disagreement("cpp", "cpu", family="pointwise")
    assert found is not None
    assert found.startswith("its dyt output differs by")


def test_the_look_at_a_kernel_draws_none_of_the_runs_random_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reseeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded.append)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    disagreement("cpp", "cpu", family="pointwise")
    assert torch.equal(torch.get_rng_state(), before)
    assert reseeded == [3]  # a GPU's generator is the run's own too


@needs_cpp
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_look_at_a_kernel_works_in_an_evaluation(mode: Any) -> None:
    with mode(), torch.autocast("cpu", torch.bfloat16):
        assert disagreement("cpp", "cpu", family="pointwise") is None
        assert disagreement("cpp", "cpu", family="rows") is None


# -- layouts ----------------------------------------------------------------------------------


def test_dense_tensors_of_every_order_are_taken_as_they_lie_in_memory() -> None:
    x = drawn(2, 3, 5, 7)
    last = x.to(memory_format=torch.channels_last)
    assert layout_of(last, channels_first=True).inner == 1
    assert layout_of(x, channels_first=True).inner == 35
    assert layout_of(x, channels_first=False).inner == 1
    assert layout_of(drawn(4, 6, 8).transpose(1, 2), channels_first=True).inner == 1
    assert layout_of(drawn(4, 8, 6).transpose(1, 2), channels_first=False).inner == 6
    for y in (x, last, drawn(4, 6, 8).transpose(0, 2)):
        layout = layout_of(y, channels_first=True)
        assert layout.view(y).is_contiguous()
        assert layout.view(y).data_ptr() == y.data_ptr()
        assert layout.restore(layout.view(y)).stride() == y.stride()


LAYOUTS = {
    "tokens": (lambda: drawn(3, 5, DIM), False),
    "one dimension": (lambda: drawn(DIM), False),
    "vectors": (lambda: drawn(4, DIM), True),
    "channels first": (lambda: drawn(2, DIM, 5), True),
    "images": (lambda: drawn(2, DIM, 3, 4), True),
    "channels_last format": (
        lambda: drawn(2, DIM, 3, 4).to(memory_format=torch.channels_last),
        True,
    ),
    "transposed": (lambda: drawn(2, DIM, 5).transpose(1, 2), False),
    "with gaps": (lambda: drawn(3, 5, 2 * DIM)[..., :DIM], False),
    "every other row": (lambda: drawn(6, DIM)[::2], False),
    "expanded": (lambda: drawn(1, DIM).expand(5, DIM), False),
    "no rows": (lambda: drawn(0, DIM), False),
    "no positions": (lambda: drawn(2, DIM, 0), True),
}


@needs_cpp
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_the_values_and_gradients_of_the_formula(name: str) -> None:
    make, first = LAYOUTS[name]
    x, p = make().requires_grad_(), parameters()
    along = 1 if first and x.dim() > 2 else -1
    y = pointwise(x, *p, function="derf", channels_first=first, backend="cpp")
    plain = make_norm("derf")(DIM, site="attn", channels_first=first)(x)
    assert y.shape == x.shape
    if name not in ("with gaps", "every other row", "expanded"):  # those are copied
        assert y.stride() == plain.stride()
    wanted = formula(x, p, function="derf", along=along)
    torch.testing.assert_close(y.double(), wanted, rtol=2e-6, atol=2e-7)
    dy = drawn(*x.shape, seed=5)
    if name == "images":  # a gradient that lies otherwise in memory
        dy = dy.to(memory_format=torch.channels_last)
    found = torch.autograd.grad(y, [x, *p], dy)
    right = torch.autograd.grad(wanted, [x, *p], dy.double())
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-5, atol=1e-6)


@needs_cpp
@pytest.mark.parametrize("norm", ["dyt", "derf", "layernorm", "rmsnorm"])
@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
def test_a_layer_with_the_kernel_agrees_with_the_layer_without(norm: str, first: bool) -> None:
    options = PointwiseOptions if norm in ("dyt", "derf") else RowOptions
    shape = (2, DIM, 7) if first else (2, 7, DIM)
    x, dy = drawn(*shape).requires_grad_(), drawn(*shape, seed=1)
    found = []
    for backend in ("eager", "cpp"):
        layer = make_norm(norm, options(backend=backend))(DIM, site="attn", channels_first=first)
        before = launches()
        y = layer(x)
        grads = torch.autograd.grad(y, [x, *layer.parameters()], dy)
        assert (sum((launches() - before).values()) == 2) == (backend == "cpp")
        found.append([y, *grads])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# -- checks and autograd ----------------------------------------------------------------------


@needs_cpp
@pytest.mark.parametrize(
    ("x", "channels", "says"),
    [
        (lambda: drawn(2, DIM + 1), DIM, "x has 25 channels, a parameter has shape"),
        (lambda: drawn(2, DIM, dtype=torch.float64), DIM, "float32, bfloat16 or float16"),
        (lambda: torch.ones(2, DIM, dtype=torch.long), DIM, "got torch.int64"),
        (lambda: torch.tensor(1.0), DIM, "got a scalar"),
        (lambda: torch.empty(2, DIM, device="meta"), DIM, "x is on meta, a parameter on cpu"),
    ],
    ids=["channels", "float64", "integers", "scalar", "device"],
)
def test_what_a_kernel_would_read_wrongly_is_refused(x: Any, channels: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        pointwise(x(), *parameters(channels), function="dyt", channels_first=False, backend="cpp")
    with pytest.raises(ValueError, match=says):
        rows(x(), *parameters(channels)[2:], kind="layer", eps=1e-5, backend="cpp")


@needs_cpp
def test_float64_is_plain_torch_in_every_layer() -> None:
    layer = make_norm("dyt", PointwiseOptions(backend="cpp"))(DIM, site="attn").double()
    before = launches()
    x = drawn(2, DIM, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(layer, x)
    assert launches() == before


@needs_cpp
def test_a_second_derivative_names_the_backend_that_has_it() -> None:
    layer = make_norm("dyt", PointwiseOptions(backend="cpp"))(DIM, site="attn")
    x = drawn(2, DIM).requires_grad_()
    with pytest.raises(RuntimeError, match=r"take norm.backend=eager for create_graph=True"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


@needs_cpp
@pytest.mark.parametrize("norm", ["dyt", "rmsnorm"])
def test_a_kernel_keeps_its_input_and_nothing_else_of_that_size(norm: str) -> None:
    options = PointwiseOptions if norm == "dyt" else RowOptions
    layer = make_norm(norm, options(backend="cpp"))(DIM, site="attn")
    x, kept = drawn(64, DIM).requires_grad_(), {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    large = [t for t in kept.values() if t.numel() >= x.numel()]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]


@needs_cpp
def test_only_what_needs_a_gradient_gets_one() -> None:
    x, p = drawn(4, DIM), parameters()
    for frozen in range(4):
        p[frozen].requires_grad_(False)
        y = pointwise(x, *p, function="dyt", channels_first=False, backend="cpp")
        if frozen < 3:
            grads = torch.autograd.grad(y.sum(), p[frozen + 1 :])
            assert all(torch.isfinite(g).all() for g in grads)
        else:
            assert not y.requires_grad


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_sixteen_bit_inputs_and_parameters_keep_their_dtypes(dtype: torch.dtype) -> None:
    for own in (torch.float32, dtype):
        x, p = drawn(6, DIM, dtype=dtype).requires_grad_(), parameters(dtype=own)
        y = pointwise(x, *p, function="dyt", channels_first=False, backend="cpp")
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), formula(x, p), rtol=1e-2, atol=1e-2)
        grads = torch.autograd.grad(y.sum(), [x, *p])
        assert [g.dtype for g in grads] == [dtype, *[own] * 4]
        z = rows(x, *p[2:], kind="rms", eps=1e-6, backend="cpp")
        grads = torch.autograd.grad(z.sum(), [x, *p[2:]])
        assert [g.dtype for g in grads] == [dtype, own, own]


@needs_cpp
def test_under_autocast_the_output_keeps_the_inputs_dtype() -> None:
    layer = make_norm("dyt", PointwiseOptions(backend="cpp"))(DIM, site="attn")
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(drawn(2, DIM)).dtype == torch.float32
        assert layer(drawn(2, DIM).bfloat16()).dtype == torch.bfloat16


@needs_cpp
@pytest.mark.parametrize("used", ["both", "norm", "sum"])
def test_add_and_norm_in_one_pass_are_the_two_in_turn(used: str) -> None:
    x, r, p = drawn(5, DIM).requires_grad_(), drawn(5, DIM, seed=1).requires_grad_(), parameters()

    def graded(y: Tensor, h: Tensor) -> list[Tensor]:
        parts = {"both": (y, h), "norm": (y,), "sum": (h,)}[used]
        total = sum((part * drawn(5, DIM, seed=9 + i)).sum() for i, part in enumerate(parts))
        found = torch.autograd.grad(total, [x, r, *p], allow_unused=True)
        return [y, h, *(torch.zeros(()) if g is None else g for g in found)]

    h = x + r
    one = graded(*pointwise_add(x, r, *p, function="dyt", channels_first=False, backend="cpp"))
    two = graded(pointwise(h, *p, function="dyt", channels_first=False, backend="cpp"), h)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    if used == "both":
        h = x + r
        one = graded(*rows_add(x, r, *p[2:], kind="layer", eps=1e-5, backend="cpp"))
        two = graded(rows(h, *p[2:], kind="layer", eps=1e-5, backend="cpp"), h)
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@needs_cpp
def test_a_residual_of_another_shape_or_dtype_is_refused() -> None:
    p = parameters()
    for r in (drawn(1, DIM), drawn(5, DIM, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="x and residual must have one shape, dtype"):
            pointwise_add(drawn(5, DIM), r, *p, function="dyt", channels_first=False, backend="cpp")


OPERATORS = {
    "pointwise": lambda x, p: (x, *p, "derf", False, "cpp"),
    "pointwise_add": lambda x, p: (x, x.detach().flip(0), *p, "derf", False, "cpp"),
    "rows": lambda x, p: (x, *p[2:], "layer", 1e-5, "cpp"),
    "rows_add": lambda x, p: (x, x.detach().flip(0), None, p[3], "rms", 1e-5, "cpp"),
}


@needs_cpp
@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_passes_torchs_own_check(name: str) -> None:
    x = drawn(3, 4, DIM).requires_grad_()
    operator = getattr(torch.ops.dyt_suite, name).default
    torch.library.opcheck(operator, OPERATORS[name](x, parameters()))
    turned = drawn(3, DIM, 4).transpose(1, 2).requires_grad_()
    torch.library.opcheck(operator, OPERATORS[name](turned, parameters()))


class Branch(nn.Module):
    def __init__(self, norm: str, options: Any) -> None:
        super().__init__()
        self.norm, self.linear = make_norm(norm, options)(DIM, site="attn"), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


@needs_cpp
@pytest.mark.parametrize("norm", ["dyt", "layernorm"])
def test_torch_compile_keeps_a_kernel_that_was_asked_for_in_one_graph(norm: str) -> None:
    options = PointwiseOptions if norm == "dyt" else RowOptions
    branch, x = Branch(norm, options(backend="cpp")), drawn(4, DIM).requires_grad_()
    compiled = torch.compile(branch, backend="aot_eager", fullgraph=True)
    before = launches()
    found = torch.autograd.grad(compiled(x).sum(), [x, *branch.parameters()])
    assert sum((launches() - before).values()) == 2
    wanted = torch.autograd.grad(branch(x).sum(), [x, *branch.parameters()])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_auto_inside_torch_compile_is_plain_torch_in_one_graph() -> None:
    for norm in ("dyt", "layernorm", "rmsnorm"):
        branch, x = Branch(norm, None), drawn(4, DIM).requires_grad_()
        before = launches()
        compiled = torch.compile(branch, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), branch(x), rtol=1e-5, atol=1e-6)
        assert launches() == before


@needs_cpp
def test_layers_with_a_kernel_are_copied_and_pickled() -> None:
    layer = make_norm("dyt", PointwiseOptions(backend="cpp"))(DIM, site="attn")
    x = drawn(2, DIM)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))


@needs_cpp
def test_nan_goes_through_every_kernel() -> None:
    x = drawn(3, DIM)
    x[1, 2] = float("nan")
    for function in FUNCTIONS:
        y = pointwise(x, *parameters(), function=function, channels_first=False, backend="cpp")
        assert y.isnan().nonzero().tolist() == [[1, 2]], function
    y = rows(x, None, None, kind="layer", eps=1e-5, backend="cpp")
    assert y[1].isnan().all()
    assert not y[[0, 2]].isnan().any()
    assert F.layer_norm(x, (DIM,))[1].isnan().all()
