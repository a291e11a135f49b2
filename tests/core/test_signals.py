"""What a process does about signals: noted or raised, heard or not, and what SLURM is asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import suite.signals
from suite.errors import Stopped
from suite.signals import ENDING, Signals, requeue
from suite.stopping import StopTogether

pytestmark = [pytest.mark.timeout(60)]
TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


@contextmanager
def child(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has said "ready", and is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def send(number: int) -> None:
    """A signal to this process, which the interpreter has seen when this returns."""
    os.kill(os.getpid(), number)
    time.sleep(0)


# --- noted or raised ------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(TERM, 143), (INT, 130), (USR1, 143)])
def test_a_signal_ends_what_is_under_way_unless_it_is_held(number: int, code: int) -> None:
    with Signals() as signals:
        signals.held = True
        send(number)
        assert signals.number == number
        with pytest.raises(Stopped):
            signals.check()
    with Signals() as signals, pytest.raises(Stopped) as stopped:
        send(number)
    assert stopped.value.exit_code == code
    assert stopped.value.requeue == (number == USR1)


def test_handlers_are_put_back_and_an_ignored_ctrl_c_stays_ignored() -> None:
    before = [signal.getsignal(number) for number in ENDING]
    with Signals():
        assert [signal.getsignal(number) for number in ENDING] != before
    assert [signal.getsignal(number) for number in ENDING] == before
    signal.signal(INT, signal.SIG_IGN)  # as a shell does for what it starts with &
    try:
        with Signals() as signals:
            send(INT)
            assert signals.number is None
            with pytest.raises(Stopped):
                send(TERM)
        assert signal.getsignal(INT) == signal.SIG_IGN
    finally:
        signal.signal(INT, before[ENDING.index(INT)])


def test_held_only_another_ctrl_c_after_a_while_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite.signals, "AGAIN_SECONDS", 0.2)
    with Signals() as signals:
        signals.held = True
        send(USR1)
        for number in (TERM, INT, USR1):  # the launcher's, and the end of SLURM's warning
            send(number)
        assert signals.number == USR1
        time.sleep(0.3)
        send(TERM)
        with pytest.raises(Stopped) as stopped:
            send(INT)
    assert stopped.value.number == USR1


def test_a_second_signal_does_not_cut_the_end_short() -> None:
    trainer: Any = None
    with Signals() as signals:
        stop = StopTogether(signals)
        signals.held = True
        send(TERM)
        with pytest.raises(Stopped) as stopped:
            stop.on_train_end(trainer, trainer)
        stop.on_exception(trainer, trainer, stopped.value)
        send(TERM)  # where it raised, the run's record was not written and SLURM not asked
        assert signals.held
        stop.on_exception(trainer, trainer, RuntimeError())
        with pytest.raises(Stopped):
            send(TERM)


# --- unheard --------------------------------------------------------------------------------------

DEAF = """
import ctypes, signal, sys, threading, time
import suite.signals
suite.signals.UNHEARD_SECONDS, suite.signals.AGAIN_SECONDS = 0.2, 0.1
with suite.signals.Signals() as signals:
    signals.unheard = lambda stopped: print("told", flush=True)
    signals.held = sys.argv[1] == "held"
    signal.pthread_sigmask(signal.SIG_BLOCK, suite.signals.ENDING)  # the listener's thread has them
    sleep = ctypes.CDLL(None).sleep
    print("ready", flush=True)
    sleep(40)
    print("heard nothing", flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="blocks by libc's sleep")
@pytest.mark.parametrize(("held", "numbers"), [("no", [TERM]), ("held", [INT, INT])])
def test_a_process_that_hangs_outside_python_is_ended_all_the_same(
    held: str, numbers: list[int]
) -> None:
    with child(DEAF, held) as process:
        for number in numbers:
            time.sleep(1.2)  # it is out of Python by then; and a second Ctrl-C comes later
            process.send_signal(number)
        output = process.communicate(timeout=20)[0]
    assert process.returncode == (143 if numbers == [TERM] else 130), output
    assert output.splitlines()[0] == "told"
    assert "no new checkpoint" in output


# --- other processes ------------------------------------------------------------------------------

WORKER = """
from suite.signals import ignore_in_worker
ignore_in_worker()
print("ready", flush=True)
input()
print("still here")
"""


def test_a_loaders_worker_is_left_to_its_trainer() -> None:
    with child(WORKER) as process:
        for number in ENDING:
            process.send_signal(number)
        assert process.communicate("\n", timeout=20)[0] == "still here\n"
    assert process.returncode == 0


PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
time.sleep(40)
"""
RANK = """
import os, time
from suite.signals import end_with_parent
end_with_parent(str(os.getppid()))
print("ready", flush=True)
time.sleep(40)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_a_rank_ends_with_the_process_that_started_it_even_by_kill_9() -> None:
    with child(PARENT, RANK) as parent:
        parent.kill()
        # it holds the pipe for as long as it lives
        assert parent.communicate(timeout=20)[0] == ""
    adopted = RANK.replace("os.getppid()", "1 + os.getppid()")
    done = subprocess.run([sys.executable, "-c", adopted], capture_output=True, timeout=20)
    assert (done.returncode, done.stdout) == (1, b"")


# --- SLURM ----------------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which a scontrol of our own writes what it was asked; it knows no job 13."""
    program = tmp_path / "scontrol"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n[ "$2" != 13 ] || {{ echo no  such job >&2; '
        "exit 1; }\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "asked"


def test_slurm_is_asked_once_for_the_job_or_the_task_of_an_array(asked: Path) -> None:
    assert requeue({}) is None
    assert not asked.exists()
    assert requeue({"SLURM_JOB_ID": "77"}) == "requeued SLURM job 77"
    array = {"SLURM_JOB_ID": "80", "SLURM_ARRAY_JOB_ID": "78", "SLURM_ARRAY_TASK_ID": "2"}
    assert requeue(array) == "requeued SLURM job 78_2"
    assert asked.read_text() == "requeue 77\nrequeue 78_2\n"


def test_what_slurm_refuses_and_what_is_no_job_is_said_in_a_line(
    asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = requeue({"SLURM_JOB_ID": "13"})
    assert refused == "not requeued: scontrol requeue 13: no such job"
    asked.unlink()
    assert "is no number of a SLURM job" in str(requeue({"SLURM_JOB_ID": "7; reboot"}))
    assert not asked.exists()
    monkeypatch.setenv("PATH", "/nowhere")
    assert str(requeue({"SLURM_JOB_ID": "77"})).startswith("not requeued: scontrol requeue 77:")
