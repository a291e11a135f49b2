"""One decision for all processes of a run: the first one makes it, the others are told.

Which folder a run takes and where it goes on from is looked up on the disk, and processes that
torchrun or SLURM has started look at different moments: one may see what another has just made.
Those that Lightning starts are told through their environment, since they start after the decision.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.fabric.utilities.distributed import _init_dist_connection

from suite.errors import ConfigError
from suite.ranks import from_first

T = TypeVar("T")


class SharedError(ConfigError):
    """A mistake that all processes end with, and of which the first one tells."""

    shared = True


def started_outside() -> ClusterEnvironment | None:
    """The environment of processes that torchrun or srun has started together, if it is so."""
    for kind in (TorchElasticEnvironment, SLURMEnvironment):
        if kind.detect():
            found: Any = kind()
            return found if found.world_size() > 1 else None
    return None


def decided(choose: Callable[[], T], *, accelerator: str, timeout: int) -> T:
    """What `choose` returns on the first process, on every one.

    accelerator: trainer.accelerator. timeout: seconds to wait for the others. The processes are
    connected here, as Lightning would do it later, which then finds them so.
    Raises ConfigError where the first process does.
    """
    environment = started_outside()
    if environment is None:
        return choose()
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(environment.local_rank())
    if not dist.is_initialized():
        backend = "nccl" if on_gpu else "gloo"
        _init_dist_connection(environment, backend, timeout=timedelta(seconds=timeout))

    def tried() -> tuple[T | None, str | None]:
        try:
            return choose(), None
        except ConfigError as error:
            return None, str(error)

    made, problem = from_first(tried)
    if problem is not None:
        raise SharedError(problem)
    return cast(T, made)


def job() -> str | None:
    """What tells the job of this process from all others, if a scheduler can start it again."""
    environ = os.environ
    if "SLURM_JOB_ID" in environ:
        array = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
        return "slurm " + ("_".join(map(str, array)) if all(array) else environ["SLURM_JOB_ID"])
    if "TORCHELASTIC_RUN_ID" in environ:
        return f"torchrun {environ['TORCHELASTIC_RUN_ID']} {os.getppid()}"
    return None


def restarted() -> bool:
    """Whether SLURM has requeued this job, or torchrun started its processes again."""
    counts = (os.environ.get(f"{n}_RESTART_COUNT", "0") for n in ("SLURM", "TORCHELASTIC"))
    return any(count.isdigit() and int(count) > 0 for count in counts)
