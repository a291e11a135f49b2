"""Which folder a run takes, what it goes on from, and what of it nobody may touch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from suite.config import Config, load, to_dict, to_yaml
from suite.errors import ConfigError
from suite.folder import Hold, Place, choose_place, locked_by, open_folder, run_folder
from suite.saving import CheckpointFiles

TOKENS = ("task=vision/classify", "model.dim=16", "model.depth=1", "trainer.accelerator=cpu")


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder and an environment of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_", "SUITE_RUN_")):
            monkeypatch.delenv(name)
    for name in ("DIR", "CHECKPOINT", "PARENT"):  # what open_folder sets is taken back
        monkeypatch.setenv(f"SUITE_RUN_{name}", "")


def config_of(*tokens: str) -> Config:
    return load([*TOKENS, *tokens]).settled


def save(folder: Path, *tokens: str, name: str = "last", step: int = 4) -> Path:
    """A checkpoint of that config, as far as anybody looks before it is loaded."""
    path = folder / "checkpoints" / f"{name}.ckpt"
    parts: dict[str, Any] = {"state_dict": {}, "loops": {}}
    parts.update(optimizer_states=[{}], lr_schedulers=[{}], global_step=step)
    identity = {"schema": 1, "config": to_dict(config_of(*tokens)), "norm": {}, "meaning": None}
    CheckpointFiles().save_checkpoint({**parts, "suite": identity}, path)
    return path


def run_of(folder: str, *tokens: str, step: int = 4) -> Path:
    """A run's folder that was left in the middle."""
    path = Path(folder).expanduser()
    path.mkdir(parents=True)
    config = config_of(*tokens)
    (path / "config.yaml").write_text(to_yaml(replace(config, run=replace(config.run, dir=None))))
    (path / "metrics.jsonl").write_text('{"step": 4}\n')
    save(path, *tokens, step=step)
    return path


def finish(folder: Path, *tokens: str, status: str = "done") -> None:
    """Its result.json, as far as it is looked at."""
    config = to_dict(config_of(*tokens))
    names = {"task": "t", "model": "m", "norm": "n", "norm_options": {}, "seed": 0}
    result = {"schema": 1, "status": status, **names, "data": {}, "primary": {}, "config": config}
    (folder / "result.json").write_text(json.dumps(result))


# --- run.resume=auto ------------------------------------------------------------------------------


@pytest.mark.parametrize("spelled", ["r", "./r", "~/r", "link"])
def test_auto_goes_on_with_the_run_of_run_dir_however_it_is_spelled(spelled: str) -> None:
    folder = run_of("r")
    Path("link").symlink_to("r")
    place = choose_place(config_of(f"run.dir={spelled}", "run.resume=auto"))
    assert place.checkpoint is not None
    assert place.checkpoint.samefile(folder / "checkpoints" / "last.ckpt")
    assert place.folder.samefile(folder)
    assert not place.done
    assert "goes on from last.ckpt" in place.notes[-1]


def test_auto_begins_where_there_is_nothing_and_goes_on_with_a_copy() -> None:
    assert choose_place(config_of("run.dir=new", "run.resume=auto")) == Place(Path("new"))
    run_of("r").rename("moved")
    place = choose_place(config_of("run.dir=moved", "run.resume=auto"))
    assert place.checkpoint == Path("moved/checkpoints/last.ckpt")


def test_auto_takes_the_newest_numbered_run_of_this_config_and_says_which_not() -> None:
    stem = "runs/vision/classify/vit_fmnist-dyt-seed0"
    run_of(f"{stem}-2")
    run_of(f"{stem}-10", "optim.lr=0.1")
    place = choose_place(config_of("run.resume=auto"))
    assert place.folder == Path(f"{stem}-2")
    assert place.notes[0].endswith(f"{stem}-10 differs in optim.lr")
    assert choose_place(config_of("run.resume=auto", "optim.lr=0.2")).folder == Path(f"{stem}-1")
    assert choose_place(config_of()).folder == Path(f"{stem}-1")


@pytest.mark.parametrize(
    ("token", "named"),
    [
        ("optim.lr=0.1", "optim.lr"),
        ("norm=layernorm", "norm.name"),
        ("seed=3", "seed"),
        ("trainer.max_epochs=7", "trainer.max_epochs"),
        ("trainer.max_time=00:01:00:00", "trainer.max_time"),
        ("trainer.limit_train_batches=2", "trainer.limit_train_batches"),
    ],
)
def test_auto_refuses_another_config_and_names_the_difference(token: str, named: str) -> None:
    run_of("r")
    with pytest.raises(ConfigError, match=named):
        choose_place(config_of("run.dir=r", "run.resume=auto", token))


def test_what_changes_no_number_may_change() -> None:
    run_of("r")
    free = ("run.save_every_n_steps=3", "data.num_workers=1", "trainer.log_every_n_steps=7")
    assert choose_place(config_of("run.dir=r", "run.resume=auto", *free)).checkpoint is not None


def test_a_damaged_checkpoint_is_passed_over_and_named_and_without_another_one_refused() -> None:
    folder = run_of("r")
    save(folder, name="best", step=2)
    last = folder / "checkpoints" / "last.ckpt"
    os.truncate(last, last.stat().st_size - 1)
    place = choose_place(config_of("run.dir=r", "run.resume=auto"))
    assert place.checkpoint == folder / "checkpoints" / "best.ckpt"
    assert "skipped checkpoint r/checkpoints/last.ckpt: it has" in place.notes[0]
    os.truncate(place.checkpoint, 9)
    for resume in ("auto", "r"):
        with pytest.raises(ConfigError, match="no checkpoint of r verifies"):
            choose_place(config_of("run.dir=r", f"run.resume={resume}"))


@pytest.mark.parametrize("content", ["", "{{{", None])
def test_a_damaged_config_yaml_does_not_stop_a_run_that_has_a_checkpoint(
    content: str | None,
) -> None:
    file = run_of("r") / "config.yaml"
    file.unlink() if content is None else file.write_text(content)
    assert choose_place(config_of("run.dir=r", "run.resume=auto")).checkpoint is not None


def test_a_try_without_a_checkpoint_begins_again_in_its_folder() -> None:
    folder = run_of("r")
    for file in (folder / "checkpoints").iterdir():
        file.unlink()
    config = config_of("run.dir=r", "run.resume=auto")
    place = choose_place(config)
    assert place == Place(folder, again=True)
    hold = open_folder(config, place)
    assert hold is not None
    hold.release()
    assert not (folder / "metrics.jsonl").exists()
    with pytest.raises(ConfigError, match="not a run of this config"):
        choose_place(config_of("run.dir=r", "run.resume=auto", "optim.lr=0.1"))


# --- what is over ---------------------------------------------------------------------------------


def test_a_finished_run_is_done_even_without_its_checkpoints() -> None:
    folder = run_of("r")
    finish(folder)
    config = config_of("run.dir=r", "run.resume=auto")
    assert choose_place(config).done
    for file in (folder / "checkpoints").iterdir():
        file.unlink()
    place = choose_place(config)
    assert place.done
    assert place.notes == ("run.resume=auto: r is done",)


@pytest.mark.parametrize("status", ["interrupted", "failed", "diverged"])
def test_a_run_that_ended_badly_goes_on(status: str) -> None:
    finish(run_of("r"), status=status)
    place = choose_place(config_of("run.dir=r", "run.resume=auto"))
    assert not place.done
    assert place.checkpoint is not None


def test_the_result_of_the_shorter_run_does_not_end_the_longer_one() -> None:
    folder = run_of("r")
    finish(folder)
    longer = "trainer.max_epochs=9"
    save(folder, longer, step=8)  # it went on by name, and was killed
    place = choose_place(config_of("run.dir=r", "run.resume=auto", longer))
    assert not place.done
    assert place.checkpoint is not None


def test_a_result_json_that_is_none_is_no_end() -> None:
    folder = run_of("r")
    for content in ("", "null", '{"schema": 1, "status": "done"}'):
        (folder / "result.json").write_text(content)
        assert not choose_place(config_of("run.dir=r", "run.resume=auto")).done


# --- run.resume=never, and by name ----------------------------------------------------------------


@pytest.mark.parametrize("spelled", ["r", "~/r"])
def test_a_run_is_never_overwritten(spelled: str) -> None:
    run_of("r")
    with pytest.raises(ConfigError, match="a run is never overwritten"):
        choose_place(config_of(f"run.dir={spelled}"))


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_folder_of_something_else_is_left_alone(resume: str) -> None:
    Path("r").mkdir()
    Path("r/thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        choose_place(config_of("run.dir=r", f"run.resume={resume}"))
    with pytest.raises(ConfigError, match="is a file"):
        choose_place(config_of("run.dir=r/thesis.tex", f"run.resume={resume}"))


@pytest.mark.parametrize(
    "named", ["r", "~/r", "r/checkpoints", "r/checkpoints/last.ckpt", "my.ckpt"]
)
def test_a_run_is_named_by_its_folder_or_a_checkpoint_of_it(named: str, tmp_path: Path) -> None:
    folder = run_of("r")
    Path("my.ckpt").symlink_to("r/checkpoints/last.ckpt")
    config = config_of()
    place = choose_place(replace(config, run=replace(config.run, resume=named)))
    assert place.folder.samefile(folder)
    assert place.checkpoint is not None
    assert place.checkpoint.samefile(folder / "checkpoints" / "last.ckpt")


def test_a_checkpoint_from_within_its_folder_is_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_of("r").resolve()
    monkeypatch.chdir(folder / "checkpoints")
    assert run_folder(Path("last.ckpt")).resolve() == folder
    with pytest.raises(ConfigError, match="not in a run's checkpoints folder"):
        run_folder(folder / "config.yaml")


def test_by_name_a_run_goes_on_for_longer_and_in_no_other_folder() -> None:
    run_of("r")
    longer = "trainer.max_epochs=9"
    for given in ((), ("run.dir=r",), ("run.dir=~/r",)):
        assert choose_place(config_of("run.resume=~/r", longer, *given)).checkpoint is not None
    with pytest.raises(ConfigError, match="goes on in its own folder"):
        choose_place(config_of("run.resume=r", "run.dir=elsewhere"))


# --- a job that is started again ------------------------------------------------------------------


def test_a_requeued_job_goes_on_in_its_own_folder_and_another_one_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = run_of("r")
    (folder / ".lock").write_text(json.dumps({"pid": 1, "host": "h", "job": "slurm 77"}))
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with pytest.raises(ConfigError, match="never overwritten"):  # not restarted
        choose_place(config_of("run.dir=r"))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert choose_place(config_of("run.dir=r")).checkpoint is not None
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    with pytest.raises(ConfigError, match="never overwritten"):
        choose_place(config_of("run.dir=r"))


# --- one folder, one trainer ----------------------------------------------------------------------

HOLDER = """
import fcntl, os, sys
file = os.open("r/.lock", os.O_RDWR | os.O_CREAT)
fcntl.lockf(file, fcntl.LOCK_EX)
os.write(file, b'{"pid": %d, "host": "there"}' % os.getpid())
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_in_which_a_process_trains_is_refused_until_it_is_dead() -> None:
    run_of("r")
    command = [sys.executable, "-c", HOLDER]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        held = locked_by(Path("r"))
        assert held is not None
        assert held["pid"] == holder.pid
        for tokens in (("run.dir=r", "run.resume=auto"), ("run.resume=r",)):
            with pytest.raises(
                ConfigError, match=f"process {holder.pid} on there is training there"
            ):
                choose_place(config_of(*tokens))
        with pytest.raises(ConfigError, match="start again"):
            Hold(Path("r"))
    finally:
        holder.kill()
        holder.communicate(timeout=20)
    assert locked_by(Path("r")) is None
    assert choose_place(config_of("run.dir=r", "run.resume=auto")).checkpoint is not None


@pytest.mark.parametrize("content", ["", "[", "\0\xff", "[1]"])
def test_a_damaged_lock_is_nobodys(content: str) -> None:
    folder = run_of("r")
    (folder / ".lock").write_text(content, encoding="latin-1")
    assert locked_by(folder) is None
    assert choose_place(config_of("run.dir=r", "run.resume=auto")).checkpoint is not None


def test_nothing_is_written_through_a_lock_that_is_a_link() -> None:
    folder = run_of("r")
    Path("victim").write_text("precious")
    (folder / ".lock").symlink_to("../victim")
    config = config_of("run.dir=r", "run.resume=auto")
    with pytest.raises(ConfigError, match="cannot be written"):
        open_folder(config, choose_place(config))
    assert Path("victim").read_text() == "precious"


def test_a_run_that_came_and_went_meanwhile_is_not_overwritten() -> None:
    config = config_of("run.dir=r", "run.resume=auto")
    place = choose_place(config)
    finish(run_of("r"))
    for chosen in (place, replace(place, again=True)):
        with pytest.raises(ConfigError, match="another run took this folder just now"):
            open_folder(config, chosen)
    assert Path("r/metrics.jsonl").read_text() == '{"step": 4}\n'
    assert locked_by(Path("r")) is None
