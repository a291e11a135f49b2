"""A run that was broken off anywhere ends bit-equal to one that was not.

tests/reliability/test_resume_matrix.py has all hooks, intervals, tasks and numbers of processes.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from interrupting import (
    SMALLEST,
    Place,
    assert_ended_alike,
    cut,
    cut_and_resumed,
    differences,
    logged,
    main,
)

from suite.resumption import added, align_validations, counted, cut_lines, place, zeros

PLACES: list[Place] = [
    ("on_train_batch_end", 0, 1),
    ("on_train_batch_end", 1, 3),
    ("on_validation_batch_end", 0, 1),
    ("on_train_epoch_end", 1, 0),
]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SUITE_RUN_DIR", raising=False)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    torch.set_num_threads(1)
    assert main([*SMALLEST, f"run.dir={folder}"]) == 0
    return folder


@pytest.mark.parametrize("where", PLACES, ids=lambda p: "-".join(map(str, p)))
def test_a_run_broken_off_in_a_hook_ends_as_if_it_had_not_been(whole: Path, where: Place) -> None:
    """In mid-epoch; on the last batch of the last epoch; in a validation; at the run's end."""
    assert_ended_alike(whole, cut_and_resumed(SMALLEST, "cut", where))


def test_what_was_logged_after_the_checkpoint_is_taken_back(whole: Path) -> None:
    cut(SMALLEST, "cut", ("on_train_batch_end", 0, 2))
    rows = Path("cut/metrics.jsonl")
    with rows.open("a") as file:
        file.write(json.dumps({"step": 99, "train/loss": 7.0}) + '\n{"step": 100, "tra')
    assert main(["run.resume=cut"]) == 0
    assert logged("cut") == logged(whole)
    assert len(rows.read_text().splitlines()) == len(
        (whole / "metrics.jsonl").read_text().splitlines()
    )


def test_a_position_means_nothing_in_an_epoch_of_another_length(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cut(SMALLEST, "cut", ("on_train_batch_end", 0, 1))
    file = Path("cut/checkpoints/last.ckpt")
    content = torch.load(file, weights_only=True)
    content["suite_progress"]["epoch_batches"] = 5
    for sidecar in file.parent.glob("last.ckpt.*"):
        sidecar.unlink()
    torch.save(content, file)
    capsys.readouterr()
    assert main(["run.resume=cut"]) == 2
    said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert len(said) == 1
    assert "had 5 batches and has 4 here" in said[0]


@pytest.mark.parametrize(
    ("position", "closed", "epochs", "inside"),
    [
        (0, True, 0, 0),
        (1, False, 0, 1),
        (4, False, 0, 4),
        (4, True, 1, 0),
        (6, False, 1, 2),
        (6, True, 1, 2),
        (8, False, 1, 4),
        (8, True, 2, 0),
    ],
)
def test_the_counters_follow_from_the_position(
    position: int, closed: bool, epochs: int, inside: int
) -> None:
    loops: dict = {}
    place(loops, position, batches=4, closed=closed)
    begun = epochs + (inside > 0)
    epoch = {"ready": begun, "started": begun, "processed": epochs, "completed": epochs}
    assert loops["epoch_progress"] == {"total": epoch, "current": epoch}
    batches = loops["epoch_loop.batch_progress"]
    assert (batches["total"], batches["current"]) == (counted(position), counted(inside))
    assert batches["is_last_batch"] == (inside == 4)
    assert loops["epoch_loop.val_loop.batch_progress"]["current"] == counted(0)


@pytest.mark.parametrize(
    ("every", "accumulate", "aligned"), [(5, 2, 4), (4, 2, 4), (1, 2, 2), (3, 1, 3), (7, 3, 6)]
)
def test_a_validation_comes_after_a_whole_step(every: int, accumulate: int, aligned: int) -> None:
    trainer = SimpleNamespace(val_check_batch=every, accumulate_grad_batches=accumulate)
    align_validations(trainer)
    assert trainer.val_check_batch == aligned


def test_sums_of_two_processes_go_to_the_first_of_another_number() -> None:
    one = {"sums": {"loss": torch.tensor(1.5), "_count": 2}, "_window": [torch.tensor([1.0, 2.0])]}
    two = {"sums": {"loss": torch.tensor(0.5), "_count": 3}, "_window": []}
    both = added([one, two])
    expected = {
        "sums": {"loss": torch.tensor(2.0), "_count": 5},
        "_window": [torch.tensor([1.0, 2.0])],
    }
    assert differences(both, expected) == []
    nothing = {
        "sums": {"loss": torch.tensor(0.0), "_count": 0},
        "_window": [torch.tensor([0.0, 0.0])],
    }
    assert differences(zeros(both), nothing) == []


@pytest.mark.parametrize(
    ("size", "left"), [(0, ""), (3, "ab\n"), (4, "ab\n"), (6, "ab\ncd\n"), (99, "ab\ncd\n")]
)
def test_a_file_is_cut_to_whole_lines(tmp_path: Path, size: int, left: str) -> None:
    path = tmp_path / "rows"
    path.write_text("ab\ncd\ne")
    cut_lines(path, size)
    assert path.read_text() == left
