"""Command-line options and fixtures that all tests share."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

os.environ.setdefault("MPLBACKEND", "Agg")
CELLS = ("layernorm", "rmsnorm", "dyt", "derf")  # norms that have a tox cell of their own


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--norm",
        default=None,
        help="contract tests of one norm only (a tox cell's name such as vision-dyt will do), "
        f"or 'others': all but {', '.join(CELLS)}",
    )


def chosen_norms(config: pytest.Config, names: list[str]) -> list[str]:
    """The norms of the table that --norm leaves."""
    wanted = config.getoption("--norm")
    if wanted is None:
        return names
    if wanted == "others":
        return [name for name in names if name not in CELLS]
    norm = wanted.rpartition("-")[2]
    if norm not in names:
        raise pytest.UsageError(f"--norm {wanted}: no such norm; choose of {', '.join(names)}")
    return [norm]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `--dist loadgroup`: a file's tests share its fixtures, so they stay in one process; the
    contract's cells say themselves which belong together.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.location[0]))


@pytest.fixture(scope="session", autouse=True)
def _as_from_a_terminal() -> Iterator[None]:
    """Where a shell starts tests in the background, Ctrl-C is ignored in all that they start."""
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)
    else:
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_process_group_stays() -> Iterator[None]:
    """A sharded run of one process leaves its group, which another test would trip over."""
    yield
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
