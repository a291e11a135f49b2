"""Damaged files of every kind: read, or refused in one line; never anything else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis.strategies as st
import pytest
from fuzzing import GIB, check_refusal, forked, fuzz, left_in, refused_or
from hypothesis import event, given
from mutate import damaged
from readable import SOURCES, UNUSABLE

from suite.errors import ConfigError

pytestmark = pytest.mark.timeout(1800)
SECONDS = 60.0  # far above what reading takes; a hang is killed


@dataclass(frozen=True)
class Place:
    """A folder of good files, what reads it, and the files."""

    kind: str
    root: Path
    read: Callable[[], None]
    files: list[str]


@pytest.fixture(scope="module", params=list(SOURCES))
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    source = SOURCES[request.param]
    root = tmp_path_factory.mktemp("suite-fuzz-files")
    source.write(root)
    before = left_in(root)
    read = source.reader(root)
    if request.param in UNUSABLE:
        with pytest.raises(ConfigError):
            read()
    else:
        read()  # it imports what the children then need not
    names = left_in(root) if source.cached else before
    return Place(request.param, root, read, [name for name in names if (root / name).is_file()])


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@fuzz(0.15)
@given(st.data())
def test_a_damaged_file_is_read_or_refused_in_one_line(place: Place, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(place.files))
    good = (place.root / name).read_bytes()
    content = data.draw(st.one_of(damaged(good), damaged(good), st.binary(max_size=100)))
    check(place, name, content)


@fuzz(0.02)
@given(st.data())
def test_a_file_of_another_kind_is_read_or_refused_in_one_line(
    place: Place, data: st.DataObject
) -> None:
    name, other = data.draw(st.tuples(*[st.sampled_from(place.files)] * 2))
    check(place, name, (place.root / other).read_bytes())


def check(place: Place, name: str, content: bytes) -> None:
    """Read the folder with another content in one of its files."""
    before = left_in(place.root)
    with replaced(place.root / name, content):
        ended = forked(lambda: refused_or(place.read), seconds=SECONDS, memory=4 * GIB)
    event(f"exit {ended.code}")
    if ended.code:
        check_refusal(ended, allowed=(1, 2))
    else:
        assert not ended.errors, ended.err
    assert [x for x in left_in(place.root) if x not in before and not kept(x)] == []


def kept(name: str) -> bool:
    """Whether it is an index or a cache, which a start may leave."""
    return name == "kept" or name.startswith("kept/") or name.endswith(".fai")


@pytest.fixture(autouse=True)
def _indices_go(place: Place) -> Iterator[None]:
    yield
    for name in left_in(place.root):
        if kept(name) and (place.root / name).is_file() and name not in place.files:
            (place.root / name).unlink()


class replaced:
    """A file with another content meanwhile; afterwards its own, with its own time."""

    def __init__(self, file: Path, content: bytes) -> None:
        self.file, self.content = file, content

    def __enter__(self) -> None:
        self.good, status = self.file.read_bytes(), self.file.stat()
        self.times = (status.st_atime_ns, status.st_mtime_ns)
        self.file.write_bytes(self.content)
        if self.content[:1] == self.good[:1]:  # half of them as if nobody had noticed
            os.utime(self.file, ns=self.times)

    def __exit__(self, *_: object) -> None:
        self.file.write_bytes(self.good)
        os.utime(self.file, ns=self.times)
