"""`suite.bench fusion`: its mistakes, what it measures, that a compiled norm vanishes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from suite import bench
from suite.benches import fusion, fusion_sides
from suite.benches.fusion import Found, Result, Setting
from suite.benches.fusion_kernels import count_kernels, launched
from suite.norms import PointwiseOptions, make_norm

torch.set_num_threads(1)

SETTING = Setting(("dyt",), (32,), rows=6, rounds=2, device="cpu", dtype="float32", compiled=False)


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("norm=layernrm", "'layernrm' must be a norm"),
        ("norm=dyt,dyt", "stand there once"),
        ("norm=identity", "'identity' must be a norm"),
        ("dim=0", "dim=0: must be a whole number, 1 or more"),
        ("dim=100", "dim=100: must be a multiple of 32"),
        ("dim=64,64", "dim=64,64: a width is given twice"),
        ("rows=x", "rows=x: must be a whole number"),
        ("rounds=0", "rounds=0: must be a whole number"),
        ("device=tpu", "device=tpu: must be cpu"),
        ("dtype=float16", "dtype=float16: must be one of float32, bfloat16"),
        ("width=3", "width=3: suite.bench fusion takes norm="),
        ("--fast", "--fast: suite.bench fusion takes norm="),
    ],
)
def test_a_mistake_is_one_line(token: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["fusion", token]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err


def test_help_names_every_key_and_switch(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["fusion", "--help"]) == 0
    text = capsys.readouterr().out
    for word in (*fusion.KEYS, *fusion.SWITCHES):
        assert word in text


@pytest.mark.parametrize("kind", ["vit", "llama"])
@pytest.mark.parametrize("norm", ["layernorm", "dyt"])
def test_all_sides_compute_the_same(kind: str, norm: str) -> None:
    x, branch = SETTING.inputs(32)
    sides = fusion_sides.sides_of(SETTING, kind, 32, norm, [])
    plain = sides[0].forward(SETTING, x, branch)
    assert {"plain", "compiled"} <= {side.name for side in sides}
    for side in sides[1:]:
        if not side.untimed:
            found = side.forward(SETTING, x, branch)
            torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def test_both_ways_of_counting_bytes_agree_where_both_can_count() -> None:
    x, branch = SETTING.inputs(32)
    side = fusion_sides.sides_of(SETTING, "vit", 32, "dyt", [])[0]
    given = [x, branch, *side.modules.parameters()]
    seen = fusion_sides.kept_bytes(SETTING, side, x, branch)
    saved = fusion_sides.saved_bytes(lambda: side.forward(SETTING, x, branch), given)
    assert seen == saved


def test_recomputing_keeps_two_tensors_less_for_each_norm_of_dyt() -> None:
    x, branch = SETTING.inputs(32)
    for kind in ("vit", "llama"):
        sides = {s.name: s for s in fusion_sides.sides_of(SETTING, kind, 32, "dyt", [])}
        plain, again = (
            fusion_sides.kept_bytes(SETTING, sides[name], x, branch)
            for name in ("plain", "recompute")
        )
        assert plain - again == 2 * 2 * x.nbytes  # two norms: y and tanh


def test_a_compiled_pointwise_norm_adds_no_loop_where_layernorm_needs_some() -> None:
    x = torch.randn(8, 32, requires_grad=True)

    def loops(norm: torch.nn.Module) -> int:
        return count_kernels(lambda x: (norm(torch.sin(x)),), (x,))["loops"]

    for parameter in (dyt := make_norm("dyt")(32, site="ffn")).parameters():
        parameter.requires_grad_(False)  # its gradient is a sum, for which loops are needed
    layernorm = make_norm("layernorm")(32, site="ffn", affine=False)
    bare = loops(make_norm("identity")(32, site="ffn"))
    assert loops(dyt) == bare == 2
    assert loops(layernorm) > bare


def test_a_kernel_that_is_written_once_and_launched_twice_counts_twice() -> None:
    code = """
triton_poi_fused_add_0 = async_compile.triton('triton_poi_fused_add_0', \'\'\'
def triton_poi_fused_add_0(in_ptr0, out_ptr0, xnumel, XBLOCK : tl.constexpr):
\'\'\', device_str='cuda')
cpp_fused_mul_1 = async_compile.cpp_pybinding(['float*'], r\'\'\'
extern "C" void kernel(float* out_ptr0)
\'\'\')
def call(args):
        triton_poi_fused_add_0.run(arg0_1, buf0, 64, stream=stream0)
        triton_poi_fused_add_0.run(buf0, buf1, 64, stream=stream0)
        cpp_fused_mul_1(buf1)
"""
    assert launched(code) == 3


def test_a_side_that_fails_of_anything_is_noted_and_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class OutOfResourcesError(Exception):
        """Triton's, which is no RuntimeError."""

    def step(side: fusion_sides.Side, *_: object) -> None:
        if side.name == "recompute":
            raise OutOfResourcesError("shared memory")

    monkeypatch.setattr(fusion_sides.Side, "step", step)
    monkeypatch.setattr(fusion_sides, "no_kernel", lambda *_: "not asked for here")
    monkeypatch.setattr(fusion_sides, "SLICE_SECONDS", 0.0)
    notes: list[str] = []
    found = fusion_sides.of_norm(SETTING, "vit", 32, "dyt", notes)
    sides = [f.side for f in found]
    assert "plain" in sides
    assert "recompute" not in sides
    assert "recompute, vit 32 dyt failed: shared memory" in notes


def result(ratios: list[float], saved: int) -> str:
    plain = Found("vit", 32, "dyt", "plain", 1000, 1.0)
    other = Found("vit", 32, "dyt", "recompute", 1000 - saved, 1.0, "plain", ratios)
    return Result(SETTING, [plain, other], [], [], {}).verdicts()[0]


def test_an_option_pays_in_time_only_beyond_two_percent_and_the_spread() -> None:
    assert "pays in time;" in result([0.9, 0.95], 0)
    assert "does not pay" in result([0.99, 0.995], 0)
    assert "does not pay" in result([0.8, 0.9, 1.1], 0)
    assert "pays in bytes;" in result([1.1, 1.2], 500)
    assert "pays in time and bytes;" in result([0.9, 0.95], 500)
    assert "(50 %)" in result([1.0], 500)


def test_a_tiny_run_prints_and_keeps_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fusion_sides, "SLICE_SECONDS", 0.0)
    monkeypatch.setattr(fusion, "chains", lambda *args: [])
    argv = ["fusion", "norm=dyt", "dim=16", "rows=4", "rounds=1", "device=cpu", "--json", "--save"]
    assert bench.main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bench"] == "fusion"
    assert {f["side"] for f in found["found"]} >= {"plain", "recompute", "compiled"}
    (page,) = tmp_path.glob("benchmarks/*/fusion.md")
    assert "| vit | 16 | dyt | recompute |" in page.read_text()
    kept = json.loads(page.with_suffix(".json").read_text())["found"]  # rounded to seven digits
    assert [(f["side"], f["bytes"]) for f in kept] == [
        (f["side"], f["bytes"]) for f in found["found"]
    ]


def test_a_norm_without_a_kernel_is_measured_without_one() -> None:
    notes: list[str] = []
    names = {s.name for s in fusion_sides.sides_of(SETTING, "vit", 32, "groupnorm", notes)}
    assert names == {"plain", "compiled"}
    assert notes == ["groupnorm has no kernel: no side with one"]
    assert PointwiseOptions().backend == "auto"
