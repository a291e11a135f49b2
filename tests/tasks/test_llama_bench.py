"""`python -m suite.bench llama`: its arithmetic, its sides, what it prints and what it refuses."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from suite import bench
from suite.errors import ConfigError
from suite.norms import norm_modules
from tasks.language import llama_bench, llama_sides
from tasks.language.llama import LLAMA_SIZES, LlamaOptions
from tasks.language.llama_bench import Setting, depth_of, parse, rest
from tasks.language.llama_sides import FORMS, Need, Place, Side, base_model, need, norms_of, sides
from tasks.language.llama_table import Found, change, published, reduction

TINY = ["model=llama_tiny", "depth=1", "tokens=8", "passes=1", "rounds=1", "device=cpu"]
NORMS = ("rmsnorm", "dyt", "derf", "identity")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(llama_bench, "SLICE_SECONDS", 0.0)
    monkeypatch.setattr(llama_bench.shutil, "which", lambda name: name)
    torch.set_num_threads(1)


def place(**sizes: int) -> Place:
    options = replace(LLAMA_SIZES["llama_tiny"], **{"depth": 2, **sizes})
    return Place(options, 32, CPU, torch.bfloat16)


# --- arithmetic ---


def test_reductions_are_those_that_the_paper_prints() -> None:
    pairs = {(1.0, 2.1): "-52.4%", (13.0, 14.1): "-7.8%", (4.8, 8.3): "-42.2%"}
    pairs |= {(39.1, 42.6): "-8.2%", (0.3, 0.3): "0.0%", (3.0, 2.0): "+50.0%"}
    for (dyt, rms), printed in pairs.items():
        assert change(reduction(dyt / rms)) == printed
    assert published("model", "training", "dyt") == ["39.1 (-8.2%)", "38.9 (0.0%)"]
    assert published("model", "training", "derf") == ["-", "-"]


def test_the_papers_layers_are_its_models_without_those_of_identities() -> None:
    from tasks.language.llama_table import PUBLISHED

    for mode in ("inference", "training"):
        for k in (0, 1):
            bare = {
                round(PUBLISHED["model", mode, n][k] - PUBLISHED["rest", mode, n][k], 1)
                for n in ("rmsnorm", "dyt")
            }
            assert len(bare) == 1


def test_the_reduction_is_the_median_of_the_ratios_of_rounds() -> None:
    found = Found("model", "training", "dyt", "eager", [8.0, 90.0, 6.0], [0.8, 0.9, 0.5], 20)
    assert (found.median, found.reduction) == (8.0, pytest.approx(20.0))
    assert Found("model", "training", "dyt", "eager", [8.0], [], 20).reduction is None


def test_rest_is_the_model_less_the_one_with_identities_of_its_own_kind() -> None:
    def of(norm: str, form: str, *seconds: float) -> Found:
        return Found("model", "training", norm, form, list(seconds), [], 1)

    eager = [of("rmsnorm", "script", 14.1), of("dyt", "script", 13.0), of("dyt", "eager", 12.5)]
    bare = [of("identity", "eager", 12.0), of("identity", "compiled", 11.0)]
    made = rest([*eager, *bare, of("dyt", "compiled", 11.5)])
    found = {(f.norm, f.form): f for f in made}
    assert found["rmsnorm", "script"].median == pytest.approx(2.1)
    assert found["dyt", "script"].reduction == pytest.approx(100 * (1 - 1.0 / 2.1))
    assert found["dyt", "eager"].reduction is None  # no rmsnorm there
    assert found["dyt", "compiled"].median == pytest.approx(0.5)
    assert len(found) == 4


def test_a_difference_below_zero_is_given_no_reduction() -> None:
    def of(norm: str, seconds: float) -> Found:
        return Found("model", "inference", norm, "eager", [seconds], [], 1)

    made = rest([of("rmsnorm", 5.0), of("dyt", 3.0), of("identity", 4.0)])
    assert [f.reduction for f in made if f.norm == "dyt"] == [None]


# --- how deep a model may be ---


def test_memory_of_training_counts_weights_gradients_and_what_the_backward_needs() -> None:
    sizes = {"dim": 8, "heads": 2, "kv_heads": 1, "hidden_dim": 12}
    options = LlamaOptions(**sizes, depth=3, vocab_size=10)
    found = need(Place(options, 10, CPU, torch.bfloat16), tokens=5, free=10**9)
    weights = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 3 * 8 * 12  # q, k, v, o and the MLP
    numbers = 2 * 8 + (8 + 4 + 4) + 2 * 8 + 4 * 12  # of a token, in bfloat16
    saved = 2 * numbers + 2 * 12 * 8 + 4 * 2  # and the norms' own, and logsumexp of two heads
    assert found.block == 2 * 2 * weights + 5 * saved
    outside = 2 * (10 * 8)  # embedding and head
    assert found.fixed == 2 * (2 * outside + 12 * 8 + 4 * 10 * 5)
    assert found.total(3) == found.fixed + 3 * found.block
    tied = Place(replace(options, tie_head=True), 10, CPU, torch.bfloat16)
    assert found.fixed - need(tied, tokens=5, free=0).fixed == 2 * 2 * 80


def test_the_arithmetic_counts_the_weights_that_the_model_has() -> None:
    def weights(depth: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in base_model_on_meta(depth).parameters())

    def base_model_on_meta(depth: int) -> nn.Module:
        from suite.norms import make_norm
        from tasks.language.llama import Llama

        return Llama(place(depth=depth).options, norm=make_norm("identity"), vocab_size=32)

    without_tokens = need(place(), tokens=0, free=0)
    assert without_tokens.block == 2 * 2 * (weights(2) - weights(1))


def test_the_depth_that_fits_leaves_a_tenth_of_the_memory() -> None:
    assert Need(fixed=100, block=50, free=1000).depth == 16  # (900 - 100) / 50
    assert Need(fixed=100, block=50, free=999).depth == 15
    assert Need(fixed=100, block=50, free=50).depth == 0


def test_llama_7b_is_cut_on_a_gpu_of_24_gib_and_whole_on_one_of_80() -> None:
    setting = Setting("llama_7b", tokens=4096, passes=1, rounds=1)
    depth, said = depth_of(setting, free=23 * 2**30)
    found = need(setting.place(32), tokens=4096, free=23 * 2**30)
    assert depth == int((0.9 * found.free - found.fixed) // found.block)
    assert 4 < depth < 32
    assert said.startswith(f"models are cut to {depth} of 32 blocks (what fits: 23.0 GiB are free")
    assert depth_of(setting, free=78 * 2**30) == (32, "")


def test_a_depth_that_is_asked_for_and_does_not_fit_is_refused_with_the_one_that_does() -> None:
    setting = Setting("llama_7b", tokens=4096, passes=1, rounds=1, depth=30)
    fits = need(setting.place(30), tokens=4096, free=20 * 2**30).depth
    with pytest.raises(ConfigError, match=rf"depth=30: .* 20.0 GiB are free .*depth={fits},"):
        depth_of(setting, free=20 * 2**30)
    with pytest.raises(ConfigError, match="take fewer tokens, or a smaller model"):
        depth_of(replace(setting, depth=None), free=2**30)


# --- sides ---


def test_layer_has_two_norms_a_block_and_the_last_one() -> None:
    assert len(norms_of(Side("dyt", "script"), place(depth=3))) == 7
    with torch.device("meta"):
        from suite.norms import make_norm
        from tasks.language.llama import Llama

        whole = Llama(LLAMA_SIZES["llama_7b"], norm=make_norm("dyt"), vocab_size=10)
    assert len(list(norm_modules(whole))) == 2 * 32 + 1


def test_the_scripts_modules_compute_the_published_formulas() -> None:
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    here = replace(place(), dtype=torch.float32)
    rms, dyt, derf = (
        llama_sides.build_norm(Side(n, "script"), here, site="attn")(x)
        for n in ("rmsnorm", "dyt", "derf")
    )
    torch.testing.assert_close(rms, torch.nn.functional.rms_norm(x, (128,), eps=1e-5))
    torch.testing.assert_close(dyt, torch.tanh(0.5 * x))
    torch.testing.assert_close(derf, torch.erf(0.5 * x))


def test_forms_of_a_norm_agree() -> None:
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    here = replace(place(), dtype=torch.float32)
    for norm in ("rmsnorm", "dyt", "derf"):
        eager, compiled = (
            llama_sides.build_norm(Side(norm, form), here, site="attn")(x)
            for form in ("eager", "compiled")
        )
        torch.testing.assert_close(eager, compiled)


def test_a_kernel_that_is_not_to_be_had_is_not_stood_for_by_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from suite.norms.kernels import Choice

    instead = Choice("eager", "no C++ compiler")
    monkeypatch.setattr(llama_sides.Chosen, "choice", lambda self, device_type: instead)
    for norm in ("rmsnorm", "dyt"):
        with pytest.raises(RuntimeError, match="backend=cpp is not to be had here: no C"):
            llama_sides.build_norm(Side(norm, "kernel"), place(), site="attn")


def test_an_identity_has_no_script_and_no_kernel() -> None:
    assert [s.form for s in sides(NORMS, FORMS) if s.norm == "identity"] == ["eager", "compiled"]


def test_models_share_weights_and_gradients_but_not_norms() -> None:
    here = place()
    base = base_model(here)
    one, two = (llama_sides.model_of(Side(n, "script"), here, base) for n in ("dyt", "rmsnorm"))
    ids = torch.zeros(1, 4, dtype=torch.long)
    one(ids).float().square().sum().backward()
    weight = two.model.layers[1].mlp.up_proj.weight
    assert weight is base.model.layers[1].mlp.up_proj.weight
    assert weight.grad is not None
    assert float(weight.grad.abs().max()) > 0
    assert type(one.model.norm) is not type(two.model.norm)
    assert isinstance(two.model.layers[0].post_attention_layernorm, llama_sides.ScriptRMSNorm)
    assert {p.dtype for p in two.parameters()} == {torch.bfloat16}


def test_a_side_that_fails_is_left_out_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(side: Side, here: Place, *, site: str) -> nn.Module:
        if side.norm == "dyt":
            raise RuntimeError("no such thing\nat all")
        return llama_sides.SCRIPT["rmsnorm"](here.options.dim, eps=1e-5).to(here.dtype)

    monkeypatch.setattr(llama_sides, "build_norm", broken)
    result = llama_bench.measure(parse([*TINY, "forms=script", "norms=rmsnorm,dyt"]))
    assert {f.norm for f in result.found} == {"rmsnorm"}
    assert "dyt script is left out of layer inference: no such thing" in result.notes


# --- the command ---


@pytest.fixture
def whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run of everything, kept. Our kernels are stood for by the eager layers, as they are built
    by a compiler that a machine need not have; and what torch would compile is only listed."""
    compiled: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda m, **_: compiled.append(type(m).__name__))
    monkeypatch.setattr(llama_sides, "kernel_backend", lambda device: "eager")
    assert bench.main(["llama", *TINY, "norms=rmsnorm,dyt,identity", "--json", "--save"]) == 0
    return {**json.loads(capsys.readouterr().out), "compiled": compiled}


def test_a_small_run_has_every_part_pass_norm_and_form(whole: dict[str, Any]) -> None:
    found = {(f["part"], f["mode"], f["norm"], f["form"]): f for f in whole["found"]}
    assert whole["notes"] == []
    for mode in ("inference", "training"):
        for norm in ("rmsnorm", "dyt", "identity"):
            own = {form for part, m, n, form in found if (part, m, n) == ("model", mode, norm)}
            assert own == ({"eager", "compiled"} if norm == "identity" else set(FORMS))
        assert ("rest", mode, "dyt", "compiled") in found
        assert ("layer", mode, "identity", "compiled") not in found
    assert all(f["seconds"][0] > 0 for f in found.values() if f["part"] != "rest")
    rms, dyt = (found["model", "training", n, "eager"]["median"] for n in ("rmsnorm", "dyt"))
    less = found["model", "training", "dyt", "eager"]["reduction_percent"]
    assert less == pytest.approx(100 * (1 - dyt / rms))
    # three norms alone and a model's block and last norm, in both passes; identities in models only
    assert Counter(whole["compiled"]) == {
        "RMSNorm": 8,
        "PointwiseNorm": 8,
        "Block": 6,
        "Identity": 2,
    }
    assert (whole["norm_layers"], whole["depth"], whole["bench"]) == (3, 1, "llama")
    pages = [path.read_text() for path in Path.cwd().glob("benchmarks/*/llama.md")]
    assert len(pages) == 1
    assert "python -m suite.bench llama model=llama_tiny" in pages[0]
    assert "| model | training | dyt |" in pages[0]
    assert "39.1 (-8.2%)" in pages[0]


def test_text_says_that_it_is_the_small_version_and_what_is_published(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert bench.main(["llama", *TINY, "norms=rmsnorm,dyt", "forms=script"]) == 0
    out = capsys.readouterr().out
    assert "small    not the paper's sizes" in out
    assert "paper    published, not measured here: LLaMA-7B on an H100" in out
    assert "models are cut to 1 of 4 blocks (asked for)" in out
    row = next(
        line for line in out.splitlines() if line.split()[:3] == ["model", "training", "dyt"]
    )
    assert row.split()[-4:] == ["39.1", "(-8.2%)", "38.9", "(0.0%)"]


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (["batch=2"], "batch=2: suite.bench llama takes model=, depth=, tokens="),
        (["--fast"], "--fast: suite.bench llama takes"),
        (["model=llama_8b"], "model=llama_8b: no such model. Did you mean model=llama_7b?"),
        (["depth=0"], "depth=0: must be a whole number, 1 or more"),
        (["model=small", "depth=5"], "depth=5: model=small has 4 blocks; take 1 to 4"),
        (["tokens=many"], "tokens=many: must be a whole number, 1 or more"),
        (["rounds=0"], "rounds=0: must be a whole number, 1 or more"),
        (["passes=1", "passes=2"], "passes is given twice"),
        (["norms=dyt,derf"], "norms=dyt,derf: needs rmsnorm"),
        (["norms=rmsnorm,dtt"], "norms=dtt: no such norms. Did you mean norms=dyt?"),
        (["norms=rmsnorm,batchnorm"], "norms=batchnorm: no such norms."),
        (["norms=rmsnorm,rmsnorm"], "norms=rmsnorm,rmsnorm: a name is given twice"),
        (["forms=eager,fused"], "forms=fused: no such forms."),
        (["dtype=float16"], "dtype=float16: no such dtype."),
        (["device=tpu"], "device=tpu: must be cpu, or cuda where there is an NVIDIA GPU"),
    ],
)
def test_a_mistake_is_one_line(
    tokens: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["llama", *tokens]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {said}")


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["llama", "--help"]) == 0
    out = capsys.readouterr().out
    assert [key for key in llama_bench.KEYS if f"{key}=" not in out] == []
    assert "llama" in bench.COMMANDS
