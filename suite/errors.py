"""The suite's own errors, each with the exit code that `python -m suite.train` ends with.

One line says what is wrong, where, what is allowed and what to do; a traceback is for our own
mistakes.
"""


class ConfigError(ValueError):
    """Something that the user can put right before anything has started. Exit code 2."""

    exit_code = 2


class DivergedError(RuntimeError):
    """Training produced a non-finite loss or gradient. Exit code 3."""

    exit_code = 3


class DataError(RuntimeError):
    """A sample that cannot be read, found while training. Exit code 1."""

    exit_code = 1

    def __str__(self) -> str:
        """Its one line, without the traceback that a loader's worker puts around it."""
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].strip()


def shown(path: object) -> str:
    """A path as one line of text, whatever bytes are in it."""
    text = str(path)
    return text if text.isprintable() else ascii(text)
