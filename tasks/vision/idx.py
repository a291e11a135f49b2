"""The idx files of MNIST and its kin, and MNIST itself (LeCun et al., 1998, Proc. IEEE 86).

Why not torchvision's reader: it wants the files unpacked below a folder of its own, and says little
of a damaged one. Here they may lie in the folder itself or where torchvision puts them, packed or
not, and each is checked before training starts. Only data.download=true goes through torchvision.
"""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from suite.data import Splits
from suite.errors import ConfigError
from tasks.vision.arrays import (
    ArrayDataOptions,
    Bytes,
    Pair,
    Published,
    content_hash,
    hold_out,
    make_splits,
    root_of,
    through_torchvision,
)

FILES = tuple(
    f"{part}-{what}.gz"
    for part in ("train", "t10k")
    for what in ("images-idx3-ubyte", "labels-idx1-ubyte")
)
SIDE = 28
CLASSES = 10
SIZES = {"train": 60_000, "t10k": 10_000}
VAL_PER_CLASS = 500

MNIST = Published(
    name="mnist",
    classes=tuple("0123456789"),
    license="CC BY-SA 3.0 (Yann LeCun and Corinna Cortes)",
    source="http://yann.lecun.com/exdb/mnist",
    mean=(0.1307,),
    std=(0.3081,),
)


@dataclass(frozen=True)
class MnistOptions(ArrayDataOptions):
    """Settings of MNIST. flip: off, for a mirrored digit is another sign."""

    flip: bool = False


def build_mnist(options: MnistOptions, *, seed: int) -> Splits:
    """MNIST: 55,000 / 5,000 / 10,000 images of 28 x 28. Raises ConfigError."""
    root = root_of(options, name="mnist", expected=expectation("MNIST"))
    return build_idx(root, "MNIST", about=MNIST, hint="", options=options, seed=seed)


def build_idx(
    root: Path,
    torchvision_name: str,
    *,
    about: Published,
    hint: str,
    options: ArrayDataOptions,
    seed: int,
) -> Splits:
    """The splits of one set of four idx files below `root`.

    torchvision_name: its class and folder in torchvision. hint: how else to get the files.
    """
    if options.download and missing_files(root, torchvision_name):
        download(root, torchvision_name, name=about.name)
    folder = find_folder(root, torchvision_name, name=about.name, hint=hint)
    train, test = (read_pair(folder, part, name=about.name, hint=hint) for part in SIZES)
    parts = hold_out(train, classes=CLASSES, per_class=VAL_PER_CLASS) | {"test": test}
    sha256 = content_hash(train, test)
    return make_splits(parts, about=about, sha256=sha256, options=options, seed=seed)


def download(root: Path, torchvision_name: str, *, name: str) -> None:
    """Let torchvision fetch the files. Raises ConfigError, one line, where it cannot."""
    from torchvision import datasets

    through_torchvision(
        lambda: getattr(datasets, torchvision_name)(str(root), download=True),
        name=name,
        root=root,
        expected=expectation(torchvision_name),
    )


def expectation(torchvision_name: str) -> str:
    """What a folder must hold, in words."""
    return f"{', '.join(FILES)} (packed or not), there or in {torchvision_name}/raw below it"


def file_of(folder: Path, name: str) -> Path | None:
    """The file `name`, or the one without .gz; None where there is neither."""
    paths = (folder / name, folder / name.removesuffix(".gz"))
    return next((path for path in paths if path.is_file()), None)


def missing_files(root: Path, torchvision_name: str) -> list[str]:
    """The files that neither `root` nor torchvision's folder below it holds."""
    folders = (root, root / torchvision_name / "raw")
    lists = [[name for name in FILES if file_of(folder, name) is None] for folder in folders]
    return min(lists, key=len)


def find_folder(root: Path, torchvision_name: str, *, name: str, hint: str) -> Path:
    """`root` or torchvision's folder below it, whichever holds all files. Raises ConfigError."""
    for folder in (root, root / torchvision_name / "raw"):
        if all(file_of(folder, file) is not None for file in FILES):
            return folder
    missing = ", ".join(missing_files(root, torchvision_name))
    what = f"has no {missing}" if root.is_dir() else "is not a folder"
    raise ConfigError(
        f"data={name}: {root} {what}; expected there: {expectation(torchvision_name)}. "
        f"{hint}Or set data.download=true to fetch them into data.root=FOLDER"
    )


def read_pair(folder: Path, part: str, *, name: str, hint: str = "") -> Pair:
    """The images [N, 28, 28] and labels [N] of `part`, "train" or "t10k". Raises ConfigError."""
    shapes = {"images-idx3-ubyte": (SIZES[part], SIDE, SIDE), "labels-idx1-ubyte": (SIZES[part],)}
    arrays = []
    for what, shape in shapes.items():
        path = file_of(folder, f"{part}-{what}.gz") or folder / f"{part}-{what}.gz"
        arrays.append(read_idx(path, shape=shape, name=name, hint=hint))
    pixels, labels = arrays
    if labels.max() >= CLASSES:
        raise ConfigError(
            f"data={name}: {path} holds label {labels.max()}, expected 0 to {CLASSES - 1}. {hint}"
        )
    return pixels, labels


def read_idx(path: Path, *, shape: tuple[int, ...], name: str, hint: str = "") -> Bytes:
    """The values of an idx file of unsigned bytes, gzipped if its name ends so.

    It is two zero bytes, type 8, the number of dimensions, each dimension as a big-endian 32-bit
    integer, then the values. Raises ConfigError unless it holds exactly `shape`.
    """
    start = f"data={name}: {path}"
    hint = hint or "Get the file again"
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            content = file.read(max(1 << 20, 2 * math.prod(shape)))  # of a bomb no more
    except (OSError, EOFError, zlib.error) as error:
        what = "is damaged or not gzip" if packed else "cannot be read"
        raise ConfigError(f"{start} {what} ({error}). {hint}") from None
    magic = bytes((0, 0, 8, len(shape)))
    header = len(magic) + 4 * len(shape)
    if content[:4] != magic or len(content) < header:
        raise ConfigError(
            f"{start} begins with {content[:4].hex() or 'nothing'}, "
            f"expected the idx header {magic.hex()}. {hint}"
        )
    found = tuple(int(n) for n in np.frombuffer(content, dtype=">u4", count=len(shape), offset=4))
    values = np.frombuffer(content, dtype=np.uint8, offset=header)
    if found != shape or values.size != np.prod(shape):
        raise ConfigError(
            f"{start} announces {found} and holds {values.size} values, expected {shape}. {hint}"
        )
    return values.reshape(shape)
