"""scripts/measure_gpu.py: its commands are valid, and one job's failure, limit or success is its
own."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from suite.bench import COMMANDS, split_tokens

FILE = Path(__file__).parents[2] / "scripts" / "measure_gpu.py"


def load_script() -> Any:
    """It is in no package."""
    spec = importlib.util.spec_from_file_location(FILE.stem, FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[FILE.stem] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


script = load_script()


def job(name: str, code: str, *, takes: int = 0, limit: int = 20) -> Any:
    words = ("-c", code)
    return script.Job(name, words, words, takes, limit)


def measured(chosen: list[Any], folder: Path, *words: str) -> dict[str, Any]:
    options = script.parse(words)
    return dict(script.measure(chosen, options, folder=folder))


def test_every_bench_command_is_one_that_there_is() -> None:
    used = {j.words[2] for j in script.jobs() if j.words[:2] == ("-m", "suite.bench")}
    assert used == {"norms", "llama", "step", "fusion"}
    assert used <= set(COMMANDS)


def test_names_are_distinct_and_limits_are_not_below_what_a_job_takes() -> None:
    every = script.jobs()
    assert len({j.name for j in every}) == len(every)
    assert all(0 < j.takes <= j.limit for j in every)
    assert [j.name for j in every][:3] == ["tests", "norms", "llama"]


def test_the_llama_commands_are_valid() -> None:
    from tasks.language.llama_bench import parse

    own = next(j for j in script.jobs() if j.name == "llama")
    for words in (own.words, own.small):
        assert parse([*(w for w in words[3:] if not w.startswith("--"))]).rounds >= 1


@pytest.mark.parametrize("name", [j.name for j in script.jobs() if j.name.startswith("step-")])
def test_the_step_commands_are_valid(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from suite.benches.step import plan

    monkeypatch.chdir(tmp_path)
    own = next(j for j in script.jobs() if j.name == name)
    for words, cells in ((own.words, 8), (own.small, 2)):
        tokens = [w.replace("accelerator=gpu", "accelerator=cpu") for w in words[3:]]
        _, rest = split_tokens(tokens, own=("rounds", "steps", "seconds"))
        assert len(plan([token for token in rest if not token.startswith("--")])) == cells


def test_a_job_that_fails_or_hangs_ends_alone_and_all_is_recorded(tmp_path: Path) -> None:
    chosen = [
        job("bad", "print('oh no'); raise SystemExit(3)"),
        job("slow", "import time; print('begun', flush=True); time.sleep(60)", limit=1),
        job("good", "print('first'); print('last')"),
    ]
    folder, out = tmp_path / "device", tmp_path / "out"
    record = measured(chosen, folder, "--out", str(out))
    assert [record[j.name]["exit"] for j in chosen] == [3, 124, 0]
    assert [record[j.name]["said"] for j in chosen] == ["oh no", "ended after 1 s", "last"]
    assert "begun" in (folder / "logs" / "slow.log").read_text()
    for kept in (folder, out / "device"):
        assert json.loads((kept / "jobs.json").read_text()) == record
    shown = script.table(chosen, record).splitlines()
    assert [line.split()[:2] for line in shown[1:]] == [
        ["bad", "3"],
        ["slow", "124"],
        ["good", "0"],
    ]


def test_what_is_done_is_not_run_again_unless_asked_for(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'a').write('x')"
    for words, times in (((), 1), ((), 1), (("--small",), 2), (("--again",), 3)):
        measured([job("once", code)], tmp_path / "device", *words)
        assert mark.read_text() == "x" * times


def test_what_would_not_fit_into_the_minutes_is_skipped(tmp_path: Path) -> None:
    chosen = [job("long", "print(1)", takes=100), job("short", "print(2)", takes=5)]
    record = measured(chosen, tmp_path, "--minutes", "1")
    assert record["long"] == {"exit": None, "said": "skipped: 60 s left, needs 100"}
    assert record["short"]["exit"] == 0


def test_a_dry_run_prints_the_commands_and_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert script.main(["--dry-run", "--only", "norms,fusion"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        "python -m suite.bench norms --save",
        "python -m suite.bench fusion --save",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--only", "norm"], ["--minutes", "0"], ["--fast"]])
def test_a_mistake_ends_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        script.main(words)
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_without_a_gpu_it_says_how_to_run_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert script.main([]) == 2
    assert "--small runs on a CPU" in capsys.readouterr().err
