"""The report: what is averaged, what is set against the baseline, and what is said about the rest.

Runs are folders with a result.json and a metrics.jsonl written here; no model is trained.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from suite.comparison import compare, norm_defaults
from suite.errors import ConfigError
from suite.records import differences, find_runs, flatten, read_curve
from suite.report import main
from suite.rows import Options, Row, difference
from suite.tables import csv_text, figure, markdown, show_difference

NORM_OPTIONS: Mapping[str, dict[str, Any]] = {
    "layernorm": {"eps": None, "by_site": {}},
    "dyt": {"alpha_init": 0.5, "by_site": {}},
    "derf": {"alpha_init": 0.5, "by_site": {}},
}
Write = Callable[..., Path]


def defaults(name: str) -> Mapping[str, Any] | None:
    return flatten(NORM_OPTIONS[name]) if name in NORM_OPTIONS else None


def make_result(
    *,
    norm: str = "layernorm",
    seed: int = 0,
    val: float | None = 0.8,
    test: float | None = 0.7,
    status: str = "done",
    options: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """A result.json of schema 1. `config` is merged over a small resolved configuration."""
    norm_options = {**NORM_OPTIONS.get(norm, {}), **(options or {})}
    resolved: dict[str, Any] = {
        "task": {"name": "toy/classify"},
        "model": {"name": "toy_model", "dim": 8},
        "data": {"name": "toy_data", "batch_size": 4},
        "norm": {"name": norm, **norm_options},
        "optim": {"lr": 1e-3},
        "trainer": {"max_epochs": 6},
        "run": {"dir": f"runs/{norm}-{seed}"},
        "seed": seed,
    }
    for key, value in flatten(config or {}).items():
        section, _, name = key.partition(".")
        resolved[section][name] = value
    result = {
        "schema": 1,
        "status": status,
        "error": None if status == "done" else "loss is nan at step 7",
        "task": "toy/classify",
        "model": "toy_model",
        "data": {
            "name": "toy_data",
            "license": "MIT",
            "source": "made by hand",
            "sha256": "ab" * 32,
            "synthetic": True,
            "sizes": {"train": 10, "val": 4, "test": 4},
        },
        "norm": norm,
        "norm_options": norm_options,
        "seed": seed,
        "primary": {
            "name": "acc",
            "direction": "max",
            "split": "val",
            "best": val,
            "best_step": 4,
            "last": val,
            "test": test,
        },
        "metrics": {"val/acc": val, "val/loss": 1.5, "test/acc": test, "test/loss": 1.25},
        "parameters": 1234,
        "norm_parameters": 56,
        "throughput": {"unit": "images", "per_s": 100.0, "step_ms": 40.0},
        "world_size": 1,
        "precision": "32-true",
        "hardware": {"cpu": "Toy CPU", "cpu_count": 2, "threads": 1, "gpus": []},
        "versions": {"torch": "2.11.0"},
        "git": {"revision": "0123456789abcdef", "dirty": True},
        "config": resolved,
        "command": f"python -m suite.train norm={norm} seed={seed}",
    }
    return {**result, **changes}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write one run's folder below tmp_path/runs; later ones are newer."""
    written: list[Path] = []

    def write_run(name: str = "", *, curve: Mapping[int, float] | None = None, **of: Any) -> Path:
        folder = tmp_path / "runs" / (name or f"run-{len(written)}")
        folder.mkdir(parents=True)
        result = folder / "result.json"
        result.write_text(json.dumps(make_result(**of)))
        os.utime(result, (1_700_000_000 + len(written),) * 2)
        if curve:
            rows = [{"step": step, "epoch": 0, "val/acc": value} for step, value in curve.items()]
            (folder / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        written.append(folder)
        return folder

    return write_run


def rows_of(tmp_path: Path, **options: Any) -> dict[str, Row]:
    """Label -> row of the only block."""
    runs, _ = find_runs([tmp_path / "runs"])
    (block,) = compare(runs, options=Options(**options), defaults=defaults)
    rows = {f"{row.label}{'*' * row.group}": row for row in block.rows}
    assert len(rows) == len(block.rows)
    return rows


def run_main(tmp_path: Path, *argv: str) -> int:
    return main([str(tmp_path / "runs"), *argv], defaults=defaults)


# -- means and differences -----------------------------------------------------------------------


def test_mean_and_sample_standard_deviation_over_seeds(write: Write, tmp_path: Path) -> None:
    for seed, val in enumerate((0.80, 0.82, 0.87)):
        write(seed=seed, val=val, test=val - 0.1)
    row = rows_of(tmp_path)["layernorm"]
    assert row.stats["val"].mean == pytest.approx(0.83)
    assert row.stats["val"].sd == pytest.approx(math.sqrt((0.03**2 + 0.01**2 + 0.04**2) / 2))
    assert row.stats["test"].mean == pytest.approx(0.73)
    assert row.stats["test"].n == 3
    assert row.mean_of("throughput", "step_ms") == 40.0


def test_the_difference_is_paired_by_seed() -> None:
    # d = (-0.02, -0.04, 0.00): mean -0.02, sd 0.02, standard error 0.02 / sqrt(3)
    found = difference({0: 0.78, 1: 0.80, 2: 0.90}, {0: 0.80, 1: 0.84, 2: 0.90, 3: 0.1})
    assert found is not None
    assert found.paired
    assert found.n == 3
    assert found.mean == pytest.approx(-0.02)
    assert found.se == pytest.approx(0.02 / math.sqrt(3))


def test_without_a_common_seed_the_difference_is_of_means_and_says_unpaired() -> None:
    # sd^2 = 0.02 and 0.08 over 2 seeds each: sqrt(0.02/2 + 0.08/2)
    found = difference({0: 0.6, 1: 0.8}, {2: 0.3, 3: 0.7})
    assert found is not None
    assert not found.paired
    assert found.mean == pytest.approx(0.2)
    assert found.se == pytest.approx(math.sqrt(0.01 + 0.04))
    assert "unpaired" in show_difference(found)


def test_one_pair_has_no_standard_error() -> None:
    found = difference({0: 0.6}, {0: 0.5, 1: 0.9})
    assert found is not None
    assert (found.n, found.se) == (1, None)
    assert show_difference(found) == "+0.1000 (1 pair)"
    assert difference({}, {0: 1.0}) is None


def test_the_baseline_comes_first_and_the_difference_is_on_each_split(
    write: Write, tmp_path: Path
) -> None:
    for seed in (0, 1):
        write(norm="dyt", seed=seed, val=0.7 + seed / 10, test=0.6)
        write(norm="layernorm", seed=seed, val=0.8 + seed / 10, test=0.75)
    rows = rows_of(tmp_path)
    assert list(rows) == ["layernorm", "dyt"]
    assert rows["dyt"].to_baseline["val"].mean == pytest.approx(-0.1)
    assert rows["dyt"].to_baseline["val"].se == pytest.approx(0.0, abs=1e-12)
    assert rows["dyt"].to_baseline["test"].mean == pytest.approx(-0.15)
    assert rows["layernorm"].to_baseline == {}


def test_the_only_row_of_its_name_is_the_baseline(write: Write, tmp_path: Path) -> None:
    write(norm="layernorm", options={"eps": 1e-6}, val=0.8)
    write(norm="dyt", val=0.7)
    rows = rows_of(tmp_path)
    assert list(rows) == ["layernorm eps=1e-06", "dyt"]
    assert rows["dyt"].to_baseline["val"].mean == pytest.approx(-0.1)
    write(norm="layernorm", options={"eps": 1e-3}, val=0.9)
    assert rows_of(tmp_path)["dyt"].to_baseline == {}


def test_another_metric_can_be_shown(write: Write, tmp_path: Path) -> None:
    write()
    row = rows_of(tmp_path, metric="loss")["layernorm"]
    assert row.stats["val"].mean == 1.5
    assert row.stats["test"].mean == 1.25


# -- what is kept apart --------------------------------------------------------------------------


def test_runs_of_another_configuration_are_flagged_and_never_averaged(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        write(seed=seed, val=0.8)
    write(norm="dyt", val=0.7)
    write(norm="dyt", seed=1, val=0.1, config={"trainer": {"max_epochs": 1}})
    rows = rows_of(tmp_path)
    assert set(rows) == {"layernorm", "dyt", "dyt*"}
    assert rows["dyt"].stats["val"].mean == 0.7
    assert rows["dyt*"].differs == "trainer.max_epochs 1 (not 6)"
    assert rows["dyt*"].to_baseline == {}
    assert run_main(tmp_path) == 0
    printed = capsys.readouterr().out
    assert "trainer.max_epochs 1" in printed
    assert "no layernorm with the same configuration" in printed


def test_the_same_names_on_other_data_are_other_rows(write: Write, tmp_path: Path) -> None:
    write()
    write(seed=1, data={"name": "toy_data", "sha256": "cd" * 32})
    rows = rows_of(tmp_path)
    assert "data sha256" in rows["layernorm*"].differs


def test_where_a_run_went_is_no_difference(write: Write, tmp_path: Path) -> None:
    write()
    write(seed=1, config={"run": {"dir": "elsewhere"}, "trainer": {"devices": 2}})
    assert set(rows_of(tmp_path)) == {"layernorm"}


def test_norm_options_that_are_not_the_defaults_make_their_own_row(
    write: Write, tmp_path: Path
) -> None:
    write(norm="dyt")
    write(norm="dyt", options={"alpha_init": 1})
    write(norm="dyt", options={"alpha_init": "calibrated", "by_site": {"final": "layernorm"}})
    assert set(rows_of(tmp_path)) == {
        "dyt",
        "dyt alpha_init=1",
        "dyt alpha_init=calibrated by_site.final=layernorm",
    }


def test_a_lone_variant_is_still_labelled_and_a_foreign_norm_by_what_varies(
    write: Write, tmp_path: Path
) -> None:
    write(norm="dyt", options={"alpha_init": 1})
    write(norm="my.pkg:Norm", options={"p": 1, "q": 2})
    write(norm="my.pkg:Norm", options={"p": 3, "q": 2})
    assert set(rows_of(tmp_path)) == {"dyt alpha_init=1", "my.pkg:Norm p=1", "my.pkg:Norm p=3"}


def test_the_suites_own_norms_have_defaults() -> None:
    dyt = norm_defaults("dyt")
    assert dyt is not None
    assert dyt["alpha_init"] == 0.5
    assert norm_defaults("no.such:Norm") is None


def test_rows_can_be_the_values_of_another_key(write: Write, tmp_path: Path) -> None:
    for seed in (0, 1):
        write(seed=seed, val=0.8)
        write(seed=seed, val=0.9, config={"optim": {"lr": 2e-3}})
    rows = rows_of(tmp_path, by="optim.lr", baseline="0.001")
    assert list(rows) == ["0.001", "0.002"]
    assert rows["0.002"].to_baseline["val"].mean == pytest.approx(0.1)


def test_models_can_be_the_rows(write: Write, tmp_path: Path) -> None:
    write()
    write(model="big", config={"model": {"name": "big", "dim": 16}}, val=0.9)
    rows = rows_of(tmp_path, by="model", baseline="toy_model")
    assert rows["big"].to_baseline["val"].mean == pytest.approx(0.1)


# -- runs that failed, or were run twice ---------------------------------------------------------


def test_failed_and_diverged_runs_are_counted_and_shown_and_in_no_mean(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(norm="dyt", seed=0, val=0.8)
    bad = write(norm="dyt", seed=1, val=0.1, status="diverged")
    write(norm="derf", seed=0, val=None, test=None, status="failed")
    rows = rows_of(tmp_path)
    assert rows["dyt"].stats["val"].n == 1
    assert rows["dyt"].counts == {"done": 1, "diverged": 1}
    assert rows["derf"].counts == {"failed": 1}
    assert rows["derf"].stats == {}
    assert run_main(tmp_path) == 0
    printed = capsys.readouterr().out
    assert "1 diverged, 1 done" in printed
    assert f"{bad} ended diverged: loss is nan at step 7" in printed


def test_of_two_runs_of_one_seed_the_newest_done_one_counts(write: Write, tmp_path: Path) -> None:
    write("a", val=0.5)
    write("b", val=0.6)
    write("b.failed-1", val=0.1, status="failed")
    row = rows_of(tmp_path)["layernorm"]
    assert row.stats["val"].mean == 0.6
    assert row.counts == {"done": 1}
    assert [note.partition(": ")[2] for note in row.notes] == [
        f"{tmp_path}/runs/b is used, {tmp_path}/runs/b.failed-1 is an attempt that ended failed",
        f"{tmp_path}/runs/b is used, {tmp_path}/runs/a is an older run",
    ]


def test_a_done_run_without_a_finite_figure_is_said_and_not_averaged(
    write: Write, tmp_path: Path
) -> None:
    write(seed=0, val=0.8)
    write(seed=1, val=math.nan)
    row = rows_of(tmp_path)["layernorm"]
    assert row.stats["val"].n == 1
    assert any("no val figure for seed 1" in note for note in row.notes)


# -- choosing a learning rate --------------------------------------------------------------------


def test_the_choice_is_made_on_val_though_test_would_choose_otherwise(
    write: Write, tmp_path: Path
) -> None:
    for seed in (0, 1):
        write(seed=seed, val=0.80, test=0.99)
        write(seed=seed, val=0.85, test=0.60, config={"optim": {"lr": 2e-3}})
    row = rows_of(tmp_path, select=("optim.lr",))["layernorm"]
    assert row.chosen == {"optim.lr": 2e-3}
    assert row.stats["test"].mean == pytest.approx(0.60)
    assert row.tried == [(1e-3,), (2e-3,)]
    assert len(row.others) == 2


def test_the_choice_follows_the_direction_of_the_metric(write: Write, tmp_path: Path) -> None:
    lower = {"name": "wer", "direction": "min", "split": "val", "test": 0.4}
    write(primary={**lower, "best": 0.30})
    write(primary={**lower, "best": 0.20}, config={"optim": {"lr": 2e-3}})
    assert rows_of(tmp_path, select=("optim.lr",))["layernorm"].chosen == {"optim.lr": 2e-3}


def test_a_value_of_which_a_seed_diverged_is_not_chosen(write: Write, tmp_path: Path) -> None:
    fast = {"optim": {"lr": 2e-3}}
    for seed in (0, 1):
        write(seed=seed, val=0.8)
    write(seed=0, val=0.9, config=fast)
    write(seed=1, val=None, config=fast, status="diverged")
    row = rows_of(tmp_path, select=("optim.lr",))["layernorm"]
    assert row.chosen == {"optim.lr": 1e-3}
    assert row.counts == {"done": 3, "diverged": 1}
    assert any("not chosen from" in note and "optim.lr=0.002" in note for note in row.notes)


def test_unequal_trials_and_a_best_value_at_the_edge_are_said(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for k, lr in enumerate((1e-3, 2e-3, 4e-3)):
        write(val=0.8 + k / 100, config={"optim": {"lr": lr}})
    write(norm="dyt", val=0.7)
    assert run_main(tmp_path, "--select", "optim.lr") == 0
    printed = capsys.readouterr().out
    assert "optim.lr=0.004 (of 3)" in printed
    assert "optim.lr=0.001 (of 1)" in printed
    assert "not an equal choice: values of optim.lr tried: layernorm 3; dyt 1" in printed
    assert "the best optim.lr, 0.004, is at the edge" in printed


def test_an_option_of_the_norm_can_be_chosen(write: Write, tmp_path: Path) -> None:
    write(norm="dyt", val=0.7)
    write(norm="dyt", val=0.8, options={"alpha_init": 1})
    row = rows_of(tmp_path, select=("norm.alpha_init",))["dyt"]
    assert row.chosen == {"norm.alpha_init": 1}


def test_without_select_two_learning_rates_are_two_rows(write: Write, tmp_path: Path) -> None:
    write(val=0.8)
    write(val=0.9, config={"optim": {"lr": 2e-3}})
    assert rows_of(tmp_path)["layernorm*"].differs == "optim.lr 0.002 (not 0.001)"


# -- files ---------------------------------------------------------------------------------------


def two_norms(write: Write) -> None:
    for seed in (0, 1, 2):
        curve = {step: 0.5 + step / 1000 + seed / 100 for step in (100, 200, 300)}
        write(norm="layernorm", seed=seed, val=0.8 + seed / 100, test=0.75, curve=curve)
        lower = {step: value - 0.05 for step, value in curve.items()}
        write(norm="dyt", seed=seed, val=0.75, test=0.7 + seed / 50, curve=lower)


def test_csv_reads_back_with_every_figure(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two_norms(write)
    write(norm="derf", status="failed", val=None, test=None)
    assert run_main(tmp_path, "--format", "csv") == 0
    lines = {line["norm"]: line for line in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    assert list(lines) == ["layernorm", "derf", "dyt"]
    assert float(lines["layernorm"]["val_mean"]) == pytest.approx(0.81)
    assert float(lines["layernorm"]["val_sd"]) == pytest.approx(0.01)
    assert float(lines["dyt"]["test_difference"]) == pytest.approx(-0.03)
    assert float(lines["dyt"]["test_difference_se"]) == pytest.approx(0.02 / math.sqrt(3))
    assert lines["dyt"]["test_difference_paired"] == "True"
    assert lines["dyt"]["seeds"] == "0 1 2"
    assert (lines["derf"]["failed"], lines["derf"]["val_mean"]) == ("1", "")
    assert (lines["dyt"]["parameters"], lines["dyt"]["step_ms"]) == ("1234", "40.0")


def test_markdown_reads_back_and_stands_alone(write: Write, tmp_path: Path) -> None:
    two_norms(write)
    write(norm="my|odd:Norm")
    assert run_main(tmp_path, "--out", str(tmp_path / "out")) == 0
    page = (tmp_path / "out" / "report.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("|")]
    widths = {len(line.replace("\\|", "").split("|")) for line in table}
    assert len(widths) == 1
    cells = [cell.strip() for cell in table[3].split("|")[1:-1]]
    assert cells[0] == "dyt"
    assert "0.7200 ± 0.0200 (n=3)" in cells
    assert "-0.0300 ± 0.0115 (3 pairs)" in cells
    for fact in (
        "toy_data; SYNTHETIC; licence MIT; 10 train, 4 val, 4 test; source made by hand",
        "runs: 7, of which 7 done; seeds 0, 1, 2",
        "Toy CPU (2 CPUs, 1 threads), no GPU",
        "torch 2.11.0; revision 0123456789ab with local changes",
        "python -m suite.train norm=dyt seed=2",
        "python -m suite.report",
        "![validation curves](curves.png)",
        "acc, higher is better",
    ):
        assert fact in page


def test_the_curves_are_a_picture_with_a_line_for_each_norm(write: Write, tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    two_norms(write)
    assert run_main(tmp_path, "--out", str(tmp_path / "out")) == 0
    pixels = image.imread(tmp_path / "out" / "curves.png")[..., :3]
    height, width, _ = pixels.shape
    assert width > 1000
    assert height > 500
    black = (pixels.max(axis=2) < 0.05).sum()
    orange = (abs(pixels - (0.902, 0.624, 0.0)).max(axis=2) < 0.02).sum()
    assert black > 1000
    assert orange > 500


def test_without_matplotlib_the_tables_are_written_and_one_line_says_what_to_install(
    write: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    two_norms(write)
    for module in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, module, None)
    assert run_main(tmp_path, "--out", str(tmp_path / "out")) == 0
    assert "pip install matplotlib" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.csv", "report.md"]
    assert "curves.png" not in (tmp_path / "out" / "report.md").read_text()


def test_runs_without_curves_say_so(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write()
    assert run_main(tmp_path, "--out", str(tmp_path / "out")) == 0
    assert "no run has val/acc" in capsys.readouterr().err
    assert not (tmp_path / "out" / "curves.png").exists()


def test_a_curve_survives_a_cut_line_and_a_resumed_step(tmp_path: Path) -> None:
    lines = ['{"step": 2, "val/acc": 0.5}', '{"step": 1, "lr": 0.1}', '{"step": 1, "val/acc": 0.2}']
    lines += ['{"step": 2, "val/acc": 0.6}', '{"step": 3, "val/ac']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_curve(tmp_path, key="val/acc") == {1: 0.2, 2: 0.6}
    assert read_curve(tmp_path / "none", key="val/acc") == {}


def test_two_tasks_get_a_table_each_and_one_of_both(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(test=0.71)
    write(norm="dyt", test=0.72)
    write(task="toy/other", config={"task": {"name": "toy/other"}}, test=0.73)
    assert run_main(tmp_path, "--format", "markdown") == 0
    page = capsys.readouterr().out
    assert "## toy/classify · toy_model · toy_data" in page
    assert "## toy/other · toy_model · toy_data" in page
    assert "| layernorm | 0.7100 (n=1) | 0.7300 (n=1) |" in page
    assert "| dyt | 0.7200 (n=1) | - |" in page


def test_the_page_and_the_csv_can_be_had_from_python(write: Write, tmp_path: Path) -> None:
    write()
    runs, skipped = find_runs([tmp_path / "runs" / "run-0" / "result.json"])
    assert skipped == []
    options = Options()
    blocks = compare(runs, options=options, defaults=defaults)
    assert "0.8000" in markdown(blocks, options=options, split=None, command="me")
    assert csv_text(blocks, options=options).count("\n") == 2


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ("[1]", "has schema None"),
        ('{"schema": 0}', "has schema 0, this version reads 1"),
        ('{"schema": 1}', "status is missing"),
        (json.dumps(make_result(status="odd")), "status is odd"),
        (json.dumps(make_result(seed=None)), "seed is missing"),  # type: ignore[arg-type]
        (json.dumps(make_result(primary=[])), "primary is missing or of the wrong type"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_and_skipped(
    content: str, says: str, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write()
    bad = write("bad")
    (bad / "result.json").write_text(content)
    killed = tmp_path / "runs" / "killed"
    killed.mkdir()
    (killed / "config.yaml").write_text("seed: 0")
    assert run_main(tmp_path, "--format", "csv") == 0
    said = capsys.readouterr()
    assert f"warning: {bad}: skipped: result.json" in said.err
    assert says in said.err
    assert f"warning: {killed}: skipped: no result.json" in said.err
    assert len(list(csv.DictReader(io.StringIO(said.out)))) == 1


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--select", "optim.lrr"], "Did you mean optim.lr?"),
        (["--by", "nrom"], "Did you mean norm?"),
        (["--metric", "f1"], "choose one of: acc, loss"),
        (["--baseline", "rmsnorm"], "rows: layernorm"),
        (["--split", "train"], "invalid choice"),
        (["--out", "/dev/null/x"], "cannot be written"),
        (["nowhere"], "does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    argv: list[str],
    says: str,
    write: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write()
    assert run_main(tmp_path, *argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_no_run_at_all_is_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").mkdir()
    assert run_main(tmp_path) == 2
    assert "no readable result.json" in capsys.readouterr().err


def test_an_unknown_select_key_raises_from_python(write: Write, tmp_path: Path) -> None:
    write()
    runs, _ = find_runs([tmp_path / "runs"])
    with pytest.raises(ConfigError, match="no run has such a key"):
        compare(runs, options=Options(select=("seed",)), defaults=defaults)


# -- small things --------------------------------------------------------------------------------


def test_figures_are_short() -> None:
    assert [figure(x) for x in (None, 0.83125, -0.5, 1234.56)] == ["-", "0.8313", "-0.5000", "1235"]
    assert figure(0.01, sign="+") == "+0.0100"


def test_configurations_compare_as_json() -> None:
    was = flatten({"a": {"b": [1, 2], "c": {}}, "d": math.nan})
    assert was == {"a.b": [1, 2], "a.c": {}, "d": was["d"]}
    assert differences(was, {"a.b": (1, 2), "a.c": {}, "d": math.nan}) == {}
    assert differences({"x": 1}, {"x": 1.0}) == {}
    assert differences({"x": 1}, {"x": True}) != {}
    assert differences(was, {"a.b": [1], "d": math.nan}) == {
        "a.b": ([1, 2], [1]),
        "a.c": ({}, None),
    }
