"""The suite's own errors, each with the exit code that `python -m suite.train` ends with.

One line says what is wrong, where, what is allowed and what to do; a traceback is for our own
mistakes.
"""

import signal

from suite.safety import printable


class ConfigError(ValueError):
    """Something that the user can put right before anything has started. Exit code 2."""

    exit_code = 2


class DivergedError(RuntimeError):
    """Training produced a non-finite loss or gradient. Exit code 3.

    shared: every process ends with the same text, which the first one alone says.
    """

    exit_code = 3
    shared = True


class DataError(RuntimeError):
    """A sample that cannot be read, found while training. Exit code 1."""

    exit_code = 1

    def __str__(self) -> str:
        """Its one line, without the traceback that a loader's worker puts around it."""
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].strip()


class RankError(RuntimeError):
    """Another process of the run is gone, or did not answer in time. Exit code 1."""

    exit_code = 1


class Stopped(BaseException):
    """A signal asked for the end, and every process has stopped after the same step.

    Not an Exception: what handles errors on the way must not take it for one. number: the signal's.
    saved: the checkpoint that was written before, or None where training had not begun.
    """

    def __init__(self, number: int, saved: object = None) -> None:
        super().__init__(number, saved)
        self.number, self.saved = number, saved

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C; 143 for what a scheduler sends, SIGTERM and SIGUSR1."""
        return 130 if self.number == signal.SIGINT else 143

    @property
    def requeue(self) -> bool:
        """Whether the signal is the one that asks SLURM's users for a warning before the end."""
        return self.number == getattr(signal, "SIGUSR1", None)

    def __str__(self) -> str:
        """One line: which signal, and what is kept."""
        what = "interrupted" if self.number == signal.SIGINT else "preempted"
        name = signal.Signals(self.number).name
        if self.saved is None:
            return f"{what} by {name} at once; no new checkpoint"
        return f"{what} by {name}; saved {shown(self.saved)}"


def shown(path: object) -> str:
    """A path as one line of text, whatever bytes are in it."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def one_line(text: str, *, limit: int = 600) -> str:
    """Text as one printable line; of a very long one, its beginning and its end."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= limit else f"{line[: limit - 205]} ... {line[-200:]}"
