"""`python -m suite.bench reference`: both sides do the same, what it prints, what it refuses."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import suite.reference
import tasks.speech.reference
from suite import bench
from suite.config import load
from suite.errors import ConfigError
from suite.reference import Pair, added_by, alone, check_losses, measure

SMALL = [
    "task=speech/pretrain",
    "model=wav2vec2_base",
    "model.conv_dim=16",
    "model.dim=24",
    "model.depth=2",
    "model.heads=2",
    "model.hidden_dim=32",
    "model.pos_kernel=8",
    "model.pos_groups=2",
    "model.codes=6",
    "model.code_dim=8",
    "task.negatives=7",
    "trainer.accelerator=cpu",
]
SIZE: dict[str, Any] = {"rows": 3, "seconds": 1.0}
PRE_NORM = ["model.pre_norm=true"]
LAYER_NORM = ["model.extractor=layer_norm", "model.conv_bias=true", *PRE_NORM]


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suite.reference, "ROUND_SECONDS", 0.02)
    monkeypatch.setattr(suite.reference, "WARMUP", 1)
    torch.set_num_threads(1)


@pytest.fixture
def _no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        suite.reference, "alone", lambda side, *_, **__: {"ours": 50, "theirs": 100}[side]
    )


def pair(*tokens: str) -> Pair:
    pytest.importorskip("transformers")
    config = load([*SMALL, "norm=layernorm", *tokens]).settled
    return Pair(suite.reference.reference_of("speech/pretrain").settle(config), **SIZE)


@pytest.mark.parametrize("tokens", [[], PRE_NORM, LAYER_NORM], ids=["post", "pre", "layer_norm"])
def test_both_sides_have_the_same_loss_for_the_same_draws(tokens: list[str]) -> None:
    ours, theirs = pair(*tokens).losses()
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours > 0.5


def test_the_reference_draws_its_own_noise_but_for_the_check() -> None:
    torchs = nn.functional.gumbel_softmax
    both = pair()
    theirs = both.reference.loss(both.model, both.module, both.batch)
    same = both.losses()[1]
    assert nn.functional.gumbel_softmax is torchs
    with torch.no_grad():
        assert len({same, float(theirs()), float(theirs())}) == 3


def test_the_batch_is_recorded_speech_of_equal_lengths() -> None:
    batch = pair().batch
    assert batch["audio"].shape == (3, 16000)
    assert batch["length"].tolist() == [16000] * 3
    assert bool((batch["audio"].square().mean(dim=1) > 1e-6).all())
    assert len({float(row.sum()) for row in batch["audio"]}) == 3


def test_both_sides_step_with_one_optimizer_over_as_many_parameters() -> None:
    both = pair()
    both.to(torch.device("cpu"))
    ours, theirs = both.sides["ours"], both.sides["theirs"]
    assert type(ours.optimizer) is type(theirs.optimizer)
    for mine, other in zip(ours.optimizer.param_groups, theirs.optimizer.param_groups, strict=True):
        assert mine["weight_decay"] == other["weight_decay"]
    assert sum(p.numel() for p in ours.model.parameters()) == sum(
        p.numel() for p in theirs.model.parameters()
    )
    for side in (ours, theirs):
        side.step()
        assert side.model.training
        assert all(p.grad is not None for p in side.model.parameters())


def test_mixed_precision_runs_both_sides_under_autocast() -> None:
    both = pair("trainer.precision=bf16-mixed")
    both.to(torch.device("cpu"))
    seen: dict[str, torch.dtype] = {}

    def look(side: str) -> Any:
        return lambda module, given, output: seen.update({side: output.dtype})

    both.module.model.final_proj.register_forward_hook(look("ours"))
    both.model.project_hid.register_forward_hook(look("theirs"))
    for side in both.sides.values():
        side.step()
    assert seen == {"ours": torch.bfloat16, "theirs": torch.bfloat16}


def test_losses_that_differ_end_it() -> None:
    check_losses(5.0, 5.001, name="theirs")
    with pytest.raises(suite.reference.DivergedError, match="not compute the same"):
        check_losses(5.0, 5.1, name="theirs")


@pytest.mark.usefixtures("_no_processes")
def test_json_holds_every_round_and_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    assert bench.main(["reference", *SMALL, "rows=3", "seconds=1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    ratios = sorted(r["ours"] / r["theirs"] for r in found["rounds"])
    assert len(ratios) == 5
    assert found["ratio"] == {"median": ratios[2], "min": ratios[0], "max": ratios[4]}
    assert min(found["ours_ms"], found["theirs_ms"]) > 0
    assert found["memory"]["ratio"] == 0.5
    assert found["loss"]["ours"] == pytest.approx(found["loss"]["theirs"], rel=1e-5)
    assert transformers.__version__ in found["reference"]
    assert (found["bench"], found["norm"], found["device"]) == ("reference", "layernorm", "cpu")
    assert (found["rows"], found["seconds"], found["precision"]) == (3, 1.0, "32-true")
    assert {"hardware", "versions", "steps", "warmup", "notes", "threads"} <= set(found)
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.usefixtures("_no_processes")
def test_text_says_ratios_sides_and_how_they_differ() -> None:
    pytest.importorskip("transformers")
    config = load([*SMALL, "norm=layernorm"]).settled
    text = measure(config, rounds=2, **SIZE).to_text()
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[:6]] == [
        *("step", "ours", "theirs", "ratio", "memory", "check")
    ]
    assert "3 x 1 s, cpu, 1 threads, 32-true" in lines[0]
    assert "median of 2 rounds" in lines[3]
    assert "0.500 of theirs" in lines[4]
    assert all(line.startswith("note") for line in lines[6:])
    assert "ready-made" in text


def test_memory_is_what_the_steps_add_to_a_process_of_its_own() -> None:
    """At least what the first convolution gives, which is most of it at this size."""
    pytest.importorskip("transformers")
    wider = [t.replace("conv_dim=16", "conv_dim=64") for t in SMALL]
    settled = load([*wider, "norm=layernorm"]).settled
    config = suite.reference.reference_of("speech/pretrain").settle(settled)
    audio = {"rows": 4, "seconds": 2.0}
    convolved = 4 * 2 * 16000 // 5 * 64 * 4  # bytes of what the first one gives
    assert convolved < alone("ours", config, **audio) < 100 * convolved


def test_a_process_that_is_ended_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pool:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None: ...

        def submit(self, work: Any, *_: Any) -> Any:
            assert work is added_by
            raise suite.reference.BrokenProcessPool

    monkeypatch.setattr(suite.reference, "ProcessPoolExecutor", Pool)
    with pytest.raises(suite.reference.DataError, match="take fewer rows or seconds"):
        alone("ours", load(SMALL).settled, rows=2, seconds=4.0)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (["task=vision/mae"], "task=speech/pretrain"),
        (["rounds=4"], "rounds=4"),
        (["rows=0"], "rows=0"),
        (["seconds=0.1"], "seconds=0.1"),
        (["seconds=long"], "seconds=long"),
        (["seconds=nan"], "seconds=nan"),
        (["seconds=2", "seconds=3"], "twice"),
        ([*SMALL, "rows=100", "seconds=60"], "take fewer rows or seconds"),
        ([*SMALL, "--dry-run"], "dry-run"),
        ([*SMALL, "norm=dyt"], "norm=dyt: transformers"),
        ([*SMALL, "model.keep_sites=[embed]"], "model.keep_sites"),
        ([*SMALL, "trainer.precision=64-true"], "trainer.precision=64-true"),
        ([*SMALL, "trainer.accumulate_grad_batches=2"], "trainer.accumulate_grad_batches"),
        ([*SMALL, "run.compile=true"], "run.compile"),
    ],
)
def test_mistakes_are_one_line(
    tokens: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    assert bench.main(["reference", *tokens]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="pip install transformers"):
        measure(load([*SMALL, "norm=layernorm"]).settled, rounds=2, **SIZE)


def test_the_task_is_there_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "PretrainReference" in runpy.run_path(str(tasks.speech.reference.__file__))
