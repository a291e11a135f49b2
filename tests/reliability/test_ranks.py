"""A rank that crashes, is killed or hangs ends the job with its reason, and leaves no orphan."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest
from processes import (
    SLOWLY,
    TINY,
    assert_nothing_is_left,
    assert_same_end,
    end,
    in_session,
    other_rank,
    result,
    slowly,
    started,
    until,
)

pytestmark = [pytest.mark.timeout(240)]
TWO = ("trainer.devices=2", "run.dist_timeout=30")


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.mark.parametrize("fault", ["raise-1", "kill-1", "exit-1", "hang-1"])
def test_a_lost_rank_ends_the_run_with_its_reason_and_resume_makes_it_whole(
    fault: str, whole_of_two: Path, tmp_path: Path
) -> None:
    tokens = (*TWO, f"run.dir={tmp_path / 'run'}", "run.resume=auto")
    with started(slowly(fault, tmp_path, *tokens), tmp_path) as process:
        code, output = end(process, seconds=90)
        assert code == 1, output
        assert ("Traceback" in output) == (fault == "raise-1"), output
        assert_nothing_is_left(process)
    found = result(tmp_path / "run")
    assert found["status"] == "failed"
    lines = [line for line in output.splitlines() if line.startswith("error")]
    said = {
        "raise-1": "error (rank 1): RuntimeError: broken on purpose",
        "kill-1": "rank 1 ended with exit code -9",
        "exit-1": "rank 1 ended with exit code 7",
        "hang-1": "did not answer within run.dist_timeout=30",
    }[fault]
    assert any(said in line for line in lines), output
    with started(slowly(fault, tmp_path, *tokens), tmp_path) as process:
        code, output = end(process, seconds=90)
        assert code == 0, output
    assert_same_end(tmp_path / "run", whole_of_two)


@pytest.mark.parametrize("fault", ["raise-0", "kill-0", "hang-0"])
def test_a_lost_first_rank_takes_the_other_one_with_it(fault: str, tmp_path: Path) -> None:
    tokens = (*TWO, f"run.dir={tmp_path / 'run'}")
    with started(slowly(fault, tmp_path, *tokens), tmp_path) as process:
        code, output = end(process, seconds=90)
        assert code == (-signal.SIGKILL if fault == "kill-0" else 1), output
        assert_nothing_is_left(process)


def test_the_other_ranks_die_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    tokens = ("trainer.devices=2", f"run.dir={tmp_path / 'run'}")
    with started(slowly("step", tmp_path, *tokens), tmp_path) as process:
        until(lambda: (tmp_path / "step-1").exists(), what="rank 1 trains")
        other = other_rank(process)
        os.kill(process.pid, signal.SIGKILL)
        until(lambda: other not in in_session(process), seconds=5, what="rank 1 is gone")


@pytest.mark.parametrize("fault", ["kill-1", "raise-0"])
def test_torchrun_starts_the_processes_again_and_they_go_on(
    fault: str, whole_of_two: Path, tmp_path: Path
) -> None:
    """Without the variable a restart of ranks that come one after the other often fails."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=2"]
    torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    command = [*torchrun, str(SLOWLY), fault, str(tmp_path), *TINY, f"run.dir={tmp_path / 'run'}"]
    with started(command, tmp_path, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1") as process:
        code, output = end(process, seconds=150)
        assert code == 0, output
        assert_nothing_is_left(process)
    assert "goes on from last.ckpt" in output
    assert_same_end(tmp_path / "run", whole_of_two)


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    tokens = (f"run.dir={folder / 'run'}", "trainer.devices=2")
    with started(slowly("none", folder, *tokens), folder) as process:
        code, output = end(process, seconds=90)
        assert code == 0, output
    return folder / "run"


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path) -> None:
    tokens = (f"run.dir={tmp_path / 'run'}", "run.resume=auto", "trainer.max_epochs=100")
    with started(slowly("step", tmp_path, *tokens), tmp_path) as first:
        until(lambda: (tmp_path / "step-0").exists(), what="the first trains")
        with started(slowly("none", tmp_path, *tokens), tmp_path) as second:
            code, output = end(second)
            assert code == 2, output
            assert f"process {first.pid} on {socket.gethostname()} is training there" in output
