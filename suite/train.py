"""The composition root: config -> task -> trainer -> result (`python -m suite.train`).

Everything that can be wrong is found before anything is written; then one folder holds the run:
config.yaml, metrics.jsonl, checkpoints/, tensorboard/ and, at the end or on failure, result.json.
Exit codes: 0 done, 1 error while running, 2 config, 3 diverged, 130 interrupted (Ctrl-C), 143
preempted (SIGTERM, SIGUSR1); the last two after a checkpoint, where training had begun.
"""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from signal import SIGINT
from typing import TYPE_CHECKING, Any

from suite.errors import ConfigError, DataError, DivergedError, RankError, Stopped, one_line
from suite.signals import Signals, end_with_parent

if TYPE_CHECKING:
    from suite.config import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Errors are one line on stderr, never a
    traceback, unless it is our own mistake."""
    tokens = list(sys.argv[1:] if argv is None else argv)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        end_with_parent(os.environ.get("SUITE_RUN_PARENT"))
    try:
        with Signals() as signals:
            return run_command(tokens, signals)
    except (ConfigError, DataError, DivergedError, RankError, Stopped) as error:
        if not getattr(error, "shared", False) or is_first():
            complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        complain("interrupted")
        return Stopped(SIGINT).exit_code


def run_command(tokens: list[str], signals: Signals) -> int:
    """What the command line asks for; the exit code of a good end."""
    from suite.config import load

    loaded = load(tokens)
    for note in loaded.notes:
        say(f"note: {one_line(note)}")
    if loaded.text:
        show(loaded.text)
        return 0
    command = shlex.join(["python", "-m", "suite.train", *tokens])
    return act(loaded.action, loaded.settled, command=command, signals=signals)


def act(action: str, config: Config, *, command: str, signals: Signals) -> int:
    """Train, evaluate or try out.

    The heavy imports happen here, after the config is known to be right.
    """
    from suite import run, trial

    try:
        if action == "evaluate":
            return trial.evaluate(config, signals)
        if action == "dry_run":
            return trial.dry_run(config, signals)
        return run.train(config, command=command, signals=signals)
    except (ConfigError, DataError, DivergedError, RankError, KeyboardInterrupt):
        raise
    except Exception as error:  # the last resort: the run's own record has been written by now
        traceback.print_exc()
        complain(
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        )
        return 1


def show(text: str) -> None:
    """A text on stdout; whoever reads it, such as head, may stop before its end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str, **kwargs: Any) -> None:
    """A line on stderr, from the first process only."""
    if is_first():
        print(text, file=sys.stderr, flush=True, **kwargs)


def is_first() -> bool:
    """Whether this is the first process of a run, by its environment."""
    return os.environ.get("RANK", "0") == "0" and os.environ.get("LOCAL_RANK", "0") == "0"


def complain(text: str) -> None:
    """One line on stderr: what is wrong.

    Every process says it with its rank, the first one without.
    """
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    prefix = "error" if rank == "0" else f"error (rank {rank})"
    print(f"{prefix}: {one_line(text)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
