"""Tensors that a kernel must not misread, and machines that it must not trust: what `launch` and
`choose_backend` do before a kernel starts.

Triton's interpreter is chosen at its first import, so those checks run in a process of their own:
this file, as a script.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from suite.norms import make_norm
from suite.norms.kernels import Choice, choose_backend, cpp
from suite.norms.kernels.chosen import Chosen
from suite.norms.kernels.ops import pointwise, rows

ROOT = Path(__file__).parents[2]
DIM = 9
LACKS = cpp.available("cpu")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_parameters_apart(backend: str) -> None:
    """Every other number of a tensor, and one number for all channels."""
    x, long = drawn(4, DIM), drawn(2 * DIM, seed=1)
    weight, bias = long[::2].detach().requires_grad_(), torch.ones(1).expand(DIM)
    both: list[tuple[Any, list[Tensor | None], dict[str, Any]]] = [
        (pointwise, [long[1::2], None, weight, bias], {"function": "dyt", "channels_first": False}),
        (rows, [weight, bias], {"kind": "layer", "eps": 1e-5}),
    ]
    for norm, apart, settings in both:
        dense = [p if p is None else p.contiguous() for p in apart]
        y = norm(x, *apart, **settings, backend=backend)
        wanted = norm(x, *dense, **settings, backend=backend)
        assert torch.equal(y, wanted)
        (found,) = torch.autograd.grad(y.sum(), weight)
        (right,) = torch.autograd.grad(wanted.sum(), weight)
        assert torch.equal(found, right)


def check_a_buffers_middle(backend: str) -> None:
    """Contiguous tensors that do not begin where memory was allocated, and one without examples."""
    settings: dict[str, Any] = {"function": "derf", "channels_first": True, "backend": backend}
    for shape in ((3, DIM), (2, DIM, 5)):
        x = drawn(4, *shape[1:])[1 : 1 + shape[0]]
        p = [drawn(n + 1, seed=n)[1:] for n in (1, 1, DIM, DIM)]
        y = pointwise(x, *p, **settings)
        assert torch.equal(y, pointwise(x.clone(), *map(torch.clone, p), **settings))
        assert pointwise(x[:0], *p, **settings).shape == x[:0].shape


CHECKS = (check_parameters_apart, check_a_buffers_middle)


@pytest.mark.skipif(LACKS is not None, reason=f"the C++ kernels need it: {LACKS}")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_cpp_kernels_read_what_is_meant(check: Any) -> None:
    check("cpp")


def test_the_triton_kernels_read_what_is_meant() -> None:
    pytest.importorskip("triton")
    env = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__))], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [check.__name__ for check in CHECKS]


@pytest.mark.skipif(LACKS is not None, reason=f"the C++ kernels need it: {LACKS}")
@pytest.mark.parametrize("family", ["rows", "pointwise"])
def test_torch_compile_makes_one_graph_for_all_lengths(family: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    one, settings = torch.ones(DIM, requires_grad=True), {"backend": "cpp"}

    def pointwise_of(x: Tensor) -> Tensor:
        given = (one[:1], None, one, None)
        return pointwise(x, *given, function="dyt", channels_first=True, **settings)

    def rows_of(x: Tensor) -> Tensor:
        return rows(x, one, None, kind="rms", eps=1e-5, **settings)

    counter = CompileCounterWithBackend("aot_eager")
    norm = pointwise_of if family == "pointwise" else rows_of
    compiled = torch.compile(norm, backend=counter, fullgraph=True)
    for length in (5, 7, 9):
        shape = (length - 3, DIM, length) if family == "pointwise" else (length - 3, length, DIM)
        x = drawn(*shape).requires_grad_()
        y = compiled(x)
        torch.testing.assert_close(y, norm(x))
        assert torch.autograd.grad(y.sum(), x)[0].shape == shape
    assert counter.frame_count == 2  # of the first length, and of any


def test_auto_leaves_a_tensor_that_is_no_plain_one_to_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Sharded(Tensor):
        """As DTensor: a subclass, for which an operator of ours has no rule."""

    kernel = Choice("triton", "agrees with the formula here")
    monkeypatch.setattr(Chosen, "choice", lambda self, device_type: kernel)
    layer = make_norm("dyt")(DIM, site="attn")
    assert layer.backend_for(drawn(2, DIM)) == "triton"
    assert layer.backend_for(drawn(2, DIM).as_subclass(Sharded)) == "eager"


def test_a_triton_that_cannot_be_imported_is_said_and_not_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*names: str) -> Any:
        raise AttributeError("module 'triton.language' has no attribute 'clamp'")

    monkeypatch.setattr("suite.norms.kernels.module_of", broken)
    found = choose_backend.__wrapped__("auto", "cuda")
    assert found.name == "eager"
    assert "it cannot be imported: module 'triton.language' has no" in found.why


def test_options_of_nvidias_compiler_are_given_to_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from suite.norms.kernels import triton_rows

    assert triton_rows._registers(2, 8) == {"maxnreg": 128}
    assert triton_rows._registers(4, 8) == triton_rows._registers(2, 1) == {}
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert triton_rows._registers(2, 8) == {}


if __name__ == "__main__":
    for each in CHECKS:
        each("triton")
        print(each.__name__)
