"""Norms computed again in the backward: the same bits, fewer bytes, nothing left behind; and the
residual add with its norm."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint

from suite.layers import Attention, Mlp
from suite.norms import NORMS, PointwiseNorm, PointwiseOptions, make_norm
from suite.norms.recompute import recompute_norms
from suite.norms.residual import add_norm

torch.set_num_threads(1)

DIM = 16
POINTWISE = sorted(name for name, spec in NORMS.items() if spec.options == PointwiseOptions())
Loss = Callable[[Tensor], Tensor]


class Vit(nn.Module):
    """One block; between the branches whatever `between` does."""

    def __init__(self, name: str = "dyt") -> None:
        super().__init__()
        norm = make_norm(name)
        self.norm1, self.attn = norm(DIM, site="attn"), Attention(DIM, heads=2)
        self.norm2, self.mlp = norm(DIM, site="ffn"), Mlp(DIM, hidden_dim=2 * DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Consumers(nn.Module):
    """A norm and three linear layers that take its output, as `how` hands it to them."""

    def __init__(self, how: Callable[[Tensor], Tensor] = lambda y: y, **options: Any) -> None:
        super().__init__()
        self.norm = make_norm("derf", PointwiseOptions(**options))(DIM, site="attn")
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(3))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(self.how(y)) for layer in self.layers)
        return (q * k.sigmoid() + v).sin()


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def gradients(
    model: nn.Module, *, again: bool, autocast: bool = False, x: Tensor | None = None
) -> list[Tensor]:
    """Of the input and every parameter, and the output."""
    model.zero_grad(set_to_none=True)
    x = (draw(2, 3, DIM) if x is None else x).clone().requires_grad_()
    with (
        recompute_norms(model) if again else nullcontext(),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        out = model(x)
    out.float().square().sum().backward()
    return [out.detach(), *(t.grad for t in (x, *model.parameters()) if t.grad is not None)]


def check_same_bits(model: nn.Module, **how: Any) -> None:
    for parameter in model.parameters():
        parameter.data += 0.01 * draw(*parameter.shape)
    plain, again = (gradients(model, again=again, **how) for again in (False, True))
    assert len(plain) == len(again) > 3
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


class Allocated(TorchDispatchMode):
    """Every storage that an operation returns, by a weak reference; `model`'s and x's not."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.given = {t.untyped_storage()._cdata for t in (x, *model.parameters())}
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.given:
                    self.seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self) -> int:
        gc.collect()
        return sum(size for weak, size in self.seen.values() if not weak.expired())


def kept(model: nn.Module, *, again: bool, autocast: bool = False) -> int:
    """Bytes that are alive after a forward, of what it made, without its output."""
    x = draw(2, 3, DIM).requires_grad_()
    with (
        Allocated(model, x) as allocated,
        recompute_norms(model) if again else nullcontext(),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        out = model(x)
    return allocated.alive() - out.untyped_storage().nbytes()


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", POINTWISE)
def test_gradients_of_a_block_have_the_same_bits_with_every_norm(name: str, autocast: bool) -> None:
    torch.manual_seed(0)
    check_same_bits(Vit(name), autocast=autocast)


HOW: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda y: y,
    "a view": lambda y: y[:, 1:],
    "transposed": lambda y: y.transpose(0, 1),
    "flat": lambda y: y.reshape(-1, DIM),
    "one example": lambda y: y[1],
    "a copy": lambda y: y * 2,
    "through a relu": lambda y: y.relu(),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("how", HOW)
def test_consumers_of_views_and_reshapes_get_the_same_bits(how: str, autocast: bool) -> None:
    torch.manual_seed(0)
    check_same_bits(Consumers(HOW[how]), autocast=autocast)


@pytest.mark.parametrize("options", [{"alpha": "none"}, {"weight": False, "bias": False}])
def test_it_works_without_some_of_the_parameters(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    check_same_bits(Consumers(**options))


def test_channels_first_and_convolutions_get_the_same_bits() -> None:
    torch.manual_seed(0)
    norm = make_norm("dyt")(4, site="stem", channels_first=True)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.Conv2d(4, 3, 3))
    for x in (draw(2, 2, 7, 7), draw(2, 2, 7, 7).contiguous(memory_format=torch.channels_last)):
        check_same_bits(model, x=x)
        check_same_bits(model, x=x, autocast=True)


def test_an_output_of_sixteen_bits_is_recomputed_in_them() -> None:
    torch.manual_seed(0)
    model = Consumers().to(torch.bfloat16)
    check_same_bits(model, x=draw(2, 3, DIM).to(torch.bfloat16))


def test_values_under_autocast_do_not_change_for_what_follows_in_float32() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = make_norm("dyt")(DIM, site="final"), nn.Linear(DIM, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            assert y.dtype == torch.float32
            return self.head(y).float().mean(1) + self.head(y.mean(1)) + y.mean()

    torch.manual_seed(0)
    check_same_bits(Pooled(), autocast=True)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_the_norms_outputs_and_all_that_they_save_are_not_kept(autocast: bool) -> None:
    """Of a norm of n elements in float32: u, erf(u), y, or its three casts under autocast."""
    torch.manual_seed(0)
    n = 2 * 3 * DIM
    model = Consumers()
    plain, again = (kept(model, again=on, autocast=autocast) for on in (False, True))
    outputs = 3 * n * 2 if autocast else n * 4
    assert plain - again == outputs + 2 * n * 4


def test_a_block_keeps_less() -> None:
    torch.manual_seed(0)
    for autocast in (False, True):
        model = Vit()
        plain, again = (kept(model, again=on, autocast=autocast) for on in (False, True))
        y = 2 * 3 * DIM * (2 if autocast else 4)
        assert plain - again == 2 * (y + 2 * 3 * DIM * 4)  # two norms: y and tanh


def test_statistics_norms_are_left_alone() -> None:
    torch.manual_seed(0)
    model = Vit("layernorm")
    context = recompute_norms(model)
    with context:
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert kept(model, again=True) == kept(model, again=False)
    check_same_bits(model)


def test_a_norm_is_repeated_once_for_all_its_consumers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = PointwiseNorm.forward
    monkeypatch.setattr(
        PointwiseNorm, "forward", lambda self, x: calls.append(x) or forward(self, x)
    )
    gradients(Consumers(), again=True)
    assert len(calls) == 2  # forward and backward
    gradients(Consumers(), again=True, autocast=True)
    assert len(calls) == 4


def test_nothing_is_left_after_the_backward() -> None:
    model = Consumers()
    context = recompute_norms(model)
    x = draw(2, 3, DIM).requires_grad_()
    h = x * 1
    with context:
        out = model(h)
    weak = StorageWeakRef(h.untyped_storage())
    del h
    assert not weak.expired()
    out.sum().backward()
    assert weak.expired()
    assert not context.known
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_nothing_is_left_of_a_graph_that_is_never_walked() -> None:
    model, x = Vit(), draw(2, 3, DIM)
    with Allocated(model, x) as allocated:
        with recompute_norms(model):
            out = model(x)
        del out
    assert allocated.alive() == 0


def test_what_is_made_again_is_given_back_before_the_next_norm_is_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from suite.norms import recompute

    made: list[Any] = []
    make = recompute._Call.make

    def noted(self: Any) -> None:
        assert all(not call.made for call in made)
        made.append(self)
        make(self)

    monkeypatch.setattr(recompute._Call, "make", noted)
    gradients(nn.Sequential(Vit(), Vit()), again=True)
    assert len(made) == 4
    assert all(not call.made for call in made)


def test_a_kept_graph_can_be_walked_twice() -> None:
    torch.manual_seed(0)
    model, x = Consumers(), draw(2, 3, DIM).requires_grad_()
    with recompute_norms(model):
        loss = model(x).sum()
    leaves = [x, *model.parameters()]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    wanted = torch.autograd.grad(model(x).sum(), leaves)
    for one, two, plain in zip(first, second, wanted, strict=True):
        assert torch.equal(one, plain)
        assert torch.equal(two, plain)


def test_second_derivatives_are_right() -> None:
    torch.manual_seed(0)
    model = Consumers().double()

    def penalty(*, again: bool) -> list[Tensor]:
        x = draw(2, 3, DIM).double().requires_grad_()
        with recompute_norms(model) if again else nullcontext():
            loss = model(x).square().sum()
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return list(torch.autograd.grad(slope.square().sum(), model.parameters()))

    for one, other in zip(penalty(again=False), penalty(again=True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_backward_may_be_inside_the_context() -> None:
    torch.manual_seed(0)
    model, x = Vit(), draw(2, 3, DIM)
    wanted = gradients(model, again=False)
    model.zero_grad()
    x.requires_grad_()
    with recompute_norms(model):
        model(x).square().sum().backward()
    assert all(
        torch.equal(p.grad, w) for p, w in zip((x, *model.parameters()), wanted[1:], strict=True)
    )


def test_an_output_changed_in_place_is_saved_as_it_is() -> None:
    torch.manual_seed(0)

    class Changed(Consumers):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x).relu_()
            return self.layers[0](y) * self.layers[1](y)

    check_same_bits(Changed())
    check_same_bits(Changed(), autocast=True)


def test_an_input_changed_in_place_is_refused() -> None:
    norm, linear = make_norm("dyt")(DIM, site="attn"), nn.Linear(DIM, DIM)
    x = draw(2, DIM).requires_grad_() * 1
    with recompute_norms(nn.Sequential(norm, linear)):
        out = linear(norm(x))
        x += out
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


@pytest.mark.parametrize("which", ["norm.alpha", "0.weight", "2.weight"])
def test_a_parameter_changed_in_place_is_refused(which: str) -> None:
    model = nn.Sequential(nn.Linear(DIM, DIM), make_norm("dyt")(DIM, site="attn"))
    model.append(nn.Linear(DIM, DIM))
    with recompute_norms(model):
        out = model(draw(2, DIM).requires_grad_()).sum()
    with torch.no_grad():
        model.get_parameter(which.replace("norm", "1")).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_an_activation_changed_in_place_elsewhere_is_refused_as_without() -> None:
    model = nn.Sequential(make_norm("dyt")(DIM, site="attn"), nn.Linear(DIM, DIM), nn.Tanh())
    with recompute_norms(model):
        out = model(draw(2, DIM))
        out.mul_(2)  # tanh saves its output
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_one_norm_may_be_used_twice_and_on_its_own_output() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = make_norm("derf")(DIM, site="attn"), nn.Linear(DIM, DIM)

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(self.norm(x)) + self.linear(self.norm(2 * x))
            return self.linear(self.norm(self.norm(x)))

    torch.manual_seed(0)
    check_same_bits(Twice())
    check_same_bits(Twice(), autocast=True)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_checkpointed_regions_work(reentrant: bool, autocast: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = Vit(), make_norm("dyt")(DIM, site="attn"), Vit()
            self.linear = nn.Linear(DIM, DIM)

        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.first, x, use_reentrant=reentrant)
            y = checkpoint(self.linear, self.norm(x), use_reentrant=reentrant)
            return self.last(x + y)

    torch.manual_seed(0)
    check_same_bits(Checkpointed(), autocast=autocast)


def test_gradients_accumulate_over_micro_batches() -> None:
    torch.manual_seed(0)
    model = Vit()
    other = copy.deepcopy(model)
    context = recompute_norms(model)
    for micro in range(3):
        x = draw(2, 3, DIM) + micro
        with context:
            loss = model(x).square().sum()
        loss.backward()
        other(x).square().sum().backward()
    for one, plain in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, plain.grad)


def test_parameters_given_from_outside_are_the_ones_that_are_used_again() -> None:
    torch.manual_seed(0)
    model, x = Consumers(), draw(2, 3, DIM)
    given = {name: (p.detach() + 0.1).requires_grad_() for name, p in model.named_parameters()}
    results = []
    for again in (False, True):
        with recompute_norms(model) if again else nullcontext():
            out = torch.func.functional_call(model, given, (x,)).sum()
        results.append(torch.autograd.grad(out, list(given.values())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_frozen_norms_and_inputs_without_gradient_work() -> None:
    torch.manual_seed(0)
    model = Vit()
    for norm in (model.norm1, model.norm2):
        norm.requires_grad_(False)
    check_same_bits(model)
    with torch.no_grad(), recompute_norms(model):
        out = model(draw(2, 3, DIM))
    assert torch.equal(out, model(draw(2, 3, DIM)))


def test_an_error_inside_a_norm_leaves_nothing_open() -> None:
    torch.manual_seed(0)
    model = Vit()
    wanted = gradients(model, again=False)
    context = recompute_norms(model)
    with context, pytest.raises(RuntimeError):
        model(torch.zeros(2, 3, DIM + 1))
    with context:
        with pytest.raises(RuntimeError):
            model.norm1(torch.zeros(2, DIM + 1, requires_grad=True))
        assert context.inside is None
    found = gradients(model, again=True)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_an_open_context_is_not_entered_again() -> None:
    context = recompute_norms(Vit())
    with context, pytest.raises(RuntimeError, match="already open"):
        context.__enter__()


def test_nan_in_the_input_is_nan_in_the_gradients() -> None:
    x = draw(2, 3, DIM)
    x[0, 0, 0] = torch.nan
    model = Consumers()
    found = gradients(model, again=True, x=x)
    for one, plain in zip(found, gradients(model, again=False, x=x), strict=True):
        assert torch.equal(one.isnan(), plain.isnan())
    assert all(gradient.isnan().any() for gradient in found)


def test_compiled_modules_are_left_to_the_compiler() -> None:
    model = Vit()
    compiled = torch.compile(model, backend="eager")
    with recompute_norms(compiled):
        assert not any(m._forward_hooks for m in model.modules())
    both = nn.Sequential(Vit(), Vit())
    both[0].compile(backend="eager")
    with recompute_norms(both):
        assert not both[0].norm1._forward_hooks
        assert both[1].norm1._forward_hooks


def test_what_is_compiled_from_outside_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    model, x = Consumers(), draw(2, 3, DIM)
    compiled = torch.compile(lambda x: model(x), backend="eager")
    found = []
    for again in (False, True, False):
        with recompute_norms(model) if again else nullcontext():
            out = compiled(x).sum()
        found.append(torch.autograd.grad(out, list(model.parameters())))
    for one, other, last in zip(*found, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, last)


# -- residual add and norm ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["layernorm", "rmsnorm", "batchnorm", "dyt", "derf", "identity"])
def test_add_norm_is_the_add_and_the_norm(name: str) -> None:
    norm = make_norm(name)(DIM, site="ffn")
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for together in (True, False):
            x, residual = (draw(2, 3, DIM).to(dtype).requires_grad_() for _ in range(2))
            h = residual + x
            y, h = add_norm(norm, x, residual) if together else (norm(h), h)
            grads = torch.autograd.grad((y * 2 + h.sin()).sum(), [x, residual, *norm.parameters()])
            results.append([y, h, *grads])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_add_norm_calls_a_norm_that_somebody_listens_to() -> None:
    norm, heard = make_norm("dyt")(DIM, site="ffn"), []
    norm.backend_for = lambda x: "cpp"  # as if it had a kernel
    norm.register_forward_hook(lambda *call: heard.append(call))
    y, h = add_norm(norm, draw(2, DIM), draw(2, DIM))
    assert len(heard) == 1
    assert torch.equal(h, 2 * draw(2, DIM))
    assert torch.equal(y, F.linear(y, torch.eye(DIM)))
