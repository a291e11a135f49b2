"""Every hook, interval, accumulation, task and number of processes: a resumed run ends bit-equal.

tests/tasks/test_resumption.py is the short selection.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import interrupting
import pytest
import torch
from interrupting import SMALLEST, Place, assert_ended_alike, cut_and_resumed, differences, main

pytestmark = [pytest.mark.timeout(300)]
EVERY_THREE = ["trainer.val_check_interval=3", "trainer.check_val_every_n_epoch=null"]
# name -> what is added, batches of an epoch, batches until a validation
CASES: dict[str, tuple[list[str], int, int]] = {
    "whole epochs": ([], 4, 4),
    "half epochs": (["trainer.val_check_interval=0.5"], 4, 2),
    "every third batch": (EVERY_THREE, 4, 3),
    "accumulated": (["trainer.accumulate_grad_batches=2"], 8, 8),
    "accumulated, half epochs": (
        ["trainer.accumulate_grad_batches=2", "trainer.val_check_interval=0.5"],
        8,
        4,
    ),
}
HOOKS = (
    "first batch",
    "middle batch",
    "last batch",
    "validation's first batch",
    "validation's last batch",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_epoch_start",
)
SCHEDULE = [
    "trainer.max_steps=-1",
    "trainer.check_val_every_n_epoch=1",
    "trainer.val_check_interval=1.0",
    "optim.warmup_steps=2",
    "optim.warmup_fraction=null",
]
BARE = [t for t in SMALLEST if t.startswith(("trainer.", "run."))]
SPEECH = [
    "model.conv_dim=8",
    "model.dim=16",
    "model.depth=2",
    "model.heads=2",
    "model.hidden_dim=16",
    "model.pos_kernel=8",
    "model.pos_groups=2",
    "model.dropout=0.1",
    "model.layer_drop=0.5",
    "data.batch_seconds=6",
]
HYENA = [
    "model=hyenadna_tiny_1k",
    "model.dim=16",
    "model.depth=1",
    "model.hidden_dim=32",
    "model.filter_dim=16",
    "model.l_max=256",
    "model.dropout=0.1",
    "data.batch_size=4",
]
MAE = [
    "model=mae_tiny",
    "model.patch_size=7",
    "model.dim=16",
    "model.depth=1",
    "model.heads=2",
    "model.decoder_dim=8",
    "model.decoder_depth=1",
    "model.decoder_heads=2",
    "task.probe=none",
    "task.pictures=0",
    "data.batch_size=16",
]
PRETRAIN = ["model.codes=8", "model.code_dim=8", "task.negatives=10", "task.temperature_decay=0.9"]
MASKED = ["task.mask_prob=0.3", "task.mask_length=3", "task.mask_channel_prob=0.3"]
TASKS = {
    "vision/mae": MAE,
    "speech/pretrain": [*SPEECH, *PRETRAIN],
    "speech/ctc": [*SPEECH, *MASKED, "task.mask_channel_length=4"],
    "dna/pretrain": [*HYENA, "data.length=64"],
    "dna/classify": HYENA,
    "language/lm": [
        "model.dim=16",
        "model.depth=1",
        "model.heads=2",
        "data.length=32",
        "data.batch_size=4",
        "data.eval_batch_size=8",
        "task.sample_tokens=0",
    ],
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SUITE_RUN_DIR", raising=False)
    torch.set_num_threads(1)


def smallest_of(task: str) -> list[str]:
    return [*BARE, *SCHEDULE, f"task={task}", *TASKS[task]]


def place_of(hook: str, *, case: str, epoch: int) -> Place:
    """Where a hook's name is. A batch in mid-accumulation is none where a run can stop."""
    more, batches, _ = CASES[case]
    step = 2 if "trainer.accumulate_grad_batches=2" in more else 1
    calls = {"first batch": step, "middle batch": batches // 2, "last batch": batches}
    if hook in calls:
        return "on_train_batch_end", epoch, calls[hook] - 1
    if hook.startswith("validation's"):
        return "on_validation_batch_end", epoch, int("last" in hook)
    return hook, epoch, 0


@pytest.mark.parametrize("case", CASES)
def test_a_run_broken_off_in_any_hook_ends_as_if_it_had_not_been(case: str) -> None:
    more, batches, _ = CASES[case]
    tokens = [*SMALLEST, *more, f"trainer.limit_train_batches={batches}"]
    assert main([*tokens, "run.dir=whole"]) == 0
    whole, wrong = interrupting.ended("whole"), {}
    for epoch in (0, 1):
        for hook in HOOKS:
            where = place_of(hook, case=case, epoch=epoch)
            run = cut_and_resumed(tokens, f"cut-{epoch}-{hook}", where)
            if found := differences(whole, interrupting.ended(run)):
                wrong[where] = found[:3]
    assert wrong == {}


@pytest.mark.parametrize(
    ("place", "after"),
    [(("on_train_batch_end", 0, 2), 2), (("on_validation_batch_end", 1, 0), 0)],
)
def test_processes_that_load_data_change_nothing(place: Place, after: int) -> None:
    assert main([*SMALLEST, "run.dir=whole"]) == 0
    workers = [*SMALLEST, "data.num_workers=2"]
    cut_and_resumed(workers, "cut", place, f"data.num_workers={after}")
    assert_ended_alike("whole", "cut")


@pytest.mark.parametrize(
    "place",
    [("on_train_batch_end", 0, 1), ("on_validation_end", 0, 1), ("on_train_epoch_end", 0, 0)],
)
def test_patience_counts_a_repeated_validation_once(place: Place) -> None:
    """Weights that do not move: the first validation stays the best, and the second is the last."""
    still = ["optim.lr=1e-30", "optim.weight_decay=0", "run.patience=2"]
    tokens = [*SMALLEST, *still, "trainer.val_check_interval=1", "optim.ema_decay=null"]
    assert main([*tokens, "run.dir=whole"]) == 0
    assert 1 < interrupting.ended("whole")["result"]["steps"] < 8
    cut_and_resumed(tokens, "cut", place)
    assert_ended_alike("whole", "cut")


def test_a_run_of_steps_that_ends_in_mid_epoch_does_so_after_a_resume() -> None:
    tokens = [*SMALLEST, "trainer.max_epochs=null", "trainer.max_steps=6"]
    assert main([*tokens, "run.dir=whole"]) == 0
    for number, place in enumerate(
        [
            ("on_train_batch_end", 0, 3),
            ("on_train_batch_end", 1, 0),
            ("on_train_batch_end", 1, 1),
            ("on_train_epoch_end", 1, 0),
        ]
    ):
        assert_ended_alike("whole", cut_and_resumed(tokens, f"cut-{number}", place))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_resumes_exactly(task: str) -> None:
    tokens = smallest_of(task)
    assert main([*tokens, "run.dir=whole"]) == 0
    for number, place in enumerate(
        [
            ("on_train_batch_end", 0, 1),
            ("on_validation_batch_end", 1, 0),
            ("on_train_batch_end", 1, 3),
        ]
    ):
        assert_ended_alike("whole", cut_and_resumed(tokens, f"cut-{number}", place))


# -- two processes ------------------------------------------------------------------------------


def launch(commands: list[dict[str, Any]], *, world: int) -> None:
    """The commands one after the other, in as many processes."""
    file = Path(f"commands-{world}.json").absolute()
    file.write_text(json.dumps(commands))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SUITE_RUN_DIR")
    clean = {k: v for k, v in os.environ.items() if k not in ranks}
    clean |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0"}
    processes = [
        subprocess.Popen(
            [sys.executable, interrupting.__file__, str(file)],
            env={
                **clean,
                **(shared if world > 1 else {}),
                **({"RANK": str(r), "LOCAL_RANK": str(r)} if world > 1 else {}),
                **({"TORCHELASTIC_RUN_ID": "test"} if world > 1 else {}),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(world)
    ]
    try:
        outputs = [p.communicate(timeout=240)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0] * world, outputs


def commands_of(tokens: list[str], run: str, place: Place | None, *more: str) -> list[Any]:
    """A whole run, or one that is broken off and goes on."""
    if place is None:
        return [{"tokens": [*tokens, f"run.dir={run}"], "pull": None, "run": run}]
    resumed = {"tokens": [f"run.resume={run}", *more], "pull": None, "run": run}
    return [{"tokens": tokens, "pull": list(place), "run": run}, resumed]


@pytest.mark.parametrize("task", ["vision/classify", "speech/pretrain", "language/lm"])
def test_two_processes_resume_exactly(task: str) -> None:
    tokens = SMALLEST if task == "vision/classify" else smallest_of(task)
    tokens = [*tokens, "trainer.devices=2", "trainer.accumulate_grad_batches=2"]
    if task.startswith("speech"):  # a step is dealt to four: the longest clips have to be as many
        tokens += ["data.batch_seconds=16"]
    places: list[Place] = [
        ("on_train_batch_end", 0, 1),
        ("on_train_batch_end", 0, 3),
        ("on_validation_batch_end", 1, 0),
    ]
    commands = commands_of(tokens, "whole", None)
    for number, place in enumerate(places):
        commands += commands_of(tokens, f"cut-{number}", place)
    launch(commands, world=2)
    for number, _ in enumerate(places):
        assert_ended_alike("whole", f"cut-{number}")


@pytest.mark.parametrize("task", ["vision/classify", "speech/ctc"])
def test_another_number_of_processes_goes_on_with_the_same_examples(task: str) -> None:
    """Bit for bit it cannot be, since a sum of two halves rounds otherwise; without dropout, which
    each process draws for itself, it is the same to rounding. By length as well as by number.
    """
    still = ["model.dropout=0"] if task == "vision/classify" else ["model.dropout=0", *UNMASKED]
    tokens = [*(SMALLEST if task == "vision/classify" else smallest_of(task)), *still]
    # the statistics of norms are those of the first process alone
    tokens += ["optim.name=sgd", "optim.momentum=0.0", "run.norm_stats=false"]
    place: Place = ("on_train_batch_end", 0, 1)
    resumed = [{"tokens": ["run.resume=cut-1", "trainer.devices=2"], "pull": None}]
    launch(
        [
            *commands_of(tokens, "whole", None),
            *commands_of(tokens, "cut-1", place)[:1],
        ],
        world=1,
    )
    cut_by_two = commands_of([*tokens, "trainer.devices=2"], "cut-2", place)[:1]
    launch([*resumed, *cut_by_two], world=2)
    launch([{"tokens": ["run.resume=cut-2", "trainer.devices=1"], "pull": None}], world=1)
    whole = interrupting.ended("whole")
    for run in ("cut-1", "cut-2"):
        other = interrupting.ended(run)
        assert whole["logged"].keys() == other["logged"].keys()
        for key, value in whole["logged"].items():
            assert other["logged"][key] == pytest.approx(value, rel=1e-4, abs=1e-6), (run, key)
        for name, tensor in whole["last"]["state_dict"].items():
            torch.testing.assert_close(
                other["last"]["state_dict"][name], tensor, rtol=1e-4, atol=1e-5
            )


UNMASKED = ["model.layer_drop=0", "task.mask_prob=0", "task.mask_channel_prob=0"]
