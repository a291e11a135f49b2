"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): 32 x 32 colour photographs in 10 or 100 classes.

Read through torchvision, which checks the MD5 of every file before it unpickles it: the published
files are pickles, so a changed one must not be opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from suite.data import Splits
from suite.errors import ConfigError
from tasks.vision.arrays import (
    ArrayDataOptions,
    Pair,
    Published,
    content_hash,
    hold_out,
    make_splits,
    root_of,
    through_torchvision,
)

LICENSE = "none stated by its authors; cite Krizhevsky, 2009"
SOURCE = "https://www.cs.toronto.edu/~kriz/cifar.html"
TRAIN_SIZE = 50_000
VAL_SHARE = 10  # one in so many training images of a class is held out: 500, or 50 of CIFAR-100

# Mean and standard deviation of the training pixels, as they are usually given.
PIXELS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def build_cifar10(options: ArrayDataOptions, *, seed: int) -> Splits:
    """CIFAR-10: 45,000 / 5,000 / 10,000 images. Raises ConfigError."""
    return build(options, name="cifar10", folder="cifar-10-batches-py", seed=seed)


def build_cifar100(options: ArrayDataOptions, *, seed: int) -> Splits:
    """CIFAR-100 with its fine labels: 45,000 / 5,000 / 10,000 images. Raises ConfigError."""
    return build(options, name="cifar100", folder="cifar-100-python", seed=seed)


def build(options: ArrayDataOptions, *, name: str, folder: str, seed: int) -> Splits:
    """The splits of one of the two sets."""
    expected = f"{folder}/ as the published archive unpacks it"
    root = root_of(options, name=name, expected=expected)

    def read() -> tuple[Any, Any]:
        from torchvision import datasets

        made = getattr(datasets, name.upper())
        train = made(str(root), train=True, download=options.download)
        return train, made(str(root), train=False)

    both = through_torchvision(read, name=name, root=root, expected=expected)
    train, test = (pair(part) for part in both)
    mean, std = PIXELS[name]
    about = Published(name, tuple(both[0].classes), LICENSE, SOURCE, mean, std)
    classes = len(about.classes)
    counts = np.bincount(train[1], minlength=classes)
    if len(train[1]) != TRAIN_SIZE or len(set(counts)) != 1:
        raise ConfigError(
            f"data={name}: {Path(root) / folder} holds {len(train[1]):,} training images, expected "
            f"{TRAIN_SIZE:,}, equally many of each class. Unpack the published archive again"
        )
    per_class = int(counts[0]) // VAL_SHARE
    parts = hold_out(train, classes=classes, per_class=per_class) | {"test": test}
    return make_splits(
        parts, about=about, sha256=content_hash(train, test), options=options, seed=seed
    )


def pair(dataset: Any) -> Pair:
    """Images [N, 32, 32, 3] and labels [N] of a torchvision CIFAR."""
    return np.ascontiguousarray(dataset.data), np.asarray(dataset.targets, dtype=np.uint8)
