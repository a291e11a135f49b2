"""Checkpoint files: what is written, what verifies, and that nothing half-written takes a name."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from suite import saving
from suite.errors import ConfigError, DataError
from suite.reference import peak, restart_peak
from suite.saving import CheckpointFiles, SaveError, newest, problem, sweep_unfinished

torch.set_num_threads(1)


def content(step: int, *, numbers: int = 1000) -> dict[str, Any]:
    """A checkpoint of tensors of several kinds, whose values follow from its step."""
    generator = torch.Generator().manual_seed(step)
    shared = torch.randn(numbers, generator=generator)
    return {
        "global_step": step,
        "state_dict": {"a": shared, "b": shared[: numbers // 2], "c": torch.tensor(step)},
        "half": torch.ones(3, dtype=torch.bfloat16),
        "plain": [1.5, "text", None, (1, 2)],
    }


def save(path: Path, step: int, **options: int) -> None:
    CheckpointFiles().save_checkpoint(content(step, **options), path)


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    else:
        assert found == expected


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def last(tmp_path: Path) -> Path:
    """last.ckpt of a run, of step 7."""
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    save(path, 7)
    return path


# -- what is written -------------------------------------------------------------------------------


def test_a_file_holds_what_torch_save_writes(last: Path, tmp_path: Path) -> None:
    torch.save(content(7), tmp_path / "torch.ckpt")
    expected = torch.load(tmp_path / "torch.ckpt", weights_only=True)
    assert_same(torch.load(last, weights_only=True), expected)
    assert_same(CheckpointFiles().load_checkpoint(last), expected)
    assert problem(tmp_path / "torch.ckpt") is None


def test_tensors_that_share_memory_share_it_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save(path, 1, numbers=100_000)
    assert path.stat().st_size < 1.1 * 400_000
    assert saving.size_of(content(1, numbers=100_000)) == 400_000 + 8 + 6


def test_the_sidecar_says_size_hash_and_step(last: Path) -> None:
    said = json.loads((last.parent / "last.ckpt.json").read_text())
    whole = last.read_bytes()
    assert said == {
        "sha256": [hashlib.sha256(whole).hexdigest()],
        "bytes": [len(whole)],
        "step": 7,
    }


def test_large_tensors_are_hashed_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save(path, 1, numbers=3 * saving.BLOCK // 4 + 5)
    assert problem(path) is None


def test_only_the_file_and_its_sidecar_are_there_afterwards(last: Path) -> None:
    save(last, 8)
    save(last.parent / "best.ckpt", 8)
    run = last.parent.parent
    names = {"last.ckpt", "last.ckpt.json", "best.ckpt", "best.ckpt.json"}
    assert files(run) == {f"checkpoints/{name}" for name in names}
    assert not (run / ".tmp").exists()


def test_nothing_is_written_where_tmpdir_is(
    last: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "not there"))
    save(last, 9)
    assert problem(last) is None


def test_a_file_outside_a_folder_of_checkpoints_is_written_beside_its_name(tmp_path: Path) -> None:
    """As Lightning's hpc_ckpt_1.ckpt is."""
    save(tmp_path / "hpc_ckpt_1.ckpt", 3)
    assert files(tmp_path) == {"hpc_ckpt_1.ckpt", "hpc_ckpt_1.ckpt.json"}


def test_a_folder_of_checkpoints_may_be_a_link_to_another_disk(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk")
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert saving.drafts_folder(path) == path.parent
    save(path, 1)
    save(path, 2)
    assert problem(path) is None
    assert files(tmp_path) == {"disk/last.ckpt", "disk/last.ckpt.json"}


def test_a_checkpoint_is_removed_with_its_sidecar(last: Path) -> None:
    for _ in range(2):
        CheckpointFiles().remove_checkpoint(str(last))
        assert files(last.parent) == set()


def added_to_the_peak(save: Callable[[], Any]) -> int:
    """Bytes that a call adds to what this process holds, at its peak."""
    cpu = torch.device("cpu")
    before = restart_peak(cpu)
    save()
    return peak(cpu) - before


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be read again here"
)
def test_saving_holds_no_second_copy_in_memory(last: Path) -> None:
    """Lightning's own writer builds one in a BytesIO, as the first save here does."""
    values = {str(k): torch.ones(1 << 20) for k in range(16)}
    size = 64 << 20
    assert added_to_the_peak(lambda: torch.save(values, io.BytesIO())) > 0.9 * size
    ours = added_to_the_peak(lambda: CheckpointFiles().save_checkpoint(values, last))
    assert ours < size / 8
    assert problem(last) is None


# -- what verifies ---------------------------------------------------------------------------------


def flip(path: Path, *, at: int) -> None:
    whole = bytearray(path.read_bytes())
    whole[at] ^= 1
    path.write_bytes(whole)


def test_a_flipped_bit_is_found(last: Path) -> None:
    for at in (0, last.stat().st_size // 2, last.stat().st_size - 1):
        flip(last, at=at)
        assert problem(last) == "its sha256 is not the one in last.ckpt.json"
        flip(last, at=at)
    assert problem(last) is None


def test_a_truncated_file_is_found(last: Path) -> None:
    size = last.stat().st_size
    os.truncate(last, size - 1)
    assert problem(last) == f"it has {size - 1} bytes, where last.ckpt.json says {size}"
    os.truncate(last, 0)
    assert "it has 0 bytes" in str(problem(last))


def test_a_missing_file_is_said(last: Path) -> None:
    last.unlink()
    assert problem(last) == "no such file"
    assert problem(last.parent) == "no such file"


def test_the_sidecar_of_another_file_does_not_verify(last: Path) -> None:
    save(last.parent / "best.ckpt", 8)
    shutil.copy(last.parent / "best.ckpt.json", last.parent / "last.ckpt.json")
    assert problem(last) == "its sha256 is not the one in last.ckpt.json"


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "null", "[]", "{}", "\x00", "[" * 100_000, '{"sha256": "a", "bytes": "b"}'),
        *('{"sha256": [], "bytes": []}', '{"sha256": ["a"], "bytes": []}', '{"sha256": ["a"]}'),
    ],
    ids=lambda text: text[:20],
)
def test_a_damaged_sidecar_is_the_reason(last: Path, text: str) -> None:
    sidecar = last.parent / "last.ckpt.json"
    sidecar.write_text(text)
    reason = problem(last)
    assert reason is not None
    assert reason.startswith("last.ckpt.json is damaged")
    assert "\n" not in reason
    assert newest(last.parent) == (None, [(last, reason)])
    save(last, 9)  # and the next save puts it right
    assert problem(last) is None


def test_without_a_sidecar_the_checksums_of_the_zip_decide(last: Path) -> None:
    (last.parent / "last.ckpt.json").unlink()
    assert problem(last) is None
    whole = last.read_bytes()
    values = content(7)["state_dict"]["a"].numpy().tobytes()
    flip(last, at=whole.index(values) + 40)
    assert "no sidecar" in str(problem(last))
    last.write_bytes(whole[: len(whole) // 2])
    assert "no sidecar" in str(problem(last))
    last.write_bytes(b"")
    assert "no sidecar" in str(problem(last))


def test_verifying_reads_no_tensor_and_runs_nothing(last: Path) -> None:
    """A pickle that would print when it is loaded verifies as a file, and does not print."""

    class Evil:
        def __reduce__(self) -> Any:
            return print, ("executed",)

    CheckpointFiles().save_checkpoint({"evil": Evil()}, last)
    assert problem(last) is None
    with pytest.raises(ConfigError, match="not a readable checkpoint of tensors and plain"):
        CheckpointFiles().load_checkpoint(last, weights_only=False)


# -- the newest ------------------------------------------------------------------------------------


def test_the_newest_is_the_one_with_the_highest_step(last: Path) -> None:
    assert newest(last.parent.parent) == (last, [])
    save(last.parent / "best.ckpt", 9)
    assert newest(last.parent.parent) == (last.parent / "best.ckpt", [])
    save(last, 9)
    assert newest(last.parent.parent) == (last, [])  # it holds more of the same step


def test_the_newest_walks_back_and_names_what_it_passes(last: Path) -> None:
    best, older = last.parent / "best.ckpt", last.parent / "older.ckpt"
    save(best, 6)
    save(older, 5)
    flip(last, at=100)
    os.truncate(best, 100)
    found, skipped = newest(last.parent)
    assert found == older
    assert [(p.name, reason.split(" ")[1]) for p, reason in skipped] == [
        ("last.ckpt", "sha256"),
        ("best.ckpt", "has"),
    ]


def test_there_is_no_newest_in_an_empty_run(tmp_path: Path) -> None:
    assert newest(tmp_path) == (None, [])
    assert newest(tmp_path / "nothing") == (None, [])


def test_files_of_older_versions_have_their_step_inside(last: Path) -> None:
    for step, name in ((11, "old.ckpt"), (2, "older.ckpt")):
        torch.save(content(step), last.parent / name)
    assert newest(last.parent)[0] == last.parent / "old.ckpt"
    (last.parent / "broken.ckpt").write_bytes(b"nothing")
    found, skipped = newest(last.parent)
    assert found == last.parent / "old.ckpt"
    assert [p.name for p, _ in skipped] == ["broken.ckpt"]


# -- a save that is cut short ----------------------------------------------------------------------


class Cut(BaseException):
    """The process ends here."""


def cut_after(monkeypatch: pytest.MonkeyPatch, changes: int) -> None:
    """Let so many renames happen, and no more: what a kill between two of them leaves."""
    left, rename = [changes], Path.replace

    def counted(self: Path, target: Any) -> Any:
        if not left[0]:
            raise Cut
        left[0] -= 1
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", counted)


@pytest.mark.parametrize("changes", [0, 1, 2, 3])
@pytest.mark.parametrize("before", ["a sidecar", "none", "nothing", "a sidecar alone"])
def test_a_file_verifies_after_each_change_of_a_name(
    last: Path, before: str, changes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if before in ("none", "nothing"):
        (last.parent / "last.ckpt.json").unlink()
    if before in ("nothing", "a sidecar alone"):
        last.unlink()
    with monkeypatch.context() as patched:
        cut_after(patched, changes)
        try:
            save(last, 8, numbers=1234)
            assert changes >= (2 if before in ("none", "nothing") else 3)
        except Cut:
            pass
    renamed = changes > (0 if before in ("none", "nothing") else 1)
    if before in ("nothing", "a sidecar alone") and not renamed:
        assert newest(last.parent) == (None, [])
        return
    assert newest(last.parent) == (last, [])
    found = CheckpointFiles().load_checkpoint(last)
    assert_same(found, content(8, numbers=1234) if renamed else content(7))
    assert saving.step_of(last) == found["global_step"]
    save(last, 9)
    assert saving.read_sidecar(last) == {**saving.read_sidecar(last), "step": 9}
    assert len(saving.read_sidecar(last)["sha256"]) == 1
    assert problem(last) is None


def test_best_and_last_in_turn_stay_whole(last: Path) -> None:
    best = last.parent / "best.ckpt"
    for step in range(8, 14):
        save(best if step % 2 else last, step, numbers=step * 100)
        path, skipped = newest(last.parent)
        assert path is not None
        assert (CheckpointFiles().load_checkpoint(path)["global_step"], skipped) == (step, [])
    assert (problem(best), problem(last)) == (None, None)


def test_what_a_killed_save_left_is_swept(last: Path) -> None:
    run = last.parent.parent
    (run / ".tmp").mkdir()
    for place in (run / ".tmp", last.parent, run):
        (place / ".last.ckpt.12345.unfinished").write_bytes(b"half")
    kept = run / ".tmp" / "of somebody else"
    kept.touch()
    sweep_unfinished(run)
    assert files(run) == {
        *("checkpoints/last.ckpt", "checkpoints/last.ckpt.json", ".tmp/of somebody else")
    }
    kept.unlink()
    sweep_unfinished(run)
    assert not (run / ".tmp").exists()
    sweep_unfinished(run / "nothing")


# -- no room ---------------------------------------------------------------------------------------


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def assert_one_line(error: pytest.ExceptionInfo[SaveError], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text
    assert isinstance(error.value, DataError)
    assert error.value.exit_code == 1


def test_a_disk_without_room_is_said_before_anything_is_written(
    last: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000, 1000, 500_000))
    with pytest.raises(SaveError) as error:
        save(last, 8)
    assert_one_line(error, "last.ckpt", "needs 1.1 MB", "has 0.5 MB free", "run.resume")
    assert saving.step_of(last) == 7
    assert problem(last) is None
    assert len(files(last.parent.parent)) == 2


def test_a_file_system_that_does_not_know_its_size_is_tried(
    last: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 0))
    save(last, 8)
    assert saving.step_of(last) == 8


@contextmanager
def limited(size: int) -> Iterator[None]:
    """No file of this process may have more bytes: the system's own limit, lifted at the end."""
    resource = pytest.importorskip("resource")
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


@pytest.mark.parametrize("limit", [10, 100_000, (1 << 22) + 700])
def test_a_write_that_the_system_refuses_leaves_the_old_file(last: Path, limit: int) -> None:
    """In the zip's first header, in a tensor, and in the zip's directory at the end."""
    large = {"a": torch.ones(1 << 20), "global_step": 8}
    with limited(limit), pytest.raises(SaveError) as error:
        CheckpointFiles().save_checkpoint(large, last)
    assert_one_line(error, "last.ckpt: there is no room for a new checkpoint beside the old one")
    assert newest(last.parent) == (last, [])
    assert saving.step_of(last) == 7
    assert len(files(last.parent.parent)) == 2
    CheckpointFiles().save_checkpoint(large, last)
    assert saving.step_of(last) == 8


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file")
    with pytest.raises(SaveError) as error:
        save(tmp_path / "run" / "checkpoints" / "last.ckpt", 1)
    assert_one_line(error, "cannot be written", "File exists", "run.dir")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write it")
def test_a_read_only_folder_is_one_line(last: Path) -> None:
    run = last.parent.parent
    try:
        for folder in (last.parent, run):
            folder.chmod(0o555)
        with pytest.raises(SaveError) as error:
            save(last, 8)
    finally:
        for folder in (run, last.parent):
            folder.chmod(0o755)
    assert_one_line(error, "cannot be written", "Permission denied")
    assert problem(last) is None


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_without_fsync_is_no_error(
    last: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    save(last, 8)
    assert saving.step_of(last) == 8


def test_an_error_of_the_disk_is_told_and_the_old_file_stays(
    last: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SaveError) as error:
        save(last, 8)
    assert_one_line(error, "Input/output error")
    assert saving.step_of(last) == 7
    assert problem(last) is None


def test_ctrl_c_while_writing_stays_ctrl_c(last: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch puts a RuntimeError in its place."""

    class Interrupted(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell():
                raise KeyboardInterrupt
            return super().write(data)

    monkeypatch.setattr(Path, "open", lambda path, mode: Interrupted(path, mode))
    with pytest.raises(KeyboardInterrupt):
        save(last, 8)
    monkeypatch.undo()
    assert saving.step_of(last) == 7
    assert len(files(last.parent.parent)) == 2


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["s3://bucket/last.ckpt", "http://host/last.ckpt"])
def test_an_address_is_refused_in_one_line(path: str) -> None:
    files = CheckpointFiles()
    for call in (
        lambda: files.load_checkpoint(path),
        lambda: files.save_checkpoint({}, path),
        lambda: files.remove_checkpoint(path),
    ):
        with pytest.raises(ConfigError, match=r"is an address") as error:
            call()
        assert "\n" not in str(error.value)


def test_storage_options_are_refused(last: Path) -> None:
    with pytest.raises(TypeError, match="without storage_options"):
        CheckpointFiles().save_checkpoint({}, last, {"key": 1})
