"""A signal to one process, the launcher or the group ends a run saved, with its code, soon."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from processes import (
    assert_nothing_is_left,
    assert_same_end,
    end,
    other_rank,
    result,
    slowly,
    started,
    until,
)

pytestmark = [pytest.mark.timeout(180)]
TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
CASES = [
    (1, "step", "group", TERM),
    (1, "step", "launcher", INT),
    (1, "validation", "launcher", USR1),
    (1, "save", "launcher", TERM),
    (1, "test", "launcher", TERM),
    (2, "step", "group", TERM),
    (2, "step", "group", INT),
    (2, "step", "group", USR1),
    (2, "step", "launcher", TERM),
    (2, "step", "rank 1", TERM),
    (2, "step", "rank 1", INT),
    (2, "validation", "group", TERM),
    (2, "validation", "rank 1", USR1),
    (2, "save", "group", TERM),
    (2, "save", "rank 1", TERM),
    (2, "test", "group", TERM),
    (2, "test", "rank 1", TERM),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs of one and two processes that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    for world in (1, 2):
        tokens = (f"run.dir={folder / str(world)}", f"trainer.devices={world}")
        with started(slowly("none", folder, *tokens), folder) as process:
            code, output = end(process, seconds=120)
            assert code == 0, output
    return {world: folder / str(world) for world in (1, 2)}


@pytest.mark.parametrize(("world", "place", "target", "number"), CASES)
def test_a_signalled_run_saves_and_ends_as_the_whole_one_when_resumed(
    world: int,
    place: str,
    target: str,
    number: signal.Signals,
    whole: dict[int, Path],
    tmp_path: Path,
) -> None:
    tokens = (f"run.dir={tmp_path / 'run'}", f"trainer.devices={world}", "run.resume=auto")
    with started(slowly(place, tmp_path, *tokens), tmp_path) as process:
        for rank in range(world if place != "save" else 1):
            until(lambda r=rank: (tmp_path / f"{place}-{r}").exists(), what=f"{place}-{rank}")
        send(process, target, number)
        code, output = end(process, seconds=45)
        assert code == (130 if number == INT else 143), output
        assert "Traceback" not in output, output
        assert_nothing_is_left(process)
    assert result(tmp_path / "run")["status"] == "interrupted"
    with started(slowly("none", tmp_path, *tokens), tmp_path) as process:
        code, output = end(process, seconds=90)
        assert code == 0, output
    assert "goes on from last.ckpt" in output
    assert_same_end(tmp_path / "run", whole[world])


def send(process: object, target: str, number: signal.Signals) -> None:
    """Deliver a signal as a scheduler, a container or a user does."""
    pid = process.pid  # type: ignore[attr-defined]
    if target == "group":
        os.killpg(pid, number)
    else:
        os.kill(pid if target == "launcher" else other_rank(process), number)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("world", "target", "number"),
    [(1, "launcher", TERM), (2, "group", TERM), (2, "rank 1", TERM), (2, "launcher", INT)],
)
def test_a_signal_before_training_ends_it_with_nothing_half_written(
    world: int, target: str, number: signal.Signals, tmp_path: Path
) -> None:
    tokens = (f"run.dir={tmp_path / 'run'}", f"trainer.devices={world}")
    with started(slowly("start", tmp_path, *tokens), tmp_path) as process:
        last = world - 1  # rank 1 starts when rank 0 is waiting for it
        until(lambda: (tmp_path / f"start-{last}").exists(), what="start")
        send(process, target, number)
        code, output = end(process, seconds=45)
        assert code == (130 if number == INT else 143), output
        assert "Traceback" not in output, output
        assert_nothing_is_left(process)
    assert not list(tmp_path.rglob("*.ckpt"))
