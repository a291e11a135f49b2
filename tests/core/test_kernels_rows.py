"""LayerNorm and RMSNorm in Triton: values and gradients in its interpreter, and machine code.

The interpreter is chosen when Triton is first imported, so the checks run in a process of their
own: this file, as a script. Triton brings its own assembler, so what would run on a GPU is built
and read here without one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[2]
EPS = 1e-5


def drawn(rows: int, dim: int, *, dtype: torch.dtype, offset: float = 1.0) -> dict[str, Tensor]:
    """Inputs with a mean to remove; parameters in float32."""
    draw = torch.Generator().manual_seed(rows * 20_001 + dim)
    x = {n: torch.randn(rows, dim, generator=draw) for n in ("x", "residual", "dy", "dh")}
    x["x"] = 2 * x["x"] + offset
    made = {n: v.to(dtype) for n, v in x.items()}
    return {**made, **{n: torch.randn(dim, generator=draw) for n in ("weight", "bias")}}


def ours(x: dict[str, Tensor], *, kind: str) -> dict[str, Tensor]:
    """y, h and the gradients; what `x` lacks is None."""
    from suite.norms.kernels import triton_rows

    parameters = (x.get("weight"), x.get("bias"))
    residual = x.get("residual")
    y, h, stats = triton_rows.rows_forward(x["x"], residual, *parameters, kind=kind, eps=EPS)
    assert (h is None) == (residual is None)
    assert stats.shape == (2 if kind == "layer" else 1, len(y))
    assert stats.dtype == torch.float32
    h = x["x"] if h is None else h
    dh = None if residual is None else x["dh"]
    grads = triton_rows.rows_backward(
        x["dy"], dh, h, stats, *parameters, kind=kind, needs=(True, True, True)
    )
    found = dict(zip(("dx", "dweight", "dbias"), grads, strict=True))
    return {"y": y, "h": h, **{n: v for n, v in found.items() if v is not None}}


def exact(x: dict[str, Tensor], h: Tensor, *, kind: str) -> dict[str, Tensor]:
    """The same of the rounded h, by torch in float64; `bound` is what y is a sum of."""
    leaves = {n: v.double() for n, v in {**x, "x": h}.items() if n in ("x", "weight", "bias")}
    for leaf in leaves.values():
        leaf.requires_grad_()
    scaled = plain(leaves["x"], leaves.get("weight"), kind=kind)
    bias = leaves.get("bias", torch.zeros(1))
    loss = ((scaled + bias) * x["dy"].double()).sum()
    if "residual" in x:
        loss = loss + (leaves["x"] * x["dh"].double()).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    sums = {"y": (scaled + bias).detach(), "bound": (scaled.abs() + bias.abs()).detach()}
    return {**sums, **dict(zip([f"d{n}" for n in leaves], grads, strict=True))}


def plain(x: Tensor, weight: Tensor | None, *, kind: str) -> Tensor:
    norm = F.layer_norm if kind == "layer" else F.rms_norm
    return norm(x, x.shape[-1:], weight, eps=EPS)


def check_close(x: dict[str, Tensor], *, kind: str) -> None:
    """Values to the last digits; gradients of the largest, as they are sums that cancel."""
    dtype, found = x["x"].dtype, ours(x, kind=kind)
    if "residual" in x:
        added = x["x"].float() + x["residual"].float()
        # the interpreter cuts bfloat16 off where a GPU rounds it
        torch.testing.assert_close(found["h"].float(), added, rtol=2**-7, atol=0)
    wanted = exact(x, found["h"], kind=kind)
    relative = 2e-6 if dtype == torch.float32 else 1e-2
    error = (found["y"].double() - wanted["y"]).abs()
    assert (error <= 2e-7 + relative * wanted["bound"]).all(), float(error.max())
    for name in wanted.keys() & {"dx", "dweight", "dbias"}:
        assert found[name].dtype == (dtype if name == "dx" else torch.float32), name
        assert found[name].shape == wanted[name].shape, name
        if wanted[name].numel() and len(x["x"]):
            bound = 1e-5 if name != "dx" or dtype == torch.float32 else 1e-2
            size = wanted[name].abs().max() + x["dy"].abs().max()
            error = (found[name].double() - wanted[name]).abs().max()
            assert error <= bound * size, (name, float(error), float(size))


def any_shape() -> None:
    from hypothesis import given, settings
    from hypothesis import strategies as st

    dims = st.one_of(st.integers(1, 70), st.integers(1, 3000), st.integers(1, 20_000))
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    absent = st.sets(st.sampled_from(["weight", "bias", "residual"]))

    @settings(max_examples=24, deadline=None, derandomize=True, database=None)
    @given(st.integers(0, 4), dims, dtypes, absent, st.sampled_from(["layer", "rms"]))
    def check(rows: int, dim: int, dtype: torch.dtype, absent: set[str], kind: str) -> None:
        x = drawn(rows, dim, dtype=dtype)
        check_close({n: v for n, v in x.items() if n not in absent}, kind=kind)

    check()


def short_rows_and_long_ones() -> None:
    """The widths at which the kernels change: rows a warp, a whole row, blocks of a row."""
    for rows, dim in ((70, 1), (40, 16), (33, 64), (3, 1024), (2, 5000), (2, 8193), (2, 20_000)):
        for kind in ("layer", "rms"):
            check_close(drawn(rows, dim, dtype=torch.bfloat16), kind=kind)


def many_rows_for_each_program() -> None:
    """A program adds up the parameters' gradients over its rows, in registers or in memory."""
    from suite.norms.kernels import triton_rows

    before = triton_rows.WHOLE_FORWARD, triton_rows.WHOLE_BACKWARD, triton_rows.LONG_TILE
    triton_rows.WARPS_PER_SM = 1
    for whole in (True, False):
        if not whole:
            triton_rows.WHOLE_FORWARD, triton_rows.LONG_TILE = 16, 64
            triton_rows.WHOLE_BACKWARD = {4: 16, 2: 16}
        triton_rows.forward_plan.cache_clear()
        triton_rows.backward_plan.cache_clear()
        assert triton_rows.forward_plan(130, 4).long == (not whole)
        for kind in ("layer", "rms"):
            check_close(drawn(19, 130, dtype=torch.float32), kind=kind)
        offset = drawn(3, 130, dtype=torch.float32, offset=1e3)
        assert_as_good_as_torch(offset)
    triton_rows.WHOLE_FORWARD, triton_rows.WHOLE_BACKWARD, triton_rows.LONG_TILE = before
    triton_rows.WARPS_PER_SM = 16
    triton_rows.forward_plan.cache_clear()
    triton_rows.backward_plan.cache_clear()


def assert_as_good_as_torch(x: dict[str, Tensor]) -> None:
    """A mean far from 0 costs the digits that the mean itself is rounded to, in torch too."""
    x = {n: v for n, v in x.items() if n not in ("residual", "weight", "bias")}
    wanted = plain(x["x"].double(), None, kind="layer")
    error = (ours(x, kind="layer")["y"].double() - wanted).abs().max()
    theirs = (plain(x["x"], None, kind="layer").double() - wanted).abs().max()
    rounding = float(x["x"].mean()) * 2**-23 / float(x["x"].std())
    assert error <= 2 * theirs + 2 * rounding + 2e-6, (float(error), float(theirs))


def a_large_mean_costs_no_more_than_in_torch() -> None:
    for dim in (64, 1000, 20_000):
        for offset in (100.0, 1e4):
            assert_as_good_as_torch(drawn(2, dim, dtype=torch.float32, offset=offset))


def nan_stays_in_its_row_and_reaches_the_parameters() -> None:
    for dim in (24, 17_000):
        for kind in ("layer", "rms"):
            x = drawn(3, dim, dtype=torch.float32)
            x["x"][1, dim // 2] = float("nan")
            found = ours(x, kind=kind)
            assert found["y"][1].isnan().all()
            assert found["dx"][1].isnan().all()
            assert found["dweight"].isnan().all()
            for name in ("y", "dx"):
                assert found[name][[0, 2]].isfinite().all(), (dim, kind, name)


def the_same_bits_again() -> None:
    for dim in (48, 9000):
        x = (
            drawn(37, dim, dtype=torch.bfloat16)
            if dim == 48
            else drawn(3, dim, dtype=torch.float32)
        )
        first, again = (ours(x, kind="layer") for _ in range(2))
        assert all(torch.equal(first[name], again[name]) for name in first)


def only_what_is_needed() -> None:
    from suite.norms.kernels import triton_rows

    for dim in (24, 17_000):
        x = drawn(2, dim, dtype=torch.float32)
        full = ours(x, kind="layer")
        parameters = (x["weight"], x["bias"])
        _, _, stats = triton_rows.rows_forward(full["h"], None, *parameters, kind="layer", eps=EPS)
        for needs in ((True, False, False), (False, True, False), (False, False, True)):
            some = triton_rows.rows_backward(
                x["dy"], x["dh"], full["h"], stats, *parameters, kind="layer", needs=needs
            )
            assert tuple(v is not None for v in some) == needs
            for name, value in zip(("dx", "dweight", "dbias"), some, strict=True):
                assert value is None or torch.equal(value, full[name]), (dim, name)


CHECKS = [
    any_shape,
    short_rows_and_long_ones,
    many_rows_for_each_program,
    a_large_mean_costs_no_more_than_in_torch,
    nan_stays_in_its_row_and_reaches_the_parameters,
    the_same_bits_again,
    only_what_is_needed,
]


def check_all() -> None:
    """Run inside the interpreter: every check, with its outcome on a line."""
    from suite.norms.kernels import triton_rows

    torch.set_num_threads(1)
    assert triton_rows.interpreted()
    assert triton_rows.available("cpu") is None
    for check in CHECKS:
        try:
            check()
        except Exception:
            print(f"{check.__name__} failed: {traceback.format_exc(limit=-4)!r}", flush=True)
        else:
            print(f"{check.__name__} passed", flush=True)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
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
    return {line.partition(" ")[0]: line.partition(" ")[2] for line in done.stdout.splitlines()}


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_in_the_interpreter(check: str, outcomes: dict[str, str]) -> None:
    assert outcomes[check] == "passed"


def built(kernel: Any, *, dim: int, capability: int = 90, **absent: None) -> Any:
    """A kernel for bfloat16 rows and float32 parameters as compiled for a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from suite.norms.kernels import triton_rows

    forward = "y" in kernel.arg_names
    plan = (triton_rows.forward_plan if forward else triton_rows.backward_plan)(dim, 2)
    constants = {"LAYER": True, "DIM": dim, "R": plan.R, "N": plan.N, **absent}
    types = {"rows": "i32", "steps": "i32", "eps": "fp32"}
    types |= dict.fromkeys(("weight", "bias", "stats", "dweight", "dbias"), "*fp32")
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "*bf16") for n in names}
    aligned = [i for i, n in enumerate(names) if signature[n].startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": plan.warps, **({} if plan.warps == 1 or forward else {"maxnreg": 128})}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of Triton's assembler; what is built does not stay."""
    triton = pytest.importorskip("triton")
    found = Path(triton.__file__).parent / "backends/nvidia/bin"
    if not (found / "ptxas").exists():
        pytest.skip("this Triton brings no assembler for NVIDIA GPUs")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton's interpreter is chosen for this process")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return found


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_rows_of_4096_are_read_by_16_bytes_and_nothing_spills(
    name: str, tools: Path, tmp_path: Path
) -> None:
    from suite.norms.kernels import triton_rows_kernels

    kernel = built(getattr(triton_rows_kernels, name), dim=4096)
    loads = re.findall(r"ld\.global\S*", kernel.asm["ptx"])
    wide = [load for load in loads if ".v4.b32" in load]
    # in bfloat16 two rows or three, now and next; the statistics are single numbers
    assert len(wide) >= 4, loads
    assert not [load for load in loads if load.endswith((".b16", ".v2.b32"))], loads
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run(
        [str(tools / "cuobjdump"), "-res-usage", str(cubin)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "STACK:0 " in usage, usage
    assert "LOCAL:0 " in usage, usage


@pytest.mark.parametrize("capability", [80, 100])
def test_other_generations_are_built_too(capability: int, tools: Path) -> None:
    from suite.norms.kernels import triton_rows_kernels

    kernel = built(triton_rows_kernels.backward, dim=96, capability=capability, dh=None)
    assert kernel.asm["cubin"]


def test_without_the_interpreter_the_kernels_ask_for_a_gpu() -> None:
    pytest.importorskip("triton")
    from suite.norms.kernels import triton_rows

    if triton_rows.interpreted():
        pytest.skip("Triton's interpreter is chosen for this process")
    assert triton_rows.available("cpu") == "needs a CUDA device"


if __name__ == "__main__":
    check_all()
