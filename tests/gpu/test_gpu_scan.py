"""The Triton kernel of the scan on a GPU, against the loop over positions in float64.

They pass on an H100 with torch 2.11.0. `tox -e gpu` runs them; without a GPU they are skipped.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tasks.dna.scan import resolve, selective_scan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
NAMES = ("u_BDL", "delta_BDL", "A_DN", "B_BNL", "C_BNL", "D_D", "z_BDL", "delta_bias_D")
# Of the largest value: upstream's own tolerances are 6e-4 and 3e-2.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 6e-3}


def drawn(b: int, length: int, d: int, n: int, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs as Mamba's first weights make them: A = -(1..N), small steps."""
    draw = torch.Generator().manual_seed(length)
    shapes = [(b, d, length)] * 2 + [(d, n)] + [(b, n, length)] * 2 + [(d,), (b, d, length), (d,)]
    made = [torch.randn(*shape, generator=draw) for shape in shapes]
    x = dict(zip(NAMES, made, strict=True))
    x["A_DN"] = -torch.arange(1.0, n + 1).repeat(d, 1)
    x["delta_bias_D"] -= 4
    own = ("A_DN", "D_D", "delta_bias_D")
    return {k: v.to("cuda", torch.float32 if k in own else dtype) for k, v in x.items()}


def graded(x: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The output and all gradients of a fixed weighing of it."""
    leaves = {name: v.clone().requires_grad_() for name, v in x.items()}
    y = selective_scan(**leaves, **options)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    grads = torch.autograd.grad((y * weights).sum(), list(leaves.values()))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def check_close(found: dict[str, Tensor], x: dict[str, Tensor], **options: Any) -> None:
    """Against the loop in float64. Where nothing changes, as A with one position, the gradient is
    what rounding leaves of 0."""
    exact = graded({k: v.double() for k, v in x.items()}, backend="reference", **options)
    bound = BOUNDS[x["u_BDL"].dtype]
    for name, wanted in exact.items():
        error = (found[name].double() - wanted).abs().max()
        size = wanted.abs().max().clamp(min=1e-3)
        assert error < bound * size, (name, float(error), float(size))


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 32, 64, 16), (3, 333, 118, 16), (2, 70, 40, 5)])
def test_the_kernel_gives_the_values_and_gradients_of_the_loop(
    size: tuple[int, int, int, int], reverse: bool, dtype: torch.dtype
) -> None:
    x = drawn(*size, dtype=dtype)
    check_close(graded(x, backend="triton", reverse=reverse), x, reverse=reverse)


def test_the_kernel_takes_a_mask() -> None:
    x = drawn(3, 100, 40, 16, dtype=torch.float32)
    mask = torch.arange(100, device="cuda") < torch.tensor([[100], [61], [5]], device="cuda")
    check_close(graded(x, backend="triton", mask_BL=mask), x, mask_BL=mask)


def test_the_kernel_gives_the_same_bits_again() -> None:
    x = drawn(4, 500, 256, 16, dtype=torch.bfloat16)
    first, again = (graded(x, backend="triton") for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_offsets_beyond_two_to_the_31_are_right() -> None:
    b, length, d = 2, 2**20 + 3, 1024
    room = 4 * 2 * b * length * d
    if torch.cuda.get_device_properties(0).total_memory < 2 * room:
        pytest.skip("the GPU is too small for tensors of 2^31 elements")
    u = torch.ones(b, length, d, device="cuda", dtype=torch.bfloat16)
    one = torch.ones(b, length, 1, device="cuda", dtype=torch.bfloat16)
    A = torch.full((d, 1), -1.0, device="cuda")
    with torch.no_grad():
        y = selective_scan(u, u, A, one, one, softplus=False, layout="BLD", backend="triton")
    # h = e^-1 h + 1 settles at 1 / (1 - e^-1)
    torch.testing.assert_close(
        y[-1, -1].float(), torch.full((d,), 1.582, device="cuda"), rtol=0.01, atol=0
    )


def test_chunks_in_plain_pytorch_run_on_a_gpu_too() -> None:
    x = drawn(2, 77, 24, 8, dtype=torch.float32)
    check_close(graded(x, backend="chunked"), x)


def test_auto_takes_the_kernel() -> None:
    assert resolve("auto", "cuda") == "triton"
    assert resolve("auto", "cuda", dtype=torch.float64) == "chunked"
