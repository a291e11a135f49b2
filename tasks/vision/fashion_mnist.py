"""Fashion-MNIST (Xiao et al., arXiv 1708.07747): 28 x 28 photographs of clothes, in 10 classes.

`fashion_mnist_mini` is a balanced subset that ships inside the package, so that the default run
needs no download; `fashion_mnist` is the whole set, with the published 10,000 test images, from
Debian's package or any folder that holds the four published files. Nothing here is unpickled, and
every file is checked before training starts.

Shapes: B examples of a batch, N examples of a split; images are uint8 until they are fetched.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from suite.data import DataInfo, DataOptions, Splits
from suite.errors import ConfigError
from suite.randomness import uniform
from suite.registry import Choice

Bytes = npt.NDArray[np.uint8]

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
SIDE = 28
LICENSE = "MIT (Copyright 2017 Zalando SE)"
SOURCE = "https://github.com/zalandoresearch/fashion-mnist"

MINI_FILE = Path(__file__).parent / "assets" / "fashion_mnist_mini.npz"
MINI_SHA256 = "c33887b9f5349ff4d5ee9b777b645b5beddea6065d9df5782d6c71d0b674ae7c"
MINI_SIZES = {"train": 1000, "val": 100, "test": 100}  # a class

DEBIAN_ROOT = Path("/usr/share/datasets/fashion-mnist")
FULL_SIZES = {"train": 60_000, "t10k": 10_000}
FULL_VAL_PER_CLASS = 500

# Mean and standard deviation of the pixels of each train split, as shares of 255.
MINI_PIXELS = (0.285666, 0.352462)
FULL_PIXELS = (0.286092, 0.353046)


@dataclass(frozen=True)
class VisionDataOptions(DataOptions):
    """Settings of an image data set.

    flip: mirror half of the training images, other ones each epoch.
    """

    flip: bool = True


@dataclass(frozen=True)
class FashionMnistOptions(VisionDataOptions):
    """Settings of the full set.

    root: the folder of the four .gz files; None: where Debian's package puts them.
    """

    root: str | None = None


class ImageSplit:
    """One split in memory.

    images: [N, 28, 28] uint8; labels: [N] uint8; pixels: mean and standard deviation of the train
    split's pixels, as shares of 255.
    """

    def __init__(
        self,
        images: Bytes,
        labels: Bytes,
        *,
        pixels: tuple[float, float],
        flip: bool,
        seed: int,
    ) -> None:
        self.images = torch.tensor(images)
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.mean, self.std = pixels
        self.flip, self.seed = flip, seed

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: list[int], *, epoch: int, train: bool) -> dict[str, Tensor]:
        """{"image": [B, 1, 28, 28] float32, standardised, "label": [B] int64}.

        In training, whether an image is mirrored is a function of (seed, epoch, index) alone.
        """
        ids = torch.tensor(indices, dtype=torch.int64)
        image = self.images[ids].float().div_(255).sub_(self.mean).div_(self.std).unsqueeze(1)
        if train and self.flip:
            mirrored = uniform(self.seed, "flip", epoch, ids=ids)[:, 0] < 0.5
            image = torch.where(mirrored[:, None, None, None], image.flip(-1), image)
        return {"image": image, "label": self.labels[ids]}


def build_mini(options: VisionDataOptions, *, seed: int) -> Splits:
    """The embedded subset: 10,000 / 1,000 / 1,000 images; assets/DATA.md says how they were chosen.

    Raises ConfigError if the file in the package is missing or not the one that was shipped.
    """
    arrays = read_mini(MINI_FILE)
    parts = {split: (arrays[f"{split}_images"], arrays[f"{split}_labels"]) for split in MINI_SIZES}
    return make_splits(
        parts,
        name="fashion_mnist_mini",
        sha256=MINI_SHA256,
        pixels=MINI_PIXELS,
        options=options,
        seed=seed,
    )


def build_full(options: FashionMnistOptions, *, seed: int) -> Splits:
    """All images: 55,000 / 5,000 / 10,000. The validation images are 500 of each class.

    Raises ConfigError if the folder or a file in it is missing or damaged.
    """
    root = Path(options.root).expanduser() if options.root is not None else DEBIAN_ROOT
    images, labels = read_idx_pair(root, "train")
    test = read_idx_pair(root, "t10k")
    val = np.concatenate([order[-FULL_VAL_PER_CLASS:] for order in content_order(images, labels)])
    is_val = np.zeros(len(labels), dtype=bool)
    is_val[val] = True
    parts = {
        "train": (images[~is_val], labels[~is_val]),
        "val": (images[is_val], labels[is_val]),
        "test": test,
    }
    digest = hashlib.sha256(b"".join((root / name).read_bytes() for name in FILES))
    return make_splits(
        parts,
        name="fashion_mnist",
        sha256=digest.hexdigest(),
        pixels=FULL_PIXELS,
        options=options,
        seed=seed,
    )


def make_splits(
    parts: dict[str, tuple[Bytes, Bytes]],
    *,
    name: str,
    sha256: str,
    pixels: tuple[float, float],
    options: VisionDataOptions,
    seed: int,
) -> Splits:
    """Splits and DataInfo of (images, labels) by split name."""
    made = {
        split: ImageSplit(images, labels, pixels=pixels, flip=options.flip, seed=seed)
        for split, (images, labels) in parts.items()
    }
    info = DataInfo(
        name=name,
        license=LICENSE,
        source=SOURCE,
        sha256=sha256,
        synthetic=False,
        sizes={split: len(part) for split, part in made.items()},
        classes=len(CLASSES),
        extra={"image_size": SIDE, "in_chans": 1, "class_names": CLASSES},
    )
    return Splits(train=made["train"], val=made["val"], test=made["test"], info=info)


def content_order(images: Bytes, labels: Bytes) -> list[npt.NDArray[np.int64]]:
    """For each class, the indices of its images in the order of SHA-256 of their pixels.

    A fixed shuffle that needs no random numbers, so it is the same with every library version, and
    equal images are neighbours in it. The embedded subset takes its images from the front, the full
    set its validation images from the back.
    """
    keys = np.array([hashlib.sha256(image.tobytes()).hexdigest() for image in images])
    order = np.argsort(keys, kind="stable")
    return [order[labels[order] == label] for label in range(len(CLASSES))]


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


FILES = tuple(
    f"{part}-{kind}-ubyte.gz"
    for part in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)
GET_IT = (
    "Get it with `apt install dataset-fashion-mnist`, name its folder with data.root=FOLDER, "
    "or take the embedded subset: data=fashion_mnist_mini"
)


def read_idx_pair(root: Path, part: str) -> tuple[Bytes, Bytes]:
    """The images [N, 28, 28] and labels [N] of `part`, "train" or "t10k". Raises ConfigError."""
    missing = [name for name in FILES if not (root / name).is_file()]
    if missing:
        what = f"has no {', '.join(missing)}" if root.is_dir() else "is not a folder"
        raise ConfigError(
            f"data=fashion_mnist: {root} {what}; expected there: {', '.join(FILES)}. {GET_IT}"
        )
    pixels = read_idx(root / f"{part}-images-idx3-ubyte.gz", shape=(FULL_SIZES[part], SIDE, SIDE))
    labels = read_idx(root / f"{part}-labels-idx1-ubyte.gz", shape=(FULL_SIZES[part],))
    if labels.max() >= len(CLASSES):
        raise ConfigError(
            f"data=fashion_mnist: {root / part}-labels-idx1-ubyte.gz holds label {labels.max()}, "
            f"expected 0 to {len(CLASSES) - 1}. {GET_IT}"
        )
    return pixels, labels


def read_idx(path: Path, *, shape: tuple[int, ...]) -> Bytes:
    """The values of a gzipped idx file of unsigned bytes, the format of MNIST.

    It is two zero bytes, type 8, the number of dimensions, each dimension as a big-endian 32-bit
    integer, then the values. Raises ConfigError unless it holds exactly `shape`.
    """
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(
            f"data=fashion_mnist: {path} is damaged or not gzip ({error}). {GET_IT}"
        ) from None
    magic = bytes((0, 0, 8, len(shape)))
    header = len(magic) + 4 * len(shape)
    if content[:4] != magic or len(content) < header:
        raise ConfigError(
            f"data=fashion_mnist: {path} begins with {content[:4].hex() or 'nothing'}, "
            f"expected the idx header {magic.hex()}. {GET_IT}"
        )
    found = tuple(int(n) for n in np.frombuffer(content, dtype=">u4", count=len(shape), offset=4))
    values = np.frombuffer(content, dtype=np.uint8, offset=header)
    if found != shape or values.size != np.prod(shape):
        raise ConfigError(
            f"data=fashion_mnist: {path} announces {found} and holds {values.size} values, "
            f"expected {shape}. {GET_IT}"
        )
    return values.reshape(shape)


DATA = {
    "fashion_mnist_mini": Choice(
        VisionDataOptions(), build_mini, "10,000 / 1,000 / 1,000 images, inside the package"
    ),
    "fashion_mnist": Choice(
        FashionMnistOptions(), build_full, "55,000 / 5,000 / 10,000 images, from data.root"
    ),
}
