"""Build the embedded splice junctions from Debian's package `r-cran-mlbench`.

    apt-get download r-cran-mlbench && dpkg-deb -x r-cran-mlbench_*.deb mlbench
    pip install rdata
    python -m scripts.build_splice_junctions \
        mlbench/usr/lib/R/site-library/mlbench/data/DNA.rda [--out FILE]

DNA.rda has the 3,186 rows of StatLog's DNA: 180 binary columns, three for each of 60 bases, and the
class. The bytes repeat: the archive holds no time. Another zlib may compress to other bytes of
equal content, so both digests are printed; they belong in tasks/dna/assets/DATA.md, the file's also
in tasks/dna/splice.py.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import warnings
import zipfile
from pathlib import Path

import numpy as np

from tasks.dna.splice import CLASSES, FILE, LENGTH, SIZES

CODES = {(1, 0, 0): "A", (0, 1, 0): "C", (0, 0, 1): "G", (0, 0, 0): "T"}  # StatLog's, of a base
COUNTS = {"train": (464, 485, 1051), "test": (303, 280, 603)}  # of the classes, as published
MIDNIGHT_1980 = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip archive can hold


def read(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """The letters as bytes [3186, 60] and the classes [3186] of DNA.rda."""
    import rdata  # needed here alone

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the file does not say that it is ASCII
        table = rdata.read_rda(file)["DNA"]
    columns = [f"V{i}" for i in range(1, 3 * LENGTH + 1)]
    bits = table[columns].astype(str).astype(np.uint8).to_numpy().reshape(-1, LENGTH, 3)
    letters = np.zeros(bits.shape[:2], np.uint8)
    for code, letter in CODES.items():
        letters[(bits == code).all(axis=2)] = ord(letter)
    assert letters.all(), "a code that is no base"
    labels = [CLASSES.index(name) for name in table["Class"].astype(str)]
    return letters, np.array(labels, np.uint8)


def divide(letters: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of the asset: StatLog's training rows come first."""
    arrays, first = {}, 0
    for split, size in SIZES.items():
        rows = slice(first, first + size)
        counts = tuple(np.bincount(labels[rows], minlength=len(CLASSES)).tolist())
        assert counts == COUNTS[split], f"{split} has {counts} of the classes"
        arrays[f"{split}_letters"], arrays[f"{split}_labels"] = letters[rows], labels[rows]
        first += size
    assert first == len(labels), f"{len(labels)} rows"
    return arrays


def write(arrays: dict[str, np.ndarray], path: Path) -> None:
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
    parser.add_argument("file", type=Path, help="DNA.rda")
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args()
    arrays = divide(*read(options.file))
    write(arrays, options.out)
    content = hashlib.sha256(b"".join(array.tobytes() for array in arrays.values())).hexdigest()
    print(f"{options.out}: {options.out.stat().st_size:,} bytes")
    print(f"sha256 of the file     {hashlib.sha256(options.out.read_bytes()).hexdigest()}")
    print(f"sha256 of the arrays   {content}")


if __name__ == "__main__":
    main()
