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
from tasks.dna.genome import GenomeOptions
from tasks.dna.labelled import LabelledOptions
from tasks.dna.tokens import PAD
from tasks.language.shakespeare import ShakespeareOptions
from tasks.language.tokens import IGNORE
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


@dataclass(frozen=True)
class FirstWindowsOptions(GenomeOptions):
    """The first `size` windows of each split of the yeast genome, some of them cut short."""

    size: int = 7


@dataclass(frozen=True)
class FirstSequencesOptions(LabelledOptions):
    """The first `size` sequences of each split, some of them cut short."""

    size: int = 7


class FirstCut(First):
    """The first rows of a split; every third loses its end, so that batches hold padding."""

    def fetch(self, indices: list[int], *, epoch: int, train: bool) -> dict[str, torch.Tensor]:
        batch = super().fetch(indices, epoch=epoch, train=train)
        for row, index in enumerate(indices):
            if index % 3 == 0:
                batch["ids"][row, 20 + index :] = PAD
        return batch


@dataclass(frozen=True)
class FirstTextOptions(ShakespeareOptions):
    """The first `size` rows of each split of the plays, some of them cut short."""

    size: int = 7


class FirstText(First):
    """The first rows of a split; every third asks for its beginning alone, as a padded one does."""

    def fetch(self, indices: list[int], *, epoch: int, train: bool) -> dict[str, torch.Tensor]:
        batch = super().fetch(indices, epoch=epoch, train=train)
        for row, index in enumerate(indices):
            if index % 3 == 0:
                batch["target"][row, 5 + index :] = IGNORE
        return batch


def build_first_text(options: FirstTextOptions, *, seed: int, build: Any) -> Splits:
    whole = build(options, seed=seed)
    sizes = dict.fromkeys(("train", "val", "test"), options.size)
    info = replace(whole.info, name="first", sizes=sizes)
    return Splits(*(FirstText(getattr(whole, name), options.size) for name in sizes), info)


def build_first_rows(options: Any, *, seed: int, build: Any, extra: Any) -> Splits:
    whole = build(options, seed=seed)
    sizes = dict.fromkeys(("train", "val", "test"), options.size)
    info = replace(whole.info, name="first", sizes=sizes, extra={**whole.info.extra, **extra})
    return Splits(*(FirstCut(getattr(whole, name), options.size) for name in sizes), info)


if __name__ == "__main__":
    torch.set_num_threads(1)
    table = load_task("vision/classify").data
    table["first"] = Choice(FirstOptions(), build_first, "the first images")  # type: ignore[index]
    for task in ("speech/pretrain", "speech/ctc"):
        table = load_task(task).data
        build = partial(build_first_clips, build=next(iter(table.values())).build)
        table["first"] = Choice(FirstClipsOptions(), build, "the first clips")  # type: ignore[index]
    for task, options in (
        ("dna/pretrain", FirstWindowsOptions(length=48)),
        ("dna/classify", FirstSequencesOptions()),
    ):
        table = load_task(task).data
        first = next(iter(table.values())).build
        build = partial(build_first_rows, build=first, extra={"padded": True})
        table["first"] = Choice(options, build, "the first rows")  # type: ignore[index]
    table = load_task("language/lm").data
    build = partial(build_first_text, build=next(iter(table.values())).build)
    table["first"] = Choice(FirstTextOptions(length=48), build, "the first rows")  # type: ignore[index]
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        code = main(arguments)
        if code:
            sys.exit(code)
