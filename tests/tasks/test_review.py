"""What goes wrong around a run: odd ends, damaged files, moved folders, empty ranks."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

import suite.build
from suite import train as entry
from suite.config import load
from suite.module import SuiteModule

SHORT = [
    "data.batch_size=32",
    "trainer.limit_train_batches=7",
    "trainer.limit_val_batches=2",
    "trainer.limit_test_batches=2",
    "trainer.max_epochs=3",
    "trainer.log_every_n_steps=2",
    "trainer.accelerator=cpu",
    "run.tensorboard=false",
]
CONSTANT = ["optim.schedule=constant", "optim.warmup_fraction=null"]


def main(tokens: list[str]) -> int:
    """suite.train's main; a token that comes later replaces an earlier one of the same key."""
    last = {t.partition("=")[0]: t for t in tokens}
    return entry.main(list(last.values()))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SUITE_RUN_DIR", raising=False)
    torch.set_num_threads(1)


def checkpoint(run: str, name: str = "last") -> dict[str, Any]:
    return torch.load(Path(run) / "checkpoints" / f"{name}.ckpt", weights_only=True)


def rows(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def result(run: str) -> dict[str, Any]:
    return json.loads((Path(run) / "result.json").read_text())


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert len(lines) == 1
    return lines[0]


def with_callback(monkeypatch: pytest.MonkeyPatch, callback: Callback) -> None:
    whole = suite.build.build_callbacks
    monkeypatch.setattr("suite.run.build_callbacks", lambda *a, **k: [*whole(*a, **k), callback])


class StopAfter(Callback):
    """Fails after so many micro-batches, as a crash would."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.batches:
            raise RuntimeError("pulled the plug")


def measure_by_step(monkeypatch: pytest.MonkeyPatch, accuracy: dict[int, float]) -> None:
    """val/acc is what `accuracy` says for the step."""
    log = SuiteModule.log_dict

    def forced(self: Any, values: dict[str, Any], **kwargs: Any) -> None:
        if "val/acc" in values:
            forged = accuracy.get(self.trainer.global_step, 0.1)
            values = {**values, "val/acc": torch.tensor(forged)}
        log(self, values, **kwargs)

    monkeypatch.setattr(SuiteModule, "log_dict", forced)


def assert_the_file_is_the_best_on_record(run: str, *, step: int) -> None:
    assert result(run)["primary"]["best_step"] == step
    assert checkpoint(run, "best")["global_step"] == step


# -- resuming
# ---------------------------------------------------------------------------------


def test_a_run_that_was_cut_in_mid_epoch_still_takes_all_its_steps() -> None:
    """Lightning counts the cut epoch as a whole one and would end after 17 of 21 steps."""
    assert main([*SHORT, *CONSTANT, "run.dir=whole"]) == 0
    assert main([*SHORT, *CONSTANT, "run.dir=cut", "trainer.max_steps=3"]) == 0
    assert main(["run.resume=cut", "trainer.max_steps=5"]) == 0
    assert main(["run.resume=cut", "trainer.max_steps=-1"]) == 0
    assert result("cut")["steps"] == 21
    a, b = checkpoint("whole")["state_dict"], checkpoint("cut")["state_dict"]
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "change", ["trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=5"]
)
def test_resume_refuses_what_would_shift_the_position_in_the_data(
    change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SHORT, "run.dir=a", "trainer.max_steps=3"]) == 0
    capsys.readouterr()
    assert main(["run.resume=a", "trainer.max_steps=5", change]) == 2
    assert change.partition("=")[0] in one_line(capsys)


def test_a_resumed_run_logs_and_sums_up_as_one_that_was_not_interrupted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The crash is between the two micro-batches of step 10; last.ckpt is of step 9."""
    tokens = [
        *SHORT,
        "trainer.accumulate_grad_batches=2",
        "trainer.limit_train_batches=14",
        "trainer.max_epochs=2",
        "trainer.log_every_n_steps=1",
        "run.save_every_n_steps=3",
    ]
    assert main([*tokens, "run.dir=whole"]) == 0
    with monkeypatch.context() as patch:
        with_callback(patch, StopAfter(19))
        assert main([*tokens, "run.dir=cut"]) == 1
    assert main(["run.resume=cut"]) == 0
    whole = {r["step"]: r["train/loss"] for r in rows("whole") if "train/loss" in r}
    for row in rows("cut"):
        if "train/loss" in row:
            assert row["train/loss"] == whole[row["step"]], row["step"]
    assert result("cut")["loss"] == result("whole")["loss"]


def test_a_checkpoint_outside_a_run_is_not_resumed_in_its_surroundings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*SHORT, "run.dir=a", "trainer.max_steps=2"]) == 0
    Path("deep/copy").mkdir(parents=True)
    for name in ("checkpoints/last.ckpt", "config.yaml"):
        (Path("deep/copy") / Path(name).name).write_bytes((Path("a") / name).read_bytes())
    capsys.readouterr()
    assert main(["run.resume=deep/copy/last.ckpt", "trainer.max_steps=4"]) == 2
    assert "deep/copy/last.ckpt" in one_line(capsys)
    assert [p.name for p in Path("deep").iterdir()] == ["copy"]


# -- the best
# ---------------------------------------------------------------------------------


def test_a_moved_run_keeps_its_best_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_by_step(monkeypatch, {7: 0.9, 14: 0.2, 21: 0.3})
    assert main([*SHORT, *CONSTANT, "run.dir=a", "trainer.max_epochs=2"]) == 0
    Path("a").rename("moved")
    assert main(["run.resume=moved", "trainer.max_epochs=3"]) == 0
    assert_the_file_is_the_best_on_record("moved", step=7)


def test_the_best_of_the_last_validation_outlives_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_by_step(monkeypatch, {7: 0.5, 10: 0.9, 17: 0.6})
    endless = [*CONSTANT, "trainer.max_epochs=null"]
    assert main([*SHORT, *endless, "run.dir=a", "trainer.max_steps=10"]) == 0
    assert main(["run.resume=a", "trainer.max_steps=17"]) == 0
    assert_the_file_is_the_best_on_record("a", step=10)
    assert result("a")["primary"]["last"] == pytest.approx(0.6)


def test_a_metric_that_is_nan_is_never_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_by_step(monkeypatch, {7: float("nan"), 14: 0.5, 21: 0.3})
    assert main([*SHORT, "run.dir=a"]) == 0
    assert result("a")["primary"]["best"] == pytest.approx(0.5)
    assert_the_file_is_the_best_on_record("a", step=14)


# -- damaged files
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["empty", "text", "half", "suite", "norm", "keys"])
def test_a_damaged_checkpoint_is_one_line(damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHORT, "run.dir=a", "trainer.max_steps=1"]) == 0
    content, file = checkpoint("a"), Path("a/checkpoints/last.ckpt")
    raw = {"empty": b"", "text": b"hello world\n", "half": file.read_bytes()[:100_000]}
    forged: dict[str, Any] = {
        "suite": {**content, "suite": "x"},
        "norm": {**content, "suite": {**content["suite"], "norm": None}},
        "keys": {1: torch.zeros(2)},
    }
    if damage in raw:
        file.write_bytes(raw[damage])
    else:
        torch.save(forged[damage], file)
    Path("a/checkpoints/best.ckpt").write_bytes(file.read_bytes())
    for tokens in (["run.resume=a"], ["evaluate=a"], [*SHORT, "run.dir=b", "model.init_from=a"]):
        capsys.readouterr()
        assert main(tokens) == 2
        assert ".ckpt" in one_line(capsys)
    assert not Path("b").exists()


def test_weights_alone_cannot_be_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHORT, "run.dir=a", "trainer.max_steps=1"]) == 0
    content = checkpoint("a")
    for path in Path("a/checkpoints").iterdir():
        path.unlink()
    torch.save({k: content[k] for k in ("state_dict", "suite")}, "a/checkpoints/last.ckpt")
    before = result("a")
    capsys.readouterr()
    assert main(["run.resume=a"]) == 2
    assert "model.init_from" in one_line(capsys)
    assert result("a") == before


# -- before and after the run
# ---------------------------------------------------------------------------------


def test_an_interval_over_the_epoch_is_found_before_anything_is_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*SHORT, "run.dir=a", "trainer.val_check_interval=8"]) == 2
    assert "trainer.val_check_interval=8" in one_line(capsys)
    assert not Path("a").exists()
    over = ["trainer.val_check_interval=8", "trainer.check_val_every_n_epoch=null"]
    assert main([*SHORT, *over, "run.dir=a"]) == 0
    assert [r["step"] for r in rows("a") if "val/acc" in r] == [8, 16, 21]


def test_the_record_is_for_others_too_and_its_command_can_be_pasted() -> None:
    tokens = ["run.dir=with space", "trainer.max_steps=1"]
    assert main([*SHORT, *tokens]) == 0
    assert "'run.dir=with space'" in result("with space")["command"]
    modes = [stat.S_IMODE((Path("with space") / n).stat().st_mode) for n in ("result.json",)]
    assert modes == [stat.S_IMODE(Path("with space/config.yaml").stat().st_mode)]
    assert not list(Path("with space").glob(".tmp*"))


# -- exact counts and the guard
# ---------------------------------------------------------------------------------


@pytest.fixture
def parts() -> suite.build.Parts:
    return suite.build.build_parts(load(SHORT).settled, processes=1)


def test_a_wholly_padded_batch_counts_for_nothing(parts: suite.build.Parts) -> None:
    """The last evaluation batch of a rank has no row of its own whenever the data runs out."""
    module, batch = parts.module.eval(), parts.data.fixed_batch(4)
    padded = {**batch, "valid": torch.zeros_like(batch["valid"])}
    metrics: Any = module.split_metrics["val"]
    with torch.no_grad():
        module._evaluate(batch, "val")
        alone = {k: float(v) for k, v in metrics.compute().items()}
        module._evaluate(padded, "val")
    assert {k: float(v) for k, v in metrics.compute().items()} == alone
    assert module.eval_sums["val"].totals(module.device)["_count"] == 4


def test_counts_are_exact_in_bfloat16() -> None:
    """1000 = 3 x 333 + 1, and bfloat16 has no 333."""
    odd = ["data.eval_batch_size=333", "trainer.limit_val_batches=1.0", "trainer.max_steps=1"]
    assert main([*SHORT, *odd, "trainer.precision=bf16-true", "run.dir=a"]) == 0
    assert [r["val/count"] for r in rows("a") if "val/count" in r] == [1000]
