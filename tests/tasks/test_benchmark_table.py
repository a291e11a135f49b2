"""GenomicBenchmarks beside the published table: what is averaged, and what is said of the rest.

Runs are folders with a result.json written here, as suite.run writes it; no model is trained.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from suite.records import read_result
from tasks.dna.benchmark_table import MEANS, PUBLISHED, TESTS, main, published_mean
from tasks.dna.genomic_benchmarks import SIZES

Write = Callable[..., Path]
TASKS = list(TESTS)
MOUSE, PROMOTERS = TASKS[0], TASKS[-1]


def make_result(
    *,
    task: str = MOUSE,
    model: str = "caduceus_ps_1k",
    norm: str = "rmsnorm",
    seed: int = 0,
    val: float = 0.8,
    test: float | None = 0.79,
    lr: float = 1e-3,
    max_length: int = 512,
    status: str = "done",
    **changes: Any,
) -> dict[str, Any]:
    """A result.json of a run on one of the tasks."""
    result = {
        "schema": 1,
        "status": status,
        "error": None if status == "done" else "loss is nan at step 7",
        "task": "dna/classify",
        "model": model,
        "data": {
            "name": f"genomic_benchmarks/{task}",
            "license": "Apache-2.0 (GenomicBenchmarks)",
            "source": "GenomicBenchmarks, doi:10.1186/s12863-023-01123-8",
            "sha256": f"{TASKS.index(task) if task in TASKS else 9:x}" * 64,
            "synthetic": False,
            "sizes": {"train": 90, "val": 10, "test": TESTS.get(task, 10)},
            "unreadable": {},
            "notes": [],
        },
        "norm": norm,
        "norm_options": {"name": norm, "by_site": {}},
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
        "metrics": {
            "val/acc": val,
            "val/count": 10.0,
            "test/acc": test,
            "test/count": float(TESTS.get(task, 10)),
        },
        "parameters": 470_940,
        "norm_parameters": 590,
        "config": {
            "task": {"name": "dna/classify", "pool": "mean"},
            "model": {
                "name": model,
                "init_from": "runs/pretrained",
                "rcps": "_ps_" in model,
                "bidirectional": True,
            },
            "data": {
                "name": "genomic_benchmarks",
                "root": "/data/genomic_benchmarks",
                "task": task,
                "max_length": max_length,
            },
            "norm": {"name": norm, "by_site": {}},
            "optim": {"name": "adamw", "lr": lr, "min_lr": 0.1 * lr},
            "trainer": {"max_epochs": 10},
            "run": {"dir": f"runs/{task}-{seed}"},
            "seed": seed,
        },
    }
    return {**result, **changes}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write one run's folder below tmp_path/runs; later ones are newer."""
    written: list[Path] = []

    def write_run(name: str = "", **of: Any) -> Path:
        folder = tmp_path / "runs" / (name or f"run-{len(written)}")
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(make_result(**of)))
        os.utime(folder / "result.json", (1_700_000_000 + len(written),) * 2)
        written.append(folder)
        return folder

    return write_run


@pytest.fixture
def table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """(exit code, stdout, stderr) of the command on tmp_path/runs."""

    def run(*words: str, folder: Path | None = None) -> tuple[int, str, str]:
        code = main([str(folder or tmp_path / "runs"), *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def write_whole(write: Write, *, seeds: int = 5, **of: Any) -> None:
    """A run a task and seed, with the published means and spreads of PS."""
    for task, (mean, spread) in zip(TASKS, PUBLISHED["Caduceus-PS"], strict=True):
        for seed in range(seeds):
            shift = spread * (seed / (seeds - 1) - 0.5) if seeds > 1 else 0.0
            write(task=task, seed=seed, test=(mean + shift) / 100, **of)


def row(out: str, task: str) -> list[str]:
    """Cells of a line of the table."""
    (line,) = [x for x in out.splitlines() if x.strip("│┃ ").startswith(f"{task} ")]
    return [cell.strip() for cell in line.strip("│┃ ").replace("┃", "│").split("│")]


def test_the_published_table_has_the_means_that_the_papers_state() -> None:
    means = {name: published_mean(name) for name in PUBLISHED}
    wanted = {"CNN": 80.325, "HyenaDNA": 85.275, "Caduceus-Ph": 86.6, "Caduceus-PS": 86.9}
    assert means == pytest.approx(wanted, abs=1e-9)
    # with its own norm, the figures of DyT's and Derf's tables are those means
    assert round(means["HyenaDNA"] - 0.05, 1) == MEANS["HyenaDNA"]["layernorm"] == 85.2
    assert means["Caduceus-PS"] == pytest.approx(MEANS["Caduceus-PS"]["rmsnorm"])


def test_the_tasks_are_the_eight_of_the_data_with_their_test_sets() -> None:
    assert {name: test for name, (_, test) in SIZES.items()} == TESTS
    assert all(len(cells) == len(TESTS) for cells in PUBLISHED.values())


def test_what_the_tests_write_is_a_result_of_the_schema(write: Write) -> None:
    assert read_result(write())["status"] == "done"


def test_a_task_is_shown_as_mean_and_largest_less_smallest_beside_the_published(
    write: Write, table: Callable[..., tuple[int, str, str]]
) -> None:
    for seed, test in enumerate((0.80, 0.77, 0.82)):
        write(seed=seed, test=test)
    code, out, _ = table()
    assert code == 0
    assert row(out, MOUSE)[1:] == ["79.7 +-5.0 (3)", "79.3 +-5.8", "71.5 +-8.7"]
    assert row(out, PROMOTERS)[1] == "-"
    assert row(out, "top-1, %")[1:] == [
        "rmsnorm",
        "published: Caduceus-PS (470k)",
        "published: CNN (264k)",
    ]


def test_a_mean_over_tasks_is_shown_only_of_all_eight(
    write: Write, table: Callable[..., tuple[int, str, str]]
) -> None:
    write_whole(write)
    _, out, err = table()
    assert row(out, "mean of 8 tasks")[1:] == ["86.90 (5 seeds)", "86.90", "80.33"]
    assert row(out, "published mean of the norm")[1] == "86.9"
    assert "40 of 40 runs are in the figures" in err
    for seed in range(5):
        write(task=MOUSE, norm="dyt", seed=seed)
    _, out, _ = table()
    assert row(out, "mean of 8 tasks")[1:3] == ["86.90 (5 seeds)", "1 of 8 tasks"]
    assert row(out, "published mean of the norm")[1:3] == ["86.9", "86.9"]


def test_each_model_stands_beside_its_own_row(
    write: Write, table: Callable[..., tuple[int, str, str]]
) -> None:
    write(model="hyenadna_tiny_1k", norm="derf")
    write(model="caduceus_ph_1k", norm="derf")
    write(model="caduceus_ps_1k", norm="derf")
    _, out, _ = table("--json")
    columns = {c["model"]: c for c in json.loads(out)["columns"]}
    assert {m: c["published_row"] for m, c in columns.items()} == {
        "hyenadna_tiny_1k": "HyenaDNA",
        "caduceus_ph_1k": "Caduceus-Ph",
        "caduceus_ps_1k": "Caduceus-PS",
    }
    assert {m: c["published_mean_of_norm"] for m, c in columns.items()} == {
        "hyenadna_tiny_1k": 85.7,
        "caduceus_ph_1k": None,
        "caduceus_ps_1k": 87.3,
    }
    found = columns["caduceus_ph_1k"]["tasks"][MOUSE]
    assert found["published"] == {"mean": 75.4, "spread": 7.4}
    assert found["tests"] == {"0": pytest.approx(79.0)}


def test_unequal_seeds_and_settings_of_tasks_are_said(
    write: Write, table: Callable[..., tuple[int, str, str]]
) -> None:
    write_whole(write, seeds=2)
    write(task=PROMOTERS, seed=2, test=0.945)
    write(task=PROMOTERS, norm="dyt", lr=2e-3)
    write(task=MOUSE, norm="dyt", max_length=1024)
    _, out, _ = table()
    assert row(out, "mean of 8 tasks")[1] == "86.90 (2-3 seeds)"
    assert "rmsnorm: not all tasks have the same seeds: 0,1 in 7 of them; 0,1,2 in 1 of them" in out
    assert "dyt: optim.lr differs between tasks: 0.001, 0.002" in out
    assert "dyt: data.max_length differs between tasks: 1024, 512" in out
    assert "data.task differs" not in out


def test_runs_without_a_figure_are_named_and_in_no_mean(
    write: Write, table: Callable[..., tuple[int, str, str]]
) -> None:
    write(test=0.8)
    write("failed", status="failed", seed=1, test=0.1)
    write("untested", seed=2, test=None)
    write("short", seed=3, test=0.1, metrics={"test/acc": 0.1, "test/count": 24.0})
    write("splice", seed=4, test=0.1, data={"name": "splice", "sha256": "0"})
    write("own", task="my_own_set", seed=5, test=0.1)
    write(seed=6, test=0.79)
    broken = write("broken")
    (broken / "result.json").write_text("{")
    running = write("running")
    (running / "result.json").unlink()
    (running / "config.yaml").write_text("seed: 7\n")
    code, out, err = table()
    assert code == 0
    assert row(out, MOUSE)[1] == "79.5 +-1.0 (2)"
    for name, reason in {
        "failed": "not counted: failed",
        "untested": "not counted: no test/acc",
        "short": "tested on 24 sequences, the published test has 242",
        "splice": "not one of the eight tasks (dna/classify on splice)",
        "own": "not one of the eight tasks (dna/classify on genomic_benchmarks/my_own_set)",
        "broken": "result.json is not JSON",
        "running": "no result.json (still running, or killed)",
    }.items():
        (line,) = [x for x in err.splitlines() if f"/{name}: " in x]
        assert reason in line
    assert "2 of 9 runs are in the figures" in err


def test_of_two_runs_of_one_seed_the_later_counts(
    write: Write, table: Callable[..., tuple[int, str, str]]
) -> None:
    write("first", test=0.5)
    write("again", test=0.9)
    _, out, err = table()
    assert row(out, MOUSE)[1] == "90.0 +-0.0 (1)"
    assert "/first: not counted: there is a later run of its seed" in err


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(
    write: Write, table: Callable[..., tuple[int, str, str]]
) -> None:
    write("slow", lr=1e-3, seed=0)
    write("fast", lr=2e-3, seed=1)
    code, out, err = table()
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert "optim.lr (0.002, 0.001)" in line
    assert "--select optim.lr,optim.min_lr" in line


def test_select_takes_for_each_task_what_is_best_on_validation_and_not_on_the_test(
    write: Write, table: Callable[..., tuple[int, str, str]]
) -> None:
    for task, good in ((MOUSE, 2e-3), (PROMOTERS, 1e-3)):
        for lr in (1e-3, 2e-3):
            for seed in range(2):
                val, test = (0.9, 0.7) if lr == good else (0.8, 0.99)
                write(task=task, lr=lr, seed=seed, val=val, test=test)
    code, out, err = table("--select", "optim.lr,optim.min_lr")
    assert code == 0
    assert [row(out, task)[1] for task in (MOUSE, PROMOTERS)] == ["70.0 +-0.0 (2)"] * 2
    assert f"chosen on val: {MOUSE}, rmsnorm: optim.lr=0.002 optim.min_lr=0.0002" in out
    assert f"chosen on val: {PROMOTERS}, rmsnorm: optim.lr=0.001" in out
    assert err.count("another optim.lr, optim.min_lr was chosen") == 4


@pytest.mark.parametrize("kind", ["missing", "empty", "others"])
def test_a_folder_without_such_runs_is_one_error(
    kind: str, tmp_path: Path, write: Write, table: Callable[..., tuple[int, str, str]]
) -> None:
    folder = tmp_path / "runs"
    if kind == "empty":
        folder.mkdir()
    elif kind == "others":
        write(data={"name": "splice", "sha256": "0"})
    code, out, err = table(folder=folder)
    assert (code, out) == (2, "")
    (line,) = [x for x in err.splitlines() if x.startswith("error: ")]
    wanted = {"missing": "does not exist", "empty": "no readable result.json", "others": "eight"}
    assert wanted[kind] in line


def test_a_mistake_in_the_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["x", "--selct", "optim.lr"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: ") and "--help" in line for line in lines)


def test_the_command_does_without_torch(write: Write, tmp_path: Path) -> None:
    write()
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['x', {str(tmp_path / 'runs')!r}]\n"
        "try: runpy.run_module('tasks.dna.benchmark_table', run_name='__main__')\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'torch', 'lightning', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert MOUSE in done.stdout
