"""`python -m suite.bench`: what it prints, that both sides do equal work, what it refuses."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rich
import torch

from suite import bench

TINY = [
    "task=vision/classify",
    "model.dim=16",
    "model.depth=1",
    "model.heads=1",
    "data.batch_size=8",
    "trainer.accelerator=cpu",
]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


def error_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused command leaves."""
    assert bench.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


# SGD for clipping: its rounding differs, and Adam blows up the gradient of a key bias, which is
# zero but for rounding.
KINDS = {"default": [], "clipped": ["optim.name=sgd", "trainer.gradient_clip_val=0.05"]}


@pytest.fixture(scope="module", params=list(KINDS))
def pair(request: pytest.FixtureRequest) -> Any:
    """Both sides of a tiny model."""
    from suite.build import quiet
    from suite.config import load
    from suite.steptime import Pair

    quiet()
    tokens = [*TINY, *KINDS[request.param], "trainer.log_every_n_steps=2"]
    return Pair(load(tokens).settled)


def test_both_sides_end_with_the_same_weights_after_the_same_steps(pair: Any) -> None:
    for plain_first in (False, True):  # the second round starts afresh
        found = pair.round([3, 2], plain_first=plain_first)
        ours, plain = pair.parts.module.model.state_dict(), pair.plain.model.state_dict()
        assert [k for k, v in ours.items() if torch.equal(v, pair.start[k])] == []
        for name, value in ours.items():
            torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-6)
        assert found.gap < 1e-5


def test_our_side_is_the_stack_that_a_run_has(pair: Any) -> None:
    console = rich.get_console()
    pair.round([2], plain_first=False)
    assert {
        *("NonFiniteGuard", "Throughput", "PrimaryTracker", "NormStatistics", "SuiteProgressBar"),
        *("ModelCheckpoint", "JsonlLogger", "TensorBoardLogger", "BackendProof"),
        *("DivergenceWatch", "StopTogether"),
    } == set(pair.parts_on)
    assert rich.get_console() is console
    assert not isinstance(console.file, io.TextIOWrapper) or not console.file.closed


def test_json_holds_every_round_and_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["overhead", *TINY, "steps=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    ratios = sorted(r["ours"] / r["plain"] for r in found["rounds"])
    assert len(ratios) == 5
    assert found["ratio"] == {"median": ratios[2], "min": ratios[0], "max": ratios[4]}
    assert min(found["ours_ms"], found["plain_ms"]) > 0
    assert found["weight_gap"] < 1e-5
    assert (found["bench"], found["model"], found["norm"]) == ("overhead", "vit_fmnist", "dyt")
    assert (found["steps"], found["log_every_n_steps"], found["batch_size"]) == (2, 2, 8)
    assert list(Path.cwd().iterdir()) == []


def test_text_says_ratio_times_and_what_was_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["overhead", *TINY, "steps=1", "norm=layernorm"]) == 0
    captured = capsys.readouterr()
    lines = {line.split()[0]: line for line in captured.out.splitlines()}
    assert list(lines) == ["step", "ours", "plain", "ratio", "with", "check"]
    assert "layernorm, batch 8, cpu" in lines["step"]
    assert "median of 5 rounds of 1 steps" in lines["ratio"]
    assert "ms a step" in lines["ours"]
    assert "SuiteProgressBar" in lines["with"]
    assert captured.err.count("round ") == 5


@pytest.mark.parametrize(
    ("step_ms", "every", "available", "steps"),
    [(50, 39, 74, 39), (50, 10, 74, 20), (1, 50, 5000, 1000), (1, 50, 120, 100), (50, 39, 30, 30)],
)
def test_a_timing_holds_whole_logging_windows(
    step_ms: float, every: int, available: int, steps: int
) -> None:
    from suite.steptime import choose_steps

    assert choose_steps(step_ms / 1e3, every=every, available=available) == steps


def test_turns_are_of_nearly_equal_length() -> None:
    from suite.steptime import cut

    assert cut(39, size=10) == [10, 10, 10, 9]
    assert cut(39, size=100) == [39]
    assert cut(3, size=1) == [1, 1, 1]


def test_both_sides_take_the_same_number_of_timed_steps() -> None:
    from suite.steptime import WARMUP, Turns

    for plain_first in (False, True):
        taken: list[str] = []
        plain = (taken.append("plain") for _ in range(100))
        turns = Turns(plain, slices=[2, 1], plain_first=plain_first, device=torch.device("cpu"))
        for _ in range(WARMUP + 3):
            taken.append("ours")
            turns.on_train_batch_end(SimpleNamespace(progress_bar_callback=None))
        order = "".join(name[0] for name in taken[2 * WARMUP :])
        assert order == ("ppoopo" if plain_first else "ooppop")
        assert turns.ours_seconds > 0
        assert turns.plain_seconds > 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "overhead"),
        (["overheadd"], "Did you mean command=overhead?"),
        (["overhead", "rounds=4"], "rounds=4"),
        (["overhead", "rounds=many"], "rounds=many"),
        (["overhead", "steps=0"], "steps=0"),
        (["overhead", "rounds=5", "rounds=6"], "twice"),
        (["overhead", "--dry-run"], "dry-run"),
        (["overhead", "norm=dytt"], "norm=dytt"),
        (["overhead", "--steps=3"], "write steps=3"),
        (["overhead", "trainer.accumulate_grad_batches=2"], "trainer.accumulate_grad_batches"),
        (["overhead", "optim.ema_decay=0.9"], "optim.ema_decay"),
        (["overhead", "trainer.precision=64-true"], "trainer.precision=64-true"),
        (["overhead", "trainer.accelerator=cpu", "data.batch_size=5000"], "data.batch_size=5000"),
        (["overhead", "trainer.accelerator=cpu", "steps=1000"], "steps=1000"),
    ],
)
def test_mistakes_are_one_line(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in error_of(argv, capsys)


def test_help_lists_the_commands_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from suite import bench; code = bench.main(sys.argv[1:]); "
        "assert not {'torch', 'lightning', 'omegaconf'} & set(sys.modules); sys.exit(code)"
    )
    for argv in (["--help"], ["overhead", "--help"], ["step", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False,
            cwd=Path(bench.__file__).parents[1],
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "python -m suite.bench" in done.stdout
        assert "a training step" in done.stdout
