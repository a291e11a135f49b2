"""Runs several command lines in one process (or one of several), on the first N real images.

usage: worker.py COMMANDS.json, a list of argument lists. Started by test_ddp.py with the
environment that torchrun would give.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from suite.data import Splits
from suite.registry import Choice, load_task
from suite.train import main
from tasks.speech.split import AudioOptions, AudioSplit
from tasks.vision.augment import VisionDataOptions
from tasks.vision.fashion_mnist import build_mini


@dataclass(frozen=True)
class FirstOptions(VisionDataOptions):
    """The first `size` images of each split."""

    size: int = 7


class First:
    """The first images of a split."""

    def __init__(self, split, size: int) -> None:  # type: ignore[no-untyped-def]
        self.split, self.size = split, size

    def __len__(self) -> int:
        return self.size

    def fetch(self, indices: list[int], *, epoch: int, train: bool) -> dict[str, torch.Tensor]:
        return self.split.fetch(indices, epoch=epoch, train=train)


def build_first(options: FirstOptions, *, seed: int) -> Splits:
    whole = build_mini(options, seed=seed)
    n = options.size
    sizes = dict.fromkeys(("train", "val", "test"), n)
    info = replace(whole.info, name="first", sizes=sizes)
    return Splits(First(whole.train, n), First(whole.val, n), First(whole.test, n), info)


@dataclass(frozen=True)
class FirstClipsOptions(AudioOptions):
    """The first `size` clips of each split."""

    size: int = 7


def build_first_clips(options: FirstClipsOptions, *, seed: int, build: Any) -> Splits:
    whole = build(options, seed=seed)
    words = whole.train.vocabulary is not None
    parts = {}
    for name in ("train", "val", "test"):
        split = getattr(whole, name)
        parts[name] = AudioSplit(
            split.clips,
            split.places[: options.size],
            name="first",
            options=options,
            seed=seed,
            train=name == "train",
            words=words,
        )
    sizes = dict.fromkeys(parts, options.size)
    return Splits(**parts, info=replace(whole.info, name="first", sizes=sizes))


if __name__ == "__main__":
    torch.set_num_threads(1)
    table = load_task("vision/classify").data
    table["first"] = Choice(FirstOptions(), build_first, "the first images")  # type: ignore[index]
    for task in ("speech/pretrain", "speech/ctc"):
        table = load_task(task).data
        build = partial(build_first_clips, build=next(iter(table.values())).build)
        table["first"] = Choice(FirstClipsOptions(), build, "the first clips")  # type: ignore[index]
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        code = main(arguments)
        if code:
            sys.exit(code)
