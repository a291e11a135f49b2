"""norm.backend and norm.recompute in whole runs: what is chosen, what has run, what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from suite.norms.kernels import cpp
from suite.train import main

SHORT = [
    "data.batch_size=32",
    "trainer.limit_train_batches=3",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
    "trainer.max_epochs=1",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "run.tensorboard=false",
]
needs_cpp = pytest.mark.skipif(
    cpp.available("cpu") is not None, reason="the C++ kernels need a compiler"
)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


def result(run: str) -> dict[str, Any]:
    return json.loads((Path(run) / "result.json").read_text())


def losses(run: str) -> list[float]:
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row]


def weights(run: str) -> dict[str, torch.Tensor]:
    return torch.load(Path(run) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@needs_cpp
@pytest.mark.parametrize("norm", ["dyt", "rmsnorm"])
def test_a_run_says_what_its_norms_computed_with_and_the_first_step_proves_it(
    norm: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for backend in ("auto", "cpp"):
        chosen = [f"norm={norm}", f"norm.backend={backend}", f"run.dir={backend}"]
        assert main([*SHORT, *chosen]) == 0
    said = capfd.readouterr().err
    assert f"9 {norm}: eager (" in said
    assert f"9 {norm}: cpp (as asked)" in said
    assert "warning" not in said
    family = "pointwise" if norm == "dyt" else "rows"
    assert result("auto")["norm_backend"] == {"layers": {"eager": 9}, "started": {}}
    assert result("cpp")["norm_backend"] == {
        "layers": {"cpp": 9},
        "started": {f"cpp.{family}_forward": 9, f"cpp.{family}_backward": 9},
    }
    assert losses("cpp") == pytest.approx(losses("auto"), rel=1e-4)


@needs_cpp
def test_a_backend_that_computes_nothing_is_reported(capfd: pytest.CaptureFixture[str]) -> None:
    tokens = ["norm=dyt", "norm.backend=cpp", "trainer.precision=64-true", "run.dir=a"]
    assert main([*SHORT, *tokens]) == 0
    assert "no kernel of cpp was started in the first step" in capfd.readouterr().err
    assert result("a")["norm_backend"]["started"] == {}


def test_recompute_changes_no_bit_of_a_run() -> None:
    for recompute in ("false", "true"):
        tokens = ["norm=derf", f"norm.recompute={recompute}", f"run.dir={recompute}"]
        assert main([*SHORT, *tokens, "model.dropout=0.1"]) == 0
    assert losses("true") == losses("false")
    kept = weights("false")
    assert all(torch.equal(value, kept[name]) for name, value in weights("true").items())


def test_a_run_goes_on_with_another_backend() -> None:
    """What a norm is computed with is no other norm: a run may move to another machine."""
    assert main([*SHORT, "norm=dyt", "norm.recompute=true", "run.dir=a"]) == 0
    longer = [t if "max_epochs" not in t else "trainer.max_epochs=2" for t in SHORT]
    assert main([*longer, "norm=dyt", "norm.backend=eager", "run.resume=a"]) == 0
    assert result("a")["steps"] == 6
    assert main([*longer, "norm=derf", "run.resume=a"]) == 2


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (["norm.backend=fast"], "norm.backend"),
        (["norm=batchnorm", "norm.backend=cpp"], "norm=batchnorm has no backend"),
        (["norm=layernorm", "norm.recompute=true"], "norm=layernorm has no recompute"),
        (["norm.recompute=true", "run.compile=default"], "norm.recompute with run.compile"),
        (
            ["task=language/lm", "norm.recompute=true", "trainer.strategy=fully_shard"],
            "norm.recompute with trainer.strategy=fully_shard",
        ),
        pytest.param(
            ["norm.backend=triton"],
            "norm.backend=triton cannot run on cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it can run here"),
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_be_had_is_one_line_and_nothing_is_written(
    tokens: list[str], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*SHORT, *tokens, "run.dir=a"]) == 2
    errors = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error")]
    assert len(errors) == 1
    assert says in errors[0]
    assert not Path("a").exists()
