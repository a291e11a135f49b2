"""Sums, means and what a callback is told, without a trainer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from suite.callbacks import PrimaryTracker
from suite.metrics import JsonlLogger, git_state, versions, write_json
from suite.module import StepOutput, Sums, means


def test_sums_are_means_over_the_items_not_over_the_batches() -> None:
    sums = Sums()
    sums.add(StepOutput(torch.tensor(6.0), 3, logs={"acc": torch.tensor(3.0)}))
    sums.add(StepOutput(torch.tensor(2.0), torch.tensor(1.0), logs={"acc": torch.tensor(0.0)}))
    totals = sums.totals(torch.device("cpu"))
    assert means(totals) == {"loss": 2.0, "acc": 0.75}
    assert totals["_units"] == 4
    assert sums.totals(torch.device("cpu")) == {}


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
    write_json(path, {"acc": float(torch.tensor(0.788)), "loss": float("nan")})
    assert json.loads(path.read_text()) == {"acc": 0.788, "loss": None}


def test_jsonl_has_an_object_a_step(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path / "m.jsonl")
    logger.log_metrics({"train/loss": torch.tensor(0.5), "epoch": 1.0}, step=3)
    logger.log_metrics({"val/acc": 0.25}, step=4)
    rows = [json.loads(x) for x in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert rows == [{"step": 3, "epoch": 1, "train/loss": 0.5}, {"step": 4, "val/acc": 0.25}]


def test_versions_name_what_decides_the_numbers() -> None:
    assert versions()["torch"] == torch.__version__.split("+")[0] or versions()["torch"]
    assert git_state(Path("/")) is None


@pytest.mark.parametrize(("direction", "best"), [("max", 0.9), ("min", 0.2)])
def test_the_best_value_is_tracked_in_its_direction(direction: str, best: float) -> None:
    from types import SimpleNamespace

    tracker = PrimaryTracker("val/x", direction)
    for step, value in enumerate((0.5, 0.9, 0.2, 0.6)):
        trainer = SimpleNamespace(
            sanity_checking=False,
            state=SimpleNamespace(fn="fit"),
            callback_metrics={"val/x": torch.tensor(value), "train/y": torch.tensor(1.0)},
            global_step=step,
        )
        tracker.on_validation_end(trainer, None)  # type: ignore[arg-type]
    assert tracker.best == pytest.approx(best)
    assert tracker.last == pytest.approx(0.6)
    again = PrimaryTracker("val/x", direction)
    again.load_state_dict(tracker.state_dict())
    assert (again.best, again.best_step) == (tracker.best, tracker.best_step)


def test_patience_is_not_spent_by_the_best_validation_seen_again(tmp_path: Path) -> None:
    """A run that broke off after a validation repeats it when it is resumed."""
    from types import SimpleNamespace

    def trainer(value: float, step: int) -> SimpleNamespace:
        metrics = {"val/x": torch.tensor(value)}
        fit = SimpleNamespace(fn="fit")
        return SimpleNamespace(
            sanity_checking=False,
            state=fit,
            callback_metrics=metrics,
            global_step=step,
            should_stop=False,
        )

    whole = PrimaryTracker("val/x", "max", patience=2)
    whole.on_validation_end(trainer(0.5, 1), None)  # type: ignore[arg-type]
    whole.on_validation_end(trainer(0.4, 2), None)  # type: ignore[arg-type]
    last = whole.state_dict()
    whole.on_validation_end(trainer(0.6, 3), None)  # type: ignore[arg-type]
    resumed = PrimaryTracker("val/x", "max", patience=2)
    resumed.load_state_dict({**last, "best": whole.best, "best_step": whole.best_step})
    again = trainer(0.6, 3)
    resumed.on_validation_end(again, None)  # type: ignore[arg-type]
    assert not again.should_stop
    assert resumed.waited == whole.waited == 0
    for step in (4, 5):
        assert not again.should_stop
        again = trainer(0.3, step)
        resumed.on_validation_end(again, None)  # type: ignore[arg-type]
    assert again.should_stop
