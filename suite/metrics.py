"""One vocabulary of results: metric names, the JSON-lines log and the schema of result.json.

Reserved in every task: `<split>/loss`, `<split>/<primary>`, `grad_norm`, `lr`,
`throughput/<unit>_per_s`, `norm/<site>/...`. A domain adds names (`val/wer`) and renames none.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

SCHEMA = 1
PACKAGES = ("dyt-suite", "torch", "lightning", "torchmetrics", "omegaconf", "numpy")
Json = dict[str, Any]


def is_main_process() -> bool:
    """Whether this is the one process that writes."""
    return getattr(rank_zero_only, "rank", 0) == 0


class JsonlLogger(Logger):
    """Appends one JSON object a logged step to `metrics.jsonl`; rank 0 only."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return "1"

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration stands in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row: Json = {"step": step}
        if "epoch" in metrics:
            row["epoch"] = int(metrics["epoch"])
        row.update({k: float(v) for k, v in metrics.items() if k != "epoch"})
        with self.path.open("a") as file:
            file.write(json.dumps(plain(row), allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """What JSON can hold: floats to the seven digits that float32 has, non-finite ones as null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Plain values as one JSON object."""
    write_text(path, json.dumps(plain(content), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write atomically: a reader sees the old file or the new one, never half of it."""
    draft = path.with_name(f".tmp-{os.getpid()}-{path.name}")  # tempfile's would be for us alone
    try:
        with draft.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def versions() -> Json:
    """Versions of Python and of the packages that decide the numbers."""
    found: Json = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def hardware() -> Json:
    """What the run ran on."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "system": platform.platform(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_memory() -> int:
    """Peak bytes: the GPU's allocations where there is one, else this process's resident set."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def git_state(folder: Path) -> Json | None:
    """Revision of `folder`'s checkout and whether it was changed; None outside one."""

    def run(*words: str) -> str | None:
        command = ["git", "-C", str(folder), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    tracked = run("ls-files", "--error-unmatch", "registry.py")
    revision = run("rev-parse", "HEAD") if tracked else None
    if not revision:
        return None
    return {"revision": revision, "dirty": bool(run("status", "--porcelain", "-uno"))}
