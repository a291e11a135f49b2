"""timm and transformers as references: same loss and gradients, what is refused, the grid beside
them."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import suite.reference
import tasks.language.reference
import tasks.vision.reference
from suite import bench
from suite.benches import step_grid
from suite.benches.peers import published_norm, reference_of
from suite.config import load
from suite.errors import ConfigError
from suite.reference import Pair, measure, our_loss

VIT = [
    "task=vision/classify",
    "model.dim=16",
    "model.depth=2",
    "model.heads=2",
    "trainer.accelerator=cpu",
]
LM = [
    "task=language/lm",
    "model.dim=16",
    "model.depth=2",
    "model.heads=2",
    "model.hidden_dim=24",
    "data.length=12",
    "trainer.accelerator=cpu",
]
LLAMA = [*LM, "model=llama_tiny", "model.kv_heads=1", "norm=rmsnorm"]
GPT2 = [*LM, "model=gpt2_tiny", "norm=layernorm"]
SIDES = {
    "avg": [*VIT, "norm=layernorm", "task.label_smoothing=0.1", "model.dropout=0.1"],
    "cls": [*VIT, "norm=layernorm", "model.pool=cls", "model.class_token=true"],
    "qk": [*VIT, "norm=layernorm", "model.qk_norm=true", "model.qkv_bias=false"],
    "llama": LLAMA,
    "llama tied": [*LLAMA, "model.tie_head=true", "model.vocab_size=300", "model.rope_theta=500"],
    "gpt2": [*GPT2, "model.dropout=0.1", "data.documents=mask"],
    "gpt2 exact": [*GPT2, "model.gelu=exact", "model.tie_head=false"],
}


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suite.reference, "ROUND_SECONDS", 0.01)
    monkeypatch.setattr(suite.reference, "WARMUP", 1)
    monkeypatch.setattr(step_grid, "SLICE_SECONDS", 0.0)
    monkeypatch.setattr(step_grid, "WARMUP", 1)
    torch.set_num_threads(1)


def library_of(tokens: list[str]) -> None:
    pytest.importorskip("timm" if tokens[0] == VIT[0] else "transformers")


def pair(tokens: list[str]) -> Pair:
    library_of(tokens)
    torch.manual_seed(0)
    config = load(tokens).settled
    return Pair(reference_of(config.task_name).settle(config), rows=3, seconds=None)


@pytest.mark.parametrize("tokens", SIDES.values(), ids=list(SIDES))
def test_both_sides_have_the_same_loss_and_gradient(tokens: list[str]) -> None:
    both = pair(tokens)
    ours = our_loss(both.module, both.batch)
    theirs = both.reference.loss(both.model, both.module, both.batch)()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert ours.item() > 0.5
    ours.backward()
    theirs.backward()

    def norm(model: Any) -> float:
        return torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()

    assert norm(both.module.model) == pytest.approx(norm(both.model), rel=1e-4)


@pytest.mark.parametrize("kind", ["cls", "llama", "gpt2"])
def test_both_sides_have_as_many_parameters(kind: str) -> None:
    both = pair(SIDES[kind])
    ours, theirs = (
        sum(p.numel() for p in model.parameters()) for model in (both.module.model, both.model)
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("tokens", "norm"), [(VIT, "layernorm"), (LLAMA, "rmsnorm"), (GPT2, "layernorm")]
)
def test_a_reference_says_which_norm_it_has(tokens: list[str], norm: str) -> None:
    library_of(tokens)
    assert published_norm(load(tokens).settled) == norm


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([*VIT, "norm=dyt"], "norm=dyt: timm"),
        ([*VIT, "norm=layernorm", "norm.eps=1e-3"], "norm.eps"),
        ([*VIT, "norm=layernorm", "norm.by_site={final: dyt}"], "norm.by_site"),
        ([*LLAMA, "norm.bias=true"], "norm.bias"),
        ([*GPT2[:-1], "norm=rmsnorm"], "norm=rmsnorm: transformers"),
        ([*GPT2, "model.bias=false"], "model.bias=false"),
        ([*VIT[:1], "model=convnext_tiny", "norm=layernorm"], "model=convnext_tiny"),
    ],
)
def test_what_they_have_not_is_refused(tokens: list[str], said: str) -> None:
    library_of(tokens)
    config = load(tokens).settled
    with pytest.raises(ConfigError, match=said.replace(".", "\\.")):
        reference_of(config.task_name).settle(config)


@pytest.mark.parametrize("tokens", [VIT, LLAMA], ids=["vision", "language"])
@pytest.mark.parametrize(
    ("more", "said"),
    [(["seconds=2"], "length of audio"), (["rows=9999999"], "take fewer rows")],
)
def test_a_batch_that_cannot_be_is_one_line(
    tokens: list[str], more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    library_of(tokens)
    assert bench.main(["reference", *tokens, *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize("tokens", [VIT, LLAMA[:-1]], ids=["vision", "language"])
def test_reference_times_them_with_the_norm_that_they_have(
    tokens: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    library_of(tokens)
    monkeypatch.setattr(suite.reference, "alone", lambda *_, **__: 100)
    assert bench.main(["reference", *tokens, "rows=3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["norm"] == ("layernorm" if tokens is VIT else "rmsnorm")
    assert (found["rows"], found["seconds"], len(found["rounds"])) == (3, None, 5)
    assert found["loss"]["ours"] == pytest.approx(found["loss"]["theirs"], rel=1e-5)


def test_text_of_a_batch_that_is_no_audio_says_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    monkeypatch.setattr(suite.reference, "alone", lambda *_, **__: 100)
    config = load([*VIT, "norm=layernorm"]).settled
    line = measure(config, rounds=2, rows=3, seconds=None).to_text().splitlines()[0]
    assert "layernorm, 3 examples, cpu" in line


@pytest.mark.parametrize("tokens", [VIT, LM], ids=["vision", "language"])
def test_a_grid_holds_the_peer_and_the_ratios_to_it(
    tokens: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    library_of(tokens)
    argv = [*tokens, "norm=layernorm,dyt", "data.batch_size=2", "rounds=5", "steps=1", "--peer"]
    assert bench.main(["step", *argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [cell["norm"] for cell in found["cells"][:2]] == ["layernorm", "dyt"]
    theirs = found["cells"][2]
    assert theirs["peer"] == found["peer"]
    assert theirs["norm"] == ("layernorm" if tokens is VIT else "rmsnorm")
    ratios = [a / b for a, b in zip(found["cells"][1]["seconds"], theirs["seconds"], strict=True)]
    assert found["cells"][1]["ratio_to_peer"]["median"] == sorted(ratios)[2]
    assert any("log" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("tokens", "package", "said"),
    [
        (VIT, "timm", r'pip install "dyt-suite\[timm\]"'),
        (LLAMA, "transformers", "pip install trans"),
    ],
)
def test_without_the_package_it_says_what_to_install(
    tokens: list[str], package: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=said):
        reference_of(load(tokens).settled.task_name)


@pytest.mark.parametrize("package", ["timm", "transformers"])
def test_the_tasks_are_there_without_the_packages(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    module: Any = tasks.vision.reference if package == "timm" else tasks.language.reference
    assert any(name.endswith("Reference") for name in runpy.run_path(str(module.__file__)))
