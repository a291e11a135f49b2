"""`suite.bench safety`: its mistakes, what it measures, that only guards are taken out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from suite import bench
from suite.benches import safety, safety_saves
from suite.benches.safety import Turns, chosen, parse
from suite.benches.safety_saves import SIDES, added_by, checkpoint
from suite.nonfinite import NonFiniteGuard
from suite.saving import problem, size_of

torch.set_num_threads(1)

TINY = [
    *("parameters=1000", "steps=10", "rounds=1", "device=cpu"),
    *("model.dim=16", "model.depth=1", "model.heads=1"),
]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("parameters=0", "parameters=0: must be a whole number, 1 or more"),
        ("steps=9", "steps=9: must be a whole number, 10 or more"),
        ("rounds=x", "rounds=x: must be a whole number"),
        ("device=tpu", "device=tpu: must be cpu"),
        ("trainer.accelerator=cpu", "takes device=cpu or cuda"),
        ("trainer.devices=2", "trainer.devices"),
        ("--fast", "--fast"),
    ],
)
def test_a_mistake_is_one_line(token: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    cpu = [] if token.startswith("device=") else ["device=cpu"]
    assert bench.main(["safety", *cpu, token]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("error: ")
    assert said in captured.err


def test_help_names_every_key_and_switch(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["safety", "--help"]) == 0
    text = capsys.readouterr().out
    for word in (*safety.KEYS, *safety.SWITCHES):
        assert word in text


def test_a_task_brings_its_own_sizes() -> None:
    assert parse(["device=cpu"]).config.model.dim == 32
    assert parse(["device=cpu", "model.dim=16", "model.heads=1"]).config.model.dim == 16
    found = parse(["device=cpu", "task=language/lm", "run.nonfinite=skip"]).config
    assert (found.task_name, found.run.nonfinite) == ("language/lm", "skip")


class Usage(NamedTuple):
    free: int


def test_a_disk_without_room_is_said_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(80_000))
    assert bench.main(["safety", *TINY]) == 2
    assert "parameters=1000: needs 0.0 GB in the current folder" in capsys.readouterr().err


def test_the_checkpoint_has_the_size_that_is_said() -> None:
    assert size_of(checkpoint(1000, device="cpu")) == 12 * 1000
    assert size_of(checkpoint(safety_saves.LARGEST + 1, device="cpu")) == 12 * (
        safety_saves.LARGEST + 1
    )


@pytest.mark.parametrize("side", SIDES)
def test_every_side_saves_the_same_content(side: str, tmp_path: Path) -> None:
    content, path = checkpoint(1000, device="cpu"), tmp_path / "checkpoints" / "last.ckpt"
    path.parent.mkdir()
    for _ in range(2):
        SIDES[side](content, path)
        found = torch.load(path, weights_only=True)
        assert problem(path) is None
        torch.testing.assert_close(found["state_dict"], content["state_dict"], rtol=0, atol=0)
    assert path.with_name("last.ckpt.json").exists() == side.startswith("suite")


def test_only_guards_are_taken_out() -> None:
    turns, guard = Turns([], device=torch.device("cpu")), NonFiniteGuard()
    assert chosen([turns, guard], guarded=True) == [turns, guard]
    assert chosen([turns, guard], guarded=False) == [turns]


@pytest.fixture
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is measured in here: five processes would take longer than all else."""

    def here(parameters: int, folder: Path, *, device: str) -> dict[str, int]:
        return {side: added_by(side, parameters, device, folder) for side in SIDES}

    monkeypatch.setattr(safety, "memory_of", here)


@pytest.mark.usefixtures("_one_process")
@pytest.mark.timeout(120)
def test_both_parts_are_measured_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["safety", *TINY, "--json", "--save"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (found["bench"], found["bytes"]) == ("safety", 12_000)
    assert [f["side"] for f in found["saving"]] == list(SIDES)
    for side in found["saving"]:
        assert len(side["seconds"]) == 1
        assert side["min"] > 0
        assert side["added_bytes"] >= 0
    ratio = found["saving"][0]["ratio"]
    assert ratio["to"] == "torch.save"
    expected = found["saving"][0]["median"] / found["saving"][1]["median"]
    assert ratio["median"] == pytest.approx(expected)
    guarding = found["guarding"]
    assert {"NonFiniteGuard", "StopTogether"} <= set(guarding["guards"])
    ((guarded, plain),) = guarding["pairs"][0]
    assert guarding["cost_us"]["median"] == pytest.approx(1e6 * (guarded - plain))
    assert guarding["share_of_50_ms"] == pytest.approx((guarded - plain) / 0.05)
    (page,) = tmp_path.glob("benchmarks/*/safety.md")
    assert "| suite | " in page.read_text()
    assert "us (" in page.read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"benchmarks"}
