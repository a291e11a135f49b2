"""`suite.bench norms`: what it refuses, what it measures and keeps, how a floor is computed."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from suite.benches import norm_rounds, norm_sides, norms, roofline
from suite.benches.norm_figures import BASELINE, Found, Goal, Table, goals, page
from suite.benches.norm_rounds import Bench
from suite.errors import ConfigError, DataError
from suite.norms import kernels
from suite.norms.functions import FUNCTIONS

CPU = torch.device("cpu")
TINY = ["shape=6x8,5x4", "dtype=float32", "norm=dyt,layernorm", "rounds=3", "device=cpu"]
PLAIN = "side=eager,published,torch"  # no compiler is needed


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(norm_rounds.SLICE_SECONDS, "cpu", 0.0)
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("shape=6304", "shape=6304: must be ROWSxCHANNELS"),
        ("shape=0x768", "shape=0x768: must be ROWSxCHANNELS"),
        ("shape=6x8,6x8", "6x8 is given twice"),
        ("dtype=float64", "dtype=float64: no such dtype"),
        ("norm=batchnorm", "norm=batchnorm: no such norm"),
        ("norm=dty", "Did you mean norm=dyt?"),
        ("pass=training", "pass=training: no such pass"),
        ("side=cuda", "side=cuda: no such side"),
        ("side=one-pass", "side=one-pass: one-pass is of --add; add it or leave one-pass out"),
        ("rounds=0", "rounds=0: must be a whole number, 1 or more"),
        ("device=tpu", "device=tpu: must be cpu, or cuda"),
        ("--saved", "--saved: suite.bench norms takes shape=, dtype="),
        ("batch=4", "batch=4: suite.bench norms takes"),
    ],
)
def test_a_mistake_is_one_line_with_exit_code_2(token: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        norms.run([token])
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.exit_code == 2


def test_a_key_that_is_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="rounds is given twice"):
        norms.run(["rounds=3", "rounds=4"])


def test_help_names_every_key_switch_and_side(capsys: pytest.CaptureFixture[str]) -> None:
    assert norms.run(["--help"]) == 0
    text = capsys.readouterr().out
    wanted = [f"{key}=" for key in norms.KEYS if key != "device"]
    for word in [*wanted, *norms.SWITCHES, *norm_sides.KINDS]:
        assert word in text, word


def test_a_graph_is_refused_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match="--graph: a CUDA graph needs device=cuda"):
        norms.parse(["--graph", "device=cpu"])


def test_defaults_hold_the_shapes_of_the_goals_on_a_cpu() -> None:
    setting = norms.parse(["device=cpu"])
    assert {(6304, 768), (8192, 1024), (16384, 256)} < set(setting.shapes)
    assert (setting.passes, setting.works) == (("forward", "train"), ("norm",))
    assert norms.parse(["--add", "device=cpu"]).works == ("norm", "add")


def kept(tokens: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], Path]:
    """Run it with --json --save: what is printed, and the folder."""
    assert norms.run([*tokens, "--json", "--save"]) == 0
    folder = next(Path("benchmarks").iterdir())
    return json.loads(capsys.readouterr().out), folder


def test_a_run_measures_every_side_and_keeps_whole_files(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found, folder = kept([*TINY, PLAIN], capsys)
    assert found["bench"] == "norms"
    assert [(t["rows"], t["dim"]) for t in found["tables"]] == [(6, 8), (5, 4)]
    names = {(s["norm"], s["kind"]) for s in found["tables"][0]["found"]}
    assert names == {
        ("dyt", "eager"),
        ("dyt", "published"),
        ("layernorm", "torch"),
        ("layernorm", "eager"),
    }
    files = ["norms-roofline.png", "norms.json", "norms.md"]
    assert sorted(p.name for p in folder.iterdir()) == files
    saved = json.loads((folder / "norms.json").read_text())
    assert saved["command"].startswith("python -m suite.bench norms shape=6x8,5x4")
    assert len(saved["tables"][1]["found"]) == 4
    text = (folder / "norms.md").read_text()
    for word in ("to LayerNorm", "to floor", "of copy", "GB/s", "saved B/el", "error grad"):
        assert word in text
    assert text.count("### ") == 4 + 1  # two shapes, two passes; notes
    assert text.endswith("![norms-roofline](norms-roofline.png)\n")


def test_ratios_and_rates_follow_from_the_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    assert norms.run([*TINY, PLAIN, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)["tables"][0]
    sides = {(s["norm"], s["kind"]): s for s in table["found"]}
    base = sides[BASELINE]
    for side in sides.values():
        for which in ("forward", "train"):
            us, f = side["us"][which], side["figures"][which]
            assert len(us) == 3
            assert min(us) >= 0
            assert f["us"]["min"] <= f["us"]["median"] <= f["us"]["max"]
            ratios = sorted(a / b for a, b in zip(us, base["us"][which], strict=True))
            assert f["to_layernorm"]["median"] == pytest.approx(ratios[1], rel=1e-5)
            rates = sorted(f["bytes"] / t / 1e3 for t in us)
            assert f["gb_per_s"] == pytest.approx(rates[1], rel=1e-5)
    assert base["figures"]["train"]["to_layernorm"]["median"] == 1
    assert {r for refs in table["references"].values() for r in refs} == {"copy", "copy + add"}


def test_residual_add_is_measured_in_one_pass_and_in_two(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokens = ["shape=6x8", "dtype=float32", "norm=dyt", "rounds=1", "pass=train", "device=cpu"]
    assert norms.run([*tokens, "side=eager,one-pass", "--add", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    add = next(t for t in found["tables"] if t["work"] == "add")
    kinds = {(s["norm"], s["kind"]) for s in add["found"]}
    assert {("dyt", "eager"), BASELINE} <= kinds
    # where no C++ compiler is, the one pass is left out with a note
    noted = [n for n in found["notes"] if "dyt one-pass" in n]
    assert (("dyt", "one-pass") in kinds) != bool(noted)
    for side in add["found"]:
        assert max(side["errors"].values()) < 1e-5


def setting_of(*tokens: str) -> Any:
    return norms.parse(["shape=64x32", "rounds=1", "device=cpu", *tokens])


def measured(norm: str, kind: str, *tokens: str, dtype: str = "float32") -> tuple[Found, Bench]:
    """The bytes and errors of one side, untimed."""
    bench = Bench(setting_of(*tokens), 64, 32, dtype, "norm", [])
    done = bench.weighed(norm, kind, bench.wanted(norm))
    assert done is not None, bench.notes
    return done[1], bench


@pytest.mark.parametrize(
    ("norm", "kind", "dtype", "saved"),
    [
        ("dyt", "eager", "float32", 8),
        ("dyt", "published", "bfloat16", 4),
        ("derf", "published", "float32", 12),
        ("layernorm", "torch", "float32", 4 + 8 / 32),  # mean and 1 / std of each row
    ],
)
def test_saved_bytes_are_those_that_autograd_keeps(
    norm: str, kind: str, dtype: str, saved: float
) -> None:
    found, _ = measured(norm, kind, dtype=dtype)
    assert found.saved == pytest.approx(saved)


def test_errors_are_those_of_rounding_and_a_wrong_side_shows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, _ = measured("derf", "published")
    assert list(found.errors) == ["y", "x", "alpha", "shift", "weight", "bias"]
    assert 0 < max(found.errors.values()) < 1e-5
    monkeypatch.setitem(norm_sides.PUBLISHED, "derf", torch.tanh)
    found, _ = measured("derf", "published")
    assert found.errors["y"] > 0.01


def test_a_side_that_fails_or_is_not_there_is_noted_and_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(u: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setitem(norm_sides.PUBLISHED, "dyt", broken)
    bench = Bench(setting_of("norm=dyt", "side=published"), 64, 32, "float32", "norm", [])
    table = bench.table()
    assert [f.key for f in table.found] == [BASELINE]
    assert bench.notes == [
        "64 x 32 float32, norm: dyt published failed: RuntimeError: no such instruction"
    ]
    monkeypatch.setitem(sys.modules, "quack", None)
    with pytest.raises(norm_sides.Absent, match="quack-kernels is not installed"):
        norm_sides.build("rmsnorm", "quack", work="norm", dim=4, dtype=torch.float32, device=CPU)


def test_a_shape_that_does_not_fit_is_noted_and_the_others_are_measured() -> None:
    tokens = ["shape=99999999x99999999,4x4", "dtype=float32", "norm=dyt", "side=eager"]
    found = norms.measure(norms.parse([*tokens, "rounds=1", "device=cpu"]))
    assert [table.title for table in found.tables] == ["4 x 4 float32"]
    assert found.notes[0].startswith("99999999 x 99999999 float32, norm failed: ")
    with pytest.raises(DataError, match="nothing could be measured: 99999999"):
        norms.measure(norms.parse([tokens[0].split(",")[0], *tokens[1:], "device=cpu"]))


def test_input_sets_are_past_the_cache_but_not_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(norm_rounds, "l2_bytes", lambda device: 2**16)
    inputs = Bench(setting_of(), 64, 32, "float32", "norm", [])
    assert inputs.result.sets == 16  # 4 times 64 KiB, by 16 KiB of x and dy
    assert inputs.result.working_set == 4 * 2**16
    assert Bench(setting_of(), 1, 1, "float32", "norm", []).result.sets == norm_rounds.MOST_SETS


def test_torch_compile_of_add_and_norm_has_the_formula_that_it_has_of_the_norm_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(norm_sides.torch, "compile", compiled.append)
    monkeypatch.setattr(kernels, "which", lambda name: "/usr/bin/c++")
    kernels.choose_backend.cache_clear()
    norm_sides.build("dyt", "compile", work="add", dim=4, dtype=torch.float32, device=CPU)
    kernels.choose_backend.cache_clear()
    (layer,) = compiled[0].args
    assert layer.requested == "compile"
    assert layer.f is FUNCTIONS["dyt"].forward


def test_all_sides_have_the_same_parameters_in_the_dtype_of_x() -> None:
    rest: dict[str, Any] = {"work": "norm", "dim": 16, "dtype": torch.bfloat16, "device": CPU}
    ours = norm_sides.build("derf", "eager", **rest).parameters
    theirs = norm_sides.build("derf", "published", **rest).parameters
    assert set(ours) == set(theirs) == {"alpha", "shift", "weight", "bias"}
    for name, p in ours.items():
        assert p.dtype == torch.bfloat16
        assert torch.equal(p.flatten(), theirs[name].flatten())
    assert ours["weight"].std() > 0.01


def hand(dtype: str = "bfloat16", rows: int = 100, dim: int = 10) -> tuple[Table, Found]:
    """A table with one round: copy 2 us, add 3 us, both 5 us; DyT 4 us, 6 us and 10 us."""
    side = Found("dyt", "ours", {"alpha": 1, "weight": dim, "bias": dim})
    side.us = {"forward": [4.0], "backward": [6.0], "train": [10.0]}
    table = Table(rows, dim, dtype, "norm", 1, 0, found=[side])
    table.references = {
        "forward": {"copy": [2.0]},
        "backward": {"copy": [2.0], "add": [3.0]},
        "train": {"copy": [2.0], "copy + add": [5.0]},
    }
    return table, side


def test_bytes_that_must_move_are_counted_by_hand() -> None:
    table, side = hand()
    # 1000 elements of 2 bytes; 21 parameters, of which a backward reads all but 10 and writes all
    expected = {"forward": 2 * (2000 + 21), "backward": 2 * (3000 + 11 + 21)}
    expected["train"] = expected["forward"] + expected["backward"]
    for which, count in expected.items():
        assert table.figures(side, which)["bytes"] == count  # type: ignore[arg-type]
    assert side.moved(100, 10, dtype="float32", work="add", which="train") == 4 * (8000 + 53)


def test_a_pass_in_which_layernorm_has_failed_has_no_ratio_to_it() -> None:
    table, side = hand()
    table.found.append(Found("layernorm", "torch", {}))
    table.found[-1].us = {"forward": [8.0]}
    found = {which: table.figures(side, which)["to_layernorm"] for which in side.us}
    assert found["forward"]["median"] == 0.5
    assert found["backward"] is found["train"] is None


def test_the_floor_is_the_bytes_at_the_rate_of_the_reference() -> None:
    table, side = hand()
    forward, train = table.figures(side, "forward"), table.figures(side, "train")
    # the copy moves 4000 bytes in 2 us
    assert forward["to_floor"]["median"] == pytest.approx(4.0 / (4042 / 2000))
    assert forward["of_copy"]["median"] == pytest.approx(4042 / 4.0 / 2000)
    assert forward["gb_per_s"] == pytest.approx(4042 / 4.0 / 1e3)
    assert train["to_floor"]["median"] == pytest.approx(10 / ((4042 + 6064) / (10_000 / 5)))
    assert table.copy_rate("train") == pytest.approx(2.0)
    assert forward["to_layernorm"] is None


def test_goals_of_a_cpu_are_judged_by_the_median_ratio_of_the_rounds() -> None:
    def side(norm: str, kind: str, us: list[float]) -> Found:
        return Found(norm, kind, {}, us={"train": us}, saved=4.0)

    sides = [
        side("layernorm", "torch", [10.0, 20.0, 10.0]),
        side("dyt", "ours", [9.0, 16.0, 9.8]),
        side("dyt", "published", [54.0, 48.0, 49.0]),
        side("derf", "ours", [10.6, 30.0, 9.0]),
    ]
    table = Table(6304, 768, "float32", "norm", 1, 0, found=sides)
    found = {g.what.partition(": ")[2]: g for g in goals([table], device="cpu", threads=1)}
    dyt = found["DyT forward + backward to LayerNorm"]
    assert (dyt.asked, dyt.found, dyt.met) == (0.95, pytest.approx(0.9), True)
    eager = found["eager DyT (published) to ours"]
    assert (eager.asked, eager.found, eager.met) == (5.0, pytest.approx(5.0), True)
    derf = found["Derf forward + backward to LayerNorm"]
    assert (derf.asked, derf.met) == (1.05, False)
    assert found["dyt saved bytes an element"].met
    assert "**not met**" in derf.line()
    assert goals([table], device="cpu", threads=2) == []
    table.dtype = "bfloat16"
    asked = [g.asked for g in goals([table], device="cpu", threads=1)]
    assert asked == [0.65, 0.75, 5.0, 2, 2]


def test_goals_of_a_gpu_are_those_of_bf16() -> None:
    table, side = hand(rows=8192, dim=4096)
    side.saved = 2.0
    liger = Found("dyt", "liger", {}, us={"forward": [9.0], "train": [13.0]})
    table.found.append(liger)
    found = {g.what.partition(": ")[2]: g for g in goals([table], device="cuda", threads=8)}
    assert found["DyT forward, of copy"].found == pytest.approx(0.5, rel=1e-3)
    assert not found["DyT forward, of copy"].met
    assert found["Liger's DyT to ours"] == Goal(
        "8192 x 4096 bfloat16: Liger's DyT to ours", 1.2, pytest.approx(1.3), False
    )
    table.dtype = "float32"
    assert goals([table], device="cuda", threads=8) == []


def test_the_page_names_shape_pass_goals_and_notes() -> None:
    table, _ = hand()
    text = page([table], [Goal("a goal", 0.5, 0.4, True)], ["a note"])
    assert "### 100 x 10 bfloat16: norm, backward alone" in text
    assert "- a goal: at most 0.5, found 0.4: met" in text
    assert text.endswith("- a note")


def test_the_picture_has_a_line_of_the_copy_and_is_not_empty(tmp_path: Path) -> None:
    path = tmp_path / "roofline.png"
    roofline.draw([hand()[0], hand("float32")[0]], path)
    import matplotlib.image

    image = matplotlib.image.imread(path)
    assert image.shape[0] > 300
    grey = image[..., :3].mean(-1)
    assert (grey < 0.1).sum() > 100
    assert math.isclose(float(grey.max()), 1.0, abs_tol=1e-3)
    roofline.draw([], path)
    assert path.stat().st_size > 0
