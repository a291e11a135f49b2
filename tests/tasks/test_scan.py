"""The selective scan: every way of computing it against one, by value and gradient, and its bench.

The reference is checked against the formula written out for one number at a time.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from suite.errors import ConfigError
from tasks.dna import scan, scan_bench, scan_chunked
from tasks.dna.scan import resolve, selective_scan

Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 4 positions, spans of 8 and one sequence at a time."""
    monkeypatch.setattr(scan_chunked, "MIN_STEPS", 4)
    monkeypatch.setattr(scan_chunked, "STEP", 1)
    monkeypatch.setattr(scan_chunked, "CHUNK", 1)
    monkeypatch.setattr(scan_chunked, "SPAN", 40)


def drawn(length: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensors:
    """Inputs of 3 sequences, 5 channels, 2 states, in mamba's layout."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "u_BDL": (3, 5, length),
        "delta_BDL": (3, 5, length),
        "A_DN": (5, 2),
        "B_BNL": (3, 2, length),
        "C_BNL": (3, 2, length),
        "D_D": (5,),
        "z_BDL": (3, 5, length),
        "delta_bias_D": (5,),
    }
    made = {
        name: torch.randn(*s, generator=draw, dtype=torch.float64) for name, s in shapes.items()
    }
    made["A_DN"] = -made["A_DN"].abs() - 0.1
    own = ("A_DN", "D_D", "delta_bias_D")  # parameters, in float32 at least
    return {
        name: x if dtype == torch.float64 else x.to(torch.float32 if name in own else dtype)
        for name, x in made.items()
    }


def graded(tensors: Tensors, **options: Any) -> Tensors:
    """The output and all gradients of a fixed weighing of it."""
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    names = ("u_BDL", "delta_BDL", "A_DN", "B_BNL", "C_BNL")
    rest = {name: x for name, x in leaves.items() if name not in names}
    y = selective_scan(*(leaves[name] for name in names), **rest, **options)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    grads = torch.autograd.grad((y * weights).sum(), list(leaves.values()))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def by_hand(x: Tensors, *, b: int, d: int) -> list[float]:
    """The formula for one channel of one sequence."""
    states, found = [0.0] * x["A_DN"].shape[1], []
    for t in range(x["u_BDL"].shape[2]):
        delta = math.log1p(math.exp(float(x["delta_BDL"][b, d, t] + x["delta_bias_D"][d])))
        u, z = float(x["u_BDL"][b, d, t]), float(x["z_BDL"][b, d, t])
        y = float(x["D_D"][d]) * u
        for n, state in enumerate(states):
            kept = math.exp(delta * float(x["A_DN"][d, n])) * state
            states[n] = kept + delta * float(x["B_BNL"][b, n, t]) * u
            y += float(x["C_BNL"][b, n, t]) * states[n]
        found.append(y * z / (1 + math.exp(-z)))
    return found


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_scan_is_mambas_formula_worked_out_by_hand(backend: Any) -> None:
    x = drawn(6)
    y = selective_scan(**x, backend=backend)
    for b, d in ((0, 0), (2, 4)):
        wanted = torch.tensor(by_hand(x, b=b, d=d), dtype=torch.float64)
        torch.testing.assert_close(y[b, d], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 3, 4, 8, 21])
def test_chunks_give_the_values_and_gradients_of_the_loop(length: int, reverse: bool) -> None:
    x = drawn(length)
    mask = torch.rand(3, length, generator=torch.Generator().manual_seed(1)) > 0.3
    for options in ({}, {"mask_BL": mask}):
        wanted = graded(x, backend="reference", reverse=reverse, **options)
        found = graded(x, backend="chunked", reverse=reverse, **options)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("left_out", ["D_D", "z_BDL", "delta_bias_D", "softplus"])
def test_chunks_do_without_any_of_the_options(left_out: str) -> None:
    x = drawn(9)
    if left_out == "softplus":
        x["delta_BDL"], x["delta_bias_D"] = x["delta_BDL"].abs(), x["delta_bias_D"].abs()
    options = {"softplus": left_out != "softplus"}
    x.pop(left_out, None)
    wanted = graded(x, backend="reference", **options)
    torch.testing.assert_close(
        graded(x, backend="chunked", **options), wanted, rtol=1e-10, atol=1e-12
    )


def test_the_chunks_of_the_default_size_join_up() -> None:
    x = drawn(3 * scan_chunked.MAX_STEPS + 5)
    torch.testing.assert_close(
        graded(x, backend="chunked"), graded(x, backend="reference"), rtol=1e-9, atol=1e-11
    )


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("reverse", [False, True])
def test_the_gradients_of_chunks_are_those_of_finite_differences(reverse: bool) -> None:
    x = {name: v[:1] if v.dim() == 3 else v for name, v in drawn(5).items()}
    leaves = [v.clone().requires_grad_() for v in x.values()]

    def work(*values: Tensor) -> Tensor:
        return selective_scan(
            **dict(zip(x, values, strict=True)), backend="chunked", reverse=reverse
        )

    assert torch.autograd.gradcheck(work, leaves, fast_mode=True)


def test_a_second_derivative_of_chunks_is_refused() -> None:
    x = drawn(4)
    leaf = x["u_BDL"].requires_grad_()
    y = selective_scan(**x, backend="chunked")
    with pytest.raises(RuntimeError, match="scan=chunked can be differentiated once"):
        torch.autograd.grad(y.sum(), [leaf], create_graph=True)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_bfloat16_inputs_keep_a_float32_state(backend: Any) -> None:
    x = drawn(64, dtype=torch.bfloat16)
    exact = graded({name: v.double() for name, v in x.items()}, backend="reference")
    found = graded(x, backend=backend)
    assert found["y"].dtype == found["u_BDL"].dtype == found["B_BNL"].dtype == torch.bfloat16
    assert found["A_DN"].dtype == torch.float32
    for name, wanted in exact.items():
        error = (found[name].double() - wanted).abs().max() / wanted.abs().max()
        assert error < 2**-8, name  # of y and of what reaches it; a bfloat16 has 8 bits
    # y is the exact one rounded once, so its state had no rounding to bfloat16
    assert (found["y"] == exact["y"].bfloat16()).float().mean() > 0.98


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_autocast_leaves_the_scan_alone(backend: Any) -> None:
    x = drawn(12, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = graded(x, backend=backend)
    torch.testing.assert_close(found, graded(x, backend=backend), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_reverse_is_the_scan_of_the_flipped_sequence(backend: Any) -> None:
    x = drawn(10)
    flipped = {name: v.flip(2) if v.dim() == 3 else v for name, v in x.items()}
    found = selective_scan(**x, reverse=True, backend=backend)
    torch.testing.assert_close(found, selective_scan(**flipped, backend=backend).flip(2))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_positions_that_a_mask_hides_touch_no_others(backend: Any) -> None:
    x = drawn(12)
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[:, 4:7] = False
    y = selective_scan(**x, mask_BL=mask, backend=backend)
    shown = {name: v[:, :, mask[0]] if v.dim() == 3 else v for name, v in x.items()}
    torch.testing.assert_close(y[:, :, mask[0]], selective_scan(**shown, backend=backend))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_both_layouts_give_the_same(backend: Any) -> None:
    x = drawn(7)
    turned = {name: v.transpose(1, 2).contiguous() if v.dim() == 3 else v for name, v in x.items()}
    y_BLD = selective_scan(**turned, layout="BLD", backend=backend)
    torch.testing.assert_close(y_BLD.transpose(1, 2), selective_scan(**x, backend=backend))


def test_several_threads_give_what_one_gives_and_leave_the_setting_alone() -> None:
    x = drawn(20)
    alone = graded(x, backend="chunked")
    torch.set_num_threads(2)
    together = graded(x, backend="chunked")
    assert torch.get_num_threads() == 2
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-13)


def test_no_state_is_kept_where_no_backward_can_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    plain = scan_chunked.forward_rows

    def watched(*args: Any, states: Tensor | None, **rest: Any) -> None:
        kept.append(states is not None)
        plain(*args, states=states, **rest)

    monkeypatch.setattr(scan_chunked, "forward_rows", watched)
    x = drawn(5)
    x["u_BDL"].requires_grad_()
    selective_scan(**x, backend="chunked")
    with torch.no_grad():
        selective_scan(**x, backend="chunked")
    assert set(kept[: len(kept) // 2]) == {True}
    assert set(kept[len(kept) // 2 :]) == {False}


@pytest.mark.parametrize(
    ("name", "shape"), [("B_BNL", (3, 5, 6)), ("delta_BDL", (3, 5, 5)), ("D_D", (4,))]
)
def test_tensors_that_do_not_fit_are_refused_by_name(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"^{name.split('_')[0]} must be"):
        selective_scan(**{**drawn(6), name: torch.zeros(shape, dtype=torch.float64)})


def test_auto_takes_the_kernel_on_a_gpu_and_chunks_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scan, "installed", lambda package: package == "triton")
    assert resolve("auto", "cpu") == "chunked"
    assert resolve("auto", "cuda") == "triton"
    assert resolve("auto", "cuda", dtype=torch.float64) == "chunked"
    monkeypatch.setattr(scan, "installed", lambda package: False)
    assert resolve("auto", "cuda") == "chunked"
    with pytest.raises(ValueError, match="scan=triton needs the package triton"):
        resolve("triton", "cuda")


def test_a_backend_that_cannot_run_here_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="scan must be one of auto, reference"):
        resolve("cuda", "cpu")
    with pytest.raises(ValueError, match=r"mamba_ssm runs on NVIDIA GPUs only; take scan=chunked"):
        resolve("mamba_ssm", "cpu")
    with pytest.raises(ValueError, match="scan=triton computes in float32"):
        resolve("triton", "cuda", dtype=torch.float64)


def mamba_stub(monkeypatch: pytest.MonkeyPatch, *, kernel: bool) -> None:
    """A mamba_ssm whose scan is our reference."""
    package, ops = ModuleType("mamba_ssm"), ModuleType("mamba_ssm.ops")
    module: Any = ModuleType("mamba_ssm.ops.selective_scan_interface")

    def selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus):  # type: ignore[no-untyped-def]
        assert all(x.is_contiguous() for x in (u, delta, B, C, z))
        rest = {"D_D": D, "z_BDL": z, "delta_bias_D": delta_bias, "softplus": delta_softplus}
        return selective_scan(u, delta, A, B, C, **rest, backend="reference")

    module.selective_scan_cuda = object() if kernel else None
    module.selective_scan_fn = selective_scan_fn
    for stub in (package, ops, module):
        monkeypatch.setitem(sys.modules, stub.__name__, stub)
    monkeypatch.setattr(scan, "installed", lambda name: name == "mamba_ssm")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_mamba_ssm_is_given_directions_and_masks_that_it_has_not(
    monkeypatch: pytest.MonkeyPatch, reverse: bool, masked: bool
) -> None:
    mamba_stub(monkeypatch, kernel=True)
    monkeypatch.setattr(scan, "resolve", lambda backend, *_, **__: backend)  # there is no GPU here
    mask = torch.rand(3, 8, generator=torch.Generator().manual_seed(2)) > 0.3
    options = {"reverse": reverse, "mask_BL": mask if masked else None}
    x = drawn(8, dtype=torch.float32)
    wanted = graded(x, backend="reference", **options)
    torch.testing.assert_close(graded(x, backend="mamba_ssm", **options), wanted)
    with pytest.raises(ValueError, match="scan=mamba_ssm computes in float32"):
        selective_scan(**drawn(8), backend="mamba_ssm")


def test_a_mamba_ssm_without_its_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "installed", lambda name: False)
        with pytest.raises(ValueError, match="needs the package mamba_ssm"):
            resolve("mamba_ssm", "cuda")
    mamba_stub(monkeypatch, kernel=False)
    with pytest.raises(ValueError, match=r"no Mamba-1 kernel .* 2\.3\.2\.post1"):
        resolve("mamba_ssm", "cuda")
    mamba_stub(monkeypatch, kernel=True)
    assert resolve("mamba_ssm", "cuda") == "mamba_ssm"


TINY = scan_bench.Setting((4, 8), rounds=2, batch=1, dim=3, state=2)


def test_every_side_of_the_bench_computes_the_same() -> None:
    length = scan_bench.inputs(TINY, 6)
    wanted = scan.run_reference(length)
    every, _ = scan_bench.sides(TINY)
    for side in every:
        if side.run is not scan_bench.associative:  # it compiles, for tens of seconds
            torch.testing.assert_close(side.run(length), wanted, msg=side.name)


def test_the_bench_prints_times_memory_and_growth(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    every = [s for s in scan_bench.sides(TINY)[0] if s.name in ("chunked (ours)", "reference")]
    every[1] = replace(every[1], longest=4)
    monkeypatch.setattr(scan_bench, "sides", lambda setting: (every, ["a note"]))
    monkeypatch.setattr(scan_bench, "SLICE_SECONDS", 1e-4)
    monkeypatch.setattr(scan_bench, "weighed", lambda side, s, mine, notes: [2**20] * len(mine))
    tokens = ["length=8,4", "rounds=2", "dim=3", "state=2", "device=cpu"]
    assert scan_bench.run([*tokens, "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert [(f["side"], f["length"]) for f in found["found"]] == [
        ("chunked (ours)", 4),
        ("reference", 4),
        ("chunked (ours)", 8),
    ]
    assert set(found["growth"]) == {"chunked (ours)"}
    assert "length 8: reference is left out beyond 4" in said.err
    assert scan_bench.run(tokens) == 0
    text = capsys.readouterr().out
    assert "growth  chunked (ours): time L^" in text
    assert "note    a note" in text


def test_the_bench_measures_what_a_step_adds_to_this_process() -> None:
    setting = replace(TINY, batch=4, dim=64, state=16)
    # in a process of its own: this one may have room from other tests, which then adds nothing
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        few, many = pool.submit(scan_bench.added, "reference", setting, [4, 1024]).result()
    assert many > few
    assert many > 4 * 1024 * 64 * 16 * 4  # it keeps a state a position and channel, in float32


def test_growth_is_the_exponent_of_the_length() -> None:
    assert scan_bench.slope([(4, 3 * 4**1.5), (8, 3 * 8**1.5), (64, 3 * 64**1.5)]) == pytest.approx(
        1.5
    )
    assert scan_bench.slope([(4, 1)]) is None


@pytest.mark.parametrize(
    ("token", "says"),
    [
        ("length=0", "length=0: must be a whole number"),
        ("length=8,8", "length: a length is given twice"),
        ("rounds=x", "rounds=x: must be a whole number"),
        ("width=3", "width=3: suite.bench scan takes length="),
        ("device=tpu", "device=tpu: must be cpu"),
    ],
)
def test_the_bench_refuses_tokens_that_it_does_not_know(token: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"^{says}"):
        scan_bench.run([token])
