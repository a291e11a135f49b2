"""What only a GPU shows: whole runs in mixed precision, the guard's delayed check, two devices.

Not yet run on a GPU. `tox -e gpu` runs them; without a GPU they are skipped.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from photographs import write_tree
from spoiled import NAN, Run

import suite.build
from suite.ema import WeightEMA
from suite.nonfinite import NonFiniteGuard
from suite.norms import NORMS, make_norm
from suite.train import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
SHORT = [
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=20",
    "trainer.log_every_n_steps=5",
    "trainer.accelerator=gpu",
]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SUITE_RUN_DIR", raising=False)


def rows(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_run_on_a_gpu_follows_the_one_on_the_cpu(precision: str) -> None:
    cpu = [t for t in SHORT if "accelerator" not in t]
    assert main([*cpu, "trainer.accelerator=cpu", "run.dir=cpu"]) == 0
    assert main([*SHORT, f"trainer.precision={precision}", "run.dir=gpu"]) == 0
    one, two = (
        {r["step"]: r["train/loss"] for r in rows(run) if "train/loss" in r}
        for run in ("cpu", "gpu")
    )
    tolerance = 1e-3 if precision == "32-true" else 3e-2
    assert one[1] == pytest.approx(two[1], rel=tolerance)
    assert one[20] == pytest.approx(two[20], rel=10 * tolerance)


def test_the_guard_stops_within_a_step_of_a_non_finite_gradient(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Poison(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            if trainer.global_step == 4:
                module.model.blocks[1].norm1.weight.data[0] = float("nan")

    whole = suite.build.build_callbacks
    monkeypatch.setattr("suite.run.build_callbacks", lambda *a, **k: [*whole(*a, **k), Poison()])
    assert main([*SHORT, "run.dir=a"]) == 3
    assert "blocks.1.norm1" in capsys.readouterr().err
    assert json.loads(Path("a/result.json").read_text())["steps"] <= 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(NORMS))
def test_norms_on_the_gpu_equal_those_on_the_cpu(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(4, 33, 96)
    cpu = make_norm(name)(96, site="ffn")
    expected = cpu(x.to(dtype).float())
    found = cpu.to("cuda")(x.to("cuda", dtype))
    assert found.dtype == dtype
    rtol = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(found.float().cpu(), expected, rtol=rtol, atol=rtol)


def test_the_average_of_the_weights_is_on_the_gpu_and_is_what_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            (average,) = (c for c in trainer.callbacks if isinstance(c, WeightEMA))
            seen.append({tensor.device.type for tensor in average.held.values()})

    whole = suite.build.build_callbacks
    monkeypatch.setattr("suite.run.build_callbacks", lambda *a, **k: [*whole(*a, **k), Look()])
    assert main([*SHORT, "run.dir=a", "optim.ema_decay=0.9"]) == 0
    assert seen[-1] == {"cuda"}
    content = torch.load("a/checkpoints/best.ckpt", weights_only=True)
    average, current = content["state_dict"], content["current_model_state"]
    assert any(not torch.equal(average[k], current[k]) for k in average)


@pytest.mark.parametrize("model", ["convnext_fmnist", "vit_fmnist"])
def test_photographs_train_in_bf16_with_workers_and_pinned_batches(model: str) -> None:
    write_tree(Path("photos"), train=32, broken=["train/bag/3.jpg"])
    patch = ["model.patch_size=4", "model.image_size=32"] if model == "vit_fmnist" else []
    tokens = [
        f"model={model}",
        "model.in_chans=3",
        *patch,
        "data=image_folder",
        "data.root=photos",
        "data.image_size=32",
        "data.batch_size=16",
        "data.num_workers=2",
        "data.on_error=skip",
        "data.mixup=0.8",
        "data.cutmix=1.0",
        "trainer.precision=bf16-mixed",
        "run.dir=a",
    ]
    assert main([*SHORT, *tokens]) == 0
    found = json.loads(Path("a/result.json").read_text())
    assert found["data"]["unreadable"]["train"]["count"] == 1
    assert found["loss"]["train"] < 2.0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_two_gpus_give_the_losses_of_one() -> None:
    for world in (1, 2):
        tokens = [*SHORT, f"trainer.devices={world}", f"run.dir={world}"]
        # a process of its own: Lightning starts the second rank by repeating this command line
        subprocess.run([sys.executable, "-m", "suite.train", *tokens], check=True, timeout=300)
    one, two = ([r.get("train/loss") for r in rows(str(w))] for w in (1, 2))
    assert one == pytest.approx(two, rel=1e-3)


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_the_device_leaves_a_bad_step_out_as_the_host_does_and_nobody_waits(optim: str) -> None:
    """The first step too, whose momentum torch's fused SGD would leave without values."""

    class AtOnce(NonFiniteGuard):
        @staticmethod
        def _waits(norm: torch.Tensor) -> bool:
            return False

    class Watched(NonFiniteGuard):
        """A wait in a step whose flag is good is an error; torch's fused SGD waits once."""

        def on_gradients(self, module: Any, norm: torch.Tensor) -> None:
            calm = module.updates in (4, 5)
            torch.cuda.set_sync_debug_mode("error" if calm else "default")
            super().on_gradients(module, norm)
            torch.cuda.set_sync_debug_mode("default")

    ends = []
    for guard in (AtOnce("skip"), Watched("skip")):
        tokens = ["trainer.accelerator=gpu", "norm=batchnorm", f"optim.name={optim}"]
        run = Run(*tokens, "optim.fused=true", guard=guard)
        run.damage({run.at(p)[0]: NAN for p in (0, 2)}).fit()
        assert run.guard.summary() == {"policy": "skip", "skipped": 2, "steps": [1, 3]}
        ends.append(run.weights)
    for name, weight in ends[0].items():
        torch.testing.assert_close(weight, ends[1][name], rtol=1e-5, atol=1e-6)
        assert weight.isfinite().all()
