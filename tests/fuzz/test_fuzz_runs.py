"""Runs that really start, with random settings: a whole record, or one line and nothing at all.

Values are such as a person may try: small, zero, negative, huge rates, not a multiple, a word.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import hypothesis.strategies as st
import pytest
from fuzzing import GIB, Ended, check_refusal, forked, fresh_folder, fuzz, left_in
from hypothesis import event, given
from schema import Chosen

import suite.run  # noqa: F401  before the children need it, each for itself
from suite import fields as types_of
from suite import train
from suite.norms import NORMS
from suite.norms.sites import SITES

pytestmark = pytest.mark.timeout(1800)
SECONDS = 240.0  # a hang is killed; a run takes some seconds
SMALL = (
    *("data.batch_size=8", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1"),
    *("trainer.limit_test_batches=1", "trainer.max_epochs=1", "trainer.accelerator=cpu"),
    *("run.tensorboard=false", "trainer.enable_progress_bar=false", "run.dir=run"),
)
VIT = ("model=vit_fmnist", "model.dim=16", "model.depth=1", "model.heads=1")
TINY: dict[str, tuple[str, ...]] = {
    "vision/classify vit": ("data=fashion_mnist_mini", *VIT),
    "vision/classify convnext": (
        *("data=fashion_mnist_mini", "model=convnext_fmnist", "model.dim=8"),
        *("model.depth1=1", "model.depth2=1"),
    ),
    "vision/mae": (
        *("data=fashion_mnist_mini", "model=mae_tiny", "model.dim=16", "model.depth=1"),
        *("model.heads=1", "model.decoder_dim=16", "model.decoder_depth=1", "task.probe=none"),
        *("model.decoder_heads=1", "task.pictures=0", "task.untrained=false"),
    ),
    "dna/classify": ("data=splice", "model=hyenadna_tiny", "model.dim=16", "model.depth=1"),
    "dna/pretrain": (
        *("data=yeast", "data.length=128", "data.cache=none", "data.novel=off"),
        *("model=caduceus_ph_tiny", "model.dim=16", "model.depth=1"),
    ),
    "language/lm llama": (
        *("data=shakespeare", "data.length=32", "task.sample_tokens=4", "model=llama_tiny"),
        *("model.dim=16", "model.depth=1", "model.heads=2", "model.kv_heads=2"),
    ),
    "language/lm gpt2": (
        *("data=shakespeare", "data.length=32", "task.sample_tokens=4", "model=gpt2_tiny"),
        *("model.dim=16", "model.depth=1", "model.heads=2"),
    ),
    "speech/ctc": ("data=cards_synthetic", "model=wav2vec2_tiny"),
    "speech/pretrain": ("data=asterisk_en", "model=wav2vec2_tiny"),
}
# what starts processes, takes minutes by its nature, or says where files lie
FIXED = (
    *("trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.accelerator"),
    *("trainer.max_time", "trainer.max_epochs", "trainer.max_steps", "trainer.profiler"),
    *("trainer.limit_train_batches", "trainer.limit_val_batches", "trainer.limit_test_batches"),
    *("trainer.precision", "trainer.detect_anomaly", "data.num_workers", "data.cache"),
    *("run.compile", "run.dir", "run.tensorboard", "run.resume", "run.dist_timeout"),
    *("data.download", "task.probe", "norm.backend", "data.novel"),
)
INTS = (-1, 0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33)
FLOATS = (-1.0, 0.0, 1e-30, 1e-8, 0.1, 0.5, 0.999, 1.0, 1.5, 2.0, 1e4, 1e30)
WORDS = ("x", "..", "no/such/file.safetensors", "\u00e9", "rand-m9", "a,b", "*", "auto", "run")


def tried(hint: Any) -> list[str]:
    """Values that a person may try for a field of this type."""
    found: list[str] = []
    for member in types_of.members(hint):
        kind = get_origin(member) or member
        if kind is Literal:
            found += map(str, get_args(member))
        elif kind is dict:
            found += ["{}", "{x: y}"]
        else:
            table: dict[Any, list[str]] = {
                bool: ["true", "false"],
                int: [str(n) for n in INTS],
                float: [repr(n) for n in FLOATS],
                str: list(WORDS),
                list: ["[]", "[0.5]", "[0.1,0.2,0.3]", "[x]"],
                type(None): ["null"],
            }
            found += table.get(kind, [])
    return found


@st.composite
def commands(draw: st.DrawFn) -> list[str]:
    """A tiny run with up to four settings of the schema changed."""
    cell = draw(st.sampled_from(sorted(TINY)))
    task = cell.split()[0]
    tiny = dict(token.split("=", 1) for token in (*TINY[cell], *SMALL))
    norm = draw(st.sampled_from(sorted(NORMS)))
    names = {"task": task, "model": tiny.pop("model"), "data": tiny.pop("data"), "norm": norm}
    chosen = Chosen(names)
    keys = [key for key in chosen.every_key() if key[0] not in FIXED]
    for key, hint, _ in draw(st.lists(st.sampled_from(keys), max_size=4)):
        if values := tried(hint):
            tiny[key] = draw(st.sampled_from(values))
    if draw(st.booleans()):
        site = draw(st.sampled_from((*SITES, "nosuchsite")))
        tiny.pop("norm.by_site", None)
        tiny[f"norm.by_site.{site}"] = draw(st.sampled_from(sorted(NORMS)))
    known = {key for key, _, _ in chosen.every_key()}
    kept = {k: v for k, v in tiny.items() if k in known or k.startswith("norm.by_site.")}
    return [*chosen.tokens, *(f"{key}={value}" for key, value in kept.items())]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SUITE_RUN_DIR"):
        monkeypatch.delenv(name, raising=False)


@fuzz(0.1)
@given(commands())
def test_a_started_run_leaves_a_whole_record_or_nothing(argv: list[str]) -> None:
    with fresh_folder() as folder:
        ended = forked(lambda: train.main(argv), seconds=SECONDS, memory=12 * GIB)
        event(f"exit {ended.code}")
        check(ended, folder, argv)


def check(ended: Ended, folder: Path, argv: list[str]) -> None:
    """What every end of a run has promised."""
    assert "Traceback" not in ended.err, (argv, ended.err[-3000:])
    assert ended.code in (0, 1, 2, 3), (argv, ended.code, ended.err[-3000:])
    assert "Warning" not in ended.err, (argv, ended.err[-3000:])
    if ended.code == 2:
        check_refusal(ended)
        assert left_in(folder) == [], argv
        return
    errors = [line for line in ended.err.splitlines() if line.startswith("error")]
    assert len(errors) == (ended.code != 0), (argv, ended.err[-3000:])
    if not (folder / "run").exists():
        assert ended.code == 1, argv
        return
    result = json.loads((folder / "run" / "result.json").read_text())
    assert result["status"] == {0: "done", 1: "failed", 3: "diverged"}[ended.code], argv
    assert (folder / "run" / "config.yaml").is_file()
    if ended.code == 0:
        assert (folder / "run" / "checkpoints" / "last.ckpt").is_file(), argv
        assert (folder / "run" / "metrics.jsonl").is_file(), argv
    stray = [name for name in left_in(folder) if ".tmp" in name]
    assert stray in ([], ["run/.tmp"]), (argv, stray)


def test_every_tiny_run_ends_well_as_it_stands() -> None:
    for cell, tokens in TINY.items():
        argv = [f"task={cell.split()[0]}", *tokens, *SMALL]
        with fresh_folder() as folder:
            ended = forked(lambda argv=argv: train.main(argv), seconds=SECONDS)  # type: ignore[misc]
            assert ended.code == 0, (argv, ended.err[-3000:])
            check(ended, folder, argv)
