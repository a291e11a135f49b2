"""Runs that are broken off in a hook, with a checkpoint written there, and what they end as.

As a script it is one rank of such runs: `interrupting.py COMMANDS.json`, a list of
{"tokens": [...], "pull": [hook, epoch, call] or null}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.callbacks import Callback

import suite.run
from suite.train import main as entry

SMALLEST = [
    "task=vision/classify",
    "model.dim=16",
    "model.depth=1",
    "model.heads=1",
    "model.dropout=0.1",
    "data.batch_size=16",
    "optim.ema_decay=0.9",
    "trainer.limit_train_batches=4",
    "trainer.limit_val_batches=2",
    "trainer.limit_test_batches=1",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=3",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "run.tensorboard=false",
]
Place = tuple[str, int, int]  # a hook, in which epoch, at which of its calls there
SAVED = ("state_dict", "optimizer_states", "lr_schedulers", "current_model_state", "global_step")


class PulledError(BaseException):
    """The end of the process, as near as a test in the same process comes to it."""


class PullThePlug(Callback):
    """Saves in a hook, as whoever stops a run does, and ends the run there."""

    def __init__(self, place: Place, path: Path) -> None:
        hook, self.epoch, self.call = place
        self.path, self.calls = path, 0
        setattr(self, hook, self.act)

    def act(self, trainer: Any, module: Any, *args: Any) -> None:
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if fitting and trainer.current_epoch == self.epoch:
            self.calls += 1
            if self.calls == self.call + 1:
                trainer.save_checkpoint(self.path)
                raise PulledError


def main(tokens: Sequence[str]) -> int:
    """suite.train's main; a token that comes later replaces an earlier one of the same key."""
    return entry(list({t.partition("=")[0]: t for t in tokens}.values()))


def cut(tokens: Sequence[str], run: str, place: Place) -> None:
    """Begin a run and break it off."""
    whole = suite.run.build_callbacks
    plug = PullThePlug(place, Path(run) / "checkpoints" / "last.ckpt")

    def with_plug(*args: Any, **kwargs: Any) -> list[Callback]:
        return [*whole(*args, **kwargs), plug]

    with patch("suite.run.build_callbacks", with_plug):
        try:
            code = main([*tokens, f"run.dir={run}"])
        except PulledError:
            return
    raise AssertionError(f"{place} was not reached, exit code {code}")


def cut_and_resumed(tokens: Sequence[str], run: str, place: Place, *more: str) -> str:
    """A run that was broken off and went on to its end; its folder."""
    cut(tokens, run, place)
    assert main([f"run.resume={run}", *more]) == 0
    return run


def logged(run: str | Path) -> dict[tuple[int, str], Any]:
    """The last value of each (step, name), but of those that a clock decides."""
    found = {}
    for line in (Path(run) / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if not name.startswith("throughput/"):
                found[row["step"], name] = value
    return found


def ended(run: str | Path) -> dict[str, Any]:
    """All that a run ends as."""
    folder = Path(run)
    last, best = (
        torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
        for name in ("last", "best")
    )
    result = json.loads((folder / "result.json").read_text())
    tracker = next(v for k, v in last["callbacks"].items() if "PrimaryTracker" in k)
    progress = {k: v for k, v in last["suite_progress"].items() if k != "metrics_bytes"}
    names = ("status", "primary", "metrics", "loss", "steps", "epochs")
    return {
        "last": {k: last[k] for k in SAVED if k in last},
        "best": best["state_dict"],
        "tracker": tracker,
        "progress": progress,
        "logged": logged(run),
        "result": {k: result[k] for k in names},
    }


def differences(a: Any, b: Any, *, where: str = "") -> list[str]:
    """Where two nested values differ, tensors bit by bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        found = [f"{where}: only one has {k}" for k in a.keys() ^ b.keys()]
        both = [k for k in a if k in b]
        return found + [x for k in both for x in differences(a[k], b[k], where=f"{where}/{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [x for i, (one, two) in pairs for x in differences(one, two, where=f"{where}/{i}")]
    return [] if a == b or (a != a and b != b) else [f"{where}: {a} and {b}"]


def assert_ended_alike(a: str | Path, b: str | Path) -> None:
    assert differences(ended(a), ended(b)) == []


if __name__ == "__main__":
    torch.set_num_threads(1)
    for command in json.loads(Path(sys.argv[1]).read_text()):
        tokens, pull = command["tokens"], command["pull"]
        if pull:
            cut(tokens, command["run"], tuple(pull))
        elif main(tokens):
            sys.exit(1)
