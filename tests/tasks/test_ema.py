"""What a run with optim.ema_decay averages, measures, saves and resumes, on the embedded images."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

import suite.build
from suite import train as entry
from suite.ema import WeightEMA

SHORT = [
    "data.batch_size=32",
    "trainer.limit_train_batches=4",
    "trainer.limit_val_batches=4",
    "trainer.limit_test_batches=2",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "run.tensorboard=false",
    "run.norm_stats=false",
    "model.depth=2",
    "model.dropout=0.1",
    "optim.lr=0.01",
    "optim.ema_decay=0.8",
]


def main(tokens: list[str]) -> int:
    """suite.train's main; a token that comes later replaces an earlier one of the same key."""
    return entry.main(list({t.partition("=")[0]: t for t in tokens}.values()))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SUITE_RUN_DIR", raising=False)
    torch.set_num_threads(1)


def with_callback(monkeypatch: pytest.MonkeyPatch, callback: Callback) -> None:
    whole = suite.build.build_callbacks
    monkeypatch.setattr("suite.run.build_callbacks", lambda *a, **k: [*whole(*a, **k), callback])


def saved(run: str, name: str = "last") -> dict[str, Any]:
    return torch.load(Path(run) / "checkpoints" / f"{name}.ckpt", weights_only=True)


def result(run: str) -> dict[str, Any]:
    return json.loads((Path(run) / "result.json").read_text())


def validations(run: str) -> dict[int, float]:
    """Step -> val/loss of each validation."""
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["val/loss"] for r in rows if "val/loss" in r}


def evaluated(capsys: pytest.CaptureFixture[str], file: str, split: str) -> dict[str, float]:
    capsys.readouterr()
    assert main([f"evaluate={file}", f"run.eval_split={split}"]) == 0
    return json.loads(capsys.readouterr().out)


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    for key in ("state_dict", "current_model_state"):
        assert a[key].keys() == b[key].keys()
        assert all(torch.equal(a[key][k], b[key][k]) for k in a[key])


class Published(Callback):
    """timm's ModelEma, which the published recipes use, beside ours."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, torch.Tensor]] = {}

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        from timm.utils import ModelEma

        self.theirs, self.step = ModelEma(module.model, decay=0.8), 0

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            self.theirs.update(module.model)
            state = self.theirs.ema.state_dict()
            self.states[self.step] = {k: v.clone() for k, v in state.items()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_is_that_of_the_published_code_with_buffers_and_accumulation(
    monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    published = Published()
    with_callback(monkeypatch, published)
    more = [f"trainer.accumulate_grad_batches={accumulate}", "norm=batchnorm", "run.dir=a"]
    assert main([*SHORT, *more]) == 0
    for name in ("last", "best"):
        held = saved("a", name)
        theirs = published.states[held["global_step"]]
        averages = {k.removeprefix("model."): v for k, v in held["state_dict"].items()}
        assert averages.keys() == theirs.keys()
        for key, value in averages.items():
            if value.is_floating_point():  # theirs leaves the counter of batches at 0
                torch.testing.assert_close(value, theirs[key], rtol=1e-5, atol=1e-6)
    assert any(k.endswith("running_var") for k in averages)


def test_validation_and_best_are_of_the_average(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHORT, "run.dir=a"]) == 0
    found, measured = result("a"), validations("a")
    again = evaluated(capsys, "a", "val")
    assert again["val/acc"] == pytest.approx(found["primary"]["best"])
    assert again["val/loss"] == pytest.approx(measured[found["primary"]["best_step"]], rel=1e-5)
    last = evaluated(capsys, "a/checkpoints/last.ckpt", "val")["val/loss"]
    assert last == pytest.approx(measured[8], rel=1e-5)
    content = saved("a")
    torch.save({**content, "state_dict": content["current_model_state"]}, "a/current.ckpt")
    assert abs(evaluated(capsys, "a/current.ckpt", "val")["val/loss"] - last) > 1e-3


def test_the_test_split_is_measured_with_the_average_of_the_best_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*SHORT, "run.dir=a"]) == 0
    again = evaluated(capsys, "a/checkpoints/best.ckpt", "test")
    for key in ("test/acc", "test/loss"):
        assert again[key] == pytest.approx(result("a")["metrics"][key], rel=1e-5)
    assert saved("a", "best")["global_step"] == result("a")["primary"]["best_step"]


def test_without_validation_the_average_of_the_last_step_is_tested(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*SHORT, "trainer.limit_val_batches=0", "run.dir=a"]) == 0
    again = evaluated(capsys, "a/checkpoints/last.ckpt", "test")
    assert again["test/loss"] == pytest.approx(result("a")["metrics"]["test/loss"], rel=1e-5)


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("pulled the plug")


@pytest.mark.parametrize("crash", [3, 6])
def test_weights_and_average_resume_bit_equal(monkeypatch: pytest.MonkeyPatch, crash: int) -> None:
    """Epochs have 4 steps; last.ckpt is written every 2: before any validation, and after one."""
    common = [*SHORT, "run.save_every_n_steps=2", "norm=batchnorm"]
    assert main([*common, "run.dir=whole"]) == 0
    with monkeypatch.context() as patch:
        with_callback(patch, StopAt(crash))
        assert main([*common, "run.dir=cut"]) == 1
    assert main(["run.resume=cut"]) == 0
    assert_same(saved("whole"), saved("cut"))
    assert result("cut")["metrics"] == result("whole")["metrics"]
    assert validations("cut") == validations("whole")


@pytest.mark.parametrize("file", ["last", "best"])
def test_a_run_that_ended_in_mid_epoch_goes_on_from_its_own_weights(file: str) -> None:
    """Its last validation comes when training is over: best.ckpt, too, holds both copies."""
    common = [*SHORT, "optim.schedule=constant", "optim.warmup_fraction=null"]
    common += ["trainer.max_epochs=null", "run.save_every_n_steps=1"]
    assert main([*common, "trainer.max_steps=8", "run.dir=whole"]) == 0
    assert main([*common, "trainer.max_steps=3", "run.dir=cut"]) == 0
    assert saved("cut", "best")["global_step"] == 3
    assert_same(saved("cut", "best"), saved("cut", "last"))
    resume = ["run.resume=cut"] if file == "last" else ["run.resume=cut/checkpoints/best.ckpt"]
    assert main([*resume, "trainer.max_steps=8"]) == 0
    assert_same(saved("whole"), saved("cut"))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2, bias=False)
        self.b = nn.Linear(2, 2, bias=False)
        self.b.weight = self.a.weight


def trainer(step: int = 0) -> Any:
    return SimpleNamespace(global_step=step, state=SimpleNamespace(fn="fit"))


def test_tied_weights_are_averaged_once_and_saved_under_every_name() -> None:
    ema, model = WeightEMA(0.5), Tied()
    at: Any = model
    first = model.a.weight.detach().clone()
    ema.setup(trainer(), at, "fit")
    ema.on_fit_start(trainer(), at)
    ema.on_train_start(trainer(), at)
    with torch.no_grad():
        model.a.weight.add_(2.0)
    ema.on_train_batch_end(trainer(1), at)
    ema.on_validation_epoch_start(trainer(1), at)
    torch.testing.assert_close(model.b.weight.detach(), first + 1.0)
    ema.on_validation_epoch_end(trainer(1), at)
    torch.testing.assert_close(model.b.weight.detach(), first + 2.0)
    checkpoint: dict[str, Any] = {"state_dict": model.state_dict()}
    ema.on_save_checkpoint(trainer(1), at, checkpoint)
    for key in ("a.weight", "b.weight"):
        torch.testing.assert_close(checkpoint["state_dict"][key], first + 1.0)
        torch.testing.assert_close(checkpoint["current_model_state"][key], first + 2.0)


def test_the_average_follows_the_model_to_its_device() -> None:
    ema = WeightEMA(0.5)
    model: Any = nn.Linear(2, 2)
    ema.setup(trainer(), model, "fit")
    ema.on_fit_start(trainer(), model.to("meta"))
    assert {t.device.type for t in ema.held.values()} == {"meta"}
