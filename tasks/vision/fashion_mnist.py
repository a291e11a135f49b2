"""Fashion-MNIST (Xiao et al., arXiv 1708.07747): 28 x 28 photographs of clothes, in 10 classes.

`fashion_mnist_mini` is a balanced subset that ships inside the package, so that the default run
needs no download; `fashion_mnist` is the whole set, with the published 10,000 test images, from
Debian's package or any folder that holds the four published files. Nothing here is unpickled, and
every file is checked before training starts.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from suite.data import Splits
from suite.errors import ConfigError
from tasks.vision.arrays import ArrayDataOptions, Bytes, Published, make_splits
from tasks.vision.augment import VisionDataOptions
from tasks.vision.idx import build_idx

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

MINI_FILE = Path(__file__).parent / "assets" / "fashion_mnist_mini.npz"
MINI_SHA256 = "c33887b9f5349ff4d5ee9b777b645b5beddea6065d9df5782d6c71d0b674ae7c"
MINI_SIZES = {"train": 1000, "val": 100, "test": 100}  # a class

DEBIAN_ROOT = Path("/usr/share/datasets/fashion-mnist")

# Mean and standard deviation of the pixels of each train split, as shares of 255.
MINI_PIXELS = (0.285666, 0.352462)
FULL_PIXELS = (0.286092, 0.353046)

FULL = Published(
    name="fashion_mnist",
    classes=CLASSES,
    license="MIT (Copyright 2017 Zalando SE)",
    source="https://github.com/zalandoresearch/fashion-mnist",
    mean=FULL_PIXELS[:1],
    std=FULL_PIXELS[1:],
)
MINI = replace(FULL, name="fashion_mnist_mini", mean=MINI_PIXELS[:1], std=MINI_PIXELS[1:])

GET_IT = (
    "Get it with `apt install dataset-fashion-mnist`, name its folder with data.root=FOLDER, "
    "or take the embedded subset: data=fashion_mnist_mini. "
)


@dataclass(frozen=True)
class FashionMnistOptions(ArrayDataOptions):
    """Settings of the full set.

    root: the folder of the four files; None: where Debian's package puts them.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.download and self.root is None:
            raise ValueError("download needs root=FOLDER, where the files are to be put")


def build_mini(options: VisionDataOptions, *, seed: int) -> Splits:
    """The embedded subset: 10,000 / 1,000 / 1,000 images; assets/DATA.md says how they were chosen.

    Raises ConfigError if the file in the package is missing or not the one that was shipped.
    """
    arrays = read_mini(MINI_FILE)
    parts = {split: (arrays[f"{split}_images"], arrays[f"{split}_labels"]) for split in MINI_SIZES}
    return make_splits(parts, about=MINI, sha256=MINI_SHA256, options=options, seed=seed)


def build_full(options: FashionMnistOptions, *, seed: int) -> Splits:
    """All images: 55,000 / 5,000 / 10,000. The validation images are 500 of each class.

    Raises ConfigError if the folder or a file in it is missing or damaged.
    """
    root = Path(options.root).expanduser() if options.root is not None else DEBIAN_ROOT
    return build_idx(root, "FashionMNIST", about=FULL, hint=GET_IT, options=options, seed=seed)


def read_mini(path: Path) -> dict[str, Bytes]:
    """The arrays of the embedded file, after its SHA-256 is checked. Raises ConfigError."""
    wanted = "data=fashion_mnist_mini: "
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(
            f"{wanted}{path} cannot be read ({error.strerror}). Install dyt-suite again"
        ) from None
    if found != MINI_SHA256:
        raise ConfigError(
            f"{wanted}{path} is not the file that was shipped (its sha256 is {found[:12]}..., "
            f"expected {MINI_SHA256[:12]}...). Install dyt-suite again"
        )
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
