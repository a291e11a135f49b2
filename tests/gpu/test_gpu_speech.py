"""What only a GPU shows of speech: steps in mixed precision that wait for nothing, equal draws.

They pass on an H100 with torch 2.11.0. `tox -e gpu` runs them; without a GPU they are skipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from suite import bench
from suite.build import build_parts
from suite.config import load
from suite.module import SuiteModule
from suite.randomness import sample_seeds
from tasks.speech import masks
from tasks.speech.wav2vec2 import frames_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
TASKS = ["speech/pretrain", "speech/ctc"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def on_gpu(task: str, norm: str) -> tuple[SuiteModule, dict[str, torch.Tensor]]:
    """A module in training, and the first batch of its loader, both on the GPU."""
    tokens = [f"task={task}", f"norm={norm}", "model.layer_drop=0.3", "data.batch_seconds=8"]
    parts = build_parts(load([*tokens, "trainer.accelerator=gpu"]).settled, processes=1)
    batch = next(iter(parts.data.train_dataloader()))
    batch.pop("unreadable", None)
    return parts.module.to("cuda").train(), {k: v.to("cuda") for k, v in batch.items()}


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Anything that makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("norm", ["layernorm", "dyt"])
@pytest.mark.parametrize("task", TASKS)
def test_a_step_in_bf16_has_the_loss_of_one_in_float32(task: str, norm: str) -> None:
    module, batch = on_gpu(task, norm)
    with torch.no_grad():
        exact = module.step(batch, "train")
    with torch.autocast("cuda", torch.bfloat16):
        out = module.step(batch, "train")
    out.loss_sum.backward()
    assert float(out.count) == float(exact.count)
    # dropout is drawn anew, and a code that falls the other way changes a target
    assert float(out.loss_sum) == pytest.approx(float(exact.loss_sum), rel=0.1)
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("task", TASKS)
def test_a_training_step_never_waits_for_the_device(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, batch = on_gpu(task, "layernorm")
    # torch's CTC loss itself reads the lengths on the host
    monkeypatch.setattr("tasks.speech.ctc.ctc_loss", likeliest_loss)
    with torch.autocast("cuda", torch.bfloat16):
        module.step(batch, "train")  # the first one may choose algorithms and allocate
    with waiting_is_an_error(), torch.autocast("cuda", torch.bfloat16):
        out = module.step(batch, "train")
        (out.loss_sum / out.count).backward()
    assert bool(out.loss_sum.isfinite())


def likeliest_loss(log_probs_BTV: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Stands for the CTC loss: [B]."""
    return -log_probs_BTV.amax(dim=2).sum(dim=1)


def test_masks_noise_and_negatives_are_those_of_the_cpu() -> None:
    length_B = torch.tensor([16000, 32000, 24000, 8000])
    size = int(frames_of(32000))
    found: dict[str, list[torch.Tensor]] = {}
    for device in ("cpu", "cuda"):
        ids, epoch = torch.arange(4, device=device), torch.full((4,), 3, device=device)
        seeds_B = sample_seeds(1, "mask", ids=ids, epoch=epoch)
        mask_BT = masks.span_mask(
            frames_of(length_B.to(device)), size=size, prob=0.65, span=10, min_spans=2,
            seeds_B=seeds_B,
        )  # fmt: skip
        most = masks.most_masked(size, prob=0.65, span=10, min_spans=2)
        at_BM, used_BM = masks.slots(mask_BT, most=most)
        drawn_BMK = masks.negatives(used_BM, count=100, seeds_B=seeds_B)
        noise = masks.gumbel(seeds_B, at_BM.shape[1], 2, 40)
        found[device] = [x.cpu() for x in (mask_BT, at_BM, used_BM, drawn_BMK, noise)]
    *whole, noise = zip(*found.values(), strict=True)
    assert all(torch.equal(cpu, gpu) for cpu, gpu in whole)
    torch.testing.assert_close(*noise)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_comparison_with_transformers_runs(
    precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    argv = ["reference", "task=speech/pretrain", "rows=4", "seconds=2", "--json"]
    assert bench.main([*argv, "trainer.accelerator=gpu", f"trainer.precision={precision}"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["device"].startswith("cuda")
    assert found["precision"] == precision
    assert min(found["memory"]["ours_bytes"], found["memory"]["theirs_bytes"]) > 0
    assert found["loss"]["ours"] == pytest.approx(found["loss"]["theirs"], rel=1e-4)
