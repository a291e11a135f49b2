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
