"""Build the embedded subset of Fashion-MNIST from Debian's package `dataset-fashion-mnist`.

    python -m scripts.build_fashion_mnist [FOLDER] [--out FILE]

The bytes repeat: the choice of images needs no random numbers
(`tasks.vision.arrays.content_order`), and the archive holds no time. Another zlib may compress to
other bytes of equal content, so both digests are printed; they belong in
tasks/vision/assets/DATA.md, the file's also in tasks/vision/fashion_mnist.py.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np

from suite.errors import ConfigError
from tasks.vision.arrays import Bytes, content_order
from tasks.vision.fashion_mnist import DEBIAN_ROOT, MINI_FILE, MINI_SIZES
from tasks.vision.idx import read_pair

MIDNIGHT_1980 = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip archive can hold


def choose(root: Path) -> dict[str, Bytes]:
    """The arrays of the subset.

    For each class the first 1,000 training images of `content_order` are train, the next 100 are
    val, and the first 100 test images are test; an image that was already taken is passed over.
    """
    pools = {part: read_pair(root, part, name="fashion_mnist") for part in ("train", "t10k")}
    orders = {pool: content_order(*arrays) for pool, arrays in pools.items()}
    taken: set[bytes] = set()
    chosen: dict[str, Bytes] = {}
    for split, pool in (("train", "train"), ("val", "train"), ("test", "t10k")):
        images, labels = pools[pool]
        index: list[int] = []
        for order in orders[pool]:
            fresh = iter(order)
            first = len(index)
            while len(index) - first < MINI_SIZES[split]:
                i = int(next(fresh))
                pixels = images[i].tobytes()
                if pixels not in taken:
                    taken.add(pixels)
                    index.append(i)
        index.sort(key=lambda i: hashlib.sha256(images[i].tobytes()).hexdigest())  # mix the classes
        chosen[f"{split}_images"], chosen[f"{split}_labels"] = images[index], labels[index]
    return chosen


def write(arrays: dict[str, Bytes], path: Path) -> None:
    """Write an .npz whose bytes are a function of the arrays (numpy's does not promise that)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            npy = io.BytesIO()
            np.lib.format.write_array(npy, array, version=(1, 0), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=MIDNIGHT_1980)
            entry.external_attr = 0o644 << 16
            entry.create_system = 3  # or zipfile writes the system that it runs on
            archive.writestr(
                entry, npy.getvalue(), compress_type=zipfile.ZIP_DEFLATED, compresslevel=9
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", nargs="?", type=Path, default=DEBIAN_ROOT, help="of the four .gz files"
    )
    parser.add_argument("--out", type=Path, default=MINI_FILE)
    options = parser.parse_args()
    try:
        arrays = choose(options.folder)
    except ConfigError as error:
        parser.error(str(error))
    write(arrays, options.out)
    content = hashlib.sha256(b"".join(array.tobytes() for array in arrays.values())).hexdigest()
    pixels = arrays["train_images"] / 255.0
    print(f"{options.out}: {options.out.stat().st_size:,} bytes")
    print(f"sha256 of the file     {hashlib.sha256(options.out.read_bytes()).hexdigest()}")
    print(f"sha256 of the arrays   {content}")
    print(f"train pixels           mean {pixels.mean():.6f}, standard deviation {pixels.std():.6f}")


if __name__ == "__main__":
    main()
