"""`python -m suite.bench step`: the cells, that ratios are paired, what it prints and refuses."""

from __future__ import annotations

import gc
import json
import random
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from suite import bench
from suite.benches import step_grid
from suite.benches.step import plan
from suite.benches.step_table import Grid, Timed

TINY = [
    "task=vision/classify",
    "model.dim=16",
    "model.depth=1",
    "model.heads=1",
    "data.batch_size=4",
    "trainer.accelerator=cpu",
]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(step_grid, "SLICE_SECONDS", 0.0)
    monkeypatch.setattr(step_grid, "WARMUP", 1)
    torch.set_num_threads(1)


def names(*tokens: str) -> list[tuple[str, str | None, str, str]]:
    return [(c.norm, c.backend, c.compile, c.precision) for c in plan([*TINY, *tokens])]


# -- the grid --------------------------------------------------------------------------------------


def test_the_grid_is_the_product_of_the_lists() -> None:
    found = names(
        *("norm=identity,dyt", "norm.backend=eager,compile"),
        *("run.compile=false,default", "trainer.precision=32-true,bf16-mixed"),
    )
    norms = [("identity", None), ("dyt", "eager"), ("dyt", "compile")]
    assert found == [
        (*norm, compiled, precision)
        for precision in ("32-true", "bf16-mixed")
        for compiled in ("false", "default")
        for norm in norms
    ]


def test_one_cell_where_nothing_is_a_list() -> None:
    assert names() == [("dyt", "auto", "false", "32-true")]


def test_settings_of_a_norm_are_for_those_that_have_them() -> None:
    cells = plan([*TINY, "norm=layernorm,dyt", "norm.alpha_init=0.75", "norm.eps=1e-3"])
    assert [cells[0].config.norm.eps, cells[1].config.norm.alpha_init] == [1e-3, 0.75]


def test_commas_inside_brackets_make_no_list() -> None:
    (cell,) = plan([*TINY, "norm=dyt", "norm.alpha_init_by_site={attn: 0.8, ffn: 0.2}"])
    assert cell.config.norm.alpha_init_by_site == {"attn": 0.8, "ffn": 0.2}


# -- the table -------------------------------------------------------------------------------------


def timed(norm: str, *seconds: float, **changes: Any) -> Timed:
    made = {"compile": "false", "precision": "32-true", "backend": None, "ran": None}
    given = {"peer": None, "steps": 1, "added": None, "mfu": None}
    return Timed(**{**made, **given, "norm": norm, "seconds": list(seconds), **changes})


def grid(*cells: Timed, **changes: Any) -> Grid:
    given = {"unit": "tokens", "units": 40.0, "examples": 4, "device": torch.device("cpu")}
    config = SimpleNamespace(task_name="a/b", model_name="m", data_name="d")
    rest = {"config": config, "cells": cells, "clock": "wall clock", "warmup": 1, "notes": []}
    return Grid(**{**given, **rest, **changes})


def test_ratios_are_taken_inside_a_round() -> None:
    """A machine that slows down tenfold in the second round changes none of them."""
    found = grid(timed("layernorm", 1.0, 10.0, 1.0), timed("dyt", 2.0, 20.0, 3.0)).to_dict()
    assert found["cells"][1]["ratio_to_baseline"] == {"median": 2.0, "min": 2.0, "max": 3.0}
    assert found["cells"][0]["ratio_to_baseline"] == {"median": 1.0, "min": 1.0, "max": 1.0}


def test_ratios_are_to_the_same_compile_and_precision() -> None:
    half = {"precision": "bf16-mixed"}
    cells = (
        *(timed("layernorm", 1.0), timed("layernorm", 4.0, **half)),
        *(timed("dyt", 2.0), timed("dyt", 2.0, **half)),
        *(timed("dyt", 2.0, compile="default"), timed("layernorm", 8.0, peer="theirs", **half)),
    )
    found = grid(*cells).to_dict()["cells"]
    ratios = [cell["ratio_to_baseline"] and cell["ratio_to_baseline"]["median"] for cell in found]
    assert ratios == [1.0, 1.0, 2.0, 0.5, None, 2.0]
    peers = [cell["ratio_to_peer"] and cell["ratio_to_peer"]["median"] for cell in found]
    assert peers == [None, 0.5, None, 0.25, None, 1.0]


def test_the_table_has_a_line_a_cell_and_no_empty_column() -> None:
    cells = timed("layernorm", 0.5), timed("dyt", 1.0, backend="auto", ran="cpp", mfu=0.25)
    lines = grid(*cells, notes=["a note"]).to_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:6]]
    assert table[0] == [
        *("norm", "backend", "compile", "precision", "ms a step", "examples/s", "tokens/s"),
        *("MFU", "of layernorm"),
    ]
    assert {len(row) for row in table} == {9}
    assert table[3][:2] == ["dyt", "auto (cpp)"]
    assert table[3][4:8] == ["1000.00 (1000.00 to 1000.00)", "4.0", "40.0", "25.0%"]
    assert lines[-1] == "- a note"


# -- measuring -------------------------------------------------------------------------------------


def test_a_grid_is_measured_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    lists = ["norm=layernorm,dyt", "trainer.precision=32-true,bf16-mixed"]
    assert bench.main(["step", *TINY, *lists, "rounds=5", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert (found["bench"], found["examples"], found["units"]) == ("step", 4, 4.0)
    assert [(c["norm"], c["precision"]) for c in found["cells"]] == [
        *(("layernorm", "32-true"), ("dyt", "32-true")),
        *(("layernorm", "bf16-mixed"), ("dyt", "bf16-mixed")),
    ]
    for cell in found["cells"]:
        assert len(cell["seconds"]) == 5
        assert min(cell["seconds"]) > 0
        assert cell["mfu"] is None
    assert captured.err.count("round ") == 5
    assert list(Path.cwd().iterdir()) == []


def test_the_old_command_is_a_table_of_one_cell(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["step", *TINY, "steps=2", "rounds=5", "norm=layernorm"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "4 examples a batch, on cpu, 1 thread: medians of 5 rounds" in lines[0]
    assert "process CPU time" in lines[0]
    assert len(lines) == 5
    assert lines[4].startswith("| layernorm ")


def test_it_is_kept_where_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["step", *TINY, "rounds=5", "steps=1", "--save"]) == 0
    assert "saved: benchmarks" in capsys.readouterr().err
    (page,) = Path.cwd().glob("benchmarks/*/step-vision-classify-vit_fmnist.md")
    assert "python -m suite.bench step task=vision/classify" in page.read_text(encoding="utf-8")
    kept = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert kept["cells"][0]["norm"] == "dyt"


def test_a_cell_that_fails_is_left_out_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: Any, **__: Any) -> None:
        raise RuntimeError("\nno C++ compiler\nand much more")

    monkeypatch.setattr(torch.nn.Module, "compile", no_compiler)
    cells = plan([*TINY, "norm=layernorm", "run.compile=default,false"])
    found = step_grid.measure(cells, rounds=2, steps=1)
    assert [cell.compile for cell in found.cells] == ["false"]
    assert found.notes == [f"left out: {cells[0].name}: RuntimeError: no C++ compiler"]
    assert cells[0].name.endswith(", compile default, 32-true")
    with pytest.raises(step_grid.DataError, match=r"no cell runs.*no C\+\+ compiler"):
        step_grid.measure(cells[:1], rounds=2, steps=1)


def test_a_mistake_of_every_cell_is_the_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    tokens = ["task=language/lm", "trainer.accelerator=cpu", "data.batch_size=2", "norm=batchnorm"]
    assert bench.main(["step", *tokens]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "look across positions" in line


def test_a_cell_that_fails_leaves_no_model_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[Any]] = []

    def no_memory(loop: Any, **_: Any) -> None:
        held.append(weakref.ref(loop.side.model))
        raise torch.OutOfMemoryError("out of memory") from ValueError("inside")

    monkeypatch.setattr(step_grid, "warm_up", no_memory)
    cells = plan([*TINY, "norm=layernorm,dyt"])
    batch = step_grid.batch_of(cells[0].config, peer=None)
    with pytest.raises(step_grid.DataError, match="no cell runs"):
        step_grid.start(cells, batch=batch, peer=None, steps=1)
    gc.collect()
    assert len(held) == 2
    assert [ref() for ref in held] == [None, None]


def test_memory_that_cannot_be_measured_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(*_: Any, **__: Any) -> int:
        raise step_grid.BrokenProcessPool("ended abruptly")

    monkeypatch.setattr(step_grid, "added_alone", ended)
    cells = plan([*TINY, "norm=layernorm"])
    found = step_grid.measure(cells, rounds=2, steps=1, extras=["memory"])
    assert found.cells[0].added is None
    assert found.notes[-1].endswith("not known, BrokenProcessPool: ended abruptly")


def test_cells_start_from_the_same_weights_and_batch() -> None:
    cells = plan([*TINY, "norm=layernorm,dyt"])
    batch = step_grid.batch_of(cells[0].config, peer=None)
    ours = [step_grid.build_loop(cell, batch=batch, peer=None).side for cell in cells]
    weights = [dict(side.model.named_parameters()) for side in ours]
    shared = [name for name in weights[0] if "norm" not in name]
    assert len(shared) > 5
    for name in shared:
        assert torch.equal(weights[0][name], weights[1][name])


def test_steps_leave_the_weights_where_they_were() -> None:
    cell = plan(TINY)[0]
    batch = step_grid.batch_of(cell.config, peer=None)
    loop = step_grid.build_loop(cell, batch=batch, peer=None)
    before = [p.detach().clone() for p in loop.side.model.parameters()]
    step_grid.take_turns([loop], rounds=2, order=random.Random(0))
    assert len(loop.seconds) == 2
    for old, new in zip(before, loop.side.model.parameters(), strict=True):
        torch.testing.assert_close(old, new.detach(), rtol=0, atol=1e-6)
        assert new.grad is not None


def test_gradients_are_clipped_where_that_is_asked_for() -> None:
    cell = plan([*TINY, "trainer.gradient_clip_val=1e-4"])[0]
    loop = step_grid.build_loop(cell, batch=step_grid.batch_of(cell.config, peer=None), peer=None)
    loop.side.step()
    grads = [p.grad for p in loop.side.model.parameters() if p.grad is not None]
    assert torch.nn.utils.get_total_norm(grads).item() == pytest.approx(1e-4, rel=1e-3)


def test_operations_that_are_counted_are_those_of_the_products() -> None:
    """One product of [4, 16] and [16, 10], forward and for both gradients."""
    module = SimpleNamespace(layer=torch.nn.Linear(16, 10), saving=nullcontext())
    x = torch.ones(4, 16, requires_grad=True)
    module.step = lambda batch, split: SimpleNamespace(
        loss_sum=module.layer(batch["x"]).sum(), count=1
    )
    assert step_grid.counted_flops(module, {"x": x}) == 3 * 2 * 4 * 16 * 10


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (["norm=dyt,dytt"], "Did you mean norm=dyt?"),
        (["norm=dyt,"], "empty value"),
        (["norm=dyt,dyt"], "named twice"),
        (["norm=dyt", "norm=derf"], "given twice"),
        (["run.compile=true,default"], "stands in the grid twice"),
        (["run.compile=fast"], "run.compile=fast"),
        (["norm=layernorm,dyt", "norm.backend=slow"], "norm.backend=slow"),
        (["norm=identity", "norm.alpha_init=1"], "alpha_init"),
        (["trainer.precision=64-true"], "suite.bench step takes 32-true or bf16-mixed"),
        (["trainer.accumulate_grad_batches=2"], "trainer.accumulate_grad_batches"),
        (["rounds=4"], "rounds=4"),
        (["steps=0"], "steps=0"),
        (["rounds=5", "rounds=6"], "twice"),
        (["seconds=3"], "add --peer"),
        (["--peers"], "--peers"),
        (["--dry-run"], "suite.bench step times training"),
        (["task=vision/mae", "--peer"], "--peer: task=vision/mae"),
        (["model=convnext_tiny", "--peer"], "--peer: model=convnext_tiny"),
        (["--peer", "seconds=3"], "length of audio"),
    ],
)
def test_mistakes_are_one_line(
    tokens: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--peer" in tokens:
        pytest.importorskip("timm")
    assert bench.main(["step", "trainer.accelerator=cpu", *tokens]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert said in line
