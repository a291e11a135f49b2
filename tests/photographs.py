"""Folders of small real photographs (the embedded Fashion-MNIST images as JPEGs) for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tasks.vision.fashion_mnist import MINI_FILE, read_mini

NAMES = ("ankle_boot", "bag", "coat", "dress")
LABELS = (9, 8, 4, 3)


def photographs(label: int, count: int, *, split: str = "train") -> list[Image.Image]:
    """RGB images of one class, 48 x 40, tinted so that the channels differ."""
    arrays = read_mini(MINI_FILE)
    images = arrays[f"{split}_images"][arrays[f"{split}_labels"] == label][:count]
    found = []
    for k, grey in enumerate(images):
        wide = np.asarray(Image.fromarray(grey).resize((48, 40)))
        tint = np.array([1.0, 0.9 - 0.02 * (k % 5), 0.8])
        found.append(Image.fromarray((wide[:, :, None] * tint).astype(np.uint8)))
    return found


def write_tree(
    root: Path,
    *,
    train: int = 16,
    val: int = 6,
    classes: int = 4,
    broken: Sequence[str] = (),
) -> Path:
    """root/{train,val}/<class>/<k>.jpg; `broken` files ("train/bag/3.jpg") hold text instead."""
    for split, count in (("train", train), ("val", val)):
        for name, label in list(zip(NAMES, LABELS, strict=True))[:classes]:
            folder = root / split / name
            folder.mkdir(parents=True)
            for k, image in enumerate(photographs(label, count, split=split)):
                image.save(folder / f"{k}.jpg", quality=90)
    for path in broken:
        (root / path).write_text("this is not an image")
    return root
