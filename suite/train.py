"""The composition root: config -> task -> trainer -> result (`python -m suite.train`).

Everything that can be wrong is found before anything is written; then one folder holds the run:
config.yaml, metrics.jsonl, checkpoints/, tensorboard/ and, at the end or on failure, result.json.
Exit codes: 0 done, 1 error while running, 2 config, 3 diverged, 130 interrupted.
"""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from suite.errors import ConfigError, DataError, DivergedError

if TYPE_CHECKING:
    from suite.config import Config

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Errors are one line on stderr, never a
    traceback, unless it is our own mistake."""
    from suite.config import load

    tokens = list(sys.argv[1:] if argv is None else argv)
    try:
        loaded = load(tokens)
        for note in loaded.notes:
            say(f"note: {note}")
        if loaded.text:
            show(loaded.text)
            return 0
        command = shlex.join(["python", "-m", "suite.train", *tokens])
        return act(loaded.action, loaded.settled, command=command)
    except ConfigError as error:
        complain(str(error))
        return ConfigError.exit_code
    except (DataError, DivergedError) as error:
        complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED


def act(action: str, config: Config, *, command: str) -> int:
    """Train, evaluate or try out.

    The heavy imports happen here, after the config is known to be right.
    """
    from suite import run, trial

    try:
        if action == "evaluate":
            return trial.evaluate(config)
        if action == "dry_run":
            return trial.dry_run(config)
        return run.train(config, command=command)
    except (ConfigError, DataError, DivergedError, KeyboardInterrupt):
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
    if os.environ.get("RANK", "0") == "0" and os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True, **kwargs)


def complain(text: str) -> None:
    """One line on stderr: what is wrong.

    Every process says it with its rank, the first one without.
    """
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    prefix = "error" if rank == "0" else f"error (rank {rank})"
    print(f"{prefix}: {' '.join(text.split())}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
