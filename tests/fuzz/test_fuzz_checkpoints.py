"""Damaged weights, runs and records: read, or refused in one line; never code, never all memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from fuzzing import GIB, check_refusal, forked, fuzz, refused_or
from hypothesis import event, given
from mutate import damaged
from safetensors.torch import save_file
from torch import nn

import suite.run  # noqa: F401  before the children need it, each for itself
from suite import report, train
from suite.checkpoint import find_checkpoint, read_resumable, read_weights

pytestmark = pytest.mark.timeout(1800)
SECONDS = 120.0  # far above what reading takes; a hang is killed
FILES = ("whole.ckpt", "old.pt", "bare.bin", "tensors.safetensors", "model.safetensors.index.json")
RECORDS = ("config.yaml", "result.json", "metrics.jsonl")
SHORT = (
    *("model.dim=16", "model.depth=1", "model.heads=1", "data.batch_size=32"),
    *("trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "run.tensorboard=false"),
    *("trainer.limit_test_batches=1", "trainer.max_epochs=1", "trainer.accelerator=cpu"),
)


def network() -> nn.Module:
    """Small, with a buffer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in each format that is read."""
    made = tmp_path_factory.mktemp("suite-fuzz-weights")
    state = network().state_dict()
    run = {"norm": {"name": "dyt", "options": {}}, "config": {"model": {"name": "x"}}}
    whole = {"state_dict": {f"model.{k}": v for k, v in state.items()}, "suite": run}
    whole |= {"optimizer_states": [], "lr_schedulers": [], "loops": {}, "global_step": 3}
    torch.save(whole, made / "whole.ckpt")
    torch.save(state, made / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"model": state}, made / "bare.bin")
    save_file(state, made / "tensors.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "tensors.safetensors")}
    (made / "model.safetensors.index.json").write_text(json.dumps(index))
    return made


def loaded(file: Path, *, key: str) -> None:
    """Read as model.init_from and evaluate do, and as run.resume does."""
    found = find_checkpoint(file, key=key, prefer="best")
    if key == "run.resume":
        read_resumable(found)
    else:
        norm = {"name": "dyt", "by_site": {}, "options": {}}
        read_weights(network(), found, norm=norm, key=key)


@fuzz(0.5)
@given(st.data())
def test_damaged_weights_are_read_or_refused_in_one_line(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(FILES))
    key = data.draw(st.sampled_from(("model.init_from", "evaluate", "run.resume")))
    good = (folder / name).read_bytes()
    other = (folder / data.draw(st.sampled_from(FILES))).read_bytes()
    content = data.draw(st.one_of(damaged(good), damaged(good), st.binary(max_size=200)))
    content = other if data.draw(st.integers(0, 19)) == 0 else content
    held(folder / name, content, lambda: refused_or(lambda: loaded(folder / name, key=key)))


def held(file: Path, content: bytes, work: Callable[[], int], *, most: int = 1) -> None:
    """The answer to a damaged file, which is whole again afterwards."""
    good = file.read_bytes()
    file.write_bytes(content)
    try:
        ended = forked(work, seconds=SECONDS, memory=4 * GIB)
    finally:
        file.write_bytes(good)
    event(f"exit {ended.code}")
    if ended.code:
        check_refusal(ended, most=most)
    else:
        assert not ended.errors, ended.err


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run."""
    made = tmp_path_factory.mktemp("suite-fuzz-run") / "run"
    ended = forked(lambda: train.main([*SHORT, f"run.dir={made}"]), seconds=240)
    assert ended.code == 0, ended.err
    return made


@fuzz(0.3)
@given(st.data())
def test_a_run_with_a_damaged_record_is_read_or_refused_in_one_line(
    run: Path, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(RECORDS))
    content = data.draw(damaged((run / name).read_bytes()) | st.binary(max_size=100))
    command = data.draw(st.sampled_from(("evaluate", "run.resume", "report")))

    def asked() -> int:
        if command == "report":
            return report.main([str(run), "--out", str(run.parent / "out")])
        return train.main([f"{command}={run}", "--print-config"])

    # a report says one line for each run that it leaves out, and one for what is left
    held(run / name, content, asked, most=2 if command == "report" else 1)
