"""The Triton kernels of the point-wise norms, without a GPU.

Values and gradients in Triton's interpreter, against float64 autograd of the plain formula. The
interpreter is chosen when Triton is first imported, so those checks run in a process of their own:
this file, as a script. And what the compiler makes of the kernels for an H100, which needs none.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

triton = pytest.importorskip("triton")
tl = triton.language

from suite.norms.functions import FUNCTIONS  # noqa: E402
from suite.norms.kernels import triton_launch, triton_pointwise, triton_tiles  # noqa: E402
from suite.norms.kernels.triton_functions import TRITON_FUNCTIONS  # noqa: E402

ROOT = Path(__file__).parents[2]
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# of one rounding; the interpreter truncates to bfloat16 where the hardware rounds
STEP = {torch.float32: 0.0, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
EVERYTHING = (True, True, True, True, True)


@triton.jit
def each(u, f, slope, F: tl.constexpr, B: tl.constexpr):
    """One function and its slope, with 16 channels."""
    at = tl.arange(0, B)
    found, found_slope = F(tl.load(u + at), 16)
    tl.store(f + at, found)
    tl.store(slope + at, found_slope)


@triton.jit
def place(out, plane, row, planes, rows, width, FIRST: tl.constexpr, WIDE: tl.constexpr):
    """Where a tile [4, 4] begins, and its last element from there."""
    at, _ = triton_tiles._place(plane, row, row * 0 + 8, planes, rows, width, FIRST, True, 4, 4)
    tl.store(out, at)
    tl.store(out + 1, tl.max(tl.max(triton_tiles._offsets(width, WIDE, 4, 4), 1), 0).to(tl.int64))


def draw(case: dict[str, Any]) -> dict[str, Tensor | None]:
    """Seeded tensors of a case."""
    generator = torch.Generator().manual_seed(case["seed"])
    dim, dtype = case["dim"], case["dtype"]
    full = (case["outer"], dim, case["inner"])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def parameter(kind: str, around: float) -> Tensor | None:
        size = {"none": 0, "scalar": 1, "channel": dim}[kind]
        return 0.2 * normal(size) + around if size else None

    return {
        "x": (2 * normal(*full)).to(dtype),
        "residual": normal(*full).to(dtype) if case["residual"] else None,
        "alpha": parameter(case["alpha"], 0.7),
        "shift": parameter(case["shift"], 0.1),
        "weight": parameter(case["affine"], 1.0),
        "bias": parameter(case["affine"], 0.3),
        "dy": normal(*full).to(dtype),
        "dh": normal(*full).to(dtype) if case["residual"] else None,
    }


def reference(
    t: dict[str, Tensor | None], h: Tensor, function: str
) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """y, the sum of its terms' sizes, gradients and the sums of their terms' sizes, in float64."""
    f = FUNCTIONS[function].at(h.shape[1]).forward
    x = h.double().requires_grad_()
    along = {
        name: t[name].double().reshape(1, -1, 1).expand_as(x).clone().requires_grad_()
        for name in ("alpha", "shift", "weight", "bias")
        if t[name] is not None
    }
    u = x * along["alpha"] if "alpha" in along else x
    u = u + along["shift"] if "shift" in along else u
    y = f(u) * along["weight"] if "weight" in along else f(u)
    size = y.detach().abs()
    if "bias" in along:
        y, size = y + along["bias"], size + along["bias"].detach().abs()
    dx, *per_element = torch.autograd.grad(y, [x, *along.values()], t["dy"].double())
    sizes = {"x": dx.abs()}
    if t["dh"] is not None:
        dx, sizes["x"] = dx + t["dh"].double(), sizes["x"] + t["dh"].double().abs()
    found = {"x": dx}
    for name, terms in zip(along, per_element, strict=True):
        kept = (0, 2) if t[name].numel() == h.shape[1] else (0, 1, 2)
        found[name] = terms.sum(kept).reshape(-1)
        sizes[name] = terms.abs().sum(kept).reshape(-1)
    return y.detach(), size, found, sizes


def agree(case: dict[str, Any]) -> None:
    """Kernel and float64 formula, forward and backward, and the backward twice to the bit."""
    t = draw(case)
    same = {"function": case["function"], "dim": case["dim"], "inner": case["inner"]}
    parameters = tuple(t[name] for name in ("alpha", "shift", "weight", "bias"))
    y, h = triton_pointwise.pointwise_forward(t["x"], t["residual"], *parameters, **same)
    step = STEP[case["dtype"]]
    assert (h is None) == (t["residual"] is None)
    if h is None:
        h = t["x"]
    else:
        total = t["x"].double() + t["residual"].double()
        assert ((h.double() - total).abs() <= (step + 2e-7) * total.abs() + 1e-7).all(), case
    wanted, size, gradients, sizes = reference(t, h, case["function"])
    assert y.dtype == h.dtype == case["dtype"]
    assert ((y.double() - wanted).abs() <= 2e-7 + 2e-6 * size + step * wanted.abs()).all(), case
    once, again = (
        triton_pointwise.pointwise_backward(
            t["dy"], t["dh"], h, *parameters, **same, needs=EVERYTHING
        )
        for _ in range(2)
    )
    for name, got, repeat in zip(
        ("x", "alpha", "shift", "weight", "bias"), once, again, strict=True
    ):
        if name not in gradients:
            assert got is None
            continue
        assert torch.equal(got, repeat)
        assert got.dtype == (case["dtype"] if name == "x" else torch.float32)
        assert got.shape == t[name].shape
        bound = 2e-6 * sizes[name] + (2e-7 + step * gradients[name].abs() if name == "x" else 1e-7)
        assert ((got.double() - gradients[name]).abs() <= bound).all(), (name, case)


CASE = {
    "function": "dyt",
    "outer": 5,
    "dim": 96,
    "inner": 1,
    "dtype": torch.float32,
    "seed": 0,
    "alpha": "scalar",
    "shift": "none",
    "affine": "channel",
    "residual": False,
}
CASES = (
    {"function": "derf", "dtype": torch.bfloat16, "residual": True, "shift": "scalar", "outer": 21},
    {"alpha": "channel", "shift": "channel", "inner": 49, "dim": 5, "residual": True},
    {"function": "dyisru", "inner": 300, "dim": 3, "outer": 2, "dtype": torch.float16},
    {"dim": 20000, "outer": 1},
    {"dim": 1, "outer": 300},
    {"alpha": "none", "affine": "none"},
)


@st.composite
def cases(sample: st.DrawFn) -> dict[str, Any]:
    dim = sample(st.one_of(st.integers(1, 40), st.integers(1, 1500)))
    inner = sample(st.sampled_from((1, 1, 2, 49)))
    kinds = st.sampled_from(("none", "scalar", "channel"))
    return {
        "function": sample(st.sampled_from(sorted(FUNCTIONS))),
        "outer": sample(st.integers(1, max(1, min(40, 2000 // (dim * inner))))),
        "dim": dim,
        "inner": inner,
        "dtype": sample(st.sampled_from(sorted(STEP, key=str))),
        "seed": sample(st.integers(0, 99)),
        "alpha": sample(kinds),
        "shift": sample(kinds),
        "affine": sample(st.sampled_from(("none", "channel"))),
        "residual": sample(st.booleans()),
    }


def check_functions() -> None:
    """All 18 and their slopes, from subnormal to infinite."""
    magnitudes = torch.cat(
        (torch.logspace(-37, 38, 1000), torch.linspace(0, 12, 1040), torch.zeros(1))
    )
    outside = torch.tensor([1e-40, -1e-40, float("inf"), -float("inf"), float("nan")])
    u = torch.cat((magnitudes, -magnitudes, outside, torch.ones(9)))
    f, slope = torch.empty_like(u), torch.empty_like(u)
    inside = slice(0, 2 * len(magnitudes))
    for name, function in TRITON_FUNCTIONS.items():
        each[(1,)](u, f, slope, function, len(u))
        row = FUNCTIONS[name].at(16)
        exact = u.double().requires_grad_()
        wanted = row.forward(exact)
        (gradient,) = torch.autograd.grad(wanted.sum(), exact)
        for got, right in ((f, wanted.detach()), (slope, gradient)):
            error = (got.double() - right).abs() - 2e-6 * right.abs()
            worst = error[inside].argmax()
            assert error[inside][worst] <= 2e-7, (name, u[worst], got[worst], right[worst])
        after = f[inside.stop :]
        assert (after[:2].double() - wanted[inside.stop :][:2]).abs().max() <= 2e-7
        least = 0.0 if name == "sigmoid" else -row.supremum
        ends = torch.tensor([row.supremum, least])
        assert torch.allclose(after[2:4], ends, rtol=4e-7, atol=1e-30), (name, after)
        assert after[4].isnan(), name
        assert slope[inside.stop + 2 : inside.stop + 4].abs().max() < 1e-30, name
        assert slope[u == 0].sub(row.slope).abs().max() < 2e-7, name


def check_offsets() -> None:
    """Beyond 2^31 elements from the start, and within one tile: every product in 64 bits."""
    out = torch.empty(2, dtype=torch.int64)
    for first, plane, row, rows, width in (
        (False, 0, 2**22, 2**23, 4096),
        (True, 70000, 64, 768, 50176),
        (True, 3, 4, 8, 2**30),
    ):
        wide = 4 * width >= 2**31
        place[(1,)](out, plane, row, plane + 1, rows, width, first, wide)
        assert out.tolist() == [(plane * rows + row) * width + 8, 3 * width + 3]


def check_empty_and_unneeded() -> None:
    one, weight = torch.ones(1), torch.ones(7)
    x = torch.empty(0, 7)
    same = {"function": "dyt", "dim": 7, "inner": 1}
    y, h = triton_pointwise.pointwise_forward(x, x, one, None, weight, weight, **same)
    assert y.shape == h.shape == x.shape
    backward = triton_pointwise.pointwise_backward
    found = backward(x, None, x, one, None, weight, weight, **same, needs=EVERYTHING)
    assert found[0].shape == x.shape
    assert found[2] is None
    assert [g.tolist() for g in found[1::2]] == [[0.0], [0.0] * 7]
    x = torch.linspace(-1, 1, 21).reshape(3, 7)
    arguments = (x, None, x, one, one, weight, weight)
    every = backward(*arguments, **same, needs=EVERYTHING)
    for only in range(5):
        needs = tuple(index == only for index in range(5))
        found = backward(*arguments, **same, needs=needs)
        assert [g is not None for g in found] == list(needs)
        assert torch.equal(found[only], every[only])
    assert backward(*arguments, **same, needs=(False,) * 5) == (None,) * 5


def check_nan() -> None:
    """A NaN stays one, where it is and nowhere else."""
    x = torch.zeros(4, 33)
    x[2, 5] = float("nan")
    for name in FUNCTIONS:
        y, _ = triton_pointwise.pointwise_forward(
            x, None, torch.ones(1), None, None, None, function=name, dim=33, inner=1
        )
        assert torch.equal(y.isnan(), x.isnan()), name


def tile_of(elements: int) -> None:
    """Elements of a thread; larger tiles are fewer programs, and so faster to interpret."""
    for name in ("ELEMENTS", "FORWARD_ELEMENTS", "BACKWARD_ELEMENTS"):
        setattr(triton_pointwise, name, elements)
    triton_pointwise.forward_plan.cache_clear()
    triton_pointwise.walk_plan.cache_clear()


def check() -> None:
    """Run inside the interpreter."""
    torch.set_num_threads(1)
    assert triton_pointwise.available("cpu") is None
    tile_of(64)
    for part in (check_functions, check_offsets, check_empty_and_unneeded, check_nan):
        part()
        print(part.__name__)
    for change in CASES:
        agree({**CASE, **change})
    settings(max_examples=8, deadline=None, database=None, derandomize=True)(
        given(cases())(agree)
    )()
    tile_of(1)  # several tiles to a walk, cut at both ends
    agree({**CASE, "function": "derf", "outer": 30, "dim": 40})
    agree({**CASE, "outer": 3, "dim": 6, "inner": 37})
    print("agree")


def test_values_and_gradients_are_those_of_float64_in_the_interpreter() -> None:
    env = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__))], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [
        *("check_functions", "check_offsets", "check_empty_and_unneeded", "check_nan", "agree")
    ]


def compiled(
    kernel: Any, tensors: dict[str, str], constants: dict[str, Any], **options: int
) -> Any:
    """A kernel as the launcher would have it compiled for an H100: tensors at 16 bytes."""
    signature, attributes, fixed = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in tensors:
            signature[name] = tensors[name]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif name in SIZES:
            signature[name] = "i32"
        else:
            signature[name], fixed[name] = "constexpr", constants.get(name)
    source = triton.compiler.ASTSource(kernel, signature, constexprs=fixed, attrs=attributes)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    options["num_warps"] = triton_pointwise.WARPS
    return triton.compile(source, target=target, options=options)


SIZES = ("planes", "rows", "units", "blocks", "along", "steps", "groups")
NO_COMPILER = pytest.mark.skipif(
    triton_launch.interpreted() or not (BINARIES / "ptxas").exists(),
    reason="Triton interprets here, or brings no ptxas",
)


def accesses(ptx: str) -> list[int]:
    """Bytes of every access to global memory of a tile in bfloat16; parameters are left out."""
    found = re.findall(r"(ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)
    return [int(many or 1) * int(bits) // 8 for _, many, bits in found]


@NO_COMPILER
@pytest.mark.parametrize("function", ["dyt", "derf"])
def test_for_an_h100_the_forward_moves_16_bytes_at_a_time(function: str) -> None:
    cut = triton_pointwise.forward_plan(50432 * 768, 768, 1, 132)
    kernel = compiled(
        triton_tiles.forward_kernel,
        {"x": "*bf16", "y": "*bf16", "alpha": "*fp32", "weight": "*fp32", "bias": "*fp32"},
        {"F": TRITON_FUNCTIONS[function], "ALPHAS": False, "SHIFTS": False, **cut.flags},
    )
    of_a_thread = cut.flags["BR"] * cut.flags["BC"] // (32 * triton_pointwise.WARPS)
    moved = accesses(kernel.asm["ptx"])
    assert moved.count(16) >= 2 * of_a_thread // 8
    assert sum(moved) - 16 * moved.count(16) <= 4 + 16  # alpha, and a parameter's last columns
    assert "div" not in re.sub(r"//.*", "", kernel.asm["ptx"])


@NO_COMPILER
def test_for_an_h100_the_backward_has_no_barrier_in_its_loop_and_spills_nothing(
    tmp_path: Path,
) -> None:
    walk = triton_pointwise.walk_plan(50432 * 768, 768, 1, 2, 132)
    kernel = compiled(
        triton_tiles.backward_kernel,
        {
            **dict.fromkeys(("dy", "h", "dx"), "*bf16"),
            **dict.fromkeys(("alpha", "shift", "weight", "parts"), "*fp32"),
        },
        {
            "F": TRITON_FUNCTIONS["derf"],
            "ALPHAS": False,
            "SHIFTS": False,
            **dict.fromkeys(("DALPHA", "DSHIFT", "DWEIGHT", "DBIAS"), True),
            **walk.cut.flags,
        },
        **triton_pointwise._registers(walk.programs),
    )
    ptx = re.sub(r"//.*", "", kernel.asm["ptx"]).splitlines()
    labels = {m[1]: n for n, line in enumerate(ptx) if (m := re.match(r"(\$L\w+):", line))}
    back = [
        (labels[m[1]], n)
        for n, line in enumerate(ptx)
        if (m := re.search(r"bra\S*\s+(\$L\w+);", line)) and labels[m[1]] < n
    ]
    first, last = max(back, key=lambda span: span[1] - span[0])
    loop = "\n".join(ptx[first : last + 1])
    assert "ex2.approx" in loop
    assert not re.search(r"\bbar\.|barrier|shfl|atom|red\.", loop)
    reads = triton_pointwise.BACKWARD_ELEMENTS // 8
    assert accesses(loop) == 3 * reads * [16]  # h and dy of the next tile, dx of this one
    assert not re.search(r"atom|red\.global", "\n".join(ptx))
    (tmp_path / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    usage = subprocess.run(
        [str(BINARIES / "cuobjdump"), "-res-usage", str(tmp_path / "kernel.cubin")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert re.search(r"STACK:0 ", usage), usage
    assert re.search(r"LOCAL:0 ", usage), usage
    assert "bar.sync" in "\n".join(ptx)  # after the walk, where the sums are put together


if __name__ == "__main__":
    check()
