"""The sweep: what a grid is, which cells run, and what becomes of them when something goes wrong.

A small script stands in for suite.train; the processes, the signals and the files are real.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from suite.cells import Cell, Outcome, run_cells, show_seconds
from suite.errors import ConfigError
from suite.sweep import (
    cell_name,
    default_out,
    exit_code,
    main,
    parse_tokens,
    plan_cells,
    resolve_config,
    split_values,
)

# What it does is chosen by `do=`: ok, fail, diverge, silent (no result), hang, and so on.
FAKE_TRAIN = """
import json, os, signal, subprocess, sys, time
tokens = dict(token.split("=", 1) for token in sys.argv[1:])
folder, do = tokens.pop("run.dir"), tokens.get("do", "ok")
os.makedirs(folder)
open(folder + "/config.yaml", "w").write("seed: 0")
began = time.time()
config = {"task": {"name": tokens.get("task", "toy")}, "seed": int(tokens.get("seed", 0)),
          "norm": {"name": tokens.get("norm", "dyt")}, "optim": {"lr": float(tokens.get("lr", 1))},
          "do": do, "run": {"dir": folder}}

def result(status, error=None):
    best = 0.5 + config["seed"] / 10 if status == "done" else None
    content = {"schema": 1, "status": status, "error": error, "task": "toy", "model": "m",
               "norm": config["norm"]["name"], "norm_options": {}, "data": {"name": "d"},
               "seed": config["seed"], "config": config, "began": began, "ended": time.time(),
               "primary": {"name": "acc", "split": "val", "best": best, "test": best},
               "threads": os.environ.get("OMP_NUM_THREADS")}
    json.dump(content, open(folder + "/result.json", "w"))

print("a line of output", flush=True)
if do == "fail":
    result("failed", "ValueError: the disk of the moon")
    sys.exit(1)
if do == "diverge":
    result("diverged", "loss is nan at step 7")
    sys.exit(3)
if do == "silent":
    sys.exit("RuntimeError: last words")
if do == "orphan":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open(folder + "/child", "w").write(str(child.pid))
if do == "stubborn":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
if do in ("hang", "stubborn"):
    try:
        with open(folder + "/.here", "w") as file:
            file.write(str(os.getpid()))
        os.rename(folder + "/.here", folder + "/here")
        time.sleep(60)
    except KeyboardInterrupt:
        result("interrupted")
        sys.exit(130)
time.sleep(float(tokens.get("sleep", 0)))
result("done")
if do == "late":
    sys.exit(1)
"""

Make = Callable[..., int]


def resolve(tokens: Sequence[str]) -> Mapping[str, Any]:
    """Stands in for suite.config.load: what the fake writes as its config."""
    given = dict(token.split("=", 1) for token in tokens)
    if given.get("norm", "dyt") not in ("dyt", "layernorm"):
        raise ConfigError(f"norm={given['norm']}: no such norm")
    return {
        "task": {"name": given.get("task", "toy")},
        "seed": int(given.get("seed", 0)),
        "norm": {"name": given.get("norm", "dyt")},
        "optim": {"lr": float(given.get("lr", 1))},
        "do": given.get("do", "ok"),
        "run": {"dir": None},
    }


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    script = tmp_path / "fake_train.py"
    script.write_text(FAKE_TRAIN)
    return [sys.executable, "-S", str(script)]


@pytest.fixture
def sweep(command: list[str], tmp_path: Path) -> Make:
    def run(*argv: str) -> int:
        return main([*argv, "--out", str(tmp_path / "out")], command=command, resolve=resolve)

    return run


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def wait_for(condition: Callable[[], Any], *, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


# -- the grid ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "values"),
    [
        ("seed=0,1,2", ["0", "1", "2"]),
        ("optim.betas=[0.9,0.95]", ["[0.9,0.95]"]),
        ("optim.betas=[0.9,0.95],[0.9,0.99]", ["[0.9,0.95]", "[0.9,0.99]"]),
        ("norm.by_site={final: layernorm, qk: dyt}", ["{final: layernorm, qk: dyt}"]),
        ("run.note='a,b'", ["'a,b'"]),
        ("data.root=/a=b", ["/a=b"]),
        ("norm=dyt", ["dyt"]),
    ],
)
def test_commas_split_only_outside_brackets_and_quotes(token: str, values: list[str]) -> None:
    assert split_values(token) == (token.partition("=")[0], values)


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (["norm"], "not key=value"),
        (["seed=0,,1"], "empty value"),
        (["seed=0,"], "empty value"),
        (["seed=1,1"], "named twice"),
        (["seed=0", "seed=1"], "seed=a,b"),
        (["run.dir=here"], "--out"),
        (["run.resume=x"], "start afresh"),
        (["evaluate=runs/x"], "suite.train evaluate"),
    ],
)
def test_a_mistake_in_a_token_is_a_config_error(tokens: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_tokens(tokens)


def test_the_grid_is_the_product_and_names_hold_the_varied_keys_only() -> None:
    axes = parse_tokens(["norm=layernorm,dyt", "seed=0,1", "lr=2"])
    cells = plan_cells(axes, resolve=resolve)
    assert [cell.name for cell in cells] == [
        "norm-layernorm_seed-0",
        "norm-layernorm_seed-1",
        "norm-dyt_seed-0",
        "norm-dyt_seed-1",
    ]
    assert cells[2].tokens == ("norm=dyt", "seed=0", "lr=2")


def test_cell_names_are_safe_distinct_and_stable() -> None:
    assert cell_name({}) == "run"
    assert cell_name({"optim.lr": "1e-3"}) == "optim.lr-1e-3"
    odd = [{"norm": "my.pkg:Norm"}, {"norm": "my.pkg/Norm"}, {"norm": "x" * 400}, {"norm": "../up"}]
    names = [cell_name(varied) for varied in odd]
    assert len(set(names)) == len(odd)
    assert all(len(name) < 170 and "/" not in name and ":" not in name for name in names)
    assert names == [cell_name(varied) for varied in odd]


def test_the_default_folder_depends_on_the_fixed_tokens_alone() -> None:
    def folder(*tokens: str) -> Path:
        axes = parse_tokens(tokens)
        return default_out(axes, cells=plan_cells(axes, resolve=resolve))

    first = folder("task=toy/one", "lr=2", "seed=0,1")
    assert first.parent == Path("runs/sweeps")
    assert first.name.startswith("toy-one-")
    assert folder("seed=0,1,2", "lr=2", "task=toy/one") == first
    assert folder("task=toy/one", "lr=3", "seed=0,1") != first
    assert folder("task=toy,b", "seed=0").name.startswith("tasks-")


def test_two_names_for_one_run_are_refused() -> None:
    with pytest.raises(ConfigError, match="same run"):
        plan_cells(parse_tokens(["lr=1e-3,0.001"]), resolve=resolve)


# -- before anything starts ----------------------------------------------------------------------


def test_every_bad_cell_is_named_and_nothing_is_written(
    sweep: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep("norm=dyt,dty,lyernorm", "seed=0,1") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "error: cell norm-dty_seed-0 and 1 more: norm=dty: no such norm",
        "error: cell norm-lyernorm_seed-0 and 1 more: norm=lyernorm: no such norm",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv", [[], ["--jobs", "0", "seed=0"], ["--job", "2", "seed=0"], ["-x"]])
def test_a_mistake_in_an_option_is_one_line_and_exit_2(
    argv: list[str], sweep: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(*argv) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_real_config_error_is_found_by_the_parent(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["norm=layernorm,dty", "seed=0,1"]) == 2
    assert "dty" in capsys.readouterr().err
    assert resolve_config(["norm=dyt", "trainer.accelerator=cpu"])["norm"]["name"] == "dyt"


def test_dry_run_prints_the_cells_and_writes_nothing(
    sweep: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep("norm=dyt,layernorm", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "norm-dyt  [to run]" in printed
    assert f"norm=layernorm run.dir={tmp_path}/out/norm-layernorm" in printed
    assert not (tmp_path / "out").exists()


def test_help_names_the_options_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("--jobs", "--out", "--dry-run", "exit codes", "130"))


def test_a_folder_that_cannot_be_made_is_exit_2(
    sweep: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("a file")
    assert sweep("seed=0,1") == 2
    assert "cannot be written" in capsys.readouterr().err


# -- running -------------------------------------------------------------------------------------


def test_one_failed_cell_does_not_end_the_rest_and_only_it_runs_again(
    sweep: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert sweep("do=ok,fail,diverge,silent") == 1
    printed = capsys.readouterr().out
    assert "the disk of the moon" in printed
    assert "exit code 3: loss is nan at step 7" in printed
    assert "RuntimeError: last words" in printed
    assert "1 done, 2 failed, 1 diverged" in printed
    assert "val/acc 0.5000" in printed
    assert "ETA" in printed
    before = (out / "do-ok" / "result.json").stat().st_mtime_ns

    assert sweep("do=ok,fail,diverge,silent") == 1
    assert (out / "do-ok" / "result.json").stat().st_mtime_ns == before
    assert "do-ok  done before, skipped" in capsys.readouterr().out
    assert read(out / "do-fail.failed-1" / "result.json")["status"] == "failed"
    assert (out / "do-silent.failed-1").is_dir()
    assert (out / "logs" / "do-fail.failed-1.log").read_text() == "a line of output\n"
    assert (out / "logs" / "do-fail.log").is_file()


def test_a_result_that_is_written_counts_though_the_process_ends_badly(
    sweep: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep("do=late") == 0
    assert "exit code 1 after its result was written" in capsys.readouterr().out
    assert sweep("do=late") == 0
    assert "done before, skipped" in capsys.readouterr().out


def test_a_larger_grid_keeps_the_finished_cells(sweep: Make, tmp_path: Path) -> None:
    assert sweep("seed=0,1") == 0
    before = (tmp_path / "out" / "seed-1" / "result.json").stat().st_mtime_ns
    assert sweep("seed=1,2") == 0
    assert (tmp_path / "out" / "seed-1" / "result.json").stat().st_mtime_ns == before
    assert (tmp_path / "out" / "seed-2" / "result.json").is_file()


def test_a_finished_run_of_another_configuration_is_never_moved(
    sweep: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep("seed=0,1", "lr=1") == 0
    assert sweep("seed=0,1", "lr=2") == 2
    assert "optim.lr 1 -> 2" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == [
        "logs",
        "seed-0",
        "seed-1",
    ]


def test_two_jobs_run_at_once_and_share_the_cores(
    sweep: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("suite.cells._cores", lambda: 6)
    assert sweep("seed=0,1,2", "sleep=0.4", "--jobs", "2") == 0
    runs = [read(tmp_path / "out" / f"seed-{k}" / "result.json") for k in range(3)]
    overlap = min(runs[0]["ended"], runs[1]["ended"]) - max(runs[0]["began"], runs[1]["began"])
    assert overlap > 0
    assert runs[2]["began"] > min(runs[0]["ended"], runs[1]["ended"])
    assert {run["threads"] for run in runs} == {"3"}


def test_the_users_own_thread_count_is_kept(
    sweep: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert sweep("seed=0") == 0
    assert read(tmp_path / "out" / "run" / "result.json")["threads"] == "5"


def test_what_a_cell_leaves_behind_is_ended_with_it(sweep: Make, tmp_path: Path) -> None:
    assert sweep("do=orphan") == 0
    pid = int((tmp_path / "out" / "run" / "child").read_text())
    wait_for(lambda: not is_alive(pid))


def test_an_error_of_the_sweep_itself_leaves_no_child(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def popen(*words: Any, **options: Any) -> subprocess.Popen[bytes]:
        if started:
            raise OSError("no more processes")
        started.append(real(*words, **options))
        return started[0]

    real = subprocess.Popen
    monkeypatch.setattr("suite.cells.subprocess.Popen", popen)
    cells = [Cell(name, ("do=hang",), {}) for name in ("a", "b")]
    with pytest.raises(OSError, match="no more processes"):
        run_cells(cells, out=tmp_path / "out", command=command, jobs=2)
    assert started[0].returncode == -signal.SIGKILL


# -- stopped -------------------------------------------------------------------------------------


def start_sweep(tmp_path: Path, *argv: str, grace: float = 30.0) -> subprocess.Popen[str]:
    """A sweep of the fake in a process of its own, as a shell would start it."""
    (tmp_path / "fake_train.py").write_text(FAKE_TRAIN)
    driver = tmp_path / "driver.py"
    driver.write_text(
        textwrap.dedent(
            f"""
            import functools, sys
            sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
            import suite.sweep
            from test_sweep import resolve
            suite.sweep.run_cells = functools.partial(suite.sweep.run_cells, grace={grace})
            fake = [sys.executable, "-S", {str(tmp_path / "fake_train.py")!r}]
            sys.exit(suite.sweep.main(sys.argv[1:], command=fake, resolve=resolve))
            """
        )
    )
    return subprocess.Popen(
        [sys.executable, str(driver), *argv, "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_ends_its_children_and_goes_on_later(
    number: signal.Signals, tmp_path: Path, sweep: Make
) -> None:
    out = tmp_path / "out"
    process = start_sweep(tmp_path, "do=ok,hang,fail", "seed=0")
    try:
        wait_for((out / "do-hang" / "here").is_file)
        child = int((out / "do-hang" / "here").read_text())
        process.send_signal(number)
        printed, _ = process.communicate(timeout=15)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert not is_alive(child)
    assert read(out / "do-hang" / "result.json")["status"] == "interrupted"
    assert not (out / "do-fail").exists()
    assert "1 done, 1 interrupted, 1 not started" in printed
    before = (out / "do-ok" / "result.json").stat().st_mtime_ns

    (tmp_path / "fake_train.py").write_text(FAKE_TRAIN.replace('"hang", ', ""))
    assert sweep("do=ok,hang", "seed=0") == 0
    assert (out / "do-ok" / "result.json").stat().st_mtime_ns == before
    assert (out / "do-hang.failed-1").is_dir()


def test_a_child_that_ignores_the_interrupt_is_killed_after_the_grace(tmp_path: Path) -> None:
    process = start_sweep(tmp_path, "do=stubborn", grace=0.2)
    try:
        wait_for((tmp_path / "out" / "run" / "here").is_file)
        child = int((tmp_path / "out" / "run" / "here").read_text())
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=15)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert not is_alive(child)


def test_a_second_sweep_in_the_folder_is_refused_even_by_orphans(
    tmp_path: Path, sweep: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start_sweep(tmp_path, "do=hang")
    child = 0
    try:
        wait_for((tmp_path / "out" / "run" / "here").is_file)
        child = int((tmp_path / "out" / "run" / "here").read_text())
        assert sweep("seed=0,1") == 2
        assert f"(process {process.pid})" in capsys.readouterr().err
        process.kill()
        process.wait()
        assert is_alive(child)
        assert sweep("seed=0,1") == 2
    finally:
        process.kill()
        if child:
            os.kill(child, signal.SIGKILL)
        process.communicate()
    wait_for(lambda: not is_alive(child))
    assert (tmp_path / "out" / ".sweep.lock").is_file(), "left behind, and of a dead process"
    assert sweep("seed=0,1") == 0


# -- small things --------------------------------------------------------------------------------


def test_the_exit_code_follows_the_worst_cell() -> None:
    cell = Cell("a", (), {})
    done, failed = Outcome(cell, "done"), Outcome(cell, "failed")
    stopped = Outcome(cell, "interrupted", stopped=True)
    assert exit_code([done, Outcome(cell, "skipped")]) == 0
    assert exit_code([done, failed]) == 1
    assert exit_code([done, Outcome(cell, "diverged")]) == 1
    assert exit_code([failed, stopped]) == 130


def test_durations_are_short() -> None:
    assert [show_seconds(s) for s in (4.2, 62.0, 3725.0)] == ["4s", "1m02s", "1h02m"]
