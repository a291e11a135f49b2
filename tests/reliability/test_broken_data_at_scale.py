"""Bad data at scale: 1 % broken pictures on two processes, broken ones that end both, and a
loader's worker that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from damage import CLIPS, PICTURES, speech, write_clip
from photographs import NAMES, write_tree
from processes import started

TIMEOUT = 240
COMMON = [
    *("trainer.accelerator=cpu", "run.tensorboard=false", "trainer.log_every_n_steps=1"),
    *("optim.schedule=constant", "norm=dyt"),
]
PHOTOS = [
    *("task=vision/classify", "model.dim=16", "model.depth=1", "model.heads=1", "model.in_chans=3"),
    *("model.image_size=32", "model.patch_size=8", "data=image_folder", "data.image_size=32"),
    *("data.root=photos", "data.batch_size=20", "data.cache=none", *COMMON),
]
MANIFEST = [
    *("task=speech/ctc", "data=manifest", "data.train=clips.tsv", "data.val=clips.tsv"),
    *("data.batch_seconds=8", "data.cache=none", "trainer.max_steps=-1", "trainer.max_epochs=1"),
    *("trainer.check_val_every_n_epoch=1", *COMMON),
]
PER_CLASS = 250


def train(folder: Path, *tokens: str) -> tuple[int, str]:
    """Exit code and output of a run that comes to its end by itself."""
    last = {token.partition("=")[0]: token for token in tokens}
    with started(["-m", "suite.train", *last.values()], folder) as process:
        output = process.communicate(timeout=TIMEOUT)[0]
    return process.returncode, output


def result(folder: Path, run: str) -> dict[str, Any]:
    return json.loads((folder / run / "result.json").read_text())


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error")]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """1,000 training pictures, ten of them broken, each in another way while there are ways."""
    write_tree(tmp_path / "photos", train=PER_CLASS, val=10)
    kinds = [harm for harm, _ in PICTURES.values()]
    for k in range(10):
        harm = kinds[k % len(kinds)]
        harm(tmp_path / "photos" / "train" / NAMES[k % 4] / f"{23 * k}.jpg")
    PICTURES["cut to half"][0](tmp_path / "photos" / "val" / "bag" / "3.jpg")
    return tmp_path


@pytest.mark.timeout(4 * TIMEOUT)
def test_one_percent_of_broken_pictures_is_left_out_alike_by_processes_and_workers(
    photos: Path,
) -> None:
    found = {}
    for world, workers in ((1, 0), (2, 0), (2, 2)):
        run = f"run-{world}-{workers}"
        code, output = train(
            photos,
            *(*PHOTOS, "data.on_error=skip", f"run.dir={run}", "trainer.max_epochs=2"),
            *(f"trainer.devices={world}", f"data.num_workers={workers}"),
        )
        assert code == 0, output
        assert "note: 10 of " in output
        found[run] = result(photos, run)
        assert found[run]["steps"] == 100
    first, *others = found.values()
    unreadable = first["data"]["unreadable"]
    assert {s: (u["count"], u["of"]) for s, u in unreadable.items()} == {
        "train": (10, 4 * PER_CLASS),
        "val": (1, 40),
        "test": (1, 40),
    }
    for other in others:
        assert other["data"]["unreadable"] == unreadable
        assert other["metrics"]["val/count"] == 39
        assert other["metrics"]["val/loss"] == pytest.approx(first["metrics"]["val/loss"], rel=1e-3)


@pytest.mark.timeout(2 * TIMEOUT)
def test_a_file_that_goes_while_training_is_one_more_that_is_left_out(photos: Path) -> None:
    tokens = [*PHOTOS, "data.on_error=skip", "run.dir=run", "trainer.max_epochs=4"]
    log = photos / "run" / "metrics.jsonl"
    with started(["-m", "suite.train", *tokens], photos) as process:
        wait_for(log, process)
        (photos / "photos" / "train" / "dress" / "200.jpg").unlink()
        output = process.communicate(timeout=TIMEOUT)[0]
    assert process.returncode == 0, output
    left_out = result(photos, "run")["data"]["unreadable"]["train"]
    assert left_out["count"] == 11
    assert result(photos, "run")["steps"] == 200


@pytest.mark.timeout(2 * TIMEOUT)
def test_a_picture_that_cannot_be_decoded_ends_two_processes_with_its_name(photos: Path) -> None:
    """Whether its header shows it, which is found before a run begins, or not."""
    code, output = train(photos, *PHOTOS, "run.dir=refused", "trainer.devices=2")
    (line,) = errors(output)
    assert (code, "/photos/train/" in line) == (1, True), output
    assert not (photos / "refused").exists()
    write_tree(photos / "later", train=20, val=10)
    PICTURES["cut to half"][0](photos / "later" / "train" / "bag" / "5.jpg")
    later = (*PHOTOS, "data.root=later", "run.dir=run", "trainer.devices=2")
    code, output = train(photos, *later)
    assert code == 1, output
    assert any(
        "/later/train/bag/5.jpg" in line and "on_error=skip" in line for line in errors(output)
    )
    assert "Traceback" not in output


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """200 clips of real speech, and a list of them."""
    wave, rows = speech(), ["path\ttranscript"]
    for i in range(200):
        start = i * 1_000
        write_clip(tmp_path / f"{i}.wav", wave[start : start + 9_000 + 10 * i])
        rows.append(f"{i}.wav\tword")
    (tmp_path / "clips.tsv").write_text("\n".join(rows) + "\n")
    return tmp_path


@pytest.mark.timeout(2 * TIMEOUT)
def test_broken_clips_are_refused_before_training_or_left_out_on_two_processes(
    clips: Path,
) -> None:
    for place, (harm, _) in enumerate(CLIPS.values()):
        harm(clips / f"{19 * place}.wav")
    code, output = train(clips, *MANIFEST, "run.dir=refused", "trainer.devices=2")
    (line,) = errors(output)
    assert (code, "0.wav: is an empty file (clips.tsv line 2)" in line) == (2, True), output
    assert not (clips / "refused").exists()
    code, output = train(clips, *MANIFEST, "run.dir=run", "trainer.devices=2", "data.on_error=skip")
    assert code == 0, output
    left_out = result(clips, "run")["data"]["unreadable"]
    assert {s: (u["count"], u["of"]) for s, u in left_out.items()} == dict.fromkeys(
        ("train", "val", "test"), (len(CLIPS), 200)
    )


@pytest.mark.timeout(2 * TIMEOUT)
def test_a_clip_with_a_nan_ends_two_processes_with_its_name(clips: Path) -> None:
    CLIPS["nan"][0](clips / "77.wav")
    code, output = train(clips, *MANIFEST, "run.dir=run", "trainer.devices=2")
    assert code == 1, output
    assert any("77.wav: has samples that are not finite" in line for line in errors(output))
    assert "Traceback" not in output
    assert result(clips, "run")["status"] == "failed"


@pytest.mark.timeout(2 * TIMEOUT)
def test_a_killed_loader_worker_ends_the_run_with_one_line(photos: Path) -> None:
    """As the kernel does where memory runs out."""
    tokens = [*PHOTOS, "data.on_error=skip", "run.dir=run", "trainer.max_epochs=1000"]
    command = ["-m", "suite.train", *tokens, "data.num_workers=2"]
    with started(command, photos) as process:
        wait_for(photos / "run" / "metrics.jsonl", process)
        os.kill(children(process.pid)[-1], signal.SIGKILL)
        output = process.communicate(timeout=TIMEOUT)[0]
    assert process.returncode == 1, output
    (line,) = errors(output)
    assert "DataLoader worker" in line
    assert "data.num_workers" in line
    assert "Traceback" not in output
    assert result(photos, "run")["status"] == "failed"


def wait_for(log: Path, process: subprocess.Popen[str]) -> None:
    """Until a run has logged a step."""
    until = time.monotonic() + TIMEOUT
    while not (log.exists() and log.stat().st_size):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.1)


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True
    )
    return [int(each) for each in listed.stdout.split()]
