"""What only a GPU shows of language models and masked autoencoders: mixed precision, shards, MFU.

They pass on an H100 with torch 2.11.0. `tox -e gpu` runs them; without a GPU they are skipped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from suite.flops import peak_flops
from suite.train import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
LM = [
    "task=language/lm",
    "task.sample_tokens=8",
    "trainer.max_steps=12",
    "trainer.val_check_interval=null",
    "trainer.check_val_every_n_epoch=1",
    "trainer.log_every_n_steps=4",
    "trainer.limit_val_batches=2",
    "trainer.limit_test_batches=2",
]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def losses(run: str) -> dict[int, float]:
    return {r["step"]: r["train/loss"] for r in rows(run) if "train/loss" in r}


@pytest.mark.parametrize("model", ["llama_tiny", "gpt2_tiny"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_language_model_learns_and_is_measured(model: str, precision: str) -> None:
    tokens = [f"model={model}", f"trainer.precision={precision}", "trainer.accelerator=gpu"]
    assert main([*LM, *tokens, "run.dir=a"]) == 0
    found = losses("a")
    assert found[12] < found[1]
    known = peak_flops(torch.device("cuda", 0), precision) is not None
    assert any("throughput/mfu" in row for row in rows("a")) == known


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_shards_on_a_gpu_train_as_a_whole_model(precision: str) -> None:
    """Weights are drawn on the CPU for both, so the first loss is the same."""
    tokens = ["norm=dyt", f"trainer.precision={precision}", "trainer.accelerator=gpu"]
    for strategy in ("auto", "fully_shard"):
        run = [f"trainer.strategy={strategy}", f"run.dir={strategy}"]
        assert main([*LM, *tokens, *run]) == 0
    one, two = losses("auto"), losses("fully_shard")
    assert one[1] == pytest.approx(two[1], rel=1e-3)
    assert one[12] == pytest.approx(two[12], rel=3e-2)


def test_a_compiled_sharded_model_with_checkpointing_follows_the_plain_one() -> None:
    tokens = ["norm=dyt", "trainer.precision=bf16-mixed", "trainer.accelerator=gpu"]
    extra = ["trainer.strategy=fully_shard", "run.compile=default", "model.checkpoint=true"]
    assert main([*LM, *tokens, "run.dir=plain"]) == 0
    assert main([*LM, *tokens, *extra, "run.dir=compiled"]) == 0
    assert losses("plain")[12] == pytest.approx(losses("compiled")[12], rel=3e-2)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_masked_autoencoder_is_probed_on_the_gpu(precision: str) -> None:
    tokens = ["task=vision/mae", f"trainer.precision={precision}", "trainer.accelerator=gpu"]
    short = ["trainer.max_epochs=1", "trainer.limit_train_batches=20", "run.dir=a"]
    assert main([*tokens, *short]) == 0
    metrics = json.loads(Path("a/result.json").read_text())["metrics"]
    assert 0.3 < metrics["test/knn_acc"] <= 1
    assert 0.3 < metrics["test/linear_acc"] <= 1
    assert Path("a/reconstructions.png").is_file()
